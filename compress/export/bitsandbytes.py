"""bitsandbytes: NF4 and FP4 blocks, and the rows of LLM.int8(), as transformers stores them (arXiv 2305.14314, 2208.07339).

4 bits: weight uint8 [out·in/2, 1], two codes a byte, the first in its upper half; weight.absmax fp32, one scale a block of the weight read row by row;
weight.quant_map, the table of 16 levels; and JSON as bytes, weight.quant_state.bitsandbytes__nf4. Our blocks are the same where they lie in one row.
Double quantization, 8-bit codes for the scales, is read but not written: it would round scales that were rounded once.
8 bits: weight int8 [out, in] and SCB fp32 [out] with Ŵ = weight · SCB / 127: a symmetric grid of one group a row. Its multiplication rounds
activations to 8 bits, too, row by row, but for columns above a threshold.
"""

from __future__ import annotations

import json
from collections import Counter

import torch
from torch import Tensor

from ..errors import CompressError
from ..formats import Format, IntGroup, Lut, packing
from ..methods.nf import TABLES
from .base import Layers, Refusal, SafetensorsExport, Source, linear_refusal

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # those that its kernels know


class BitsAndBytes(SafetensorsExport):
    def refusals(self, source: Layers) -> list[Refusal]:
        refused = [r for name in source.layers if (r := self._refusal(name, source))]
        usual = Counter(isinstance(source.peek(name), Lut) for name in source.layers).most_common(1)[0][0] if source.layers else True
        return refused or [Refusal(name, f"4 and 8 bits in one model, and most layers have {4 if usual else 8}", "one of w4-nf4 and w8-rtn for all")
                           for name in source.layers if isinstance(source.peek(name), Lut) != usual]  # fmt: skip

    @staticmethod
    def _refusal(layer: str, source: Layers) -> Refusal | None:
        weight = source.peek(layer)
        if isinstance(weight, Lut):
            block = weight.shape[1] // (weight.scales.shape[1] if weight.scales is not None else 1)
            if weight.name not in TABLES or weight.scales is None:
                return Refusal(layer, f"{weight.describe()} has levels of its own", "{method: nf}")
            if block not in BLOCKS:
                return Refusal(layer, f"blocks of {block}, bitsandbytes has {', '.join(map(str, BLOCKS))}",
                               f"{{method: nf, type: {weight.name}, group_size: 64}}")  # fmt: skip
        elif not isinstance(weight, IntGroup) or (weight.bits_per_code, weight.groups, weight.zeros) != (8, 1, None):
            return Refusal(layer, f"{weight.describe()} is neither NF4 nor FP4 nor 8 bits with one symmetric group a row",
                           "{method: nf}, or {method: gptq, bits: 8, group_size: -1, sym: true}")  # fmt: skip
        if layer not in source.transposed and (refused := linear_refusal(layer, source, "bitsandbytes")):  # a Conv1D is replaced, as [out, in]
            return Refusal(layer, refused.reason, "--to dense")
        return None

    def tensors(self, source: Source, layer: str, weight: Format) -> dict[str, Tensor]:
        if isinstance(weight, IntGroup):
            return {"weight": (weight.unpack() ^ 128).view(torch.int8), "SCB": 127 * weight.scales.float()[:, 0],
                    "weight_format": torch.tensor(0, dtype=torch.uint8)}  # fmt: skip
        assert isinstance(weight, Lut) and weight.scales is not None
        q = weight.unpack().view(-1, 2)
        state = {"quant_type": weight.name, "blocksize": weight.shape[1] // weight.scales.shape[1], "dtype": str(source.model_dtype)[6:],
                 "shape": list(weight.shape)}  # fmt: skip
        return {"weight": q[:, :1] << 4 | q[:, 1:], "weight.absmax": weight.scales.float().flatten(), "weight.quant_map": weight.table[0].float(),
                f"weight.quant_state.bitsandbytes__{weight.name}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}  # fmt: skip

    def config(self, source: Source) -> dict:
        first = source.peek(next(iter(source.layers)))
        common = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": source.kept}
        if isinstance(first, IntGroup):
            source.note("activations are rounded to 8 bits when it runs", "every layer", "LLM.int8() does; `eval` here does not")
            return common | {"load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": 6.0}
        assert isinstance(first, Lut)
        return common | {"load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": first.name, "bnb_4bit_use_double_quant": False,
                         "bnb_4bit_quant_storage": "uint8", "bnb_4bit_compute_dtype": str(source.model_dtype)[6:]}  # fmt: skip

    def load_line(self, name: str) -> str:
        return f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")  # pip install bitsandbytes'


# ---- and back

MARKS = ("weight.absmax", "SCB")  # what only a packed linear has
SUFFIXES = (*MARKS, "weight", "weight_format", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
            *(f"weight.quant_state.bitsandbytes__{name}" for name in TABLES))  # fmt: skip


def read(tensors: dict[str, Tensor], config: dict, where: str) -> IntGroup | Lut:
    """A stored linear as our format: the same codes, and the very scales that bitsandbytes multiplies by."""
    if "SCB" in tensors:
        if tensors.get("weight_format", torch.tensor(0)).item() != 0:
            raise CompressError(f"{where}: 8-bit weights tiled for one kind of GPU, from bitsandbytes before 0.43; only rows can be read")
        return IntGroup.pack(tensors["weight"].view(torch.uint8) ^ 128, tensors["SCB"].float()[:, None] / 127, None, 8)
    name = next((n for n in TABLES if f"weight.quant_state.bitsandbytes__{n}" in tensors), None)
    if name is None:
        raise CompressError(f"{where}: no weight.quant_state.bitsandbytes__nf4 or __fp4 beside its weight")
    state = json.loads(bytes(tensors[f"weight.quant_state.bitsandbytes__{name}"].tolist()))
    (out, n), scales = state["shape"], tensors["weight.absmax"]
    if n % state["blocksize"]:
        raise CompressError(f"{where}: blocks of {state['blocksize']} run across rows of {n}; ours do not, and its scales cannot be carried over")
    if scales.dtype == torch.uint8:  # double quantization: a table of 256 values, scaled in blocks of its own, around their mean
        q = tensors["weight.nested_quant_map"][scales.int()]
        scales = q * tensors["weight.nested_absmax"].repeat_interleave(state["nested_blocksize"])[: len(q)] + torch.tensor(state["nested_offset"])
    octets = tensors["weight"].contiguous().view(torch.uint8).flatten()  # any quant_storage
    codes = torch.stack([octets >> 4, octets & 15], 1).view(out, n)
    return Lut(packing.pack_rows(codes, 4), tensors["weight.quant_map"][None], scales.view(out, -1), (out, n), name)
