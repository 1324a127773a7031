"""Dense × sparse: every input's column is a mix of a few of many atoms, where a product of two thin matrices makes it a mix of all of few.

    minimise tr[(W−DS) H_d (W−DS)ᵀ] over D [m, q] and sparse S [q, n], q above the rank that two dense factors could have:
    S ← ADMM of Dᵀ W,    D ← the orthonormal U Vᵀ of W H_d Sᵀ,    … and at the end the best D for that S, orthonormal or not

DSFormer (arXiv 2312.13211) codes the blocks of W one by one and trains; here the dictionary is the whole layer's and everything is in closed form:
while D is orthonormal ‖(W−DS)L‖ is ‖(DᵀW−S)L‖ and a constant, which is a pruning problem with the site's own H. It starts from the whitened SVD
(svd.py). Bytes count the mask. Cost: `rounds` + 1 times ADMM on [q, n].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration.statistics import Stats
from ..errors import CompressError
from ..formats import Dense, Format, Product
from .admm import ADMM
from .support import least_squares
from .svd import answer, leading
from .target import TargetOptions


@dataclass(frozen=True)
class DenseSparse(TargetOptions):
    ratio: float = 0.2  # share of the weight's bytes that goes away, mask included; 0: the weight stays as it is
    atoms: float = 1.2  # columns of the dense factor, relative to the rank that dense factors of the same size would have
    rounds: int = 3  # times that the dictionary is turned and the coefficients are chosen again
    iterations: int = 20  # rounds of ADMM for each choice
    damp: float = 0.01  # added to the diagonal of H, relative to its mean; raised tenfold until H can be factored

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.ratio < 1 or not 1 < self.atoms < math.inf or self.rounds < 0:
            raise CompressError(f"ratio {self.ratio} must be a share from 0 to below 1, atoms {self.atoms} above 1, rounds {self.rounds} at least 0")

    def coefficients(self, shape: tuple[int, int], stored: torch.dtype, where: str) -> tuple[int, ADMM]:
        """The number of atoms, and the pruning that leaves as many coefficients as the bytes allow. Raises CompressError where they allow none."""
        (m, n), bits = shape, 8 * stored.itemsize
        rank = (1 - self.ratio) * m * n / (m + n)
        q = min(m, int(self.atoms * rank))
        left = int(((1 - self.ratio) * bits * m * n - bits * m * q - 8 * q * -(-n // 8)) / bits)
        if not 0 < left < q * n:
            raise CompressError(f"{where}: {q} atoms of [{m}, {n}] leave {left} numbers for {q * n} coefficients; set atoms between 1 and {1 + n / m:.3g}")
        return q, ADMM(sparsity=1 - left / (q * n), iterations=self.iterations, damp=self.damp)

    def planned(self, shape: tuple[int, int], stored: torch.dtype, where: str) -> Format:
        if not self.ratio:
            return Dense(torch.empty(shape, dtype=stored, device="meta"))
        q, pruning = self.coefficients(shape, stored, where)
        return Product((Dense(torch.empty(shape[0], q, dtype=stored, device="meta")), pruning.planned((q, shape[1]), stored, where)))

    def __call__(self, weight: Tensor, stats: Stats, *, stored: torch.dtype, where: str = "weight") -> Format:
        """weight [out, in] fp32 → Product of Dense [out, atoms] and Masked [atoms, in]."""
        if not self.ratio:
            return Dense(weight.to(stored))
        (q, pruning), factor = self.coefficients(tuple(weight.shape), stored, where), stats.factor(self.damp, False)
        W = self.target(weight, stats, factor)
        H, ridge = (torch.zeros_like(factor.U), torch.ones_like(factor.U[0])) if factor.failed else (stats.hessian, stats.ridge(factor))
        Hd = H + ridge.diag()
        D = leading(W @ torch.linalg.cholesky(Hd), q)
        for k in range(self.rounds + 1):
            B = D.T @ W
            S, keep = pruning.search(B, torch.ones_like(B), H, ridge, None)
            S = least_squares(B, S, keep, H, ridge)
            if k < self.rounds:
                U, _, V = torch.linalg.svd(W @ Hd @ S.T, full_matrices=False)
                D = U @ V
        right = pruning.store(S, keep, stored)
        return Product((Dense(answer(W, right.dequantize(W.dtype), Hd).to(stored)), right))
