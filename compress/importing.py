"""Import: a GPTQ, AWQ, compressed-tensors or bitsandbytes checkpoint as an artifact. Exact codes and scales, nothing is rounded or calibrated.

The quantized linears of the checkpoint are seen as plain weights of the model that config.json describes, so that blocks are found, filled and
sent probe tokens as everywhere else; then each gets the format that its own tensors spell (the `read` of its file in compress/export/). What
comes out can be evaluated, verified, run on our kernels and exported again.
"""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .artifact import PROBE, Fallback, LayerRecord, Manifest, Writer, totals
from .checkpoint import Checkpoint, Entry, read_headers
from .errors import CompressError
from .export import awq, bitsandbytes, compressed_tensors, gptq
from .formats import FloatBlock, Format, IntGroup, Lut, join_rows
from .linear import set_weight
from .stream import Stream
from .version import __version__
from .walk import block_tensors, copy_outer

Packable = IntGroup | Lut | FloatBlock
READERS: dict[str, ModuleType] = {"gptq": gptq, "awq": awq, "compressed-tensors": compressed_tensors, "bitsandbytes": bitsandbytes}


class Packed(Checkpoint):
    """A quantized checkpoint whose packed linears look like plain ones with weights of zero; `format` reads what they hold."""

    def __init__(self, model: str, **kwargs):
        super().__init__(model, **kwargs)
        split = lambda key, suffixes: next(((key.removesuffix(f".{s}"), s) for s in suffixes if key.endswith(f".{s}")), (key, ""))
        packed = {module for key in self.entries for module, mark in [split(key, self.reader.MARKS)] if mark}
        if not packed:
            raise CompressError(f"{model}: config.json says {self.method}, but no tensor is called *.{' or *.'.join(self.reader.MARKS)}")
        self.packed: dict[str, dict[str, Entry]] = {module: {} for module in sorted(packed)}
        plain: dict[str, Entry] = {}
        for key, entry in self.entries.items():
            module, suffix = split(key, self.reader.SUFFIXES)
            if module in packed and suffix:
                self.packed[module][suffix] = entry
            else:
                plain[key] = entry
        conv = [name for name, m in self.model.named_modules() if isinstance(m, Conv1D)]  # [in, out], GPT-2's
        for module, stored in self.packed.items():  # reads each once, so that what cannot be read is told before anything is written
            weight = self.format(module)
            shape = weight.shape[::-1] if any(c.endswith(module) for c in conv) else weight.shape
            dtype = weight.scales.dtype if weight.scales is not None and weight.scales.is_floating_point() else self.stored_dtype
            plain[f"{module}.weight"] = Entry(next(iter(stored.values())).file, dtype, shape)
        self.entries = plain
        if outside := [m for m in self.packed if f"{m}.weight" in {key for g in self.outer_groups() for key, _ in g.sources} | set(self.unknown)]:
            raise CompressError(f"{model}: {outside[0]} is quantized and lies outside the blocks, where artifacts keep plain tensors")

    def _check_config(self) -> None:
        config = getattr(self.config, "quantization_config", None)
        if config is None:
            raise CompressError(f"{self.name}: not quantized; compress it with `compress run`")
        self.quantization: dict[str, Any] = config if isinstance(config, dict) else config.to_dict()
        self.method = self.quantization.get("quant_method", "an unknown method")
        if self.method not in READERS:
            raise CompressError(f"{self.name}: quantized by {self.method}, which cannot be imported; {', '.join(READERS)} can")
        self.reader = READERS[self.method]
        del self.config.quantization_config

    def read_stored(self, key: str) -> Tensor:
        if key.removesuffix(".weight") in self.packed:
            return torch.zeros(self.entries[key].shape, dtype=self.entries[key].dtype)
        return super().read_stored(key)

    def format(self, module: str) -> Packable:
        """A packed linear as its tensors spell it. Raises CompressError where our integer grid cannot hold it."""
        return self.reader.read({s: self.read_from(e.file, f"{module}.{s}") for s, e in self.packed[module].items()}, self.quantization, module)

    def formats_of(self, i: int, block: nn.Module) -> dict[str, Format]:
        """The packed linears of block i by their paths in it; gate and up of an expert, stored apart, are one."""
        found: dict[str, Format] = {}
        for group in self.block_groups(i):
            modules = [key.removesuffix(".weight") for key, _ in group.sources]
            if not (packed := [m for m in modules if m in self.packed]):
                continue
            local = group.target.removeprefix(self.block_name(i) + ".")
            if group.converter is None:
                found[local.removesuffix(".weight")] = self.format(packed[0])
                continue
            parent, _, leaf = local.rpartition(".")
            for e in range(len(block.get_submodule(parent))):
                parts = [key.removesuffix(".weight") for p in group.converter.source_patterns for key, pattern in group.sources
                         if pattern == p and re.search(rf"\.{e}\.", key.removeprefix(self.block_name(i)))]  # fmt: skip
                if any(m not in self.packed for m in parts):
                    raise CompressError(f"{self.name}: {group.target}: only some of its parts are quantized")
                found[f"{parent}.{e}.{leaf}"] = _stacked([self.format(m) for m in parts], f"{group.target}[{e}]")
        return found



def write(source: Packed, writer: Writer, probe: Stream, kept: int) -> Manifest:
    """Every block and what lies outside into the writer's folder, the probe's last `kept` logits with it."""
    headers: dict[str, dict] = {}
    copy_outer(source, writer, headers)
    for i in range(source.num_blocks):
        block, name = source.load_block(i), source.block_name(i)
        formats = source.formats_of(i, block)
        layers = {}
        for path, weight in formats.items():
            set_weight(block.get_submodule(path), weight.dequantize())
            layers[f"{name}.{path}"] = LayerRecord(
                method="import", options={"from": source.method}, format=weight.meta(), describe=weight.describe(), tensors=list(weight.tensors()),
                bits=weight.bits(), bytes=weight.nbytes(), planned_bytes=weight.nbytes(), parameters=weight.shape[0] * weight.shape[1],
                error=0.0, error_norm="identity", tokens=0)  # fmt: skip
        headers[f"block-{i:05d}"] = writer.commit(f"block-{i:05d}", block_tensors(block, name, formats, layers), layers, [])
        probe.advance(block)
    stem = PROBE.removesuffix(".safetensors")
    groups = source.quantization.get("config_groups", {}).values()
    notes = [Fallback(what="activations not rounded", where="every layer", detail="its server rounds them to 8 bits as they come; an artifact holds weights")]
    headers[stem] = writer.commit(stem, {"tokens": probe.tokens, "logits": next(probe.logits())[:, -kept:].float()}, {},
                                  [n.model_dump() for n in notes] if any(g.get("input_activations") for g in groups) else [])  # fmt: skip
    parameters = sum(torch.Size(e.shape).numel() for e in source.entries.values())
    sizes = totals(headers, parameters, sum(e.nbytes for e in read_headers(source.path).values()))
    return writer.finish(headers, source.path, source.changes, source.blocks_path, sizes, __version__)


def _stacked(parts: list[Packable], where: str) -> Format:
    """Rows of one weight below those of the other."""
    if len({p.describe() for p in parts}) > 1:
        raise CompressError(f"{where}: its parts differ: {' and '.join(p.describe() for p in parts)}")
    if (whole := join_rows(parts)) is None:
        raise CompressError(f"{where}: its parts have scales that one {parts[0].describe()} cannot hold")
    return whole
