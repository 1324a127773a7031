"""Tiny random models of every architecture in compress.arch.ARCHS: 2 blocks, 64 wide, 256 tokens. No download.

`TINY[name]()` makes a config, `tiny_model(name)` a model whose activations look like something (weights scaled by
fan-in, norms and biases off their defaults), `save_tiny(name, folder)` a checkpoint with a byte-level tokenizer.
"""
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

COMMON = dict(vocab_size=256, bos_token_id=0, eos_token_id=0, pad_token_id=0)
NEOX = dict(COMMON, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=256)
LLAMA = dict(NEOX, num_key_value_heads=2)
# Heads wider than hidden / heads; block 0 has a window shorter than any test sequence, so the two blocks' masks differ.
GEMMA = dict(LLAMA, intermediate_size=96, head_dim=32, query_pre_attn_scalar=32, sliding_window=8,
             layer_types=["sliding_attention", "full_attention"])
OPT = dict(COMMON, hidden_size=64, word_embed_proj_dim=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
           max_position_embeddings=256)
FALCON = dict(COMMON, hidden_size=64, ffn_hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
              max_position_embeddings=256)
MIXTRAL = dict(LLAMA, num_local_experts=4, num_experts_per_tok=2)
QWEN3_MOE = dict(LLAMA, head_dim=32, moe_intermediate_size=96, num_experts=4, num_experts_per_tok=3,
                 mlp_only_layers=[0])  # block 0 is dense


def _config(model_type: str, **fields) -> Callable[[], PreTrainedConfig]:
    return lambda: CONFIG_MAPPING[model_type](**fields)


TINY: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _config("llama", **LLAMA),
    "mistral": _config("mistral", **LLAMA, sliding_window=None),
    "qwen2": _config("qwen2", **LLAMA, tie_word_embeddings=True),
    "qwen3": _config("qwen3", **LLAMA, head_dim=32),
    "gemma2": _config("gemma2", **GEMMA),
    "gemma3": _config("gemma3_text", **GEMMA),
    "phi3": _config("phi3", **LLAMA),
    "opt": _config("opt", **OPT),
    "gpt2": _config("gpt2", **COMMON, n_embd=64, n_inner=128, n_layer=2, n_head=4, n_positions=256),
    "gpt_neox": _config("gpt_neox", **NEOX),
    "bloom": _config("bloom", **COMMON, hidden_size=64, n_layer=2, n_head=4),
    "falcon": _config("falcon", **FALCON),  # as falcon-7b: multi-query, one norm for attention and MLP in parallel
    "falcon_40b": _config("falcon", **FALCON, new_decoder_architecture=True, num_kv_heads=2),  # two norms in parallel
    "falcon_rw": _config("falcon", **FALCON, parallel_attn=False, multi_query=False, alibi=True, bias=True),
    "mixtral": _config("mixtral", **MIXTRAL),
    "qwen3_moe": _config("qwen3_moe", **QWEN3_MOE),
    "olmo2": _config("olmo2", **LLAMA),
}


def tiny_model(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Random, in eval mode; the same for the same seed up to rounding to `dtype`. Leaves the global generator alone."""
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(TINY[name](), dtype=dtype).eval()
    transposed = {id(m.weight) for m in model.modules() if isinstance(m, Conv1D)}  # [in, out]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() == 1:  # around the default: 1 for a norm, 0 for a bias or a gemma norm
                p += (0.2 * noise).to(dtype)
            else:
                p.copy_(noise * p.shape[0 if id(p) in transposed else -1] ** -0.5)
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token id = byte, no merges, byte 0 for every special token. ByteLevel writes a byte as chr(byte) where that
    prints and as chr(256 + n), n counting up, where it does not."""
    prints, spare = {*range(33, 127), *range(161, 173), *range(174, 256)}, count(256)
    vocab = {chr(byte if byte in prints else next(spare)): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    # unk too: AutoTokenizer loads a class of its own for qwen2, which would add the one it misses as token 256
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), chr(256))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def save_tiny(name: str, folder: str | Path, dtype: torch.dtype = torch.bfloat16,
              max_shard_size: str | int | None = None) -> PreTrainedModel:
    """Write a checkpoint as transformers does (experts under their per-expert names); returns the model written."""
    model = tiny_model(name, dtype=dtype)
    model.save_pretrained(folder, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
    byte_tokenizer().save_pretrained(folder)
    return model
