"""SparseGPT: prune column by column, and let the columns still to come make up for every weight that is lost; in the same sweep, quantize the rest.

    minimise  tr[(W−Ŵ) H (W−Ŵ)ᵀ]  over Ŵ with that many zeros (and its other entries on a grid);   H_d⁻¹ = UᵀU
    for column i:   ŵ = Π(W_i) where kept, 0 elsewhere;   e = (W_i − ŵ) / U_ii,   W_{j>i} −= e · U_ij;   score = (W_ij / U_jj)²

Frantar and Alistarh, arXiv 2301.00774. The score is what losing a weight costs once all later columns have answered; it is asked anew for every
128 columns, or every M of an N:M pattern, of the weights as they are by then. What we add: counts are exact, grids see only the weights that are
kept, `refit` solves the kept weights exactly afterwards (support.py) and, with bits, `sweeps` lets every code answer to all others (descent.py).
Columns go in the layer's own order, because N:M groups are neighbours. Cost: n² (m + n/3) for W [m, n].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..calibration.statistics import Stats
from ..formats import Format
from .masks import SparseIntOptions
from .sweep import finish, quantize, sweep


@dataclass(frozen=True)
class SparseGPT(SparseIntOptions):
    scope: Literal["row", "layer"] = "layer"  # without a pattern: as many in every row, or (the paper) wherever in 128 columns they matter most
    refit: bool = False  # without bits: solve the kept weights exactly afterwards; False: as the paper leaves them

    def __call__(self, weight: Tensor, stats: Stats, *, stored: torch.dtype, where: str = "weight") -> Format:
        """weight [out, in] fp32 → Masked or Sparse24 of Dense, or of IntGroup with `bits`."""
        self.nm(weight.shape[1], where)  # refused before anything is computed
        factor = stats.factor(self.damp, False)
        W, say = self.task(weight, stats, factor)
        if self.bits:  # zeros and integers in the one sweep
            return quantize(W, say, stats, factor, self, stored)
        return finish(W, say, *sweep(W, factor.U, self, say), stats, factor, self, stored)
