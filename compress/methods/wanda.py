"""Wanda: the weights whose part of the output is smallest become zero, the others stay as they are.

    score_ij = |w_ij| · √H_jj,   H_jj the mean square of input j

This is what the layer's error would be if inputs were uncorrelated, a diagonal H, and nothing made up for what is lost. Sun et al., arXiv
2306.11695. Where all inputs are equally loud it is magnitude pruning by rows. With `gradient` tokens and outputs count by the squared gradient of the
model's loss there, score² = w_ij² E[s_t x_tj²] E[g_ti²]: the diagonal of the Fisher matrix as a product, what Wanda++ (arXiv 2503.04992) adds to the score
from gradients of each weight, for one backward pass and no memory a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration.statistics import Stats
from ..formats import Format
from .masks import SparseOptions
from .target import importance


@dataclass(frozen=True)
class Wanda(SparseOptions):
    gradient: bool = False  # tokens and outputs count by the squared gradient of the model's loss there; False: all alike

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"hessian", "guidance", "gradient"} if self.gradient else {"hessian"})

    def __call__(self, weight: Tensor, stats: Stats, *, stored: torch.dtype, where: str = "weight") -> Format:
        """weight [out, in] fp32 → Masked or Sparse24 of Dense; what is kept is bit for bit what it was."""
        nm, W = self.nm(weight.shape[1], where), stats.silence(weight) * self.live(weight, stats)
        score = W.abs() * stats.hessian.diagonal().sqrt()
        return self.store(W, self.select(score * importance(weight, stats) if self.gradient else score, nm), stored)
