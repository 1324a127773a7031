"""Wanda: the weights whose part of the output is smallest become zero, the others stay as they are.

    score_ij = |w_ij| · √H_jj,   H_jj the mean square of input j

This is what the layer's error would be if inputs were uncorrelated, a diagonal H, and nothing made up for what is lost. Sun et al., arXiv
2306.11695. Where all inputs are equally loud it is magnitude pruning by rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..calibration.statistics import Stats
from ..formats import Format
from .masks import SparseOptions


@dataclass(frozen=True)
class Wanda(SparseOptions):
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    def __call__(self, weight: Tensor, stats: Stats, *, stored: torch.dtype, where: str = "weight") -> Format:
        """weight [out, in] fp32 → Masked or Sparse24 of Dense; what is kept is bit for bit what it was."""
        score = self.alive(weight, stats).abs() * stats.hessian.diagonal().sqrt()
        return self.store(weight, self.select(score, self.nm(weight.shape[1], where)), stored)
