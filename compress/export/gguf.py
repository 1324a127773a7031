"""GGUF: one file for llama.cpp and what is built on it, through the `gguf` library (pip install gguf).

ggml's plain types are blocks of 32 weights along a row: Q4_0, Q5_0 and Q8_0 hold d·k with d fp16 and k a signed integer of 4, 5 or 8 bits. Our
(q − z)·s is exactly that with k = q − z, whatever group of a multiple of 32 it came from: a layer takes the smallest type whose range holds
q − z, so nothing is rounded, zero points included. (Q4_1's d·q + m would need −z·s in fp16, which has 12 bits where fp16 has 11.) Layers that
no block type holds are multiplied out in the model's own dtype, and a note says so. The rows of q and k are permuted as llama.cpp's rotary
embedding wants them; rows permute without rounding.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..artifact import PROBE
from ..errors import CompressError
from ..formats import Format, IntGroup, build, packing
from ..formats.int_group import symmetric_zero
from .base import Export, Layers, Refusal, Source, fits_half

ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}  # model_type → gguf.MODEL_ARCH
OFFSET = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}  # ggml type → o, where k lies in −o … o − 1
FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# How a byte-level tokenizer cuts text before it merges → llama.cpp's name of it. The first is what tokenizers' ByteLevel does by itself.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {GPT2: "gpt-2", QWEN2: "qwen2", QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|"): "llama-bpe"}


class GGUF(Export):
    def refusals(self, source: Layers) -> list[Refusal]:
        """None by layer: what no block type holds is stored as floats. Raises CompressError for a model that llama.cpp's names are not known of."""
        if (kind := source.config.model_type) not in ARCHITECTURES:
            raise CompressError(f"gguf: model type {kind} is not mapped to llama.cpp's names here (mapped: {', '.join(ARCHITECTURES)}); use --to dense")
        rope = source.config.rope_parameters["rope_type"]
        if rope not in ("default", "linear", "llama3") or (rope != "default" and ARCHITECTURES[kind] != "LLAMA"):
            raise CompressError(f"gguf: rope type {rope} of a {kind} model is not mapped here; use --to dense and llama.cpp's converter")
        return []

    def widened(self, source: Layers) -> list[str]:
        return [name for name in source.layers if _type(source.peek(name)) is None]

    def write(self, source: Source, folder: Path) -> None:
        gguf = _library()
        arch = gguf.MODEL_ARCH[ARCHITECTURES[source.config.model_type]]
        names = gguf.get_tensor_name_map(arch, source.num_blocks)
        writer = gguf.GGUFWriter(folder / "model.gguf", gguf.MODEL_ARCH_NAMES[arch])
        types = {name: _type(source.peek(name)) for name in source.layers}
        kept = [name for name, kind in types.items() if kind is None]
        if kept:
            source.note(f"stored as {FLOATS[source.model_dtype]}", f"{len(kept)} layers, {kept[0]} first",
                        "no block type of ggml holds their integers, scales (fp16) and groups (multiples of 32) exactly")  # fmt: skip
        for name, kind, shape in (entry for entries in _plan(source, types) for entry in entries):
            if (target := names.get_name(name, try_suffixes=(".weight", ".bias"))) is None:
                raise CompressError(f"gguf: llama.cpp has no name for {name} of a {source.config.model_type} model")
            quant = gguf.GGMLQuantizationType[kind]
            weights, size = gguf.GGML_QUANT_SIZES[quant]
            row = (*shape[:-1], shape[-1] // weights * size)
            writer.add_tensor_info(target, row, np.dtype(np.uint8), int(np.prod(row)), quant)
        if (factors := _rope_factors(source)) is not None:
            source.note("rope scaling as rope_freqs.weight", "model.gguf", "llama.cpp reads it, transformers does not")
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        _metadata(source, writer, gguf, Counter(t or FLOATS[source.model_dtype] for t in types.values()))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entries, (tensors, _) in zip(_plan(source, types), source.shards(), strict=True):
            for name, kind, _ in entries:
                if (layer := name.removesuffix(".weight")) in types:
                    weight = build(source.layers[layer].format, {t: tensors[n] for t, n in source.layers[layer].places(layer).items()})
                    data = _blocks(weight, kind) if kind in OFFSET else weight.dequantize(source.model_dtype).view(torch.uint8)
                else:
                    data = (tensors[name].float() if kind == "F32" else tensors[name]).contiguous().view(torch.uint8)
                writer.write_tensor_data(_permuted(source, name, data).numpy())
        if factors is not None:
            writer.write_tensor_data(factors)
        writer.close()

    def load_line(self, name: str) -> str:
        return f"llama-server -m {name}/model.gguf"


def _library() -> Any:
    try:
        import gguf  # the library, not this file
    except ImportError as error:
        raise CompressError("gguf: the gguf library is not installed; pip install gguf") from error
    return gguf


# ---- tensors


def _type(weight: Format) -> str | None:
    """The smallest ggml type that holds a weight exactly, None where none does."""
    if not isinstance(weight, IntGroup) or weight.group_size % 32 or not fits_half(weight.scales):
        return None
    if weight.levels == 2 or (weight.zeros is not None and weight.zeros.is_floating_point()):
        return None  # zero points between two levels
    if weight.zeros is None:
        zeros = torch.tensor([symmetric_zero(weight.bits_per_code, weight.levels)])
    else:  # of a plan: any may come
        zeros = torch.tensor([0.0, weight.levels - 1]) if weight.zeros.is_meta else weight.zero_points()
    low, high = -float(zeros.max()), weight.levels - 1 - float(zeros.min())
    return next((name for name, o in OFFSET.items() if -o <= low and high <= o - 1), None)


def _blocks(weight: Format, kind: str) -> Tensor:
    """uint8 [out, bytes of a row]: for every 32 weights d as fp16, then their codes."""
    assert isinstance(weight, IntGroup)
    (out, n), o = weight.shape, OFFSET[kind]
    k = weight.unpack().view(out, weight.groups, -1) - weight.zero_points()[:, :, None]
    u = (k + o).to(torch.uint8).view(out, n // 32, 32)  # k + o lies in 0 … 2o − 1
    parts = [weight.scales.half().repeat_interleave(weight.group_size // 32, 1).contiguous().view(torch.uint8).view(out, -1, 2)]
    if kind == "Q8_0":
        parts.append(u ^ 128)  # k + 128 with its top bit turned is k in two's complement
    else:
        if kind == "Q5_0":
            parts.append(packing.pack_bytes((u >> 4).view(-1, 32), 1).view(out, -1, 4))  # the fifth bits, one of each weight
        parts.append(u[..., :16] & 15 | u[..., 16:] << 4)
    return torch.cat(parts, -1).view(out, -1)


def _plan(source: Source, types: dict[str, str | None]) -> list[list[tuple[str, str, tuple[int, ...]]]]:
    """For every shard (name, ggml type, shape) of what is written from it, in order."""
    owners = {f"{layer}.{t}": layer for layer, r in source.layers.items() for t in r.tensors}
    shards: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for name, t in source.manifest.tensors.items():
        if t.shard == PROBE:
            continue
        entries = shards.setdefault(t.shard, {})
        if layer := owners.get(name):
            entries[f"{layer}.weight"] = types[layer] or FLOATS[source.model_dtype], tuple(source.layers[layer].format["shape"])
        else:  # llama.cpp wants norms and biases in fp32, an exact widening
            entries[name] = FLOATS[getattr(torch, t.dtype)] if len(t.shape) > 1 else "F32", tuple(t.shape)
    return [[(name, *entry) for name, entry in entries.items()] for entries in shards.values()]


def _permuted(source: Source, name: str, rows: Tensor) -> Tensor:
    """Rows of q and k with the two halves of every head interleaved, as the rotary embedding of llama.cpp's llama wants them."""
    heads = {"q_proj": source.config.num_attention_heads, "k_proj": source.config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None or ARCHITECTURES[source.config.model_type] != "LLAMA":
        return rows
    size = 4 if rows.dim() == 1 else 1  # a bias is fp32, seen as bytes
    return rows.reshape(heads, 2, -1, size * (rows.shape[-1] if rows.dim() > 1 else 1)).transpose(1, 2).reshape(rows.shape)


def _rope_factors(source: Source) -> np.ndarray | None:
    """What llama.cpp divides the rotary frequencies by, per pair of a head; None: nothing is scaled."""
    frequencies = source.model.model.rotary_emb.inv_freq
    theta = source.config.rope_parameters["rope_theta"]
    factors = theta ** -(torch.arange(0, 2 * len(frequencies), 2) / (2 * len(frequencies))) / frequencies
    return None if source.config.rope_parameters["rope_type"] == "default" else factors.float().numpy()


# ---- metadata


def _metadata(source: Source, writer: Any, gguf: Any, types: Counter[str]) -> None:
    c = source.config
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    vocabulary = source.model.get_input_embeddings().num_embeddings
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(vocabulary)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    usual = types.most_common(1)[0][0] if types else FLOATS[source.model_dtype]
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if usual == "F32" else f"MOSTLY_{usual}"])
    _tokenizer(source, writer, gguf, vocabulary)


def _tokenizer(source: Source, writer: Any, gguf: Any, vocabulary: int) -> None:
    """Vocabulary, merges, special tokens and chat template of a byte-level BPE tokenizer; another kind is not written, and that is noted."""
    file = source.path / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"model": {}}
    ids = {i: (token, gguf.TokenType.NORMAL) for token, i in data["model"].get("vocab", {}).items()} if data["model"].get("type") == "BPE" else {}
    ids |= {t["id"]: (t["content"], gguf.TokenType.CONTROL if t["special"] else gguf.TokenType.USER_DEFINED) for t in data.get("added_tokens", [])}
    stages = [data.get("pre_tokenizer") or {}]
    stages = [s for stage in stages for s in stage.get("pretokenizers", [stage])]
    if not any(s.get("type") == "ByteLevel" for s in stages) or not data["model"].get("merges") or max(ids) >= vocabulary:
        source.note("no tokenizer in the file", "model.gguf", "only byte-level BPE tokenizers with merges are written; give llama.cpp token ids")
        writer.add_tokenizer_model("none")
        return
    found = [s["pattern"].get("Regex") for s in stages if s.get("type") == "Split"] + [GPT2 for s in stages if s.get("use_regex")]
    name = SPLITS.get(found[0]) if len(found) == 1 else None
    if name is None:
        source.note("pre-tokenizer not known to llama.cpp", "model.gguf", "written as `default`: some texts may be cut into other tokens")
    padded = [ids.get(i, (f"[PAD{i}]", gguf.TokenType.UNUSED)) for i in range(vocabulary)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name or "default")
    writer.add_token_list([token for token, _ in padded])
    writer.add_token_types([kind for _, kind in padded])
    gguf.SpecialVocab(source.path, load_merges=True, n_vocab=vocabulary).add_to_gguf(writer, quiet=True)
