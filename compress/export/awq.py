"""AWQ, gemm layout: what AutoAWQ made and vLLM, SGLang, transformers (through GPTQModel) read (arXiv 2306.00978, github.com/casper-hansen/AutoAWQ).

A linear is qweight int32 [in, out/8] and qzeros int32 [groups, out/8], eight 4-bit values a word along out in the order 0 2 4 6 1 3 5 7, and
scales fp16 [groups, out]. The method that gave it its name is not needed: any 4-bit grid with one group size for the whole model fits.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import CompressError
from ..formats import Format, IntGroup, packing
from .base import Layers, Refusal, SafetensorsExport, Source, fits_half, fused_refusals, integer_refusal, integers, linear_refusal, schemes, uniform_refusals

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


class AWQ(SafetensorsExport):
    def refusals(self, source: Layers) -> list[Refusal]:
        refused = [r for name in source.layers if (r := linear_refusal(name, source, "awq") or self._refusal(name, source.peek(name)))]
        found = {} if refused else {name: replace(s, sym=False) for name, s in schemes(source).items()}  # symmetric ones get the zero point 8
        return refused or uniform_refusals(found, "awq") or fused_refusals(source, found)

    @staticmethod
    def _refusal(layer: str, weight: Format) -> Refusal | None:
        if refused := integer_refusal(layer, weight, "awq", (4,)):
            return refused
        assert isinstance(weight, IntGroup)
        if weight.shape[0] % 8:
            return Refusal(layer, f"{weight.shape[0]} outputs are not a multiple of 8, which packing into 32-bit words needs", "--to compressed-tensors")
        if not fits_half(weight.scales):
            return Refusal(layer, "scales that fp16 cannot hold exactly", "--to compressed-tensors, or a larger group_size")
        return None

    def tensors(self, source: Source, layer: str, weight: Format) -> dict[str, Tensor]:
        assert isinstance(weight, IntGroup)
        codes, zeros = integers(weight)
        return {"qweight": _pack(codes.T), "qzeros": _pack(zeros.T), "scales": weight.scales.half().T}

    def config(self, source: Source) -> dict:
        if source.model_dtype != torch.float16:
            source.note("scales stored as fp16", f"{len(source.layers)} layers", f"exactly the {str(source.model_dtype)[6:]} scales: every value was checked")
        return {"quant_method": "awq", "bits": 4, "group_size": next(iter(schemes(source).values())).group_size, "zero_point": True, "version": "gemm",
                "modules_to_not_convert": source.kept}  # fmt: skip

    def load_line(self, name: str) -> str:
        return f'vllm serve {name}\nmodel = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")  # pip install gptqmodel'


def _pack(values: Tensor) -> Tensor:
    """uint8 [rows, n] below 16 → int32 [rows, n/8]."""
    return packing.pack_rows(values.reshape(len(values), -1, 8)[:, :, ORDER].reshape(values.shape), 4)


# ---- and back

MARKS = ("qweight",)
SUFFIXES = (*MARKS, "qzeros", "scales")


def read(tensors: dict[str, Tensor], config: dict, where: str) -> IntGroup:
    """A stored linear as our integer grid: the same codes, scales and zero points."""
    if config.get("version", "gemm").lower() != "gemm":
        raise CompressError(f"{where}: awq of layout {config['version']}; only gemm can be read")
    return IntGroup.pack(_unpack(tensors["qweight"]).T, tensors["scales"].T.contiguous(), _unpack(tensors["qzeros"]).T, 4)


def _unpack(words: Tensor) -> Tensor:
    """The inverse of _pack."""
    values = packing.unpack_rows(words, 8 * words.shape[1], 4)
    return values.view(len(values), -1, 8)[:, :, torch.tensor(ORDER).argsort()].reshape(values.shape)
