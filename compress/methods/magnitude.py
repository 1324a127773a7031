"""Magnitude: the smallest weights become zero and the others stay as they are, whatever the inputs look like. The baseline that every pruning
method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..calibration.statistics import Stats
from ..formats import Format
from .masks import SparseOptions


@dataclass(frozen=True)
class Magnitude(SparseOptions):
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, weight: Tensor, stats: Stats | None, *, stored: torch.dtype, where: str = "weight") -> Format:
        """weight [out, in] → Masked or Sparse24 of Dense. `stats` is only told what is odd."""
        if stats is not None:
            self.live(weight, stats)
        return self.store(weight, self.select(weight.abs(), self.nm(weight.shape[1], where)), stored)
