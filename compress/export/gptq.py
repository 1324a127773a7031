"""GPTQ: what GPTQModel, transformers, vLLM and ExLlama read (AutoGPTQ's layout, github.com/ModelCloud/GPTQModel).

A linear is qweight int32 [in·b/32, out], codes packed along in; qzeros int32 [groups, out·b/32], packed along out; scales [groups, out]; g_idx
int32 [in], the group of each input. Version 1 stores z − 1 and adds 1 when it loads, which wraps for z = 0, so it is written for symmetric grids
only; version 2 (checkpoint_format gptq_v2) stores z. Act-order needs no g_idx here: our groups are fitted before the sweep and stay contiguous.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from ..formats import Format, IntGroup, packing
from ..version import __version__
from .base import FUSED, Refusal, SafetensorsExport, Source, fused_refusals, integer_refusal, integers, linear_refusal, scheme, schemes, wide_scales


@dataclass(frozen=True)
class GPTQ(SafetensorsExport):
    version: int

    def refusals(self, source: Source) -> list[Refusal]:
        return [r for name in source.layers if (r := linear_refusal(name, source, "gptq") or self._refusal(name, source.peek(name)))] or fused_refusals(source, schemes(source))

    def _refusal(self, layer: str, weight: Format) -> Refusal | None:
        if refused := integer_refusal(layer, weight, "gptq", (2, 3, 4, 8)):
            return refused
        assert isinstance(weight, IntGroup)
        out, n = weight.shape
        if n % 32 or out % 32:
            return Refusal(layer, f"{out}×{n} is not a multiple of 32 both ways, which packing into 32-bit words needs", "--to compressed-tensors")
        if self.version == 1 and weight.zeros is not None:
            return Refusal(layer, "zero points: version 1 stores z − 1, and loaders refuse or wrap asymmetric grids",
                           f"{replace(scheme(weight), sym=True).recipe}, or --to gptq-v2")  # fmt: skip
        return None

    def tensors(self, source: Source, layer: str, weight: Format) -> dict[str, Tensor]:
        assert isinstance(weight, IntGroup)
        codes, zeros = integers(weight)
        b, n = weight.bits_per_code, weight.shape[1]
        return {"qweight": packing.pack_rows(codes, b).T, "qzeros": packing.pack_rows(zeros.T - (2 - self.version), b),
                "scales": wide_scales(source, weight).T, "g_idx": torch.arange(n, dtype=torch.int32) // weight.group_size}  # fmt: skip

    def config(self, source: Source) -> dict:
        found = schemes(source)
        base = Counter(found.values()).most_common(1)[0][0]
        if not all(s.sym and s.bits in (4, 8) for s in found.values()):
            source.note("vLLM has no kernel", "asymmetric or other than 4 and 8 bits", "its GPTQ kernels are symmetric 4 and 8 bits; GPTQModel loads all")
        dynamic: dict[str, dict] = {f"-:^{pattern}$": {} for name in source.kept if name.startswith(source.blocks_path + ".") for pattern in _patterns(name)}
        dynamic |= {f"+:^{pattern}$": asdict(s) for layer, s in found.items() if s != base for m in source.modules(layer) for pattern in _patterns(m)}
        return {"quant_method": "gptq", **asdict(base), "desc_act": False, "checkpoint_format": "gptq" if self.version == 1 else "gptq_v2",
                "pack_dtype": "int32", "lm_head": False, "dynamic": dynamic, "meta": {"quantizer": [f"compress:{__version__}"]}}  # fmt: skip

    def load_line(self, name: str) -> str:
        return f'vllm serve {name}\nmodel = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")  # pip install gptqmodel optimum'

def _patterns(module: str) -> list[str]:
    """A module by its own name, and by the name that a server gives the matrix that it is part of."""
    parent, _, leaf = module.rpartition(".")
    return [re.escape(module), *(re.escape(f"{parent}.{whole}") for whole, parts in FUSED.items() if leaf in parts)]
