"""Masked: zeros anywhere. One bit a weight says whether it is kept, and only the kept ones are stored.

    Ŵ[keep] = values, row by row;   Ŵ = +0 elsewhere

The values are a Format of their own: Dense, or IntGroup where every row keeps equally many, so that its groups are runs of kept weights. 50 %
zeros in bf16 cost 9 bits a weight. A zero is where the mask says so and takes part in no arithmetic, so it is exactly zero after every step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CompressError
from . import packing
from .base import Format
from .combine import nested, rebuild


@dataclass(frozen=True, eq=False)
class Masked(Format):
    mask: Tensor  # uint8 [out, ceil(in/8)], little-endian: bit j % 8 of byte j // 8 is weight j
    values: Format  # its entries, row by row, are the kept weights in their order: [out, kept of a row], or [1, kept of all] where rows differ
    shape: tuple[int, int]

    @classmethod
    def pack(cls, keep: Tensor, values: Format) -> Masked:
        """keep bool [out, in]. Raises CompressError where the number of values is not the number of kept weights."""
        if int(keep.sum()) != values.shape[0] * values.shape[1]:
            raise CompressError(f"a mask that keeps {int(keep.sum())} weights does not fit values of shape {list(values.shape)}")
        return cls(packing.pack_bytes(keep.to(torch.uint8), 1), values, tuple(keep.shape))

    @classmethod
    def planned(cls, shape: tuple[int, int], values: Format) -> Masked:
        """The same format on meta."""
        return cls(torch.empty(shape[0], -(-shape[1] // 8), dtype=torch.uint8, device="meta"), values, shape)

    def keep(self) -> Tensor:
        """bool [out, in]."""
        return packing.unpack_bytes(self.mask, self.shape[1], 1).bool()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        values = self.values.dequantize(dtype)
        return torch.zeros(self.shape, dtype=dtype, device=values.device).masked_scatter_(self.keep(), values)

    def tensors(self) -> dict[str, Tensor]:
        return {"mask": self.mask} | nested("values", self.values)

    def meta(self) -> dict:
        return {"format": "Masked", "shape": list(self.shape), "values": self.values.meta()}

    @classmethod
    def from_tensors(cls, meta, tensors) -> Masked:
        return cls(tensors["mask"], rebuild("values", meta["values"], tensors), tuple(meta["shape"]))

    def describe(self) -> str:
        zeros = 1 - self.values.shape[0] * self.values.shape[1] / (self.shape[0] * self.shape[1])
        return f"{100 * zeros:.3g}% sparse {self.values.describe()}"
