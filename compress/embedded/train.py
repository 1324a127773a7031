"""Train the embedded model from nothing but this Python: `python -m compress.embedded.train --minutes 15`.

`--architecture opt --out FOLDER` trains a model of another kind on the same text (LayerNorm, biases, learned positions, ReLU:
OPT, arXiv 2205.01068), to see whether what holds for the one holds for the other.

A byte-level BPE and a Llama (arXiv 2302.13971: RMSNorm, RoPE, SwiGLU) on the standard library's sources. Weights and
AdamW's state stay fp32; autocast runs the GEMMs in bf16, about seven times faster on an AVX512-BF16 core; the saved
weights are rounded to bf16 once. The clock only chooses the number of steps, during warm-up, so `--steps N` with the
same OMP_NUM_THREADS repeats a run byte for byte.

On a shared machine set OMP_NUM_THREADS to the idle cores, or OMP_WAIT_POLICY=PASSIVE: threads that spin while a sibling
is descheduled burnt two thirds of the CPU time (a step took 0.93 CPU seconds with two threads on two busy cores, 0.30
with one or with passive waiting).
"""
import argparse
import json
import math
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedModel, PreTrainedTokenizerFast

from compress.embedded import model_path
from compress.embedded.corpus import HELDOUT_PERCENT, stdlib_documents

WINDOW, BATCH, WARMUP = 512, 4, 100
PEAK_LR, WEIGHT_DECAY, CLIP, SEED = 2e-3, 0.1, 1.0, 0
END = "<|endoftext|>"       # token 0: starts every document, ends the last

CONFIG = LlamaConfig(       # every width is a multiple of 128, the usual quantization group
    vocab_size=4096, hidden_size=256, intermediate_size=640, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=1024, tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, bos_token_id=0, eos_token_id=0,
    attn_implementation="eager")    # compiled, a step is 11 % faster than with SDPA's CPU flash; not saved
CONFIGS = {"llama": CONFIG, "opt": OPTConfig(
    vocab_size=4096, hidden_size=256, ffn_dim=1024, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=1024,
    word_embed_proj_dim=256, dropout=0.0, activation_function="relu", pad_token_id=0, bos_token_id=0, eos_token_id=0,
    attn_implementation="eager")}


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: 256 bytes, END and merges, so any text round-trips exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(documents, trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END,
                                   clean_up_tokenization_spaces=False, model_max_length=CONFIG.max_position_embeddings)


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Tensor:
    """All documents as one stream, END before each and after the last."""
    stream = [0]
    for encoding in tokenizer.backend_tokenizer.encode_batch(documents):
        stream += [*encoding.ids, 0]
    return torch.tensor(stream)     # [tokens] int64


@torch.no_grad()
def loss_on(model: torch.nn.Module, stream: Tensor, windows: int | None = None) -> float:
    """Mean next-token loss (nats) over `windows` disjoint windows spread evenly over the stream, or all of them."""
    total, count = 0.0, 0
    every = stream.unfold(0, WINDOW + 1, WINDOW)        # [windows, WINDOW + 1]
    for window in every[::max(1, len(every) // (windows or len(every)))][:windows].split(BATCH):
        logits = model(window[:, :-1], use_cache=False).logits.float()
        total += F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum").item()
        count += window[:, 1:].numel()
    return total / count


def batches(stream: Tensor, generator: torch.Generator):
    """Endless [BATCH, WINDOW + 1] batches; each epoch cuts the stream at another offset and shuffles the windows."""
    while True:
        offset = int(torch.randint(WINDOW, (), generator=generator))
        windows = stream[offset:].unfold(0, WINDOW + 1, WINDOW)
        order = torch.randperm(len(windows), generator=generator)
        for index in order[:len(order) // BATCH * BATCH].split(BATCH):     # whole batches: a ragged one recompiles
            yield windows[index]


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    progress = max(step - WARMUP, 0) / max(steps - WARMUP, 1)
    return PEAK_LR * min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * progress))


def train(model: PreTrainedModel, stream: Tensor, heldout: Tensor, minutes: float, steps: int | None) -> int:  # type: ignore[return]
    """Train in place and return the number of steps."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=WEIGHT_DECAY), dict(params=vectors, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)

    @torch.compile
    def loss_of(window: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(window[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())

    start, smooth = time.perf_counter(), math.log(CONFIG.vocab_size)
    for step, window in enumerate(batches(stream, torch.Generator().manual_seed(SEED))):
        if step == 10:
            after_compile = time.perf_counter()
        if step == WARMUP // 2 and steps is None:
            now = time.perf_counter()
            steps = max(WARMUP, step + int((start + minutes * 60 - now) * (step - 10) / (now - after_compile)))
            print(f"{minutes:g} minutes are {steps} steps here: --steps {steps} repeats this run", flush=True)
        if step == steps:
            return steps
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps or 2 * WARMUP)      # warm-up is the same whatever steps will be
        loss = loss_of(window)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        smooth += (loss.item() - smooth) * max(0.02, 1 / (step + 1))
        if step % 200 == 199 and steps:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                val = loss_on(model, heldout, 16)
            rate = (step - 9) / (time.perf_counter() - after_compile)
            print(f"step {step + 1}/{steps}  train {smooth:.4f}  val {val:.4f}  grad {norm:.2f}  lr {group['lr']:.2e}  "
                  f"{rate * BATCH * WINDOW:.0f} tok/s  ETA {(steps - step - 1) / rate / 60:.1f} min", flush=True)


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [{architecture}, python, fixture, compression]
---
# compress embedded model

A {parameters:,}-parameter {name} that writes something like Python. It is a fixture: the default model of `compress`,
small enough to travel inside the package ({megabytes:.2f} MB with its tokenizer), large enough that quantization,
pruning and low-rank error show up in its perplexity. Use it to try and test compression offline. Do not use it to
write code.

- **Architecture**: {name}, {layers} blocks, hidden {hidden}, intermediate {intermediate},
  {heads} query / {kv} key-value heads of {head_dim}, tied embeddings, bf16.
- **Tokenizer**: byte-level BPE, {vocab} tokens, trained on the same modules; no normalizer, every text round-trips.
- **Data**: standard library of Python {python}: {train_modules} modules, {train_tokens:,} tokens; held out:
  {heldout_modules} modules, {heldout_tokens:,} tokens.
- **Training**: {steps} steps of {batch} x {window} tokens = {tokens_seen:,} tokens ({epochs:.1f} epochs), {minutes:.1f}
  minutes with OMP_NUM_THREADS={threads}, torch {torch}, transformers {transformers}.
- **Optimizer**: AdamW, peak {lr:g}, {warmup} steps of warm-up, cosine to 0, weight decay {decay:g}, clip {clip:g},
  seed {seed}; fp32 master weights, bf16 autocast.
- **Held-out perplexity: {perplexity:.3f}** ({loss:.4f} nats a token, {bits_per_byte:.3f} bits a byte;
  windows of {window}, saved bf16 weights, fp32 arithmetic). On {train_windows} windows of the training modules:
  {train_perplexity:.3f}.

Made with

    OMP_NUM_THREADS={threads} python -m compress.embedded.train --steps {steps}{option}

`compress/embedded/corpus.py` names the modules: the ones a SHA-256 of the path holds out ({percent} in 100) were seen
by neither the model nor the tokenizer. Tests, generated tables (`encodings`, `pydoc_data`) and build settings are left
out.

## Limits

It has read one code base, and may repeat pieces of it verbatim. Contexts up to {window} tokens were trained; positions
up to {positions} are allowed and untested.

## License

Weights, tokenizer files and this card: Apache-2.0. Trained on sources distributed under the Python Software Foundation
License, Version 2.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m compress.embedded.train",
                                     description="Train the embedded model on the standard library.")
    parser.add_argument("--minutes", type=float, default=15, help="training time: decides the steps, during warm-up")
    parser.add_argument("--steps", type=int, help="train this many steps instead: repeats a run at any speed")
    parser.add_argument("--architecture", choices=sorted(CONFIGS), default="llama", help="the embedded model is a llama")
    parser.add_argument("--out", type=Path, help="folder to write; without it the llama is written over the embedded model")
    args = parser.parse_args()
    if args.out is None and args.architecture != "llama":
        parser.error(f"--architecture {args.architecture} needs --out: the embedded model is a llama")
    out, config = args.out or model_path(), CONFIGS[args.architecture]

    torch.manual_seed(SEED)
    documents, held = list(stdlib_documents("train").values()), list(stdlib_documents("heldout").values())
    tokenizer = train_tokenizer(documents)
    stream, heldout = encode(tokenizer, documents), encode(tokenizer, held)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=config._attn_implementation)
    print(f"{model.num_parameters():,} parameters, {len(stream):,} training tokens, {len(heldout):,} held out, "
          f"{sum(map(len, documents)) / len(stream):.2f} characters a token", flush=True)
    start = time.perf_counter()
    steps = train(model, stream, heldout, args.minutes, args.steps)
    minutes = (time.perf_counter() - start) / 60

    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    weights, vocabulary = out / "model.safetensors", out / "tokenizer.json"
    compact = json.dumps(json.loads(vocabulary.read_text("utf-8")), ensure_ascii=False, separators=(",", ":"))
    vocabulary.write_text(compact, "utf-8")
    saved = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    loss, train_loss = loss_on(saved, heldout), loss_on(saved, stream, windows := 256)
    (out / "README.md").write_text(CARD.format(
        parameters=saved.num_parameters(), megabytes=(weights.stat().st_size + vocabulary.stat().st_size) / 1e6,
        name=type(saved).__name__, architecture=args.architecture,
        option="" if args.architecture == "llama" else f" --architecture {args.architecture} --out FOLDER",
        layers=config.num_hidden_layers, hidden=config.hidden_size, heads=(heads := config.num_attention_heads),
        kv=getattr(config, "num_key_value_heads", heads), head_dim=getattr(config, "head_dim", config.hidden_size // heads),
        intermediate=getattr(config, "intermediate_size", getattr(config, "ffn_dim", None)),
        vocab=config.vocab_size, positions=config.max_position_embeddings,
        python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__,
        threads=torch.get_num_threads(), train_modules=len(documents), heldout_modules=len(held),
        percent=HELDOUT_PERCENT, train_tokens=len(stream), heldout_tokens=len(heldout), steps=steps,
        batch=BATCH, window=WINDOW, tokens_seen=steps * BATCH * WINDOW, epochs=steps * BATCH * WINDOW / len(stream),
        minutes=minutes, lr=PEAK_LR, warmup=WARMUP, decay=WEIGHT_DECAY, clip=CLIP, seed=SEED,
        loss=loss, perplexity=math.exp(loss),
        bits_per_byte=loss / math.log(2) * len(heldout) / sum(len(text.encode()) for text in held),
        train_windows=windows, train_perplexity=math.exp(train_loss)), "utf-8")
    print(f"{steps} steps, {minutes:.1f} min, held-out perplexity {math.exp(loss):.3f}, "
          f"training {math.exp(train_loss):.3f} -> {out}")


if __name__ == "__main__":
    main()
