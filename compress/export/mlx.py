"""MLX: what mlx-lm serves on Apple silicon, and on Linux with mlx[cpu] (github.com/ml-explore/mlx-lm).

A linear is weight uint32 [out, in·b/32], scales and biases [out, groups] with Ŵ = q · scale + bias: our (q − z)·s with the bias −z·s. Rows are one
little-endian stream of codes, as ours are. −z·s must be exact: for a symmetric grid z is a power of two and it always is; another zero point may need
more digits than bf16 has, then both are stored in fp32, which mlx's kernels follow. Groups of 32, 64 or 128. MXFP4 is stored as it is, no biases.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from ..formats import FloatBlock, Format, IntGroup, packing
from .base import Layers, Refusal, SafetensorsExport, Source, fits, integer_refusal, integers, scheme

BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)


class MLX(SafetensorsExport):
    key = "quantization"

    def refusals(self, source: Layers) -> list[Refusal]:
        refused = [r for name in source.layers if (r := self._refusal(name, source))]
        stacks: dict[str, set[str]] = {}
        for name in source.experts:
            stacks.setdefault(name.rpartition(".experts.")[0], set()).add(source.peek(name).describe())
        return refused or [Refusal(name, f"an expert beside others of another format ({' and '.join(sorted(kinds))}), and mlx-lm stacks them", "one for all")
                           for name in source.experts if len(kinds := stacks[name.rpartition(".experts.")[0]]) > 1]  # fmt: skip

    @staticmethod
    def _refusal(layer: str, source: Layers) -> Refusal | None:
        weight = source.peek(layer)
        if layer in source.transposed:
            return Refusal(layer, "a Conv1D, which no loader of mlx replaces", "--to dense")
        if layer in source.experts and source.config.model_type != "mixtral":
            return Refusal(layer, "an expert: mlx-lm 0.32 stacks quantized ones of Mixtral only", "--to dense")
        if isinstance(weight, FloatBlock):
            return None if weight.name == "mxfp4" else Refusal(layer, f"{weight.describe()} has scales that mlx has not", "w4-mxfp4")
        if refused := integer_refusal(layer, weight, "mlx", BITS):
            return refused
        assert isinstance(weight, IntGroup)
        if weight.group_size not in GROUPS:
            best = next((g for g in reversed(GROUPS) if weight.shape[1] % g == 0), 64)
            return Refusal(layer, f"groups of {weight.group_size}, mlx has {', '.join(map(str, GROUPS))}", replace(scheme(weight), group_size=best).recipe)
        return None

    def tensors(self, source: Source, layer: str, weight: Format) -> dict[str, Tensor]:
        if isinstance(weight, FloatBlock):
            return {"weight": weight.codes.view(torch.uint32), "scales": weight.scales}
        assert isinstance(weight, IntGroup)
        codes, zeros = integers(weight)
        scales = weight.scales.float()
        biases = -zeros.float() * scales  # exact in fp32: 8 bits of z and 11 of s
        dtype = source.model_dtype if fits(scales, source.model_dtype) and fits(biases, source.model_dtype) else torch.float32
        return {"weight": packing.pack_rows(codes, weight.bits_per_code).view(torch.uint32), "scales": scales.to(dtype), "biases": biases.to(dtype)}

    def config(self, source: Source) -> dict:
        kinds = {name: self._kind(source.peek(name)) for name in source.layers}
        usual = Counter(tuple(sorted(k.items())) for k in kinds.values()).most_common(1)[0][0]
        if any(w.zeros is not None for name in source.layers if isinstance(w := source.peek(name), IntGroup)) and source.model_dtype != torch.float32:
            source.note("scales and biases stored as fp32", "layers with zero points",
                        f"{str(source.model_dtype)[6:]} cannot hold every −z·s; sym: true stays narrow")  # fmt: skip
        return dict(usual) | {m: k for name, k in kinds.items() if k != dict(usual) for m in source.modules(name)}

    @staticmethod
    def _kind(weight: Format) -> dict:
        if isinstance(weight, FloatBlock):
            return {"group_size": 32, "bits": 4, "mode": "mxfp4"}
        assert isinstance(weight, IntGroup)
        return {"group_size": weight.group_size, "bits": weight.bits_per_code, "mode": "affine"}

    def settings(self, source: Source) -> dict:
        """The rotary settings as transformers 4 wrote them: mlx-lm's llama does not look into rope_parameters and would take a base of 10000."""
        rope = getattr(source.config, "rope_parameters", None) or {}
        if "rope_theta" not in rope:  # none, or one a layer type
            return {}
        scaling = None if rope["rope_type"] == "default" else {k: v for k, v in rope.items() if k != "rope_theta"}
        return {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}

    def load_line(self, name: str) -> str:
        return f"mlx_lm.generate --model {name} --prompt hello  # pip install mlx-lm"
