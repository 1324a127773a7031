"""ADMM: let a dense solution and a sparse one pull each other until they agree on the mask, then solve the kept weights exactly.

    minimise ½ tr[(W−X) H_d (W−X)ᵀ] with X = Z and Z sparse, in scaled variables (diag H_d = 1):
    X ← (W H_d + ρ (Z − U)) (H_d + ρ I)⁻¹,    Z ← T(X + U),    U ← U + X − Z

X answers to every zero with the whole of H, where a gradient step sees a little of it, and U remembers who wants to come back: the mask is far
better than that of a greedy sweep. Meng et al., ALPS, arXiv 2406.07831, and Boža, arXiv 2401.02938, from whom the scaling is. ρ must begin low, to
search, and end high, to settle. Both papers factor H for one ρ or take its eigenvectors for all; four values of ρ, an inverse each, find masks
as good as a ρ that grows at every step. Cost: 4n³, then 2mn² a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..calibration.statistics import Factor, Stats
from ..errors import CompressError
from ..formats import Format
from .masks import SparseIntOptions
from .sweep import finish, sweep

STAGES = (0.03, 0.1, 0.3, 1.0)  # ρ, where diag(H_d) is 1


@dataclass(frozen=True)
class ADMM(SparseIntOptions):
    scope: Literal["row", "layer"] = "layer"  # without a pattern: as many in every row, or wherever in the layer they matter most
    iterations: int = 40  # rounds of X, Z and U, spread over four values of ρ

    def __post_init__(self):
        super().__post_init__()
        if self.iterations < len(STAGES):
            raise CompressError(f"iterations {self.iterations} must be at least {len(STAGES)}, one for each value of ρ; 40 is usual")

    def __call__(self, weight: Tensor, stats: Stats, *, stored: torch.dtype, where: str = "weight") -> Format:
        """weight [out, in] fp32 → Masked or Sparse24 of Dense, or of IntGroup with `bits`."""
        self.nm(weight.shape[1], where)  # refused before anything is computed
        factor = stats.factor(self.damp, False)
        return self.solve(*self.task(weight, stats, factor), stats, factor, stored)

    def solve(self, W: Tensor, say: Tensor, stats: Stats, factor: Factor, stored: torch.dtype) -> Format:
        """Near to W [out, in], of which each weight has its say [out, in]."""
        if factor.failed:  # told by the factor
            return finish(W, say, *sweep(W, factor.U, self, say), stats, factor, self, stored)
        theta, keep = self.search(W, say, stats.hessian, stats.ridge(factor), self.nm(W.shape[1]))
        return finish(W, say, theta, keep, stats, factor, self, stored)

    def search(self, W: Tensor, say: Tensor, H: Tensor, ridge: Tensor, nm: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
        """The sparse weight Z and its mask, [out, in]."""
        volume = (H.diagonal() + ridge).sqrt()
        A = H / volume / volume[:, None]
        A.diagonal().fill_(1)
        W = W * volume
        B = W @ A
        Z, U, live = W, torch.zeros_like(W), say > 0
        for k, rho in enumerate(STAGES):
            A.diagonal().fill_(1 + rho)
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(A))
            for _ in range(self.iterations * k // len(STAGES), self.iterations * (k + 1) // len(STAGES)):
                U += (B + rho * (Z - U)) @ inverse  # X + U
                keep = self.select(U.abs() * say, nm)
                Z = U * (keep & live)
                U -= Z
            U *= rho / STAGES[min(k + 1, len(STAGES) - 1)]  # it counts in units of ρ
        return Z / volume, keep
