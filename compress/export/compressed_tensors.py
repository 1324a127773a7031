"""compressed-tensors, pack-quantized: what vLLM, SGLang and transformers read (github.com/vllm-project/compressed-tensors).

A linear is weight_packed int32 [out, ceil(in·b/32)], weight_scale [out, groups], weight_shape int64 [2] and, asymmetric, weight_zero_point
int32 [ceil(out·b/32), groups], packed along out. Their signed code is ours minus 2^(b−1), and they store it plus 2^(b−1): the packed words are
ours, bit for bit. Widths of 3, 5, 6 and 7 bits are dense streams in compressed-tensors 0.19; 0.17 and earlier left bits of each word unused and cannot read them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import Format, IntGroup, packing
from .base import Refusal, SafetensorsExport, Scheme, Source, fused_refusals, integer_refusal, integers, schemes, wide_scales


class CompressedTensors(SafetensorsExport):
    def refusals(self, source: Source) -> list[Refusal]:
        found = [integer_refusal(name, source.peek(name), "compressed-tensors", tuple(range(1, 9))) for name in source.layers]
        found += [Refusal(name, "a Conv1D, which no loader of compressed-tensors replaces", "--to dense")
                  for name in source.layers if name in source.transposed]  # fmt: skip
        return [r for r in found if r] or fused_refusals(source, schemes(source))

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
        # dequantize=True: transformers 5.23 with compressed-tensors 0.20 expects packed zero points unpacked and refuses asymmetric grids without it
        return (f'vllm serve {name}\nmodel = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto", '
                "quantization_config=CompressedTensorsConfig(dequantize=True))  # pip install compressed-tensors")  # fmt: skip