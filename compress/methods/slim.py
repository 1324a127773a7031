"""SLiM: what pruning (and integers) took away comes back as a thin product, where the layer's output misses it most.

    Ŵ = S + AB,   S sparse, optionally quantized:   repeat  S ← solve(W − AB),   AB ← the best rank r of W − S in the norm of H_d

SLiM (arXiv 2410.09615) weighs the residual by diag H and goes round once. We whiten it by the whole of H (svd.py), which is the optimum for a given
S, let S be solved again for what the product leaves (as CALDERA does for integers, arXiv 2405.18886), by ADMM, and keep the best round. The rank
is what `extra` bits a weight buy, so that a layer of any shape pays the same share. Cost: `rounds` + 1 times ADMM and one eigenproblem each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..calibration.statistics import Factor, Stats
from ..errors import CompressError
from ..formats import Dense, Format, Product, Sum
from .admm import ADMM
from .svd import answer, leading
from .sweep import finish


@dataclass(frozen=True)
class SLiM(ADMM):
    extra: float = 0.25  # bits a weight spent on the product
    rounds: int = 2  # times that the sparse part is solved again for what the product leaves
    support: Literal["solved", "random"] = "solved"  # where the sparse part lives: by ADMM, or anywhere, as SLTrain has it (arXiv 2406.02214)

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.extra < math.inf or self.rounds < 0:
            raise CompressError(f"extra {self.extra} must be bits a weight, above 0, and rounds {self.rounds} at least 0; 0.25 and 2 are usual")

    def solve(self, W: Tensor, say: Tensor, stats: Stats, factor: Factor, stored: torch.dtype) -> Format:
        if self.support == "solved":
            return super().solve(W, say, stats, factor, stored)
        lot = torch.rand(W.shape, generator=torch.Generator().manual_seed(0)).to(W) * say
        keep = self.select(lot, self.nm(W.shape[1]))
        return finish(W, say, W * keep, keep, stats, factor, self, stored)

    def product(self, shape: tuple[int, int], stored: torch.dtype, where: str) -> Product:
        """The product on meta. Raises CompressError where `extra` does not buy one column and one row."""
        (m, n), bits = shape, 8 * stored.itemsize
        rank = int(self.extra * m * n / (bits * (m + n)))
        if not rank:
            raise CompressError(f"{where}: {self.extra} extra bits a weight of [{m}, {n}] buy no product, rank 1 costs {bits * (m + n) / (m * n):.3g}")
        return Product(tuple(Dense(torch.empty(s, dtype=stored, device="meta")) for s in ((m, rank), (rank, n))))

    def planned(self, shape: tuple[int, int], stored: torch.dtype, where: str) -> Sum:
        return Sum((super().planned(shape, stored, where), self.product(shape, stored, where)))

    def __call__(self, weight: Tensor, stats: Stats, *, stored: torch.dtype, where: str = "weight") -> Format:
        """weight [out, in] fp32 → Sum of Masked or Sparse24 and a Product of two Dense."""
        self.nm(weight.shape[1], where)
        factor, rank = stats.factor(self.damp, False), self.product(weight.shape, stored, where).factors[0].shape[1]
        W, say = self.task(weight, stats, factor)
        Hd = torch.eye(len(W.T), dtype=W.dtype, device=W.device) if factor.failed else stats.hessian + stats.ridge(factor).diag()
        L = torch.linalg.cholesky(Hd)
        low, found = torch.zeros_like(W), []
        for _ in range(self.rounds + 1):
            sparse = self.solve(W - low, say, stats, factor, stored)
            R = W - sparse.dequantize(W.dtype)
            right = Dense((leading(R @ L, rank).T @ R).to(stored))
            left = Dense(answer(R, right.dequantize(W.dtype), Hd).to(stored))
            low = Product((left, right)).dequantize(W.dtype)
            found.append((float(((R - low) @ L).square().sum(dtype=torch.float64)), Sum((sparse, Product((left, right))))))
        return min(found, key=lambda pair: pair[0])[1]
