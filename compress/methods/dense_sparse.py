"""Dense × sparse: every row (or column) of a weight is a mix of a few of many atoms, where a product of two thin matrices makes it a mix of all of few.

    minimise tr[(W−AB) H_d (W−AB)ᵀ], the factor along the longer side sparse, more than rank atoms between them
    tall W, K = W L:    A ← the largest entries of K Bᵀ,   B ← the orthonormal U Vᵀ of Aᵀ K,   at the end least squares for either      (H_d = L Lᵀ)
    wide W:             B ← ADMM of Aᵀ W,                  A ← the orthonormal U Vᵀ of W H_d Bᵀ,   at the end the best A for that B

DSFormer (arXiv 2312.13211) codes the blocks of W one by one and trains; here the atoms are the whole layer's and everything is in closed form.
Orthonormal atoms turn the coding into a pruning problem: of Aᵀ W with the site's own H, or, whitened, with none at all, where keeping the largest
is exact and a round costs one product and one small SVD. It starts from the whitened SVD (svd.py), which is the case of no zeros. The dense
factor lies along the shorter side, where an atom is cheap. Bytes count the mask. Cost: `rounds` + 1 times ADMM on [atoms, in], or 12 `rounds` SVDs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration.statistics import Stats
from ..errors import CompressError
from ..formats import Dense, Format, Product
from .admm import ADMM
from .masks import SparseOptions
from .support import least_squares
from .svd import answer, leading
from .target import TargetOptions


@dataclass(frozen=True)
class DenseSparse(TargetOptions):
    ratio: float = 0.2  # share of the weight's bytes that goes away, mask included; 0: the weight stays as it is
    density: float = 0.55  # share of the sparse factor that is kept; fewer make room for more atoms
    rounds: int = 3  # times that the atoms are turned and the coefficients are chosen again; twelve times as many for tall weights, where it costs little
    iterations: int = 20  # rounds of ADMM for each choice, for wide weights
    damp: float = 0.01  # added to the diagonal of H, relative to its mean; raised tenfold until H can be factored

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.ratio < 1 or not 0 < self.density < 1 or self.rounds < 0:
            raise CompressError(f"ratio {self.ratio} must be a share from 0 to below 1, density {self.density} one between 0 and 1, "
                                f"rounds {self.rounds} at least 0")  # fmt: skip

    def sizes(self, shape: tuple[int, int], stored: torch.dtype, where: str) -> tuple[int, int]:
        """The number of atoms q, and of coefficients that the bytes allow. Raises CompressError where they allow none."""
        (short, long), bits = sorted(shape), 8 * stored.itemsize
        budget = (1 - self.ratio) * short * long
        q = min(short, int(budget / (short + long * (self.density + 1 / bits))))
        sparse = (q, shape[1]) if shape[0] < shape[1] else (shape[0], q)
        left = int(budget - short * q - 8 * sparse[0] * -(-sparse[1] // 8) / bits)
        if q < 1 or left < 1:
            raise CompressError(f"{where}: {self.ratio:.0%} fewer bytes than [{shape[0]}, {shape[1]}] leave no room for atoms; "
                                "use a smaller ratio, or ignore the layer")  # fmt: skip
        return q, min(left, q * long)

    def planned(self, shape: tuple[int, int], stored: torch.dtype, where: str) -> Format:
        if not self.ratio:
            return Dense(torch.empty(shape, dtype=stored, device="meta"))
        (m, n), (q, left) = shape, self.sizes(shape, stored, where)
        pruning, empty = self.pruning(left, q * max(m, n)), lambda *size: Dense(torch.empty(size, dtype=stored, device="meta"))
        return Product((empty(m, q), pruning.planned((q, n), stored, where)) if m < n else (pruning.planned((m, q), stored, where), empty(q, n)))

    def pruning(self, left: int, of: int) -> ADMM:
        return ADMM(sparsity=1 - left / of, iterations=self.iterations, damp=self.damp)

    def __call__(self, weight: Tensor, stats: Stats, *, stored: torch.dtype, where: str = "weight") -> Format:
        """weight [out, in] fp32 → Product of Dense [out, atoms] and Masked [atoms, in], of a tall one Masked [out, atoms] and Dense [atoms, in]."""
        if not self.ratio:
            return Dense(weight.to(stored))
        (m, n), (q, left), factor = weight.shape, self.sizes(tuple(weight.shape), stored, where), stats.factor(self.damp, False)
        W, pruning = self.target(weight, stats, factor), self.pruning(left, q * max(m, n))
        H, ridge = (torch.zeros_like(factor.U), torch.ones_like(factor.U[0])) if factor.failed else (stats.hessian, stats.ridge(factor))
        return self.wide(W, H, ridge, q, pruning, stored) if m < n else self.tall(W, H + ridge.diag(), q, pruning, stored)

    def wide(self, W: Tensor, H: Tensor, ridge: Tensor, q: int, pruning: ADMM, stored: torch.dtype) -> Product:
        Hd = H + ridge.diag()
        A = leading(W @ torch.linalg.cholesky(Hd), q)
        for k in range(self.rounds + 1):
            C = A.T @ W
            B, keep = pruning.search(C, torch.ones_like(C), H, ridge, None)
            B = least_squares(C, B, keep, H, ridge)
            if k < self.rounds:
                A = orthonormal(W @ Hd @ B.T)
        right = pruning.store(B, keep, stored)
        return Product((Dense(answer(W, right.dequantize(W.dtype), Hd).to(stored)), right))

    def tall(self, W: Tensor, Hd: Tensor, q: int, pruning: SparseOptions, stored: torch.dtype) -> Product:
        L = torch.linalg.cholesky(Hd)
        K = W @ L
        B = leading(K.T, q).T  # [q, in], orthonormal in the whitened space
        for k in range(12 * self.rounds + 1):
            A = K @ B.T
            keep = pruning.select(A.abs(), None)
            A *= keep
            if k < 12 * self.rounds:
                B = orthonormal(A.T @ K)
        for _ in range(3):
            B = answer(K.T, A.T, None).T  # A⁺ K
            G = B @ B.T
            A = least_squares(answer(K, B, None), A, keep, G, RIDGE * G.diagonal().mean().expand(q))
        right = Dense(torch.linalg.solve_triangular(L, answer(K.T, A.T, None).T, upper=False, left=False).to(stored))
        B = right.dequantize(W.dtype)
        G = B @ Hd @ B.T
        A = least_squares(answer(W, B, Hd), A, keep, G, RIDGE * G.diagonal().mean().expand(q))  # for the B that is stored
        return Product((pruning.store(A, keep, stored), right))


RIDGE = 1e-6  # of the atoms' Gram matrix: atoms that no row uses leave it singular


def orthonormal(X: Tensor) -> Tensor:
    """The orthonormal matrix nearest to X."""
    U, _, V = torch.linalg.svd(X, full_matrices=False)
    return U @ V
