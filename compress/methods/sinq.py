"""SINQ, Sinkhorn-normalised quantization: a scale for every input column besides those of the groups, then round to nearest; no calibration.

    W ≈ Ŵ · diag(t),   Ŵ = RTN(W · diag(1/t)),   t such that rows and columns of diag(1/r) W diag(1/t) have about the same standard deviation

One scale a group must serve the outlier of any column in it; t takes the columns' share first, so outliers of single weights are all that is
left (Müller et al., arXiv 2509.22944). Every turn divides by the standard deviations of rows and columns, as Sinkhorn's iteration divides by
sums; the r and t of least imbalance max σ / min σ are kept. r itself is not stored: rounding with one scale a group of a row is the same for r·w
as for w. What we do differently: the span of a group may be clipped, at the same size and a fifth less KL at 2 bits. t costs 16/out bits a
weight and one multiplication of the input, or nothing once it is folded into a norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..calibration.statistics import Stats
from ..errors import CompressError
from ..formats import Scaled
from .rtn import RTN

STEP = 0.7, 2.0  # bounds of one iteration's correction
TOTAL = 1e-3, 1e3  # bounds of t


@dataclass(frozen=True)
class SINQ(RTN):
    group_size: int = 64  # input columns that share a scale; -1: one scale a row
    clip: Literal["none", "mse"] = "mse"  # how the span of a group of the normalised weight is shrunk; "none": min to max, as in the paper
    iterations: int = 16  # turns of normalising rows and columns; 0: t = 1, which is rtn

    def __post_init__(self):
        super().__post_init__()
        if self.iterations < 0:
            raise CompressError(f"iterations {self.iterations} must be at least 0; 16 is usual")

    def __call__(self, weight: Tensor, stats: Stats | None, *, stored: torch.dtype, where: str = "weight") -> Scaled:  # type: ignore[override]
        """weight [out, in] fp32 → Scaled(IntGroup, t [in]); t is rounded to 16 bits before the weight is divided by it."""
        t = self.columns(weight).to(self.scale_dtype(stored))
        return Scaled(super().__call__(weight / t.float(), stats, stored=stored, where=where), t)

    def columns(self, W: Tensor) -> Tensor:
        """t [in] fp32 of W [out, in]."""
        r, t = W.new_ones(len(W), 1), W.new_ones(W.shape[1])
        best, least = t, torch.inf
        for i in range(self.iterations + 1):
            rows, cols = ((W / r / t).std(dim, correction=0) for dim in (1, 0))
            live = torch.cat([rows[rows > 0], cols[cols > 0]])  # a row or column of zeros needs no scale
            if not len(live):
                break
            if (imbalance := float(live.max() / live.min())) < least:
                best, least = t, imbalance
            if i < self.iterations:
                r = (r * (rows[:, None] / live.min()).clamp(*STEP)).clamp(*TOTAL)
                t = (t * (cols / live.min()).clamp(*STEP)).clamp(*TOTAL)
        return best

    def planned(self, shape: tuple[int, int], stored: torch.dtype, where: str) -> Scaled:  # type: ignore[override]
        """The format this gives for a weight of that shape, on meta. Raises CompressError where it cannot be done."""
        return Scaled(super().planned(shape, stored, where), torch.empty(shape[1], dtype=self.scale_dtype(stored), device="meta"))
