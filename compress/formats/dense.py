"""Dense: the weight as it is. The no-op leaf, and the factors of a low-rank product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Format


@dataclass(frozen=True, eq=False)
class Dense(Format):
    weight: Tensor  # [out, in], any float dtype

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return tuple(self.weight.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.weight.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def meta(self) -> dict:
        return {"format": "Dense"}

    @classmethod
    def from_tensors(cls, meta, tensors) -> Dense:
        return cls(tensors["weight"])

    def describe(self) -> str:
        return str(self.weight.dtype).removeprefix("torch.")
