"""compressed-tensors, pack-quantized: what vLLM, SGLang and transformers read (github.com/vllm-project/compressed-tensors).

A linear is weight_packed int32 [out, ceil(in·b/32)], weight_scale [out, groups], weight_shape int64 [2] and, asymmetric, weight_zero_point
int32 [ceil(out·b/32), groups], packed along out. Their signed code is ours minus 2^(b−1), and they store it plus 2^(b−1): the packed words are
ours, bit for bit. Widths of 3, 5, 6 and 7 bits are dense
streams in compressed-tensors 0.19; 0.17 and earlier left bits of each word unused and cannot read these.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import CompressError
from ..formats import Format, IntGroup, packing
from .base import Layers, Refusal, SafetensorsExport, Scheme, Source, fused_refusals, integer_refusal, integers, scheme, schemes, wide_scales


class CompressedTensors(SafetensorsExport):
    def refusals(self, source: Layers) -> list[Refusal]:
        return [r for name in source.layers if (r := self._refusal(name, source))] or fused_refusals(source, schemes(source))

    @staticmethod
    def _refusal(layer: str, source: Layers) -> Refusal | None:
        weight = source.peek(layer)
        if refused := integer_refusal(layer, weight, "compressed-tensors", tuple(range(1, 9))):
            return refused
        assert isinstance(weight, IntGroup)
        if layer in source.transposed:
            return Refusal(layer, "a Conv1D, which no loader of compressed-tensors replaces", "--to dense")
        if layer in source.experts and weight.zeros is not None:
            return Refusal(layer, "an expert with zero points, which transformers cannot unpack (huggingface/transformers#47430)",
                           replace(scheme(weight), sym=True).recipe)  # fmt: skip
        return None

    def tensors(self, source: Source, layer: str, weight: Format) -> dict[str, Tensor]:
        assert isinstance(weight, IntGroup)
        codes, zeros = integers(weight)
        stored = {"weight_packed": packing.pack_rows(codes, weight.bits_per_code), "weight_scale": wide_scales(source, weight),
                  "weight_shape": torch.tensor(weight.shape)}  # fmt: skip
        if weight.zeros is not None:
            stored["weight_zero_point"] = packing.pack_rows(zeros.T, weight.bits_per_code).T
        return stored

    def config(self, source: Source) -> dict:
        groups: dict[Scheme, list[str]] = {}
        for layer, s in schemes(source).items():
            groups.setdefault(s, []).extend(source.modules(layer))
        for s in groups:
            if s.bits not in (4, 8):
                source.note("vLLM has no kernel", str(s), "its weight-only kernels take 4 and 8 bits; transformers with compressed-tensors 0.19 reads all")
        if not all(s.sym for s in groups):
            source.note("transformers 5.23 with compressed-tensors 0.20 expects zero points unpacked", "asymmetric layers",
                        "load with quantization_config=CompressedTensorsConfig(dequantize=True)" if len(groups) == 1 else
                        "with more than one scheme it cannot; transformers 5.17 with compressed-tensors 0.19 can")  # fmt: skip
        return {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed", "ignore": source.kept,
                "config_groups": {f"group_{i}": self._group(s, ["Linear"] if len(groups) == 1 else names)
                                  for i, (s, names) in enumerate(groups.items())}}  # fmt: skip

    @staticmethod
    def _group(s: Scheme, targets: list[str]) -> dict:
        channel = s.group_size == -1
        weights = {"num_bits": s.bits, "type": "int", "symmetric": s.sym, "strategy": "channel" if channel else "group",
                   "group_size": None if channel else s.group_size, "dynamic": False, "actorder": None}  # fmt: skip
        return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None, "format": "pack-quantized"}

    def load_line(self, name: str) -> str:
        return f'vllm serve {name}\nmodel = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")  # pip install compressed-tensors'


# ---- and back

MARKS = ("weight_packed",)
SUFFIXES = (*MARKS, "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")


def read(tensors: dict[str, Tensor], config: dict, where: str) -> IntGroup:
    """A stored linear as our integer grid: the same codes, scales and zero points."""
    (out, n), words, scales = tensors["weight_shape"].tolist(), tensors["weight_packed"], tensors["weight_scale"]
    b = next((b for b in range(1, 9) if packing.packed_words(n, b) == words.shape[1]), 0) if words.dtype == torch.int32 else 0
    groups = config.get("config_groups", {}).values()
    if config.get("transform_config") or any(g.get("input_activations") for g in groups):
        raise CompressError(f"{where}: its activations are quantized or transformed, which an artifact does not hold")
    if b not in {g["weights"]["num_bits"] for g in groups}:
        raise CompressError(f"{where}: {str(words.dtype)[6:]} {list(words.shape)} for {out}×{n} weights is no dense pack of 1 to 8 bits")
    if "weight_g_idx" in tensors and not torch.equal(tensors["weight_g_idx"].long(), torch.arange(n) // (n // scales.shape[1])):
        raise CompressError(f"{where}: act-order with a group index that is not contiguous; our groups are, and its codes cannot be carried over")
    zeros = packing.unpack_rows(tensors["weight_zero_point"].T, out, b).T if "weight_zero_point" in tensors else None
    return IntGroup.pack(packing.unpack_rows(words, n, b), scales, zeros, b)
