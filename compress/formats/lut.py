"""Lut: integer codes into a table of 2**bits values, for levels that no uniform grid has.

    Ŵ[i, j] = table[q[i, j]] · s[i, g]   one table for the whole matrix, one scale a group of input columns (NF4, FP4)
    Ŵ[i, j] = table[i, q[i, j]]          one table a row and no scales (LNQ, SqueezeLLM)

Uniform levels are cheapest to multiply by; a table puts its levels where the weights are. A shared table costs nothing, tables of 16-bit
values 2**bits · 16 / in bits a weight. Codes are packed like those of IntGroup.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import packing
from .base import Format


@dataclass(frozen=True, eq=False)
class Lut(Format):
    codes: Tensor  # int32 [out, ceil(in·bits/32)]
    table: Tensor  # [1 or out, 2**bits], any float dtype
    scales: Tensor | None  # [out, groups], any float dtype; None: the table says it all
    shape: tuple[int, int]
    name: str  # what the table is called: "nf4", "fp4"; "lut3" where every layer has its own

    @classmethod
    def pack(cls, codes: Tensor, table: Tensor, scales: Tensor | None, name: str) -> Lut:
        """codes uint8 [out, in] → the packed format. On meta tensors it is the plan."""
        return cls(packing.pack_rows(codes, cls._bits(table)), table, scales, tuple(codes.shape), name)  # type: ignore[arg-type]

    @staticmethod
    def _bits(table: Tensor) -> int:
        return table.shape[1].bit_length() - 1

    def unpack(self) -> Tensor:
        """uint8 codes [out, in]."""
        return packing.unpack_rows(self.codes, self.shape[1], self._bits(self.table))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        index = self.unpack().int()
        if len(self.table) > 1:
            index += torch.arange(0, self.table.numel(), self.table.shape[1], dtype=torch.int32, device=index.device)[:, None]
        W = self.table.float().flatten().index_select(0, index.flatten())
        if self.scales is not None:
            W = W.view(*self.scales.shape, -1).mul_(self.scales.float()[:, :, None])
        return W.view(self.shape).to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        kept = {"codes": self.codes, "table": self.table}
        return kept if self.scales is None else kept | {"scales": self.scales}

    def meta(self) -> dict:
        return {"format": "Lut", "shape": list(self.shape), "name": self.name}

    @classmethod
    def from_tensors(cls, meta, tensors) -> Lut:
        return cls(tensors["codes"], tensors["table"], tensors.get("scales"), tuple(meta["shape"]), meta["name"])

    def describe(self) -> str:
        return f"{self.name} {'row' if self.scales is None else f'g{self.shape[1] // self.scales.shape[1]}'}"
