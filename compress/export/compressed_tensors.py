"""compressed-tensors, pack-quantized: what vLLM, SGLang and transformers read (github.com/vllm-project/compressed-tensors).

A linear is weight_packed int32 [out, ceil(in·b/32)], weight_scale [out, groups], weight_shape int64 [2] and, asymmetric, weight_zero_point
int32 [ceil(out·b/32), groups], packed along out. Their signed code is ours minus 2^(b−1), and they store it plus 2^(b−1): the packed words are
ours, bit for bit. Widths other than 1, 2, 4 and 8 are dense streams since compressed-tensors 0.17; earlier ones left bits of each word unused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CompressError
from ..formats import Format, IntGroup, packing
from .base import Refusal, SafetensorsExport, Scheme, Source, fused_refusals, integer_refusal, integers, schemes, wide_scales


class CompressedTensors(SafetensorsExport):
    def refusals(self, source: Source) -> list[Refusal]:
        found = [integer_refusal(name, source.peek(name), "compressed-tensors", tuple(range(1, 9))) for name in source.layers]
        found += [Refusal(name, "a Conv1D, and compressed-tensors knows Linear only", "--to gptq or --to dense")
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
                source.note("vLLM has no kernel", str(s), "its weight-only kernels take 4 and 8 bits; transformers decompresses every width")
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

    suffixes = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
