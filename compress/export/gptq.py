"""GPTQ: what GPTQModel, transformers, vLLM and ExLlama read (AutoGPTQ's layout, github.com/ModelCloud/GPTQModel).

A linear is qweight int32 [in·b/32, out], codes packed along in; qzeros int32 [groups, out·b/32], packed along out; scales [groups, out]; g_idx
int32 [in], the group of each input. Version 1 stores z − 1 and adds 1 when it loads, which wraps for z = 0, so it is written for symmetric grids
only; version 2 (checkpoint_format gptq_v2) stores z. Act-order needs no g_idx here: our groups are fitted before the sweep and stay contiguous.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from ..errors import CompressError
from ..formats import Format, IntGroup, packing
from ..version import __version__
from .base import (
    Layers,
    Refusal,
    SafetensorsExport,
    Source,
    fused_refusals,
    integer_refusal,
    integers,
    linear_refusal,
    scheme,
    schemes,
    uniform_refusals,
    wide_scales,
)


@dataclass(frozen=True)
class GPTQ(SafetensorsExport):
    version: int

    def refusals(self, source: Layers) -> list[Refusal]:
        refused = [r for name in source.layers if (r := linear_refusal(name, source, "gptq") or self._refusal(name, source.peek(name)))]
        return refused or uniform_refusals(found := schemes(source), "gptq") or fused_refusals(source, found)

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
        s = next(iter(schemes(source).values()))
        if not s.sym or s.bits not in (4, 8):
            source.note("vLLM has no kernel", str(s), "its GPTQ kernels are symmetric, 4 and 8 bits; GPTQModel and transformers load this")
        config = {"quant_method": "gptq", **asdict(s), "desc_act": False, "checkpoint_format": "gptq" if self.version == 1 else "gptq_v2",
                  "pack_dtype": "int32", "lm_head": False, "meta": {"quantizer": [f"compress:{__version__}"]}}  # fmt: skip
        if kept := [name for name in source.kept if name.startswith(source.blocks_path + ".")]:  # transformers and vLLM read the first, GPTQModel the second
            config["modules_in_block_to_quantize"] = [[m for layer in source.layers for m in source.modules(layer)]]
            config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in kept}
        return config

    def load_line(self, name: str) -> str:
        return f'vllm serve {name}\nmodel = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")  # pip install gptqmodel optimum'


# ---- and back

MARKS = ("qweight",)
SUFFIXES = (*MARKS, "qzeros", "scales", "g_idx")


def read(tensors: dict[str, Tensor], config: dict, where: str) -> IntGroup:
    """A stored linear as our integer grid: the same codes, scales and zero points."""
    out, groups = tensors["scales"].shape[1], tensors["scales"].shape[0]
    b = 32 * tensors["qzeros"].shape[1] // out
    n = 32 * tensors["qweight"].shape[0] // b
    if "g_idx" in tensors and not torch.equal(tensors["g_idx"].long(), torch.arange(n) // (n // groups)):
        raise CompressError(f"{where}: act-order with a group index that is not contiguous; our groups are, and its codes cannot be carried over")
    zeros = packing.unpack_rows(tensors["qzeros"], out, b).T.int() + (config.get("checkpoint_format", "gptq") != "gptq_v2")
    if int(zeros.max()) >= 2**b:
        raise CompressError(f"{where}: a zero point of {2**b} after the 1 that version 1 adds; loaders disagree on what it means")
    symmetric = config.get("sym", False) and bool((zeros == 2 ** (b - 1)).all())
    return IntGroup.pack(packing.unpack_rows(tensors["qweight"].T, n, b), tensors["scales"].T.contiguous(), None if symmetric else zeros.to(torch.uint8), b)
