"""Columns: some input columns in one format, all others in another; one bit a column says which.

    Ŵ[:, mask] = first,   Ŵ[:, ~mask] = second;       y = x[mask] · firstᵀ + x[~mask] · secondᵀ

Few inputs carry most of a layer's output, so few columns deserve more bits (PTQ1.61, arXiv 2502.13179). A mask over weights would cost a bit a weight and a
gather at each of them; over columns it costs 1/out bits, and either part is a contiguous matrix of an ordinary format, run by that format's kernel on its
share of the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import packing
from .base import Format
from .combine import nested, rebuild


@dataclass(frozen=True, eq=False)
class Columns(Format):
    mask: Tensor  # uint8 [ceil(in/8)], little-endian: bit j % 8 of byte j // 8 is column j
    first: Format  # [out, columns in the mask], in their order
    second: Format  # [out, all others]

    @classmethod
    def pack(cls, mask: Tensor, first: Format, second: Format) -> Columns:
        """mask bool [in], with as many True as `first` has columns. On meta tensors it is the plan."""
        return cls(packing.pack_bytes(mask.to(torch.uint8)[None], 1)[0], first, second)

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.first.shape[0], self.first.shape[1] + self.second.shape[1]

    def places(self) -> tuple[Tensor, Tensor]:
        """int64 indices of the columns of `first` and of `second`."""
        mask = packing.unpack_bytes(self.mask[None], self.shape[1], 1)[0].bool()
        return mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.cat([self.first.dequantize(), self.second.dequantize()], 1)[:, torch.cat(self.places()).argsort()].to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"mask": self.mask} | nested("first", self.first) | nested("second", self.second)

    def meta(self) -> dict:
        return {"format": "Columns", "first": self.first.meta(), "second": self.second.meta()}

    @classmethod
    def from_tensors(cls, meta, tensors) -> Columns:
        return cls(tensors["mask"], rebuild("first", meta["first"], tensors), rebuild("second", meta["second"], tensors))

    def describe(self) -> str:
        return f"{self.first.shape[1]} × {self.first.describe()} | {self.second.describe()}"
