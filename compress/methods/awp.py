"""AWP: projected gradient. Step towards the dense weight in the norm of H, keep the largest, repeat; then solve the kept weights exactly.

    minimise ½ tr[(W−Θ) H (W−Θ)ᵀ] over Θ with that many zeros:   Θ ← T( Θ + η (W−Θ) H )

T keeps the weights of highest score and zeroes the others (iterative hard thresholding). Liu et al., arXiv 2506.10205, step by η = 2/‖H‖_F and
score by |θ|, which hardly ever moves a weight into the mask when some inputs are loud. The default measures everything in the scaled variables
Θ·D, D² = diag H_d, where all inputs are equally loud: η = 1/λmax of the scaled H_d, score |θ_ij|·D_jj, so that with no step at all it is Wanda. We
start from Wanda's mask, as they do, and finish with least squares on the mask (support.py). Cost: 2mn² a step, nothing is factored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..calibration.statistics import Stats
from ..errors import CompressError
from ..formats import Format
from .masks import SparseIntOptions
from .sweep import finish, sweep


@dataclass(frozen=True)
class AWP(SparseIntOptions):
    iterations: int = 100  # gradient steps
    step: Literal["diagonal", "published"] = "diagonal"  # in scaled variables, or the paper's 2/‖H‖_F in the weights as they are

    def __post_init__(self):
        super().__post_init__()
        if self.iterations < 0:
            raise CompressError(f"iterations {self.iterations} must be at least 0")

    def __call__(self, weight: Tensor, stats: Stats, *, stored: torch.dtype, where: str = "weight") -> Format:
        """weight [out, in] fp32 → Masked or Sparse24 of Dense, or of IntGroup with `bits`."""
        nm, factor = self.nm(weight.shape[1], where), stats.factor(self.damp, False)
        W, say = self.task(weight, stats, factor)
        if factor.failed:  # told by the factor
            return finish(W, say, *sweep(W, factor.U, self, say), stats, factor, self, stored)
        H, ridge = stats.hessian, stats.ridge(factor)
        h = H.diagonal() + ridge
        if self.step == "diagonal":
            eta, volume = 1 / (h * largest_eigenvalue(H, ridge, h)), h.sqrt()
        else:
            eta, volume = 2 / torch.linalg.matrix_norm(H), torch.ones_like(h)
        keep = self.select(W.abs() * h.sqrt() * say, nm)
        live = say > 0
        theta = W * (keep & live)
        for _ in range(self.iterations):
            D = W - theta
            theta += (D @ H).addcmul_(ridge, D).mul_(eta)
            keep = self.select(theta.abs() * volume * say, nm)
            theta *= keep & live
        return finish(W, say, theta, keep, stats, factor, self, stored)


def largest_eigenvalue(H: Tensor, ridge: Tensor, h: Tensor, steps: int = 30) -> Tensor:
    """λmax of D⁻¹ (H + diag ridge) D⁻¹, D² = diag(h), by power iteration: a little below, which a step of up to 2/λmax forgives."""
    v = torch.linspace(1, 2, len(h), dtype=H.dtype, device=H.device)
    for _ in range(steps):
        v = v / v.norm()
        u = v / h.sqrt()
        v = (H @ u + ridge * u) / h.sqrt()
    return v.norm()
