"""The contract of a compressed weight: frozen tensors that know how to become a matrix, a file and a number of bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Format:
    """A weight [out, in] in compressed form. Subclasses are frozen dataclasses; equal tensors and meta mean equal weights."""

    shape: tuple[int, int]  # (out_features, in_features) of the matrix it stands for

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense matrix [out, in]: computed in fp32, cast once at the end."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name. Names hold no dots: they become buffers of a module and keys of a shard."""
        raise NotImplementedError

    def meta(self) -> dict[str, Any]:
        """What the tensors do not say, as JSON; `formats.build(meta, tensors)` is the inverse."""
        raise NotImplementedError

    @classmethod
    def from_tensors(cls, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Format:
        raise NotImplementedError

    def nbytes(self) -> int:
        """Bytes on disk: codes, scales, zeros and padding, everything that is stored."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def bits(self) -> float:
        """Bits per weight of the matrix, scales and padding included."""
        return 8 * self.nbytes() / (self.shape[0] * self.shape[1])

    def describe(self) -> str:
        """A few characters for tables: `int4 g128 asym`."""
        raise NotImplementedError

    def to(self, device: torch.device | str) -> Format:
        from . import build

        return build(self.meta(), {name: t.to(device) for name, t in self.tensors().items()})
