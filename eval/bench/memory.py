"""python -m compress.eval.bench.memory [--folder DIR] [--blocks 22] [--trace]: how much RAM does `compress run` take on a 1.1B model?

A random Llama of TinyLlama-1.1B's shape (2.2 GB in bf16, one safetensors file a block) goes through w4-gptq with 16 windows of 512 tokens in a
process of its own. Reported is that process's VmHWM, the most that was ever resident, above the VmHWM of one that only imports torch and
transformers. Mapped pages of weight files count as long as they are mapped. The checkpoint is built once and kept in DIR.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

import compress

SHAPE = dict(hidden_size=2048, intermediate_size=5632, num_attention_heads=32, num_key_value_heads=4, vocab_size=32000,
             max_position_embeddings=2048, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False)  # fmt: skip
TARGET = 1.2e9  # bytes above the imports
PEAK = "next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM'))"  # kB; ru_maxrss would count the parent's
IMPORTS = f"import torch, transformers\nprint({PEAK})"
RUN = f"from compress.cli import main\ntry:\n main()\nfinally:\n print({PEAK})"


def shards(blocks: int) -> Iterator[dict[str, torch.Tensor]]:
    """The model's tensors file by file: embedding, blocks, norm and head. Random, scaled by fan-in, the same every time."""
    generator = torch.Generator().manual_seed(0)
    d, m, kv, v = SHAPE["hidden_size"], SHAPE["intermediate_size"], 64 * SHAPE["num_key_value_heads"], SHAPE["vocab_size"]
    weight = lambda out, n: torch.randn(out, n, generator=generator).mul_(n**-0.5).to(torch.bfloat16)
    ones = lambda: torch.ones(d, dtype=torch.bfloat16)
    yield {"model.embed_tokens.weight": weight(v, d)}
    linears = {"self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, d),
               "mlp.gate_proj": (m, d), "mlp.up_proj": (m, d), "mlp.down_proj": (d, m)}  # fmt: skip
    for i in range(blocks):
        tensors = {f"{name}.weight": weight(*shape) for name, shape in linears.items()}
        tensors |= {"input_layernorm.weight": ones(), "post_attention_layernorm.weight": ones()}
        yield {f"model.layers.{i}.{name}": t for name, t in tensors.items()}
    yield {"model.norm.weight": ones(), "lm_head.weight": weight(v, d)}


def build(folder: Path, blocks: int) -> Path:
    """The checkpoint, written one file at a time and renamed when whole; found again the next time."""
    made = folder / f"random-llama-{blocks}x2048"
    if made.is_dir():
        return made
    part = Path(tempfile.mkdtemp(dir=folder))
    where = {}
    for i, tensors in enumerate(shards(blocks)):
        save_file(tensors, part / f"model-{i:05d}.safetensors", metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, f"model-{i:05d}.safetensors")
    (part / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    LlamaConfig(**SHAPE, num_hidden_layers=blocks, architectures=["LlamaForCausalLM"], dtype="bfloat16").save_pretrained(part)
    add_text(part)
    return part.rename(made)


def add_text(part: Path) -> None:
    """A tokenizer of bytes, and text to calibrate on."""
    bytes_ = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    bytes_.pre_tokenizer, bytes_.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytes_).save_pretrained(part)
    (part / "calibration.txt").write_text(Path(argparse.__file__).read_text())  # 99 kB of text that every machine has


def peak(code: str, *argv: str) -> tuple[int, list[tuple[str, float, int, int]]]:
    """VmHWM in bytes of a Python that runs `code`; and (line of progress, seconds, most anonymous, most mapped bytes up to it)."""
    root = str(Path(compress.__file__).parent.parent)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    with tempfile.TemporaryFile("w+") as out, tempfile.NamedTemporaryFile() as written, open(written.name) as err:
        child = subprocess.Popen([sys.executable, "-c", code, *argv], stdout=out, stderr=written, env=env)
        began, stages, anonymous, mapped, last = time.perf_counter(), [], 0, 0, ""
        while child.poll() is None:
            try:
                status = dict(line.split(":", 1) for line in Path(f"/proc/{child.pid}/status").read_text().splitlines())
                now = [int(status[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile")]
            except (OSError, KeyError):  # it has ended
                break
            if sum(now) > anonymous + mapped:
                anonymous, mapped = now
            while line := err.readline():
                stages.append((line.strip(), time.perf_counter() - began, anonymous, mapped))
                anonymous = mapped = 0
                last = line
            time.sleep(0.005)
        stages.append(("end", time.perf_counter() - began, anonymous, mapped))
        if child.wait():
            sys.exit(f"the run failed with exit code {child.returncode}: {last or err.read()}")
        out.seek(0)
        return int(out.read().split()[-1]) * 1024, stages


def main(folder: Path, blocks: int, samples: int, seqlen: int, recipe: str, trace: bool) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    model, out = build(folder, blocks), folder / "out"
    weights = sum(f.stat().st_size for f in model.glob("*.safetensors"))
    imports, _ = peak(IMPORTS)
    for old in (out, Path(f"{out}.log.jsonl")):
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    used, stages = peak(RUN, "run", str(model), "-r", recipe, "-c", f"file:{model / 'calibration.txt'}", "-o", str(out), "--samples", str(samples),
                        "--seqlen", str(seqlen))  # fmt: skip
    if trace:
        for line, seconds, anonymous, mapped in stages:
            print(f"{seconds:7.1f} s  {anonymous / 1e6:6.0f} MB anonymous {mapped / 1e6:6.0f} MB mapped, up to: {line[:100]}")
    line, seconds, anonymous, mapped = max(stages, key=lambda s: s[2] + s[3])
    planned = compress.plan(str(model), recipe, samples=samples, seqlen=seqlen).peak_ram
    print(f"{model.name}: {weights / 1e9:.2f} GB of weights, {recipe}, {samples}×{seqlen} tokens, {os.environ.get('OMP_NUM_THREADS', 'all')} threads, "
          f"torch {torch.__version__}: {stages[-1][1]:.0f} s\n"
          f"imports {imports / 1e6:.0f} MB, run {used / 1e6:.0f} MB, above the imports {(used - imports) / 1e6:.0f} MB "
          f"(target {TARGET / 1e6:.0f}, planned {planned / 1e6:.0f})\n"
          f"largest at {seconds:.0f} s, before `{line[:60]}`: {anonymous / 1e6:.0f} MB anonymous, {mapped / 1e6:.0f} MB mapped")  # fmt: skip
    return int(used - imports > TARGET)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "compress-memory", help="where the checkpoint is kept")
    parser.add_argument("--blocks", type=int, default=22)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--recipe", default="w4-gptq")
    parser.add_argument("--trace", action="store_true", help="print the most that was resident up to every line of progress")
    sys.exit(main(**vars(parser.parse_args())))
