"""Sparse24: of every M neighbours in a row N are kept, 2 of 4 above all, as the kept values and their places.

    Ŵ[i, M·g + p] = values[i, N·g + k]   where p is the k-th place of group g;   +0 elsewhere

2:4 is the pattern that sparse tensor cores run at twice the dense rate (arXiv 2104.08378). Each place takes 2 bits, ascending in its group,
packed in column order: for 2:4 four bits a group, low ones first, the logical order of mma.sp's metadata before CUTLASS or cuSPARSELt tile it.
The values are a dense matrix [out, in·N/M], a Format of their own: Dense or IntGroup. 2:4 costs 9 bits a weight in bf16, 3.1 in int4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CompressError
from . import packing
from .base import Format
from .combine import nested, rebuild


def place_bits(m: int) -> int:
    return max(1, (m - 1).bit_length())


@dataclass(frozen=True, eq=False)
class Sparse24(Format):
    places: Tensor  # int32 [out, ceil(kept·bits/32)]: where in its group each value lies, 2 bits for groups of 4
    values: Format  # [out, in·N/M]
    n: int  # kept ...
    m: int  # ... of every m

    @classmethod
    def pack(cls, keep: Tensor, values: Format, n: int, m: int) -> Sparse24:
        """keep bool [out, in] with exactly n of every m neighbours. Raises CompressError where it has not."""
        groups = keep.view(keep.shape[0], -1, m)
        if not (groups.sum(-1) == n).all():
            raise CompressError(f"a mask that does not keep {n} of every {m} is no {n}:{m} mask; store it as Masked")
        places = torch.arange(m, dtype=torch.uint8, device=keep.device).expand_as(groups)[groups].view(keep.shape[0], -1)
        return cls(packing.pack_rows(places, place_bits(m)), values, n, m)

    @classmethod
    def planned(cls, values: Format, n: int, m: int) -> Sparse24:
        """The same format on meta."""
        out, kept = values.shape
        return cls(torch.empty(out, packing.packed_words(kept, place_bits(m)), dtype=torch.int32, device="meta"), values, n, m)

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.values.shape[0], self.values.shape[1] // self.n * self.m

    def columns(self) -> Tensor:
        """int64 [out, kept]: the input that each value multiplies."""
        kept = self.values.shape[1]
        first = torch.arange(kept, device=self.places.device) // self.n * self.m
        return packing.unpack_rows(self.places, kept, place_bits(self.m)).long() + first

    def keep(self) -> Tensor:
        """bool [out, in]."""
        return torch.zeros(self.shape, dtype=torch.bool, device=self.places.device).scatter_(1, self.columns(), True)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(self.shape, dtype=dtype, device=self.places.device).scatter_(1, self.columns(), self.values.dequantize(dtype))

    def tensors(self) -> dict[str, Tensor]:
        return {"places": self.places} | nested("values", self.values)

    def meta(self) -> dict:
        return {"format": "Sparse24", "n": self.n, "m": self.m, "values": self.values.meta()}

    @classmethod
    def from_tensors(cls, meta, tensors) -> Sparse24:
        return cls(tensors["places"], rebuild("values", meta["values"], tensors), meta["n"], meta["m"])

    def describe(self) -> str:
        return f"{self.n}:{self.m} {self.values.describe()}"
