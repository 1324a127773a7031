"""SVD: a weight as the product of two thin matrices, the directions chosen by what they carry of the layer's output.

    minimise tr[(W−AB) H (W−AB)ᵀ] over rank r:   P = the r leading left singular vectors of W·S, S Sᵀ = H_d;   A = P,  B = Pᵀ W

The loss is the sum of the squared singular values left out, exactly. Any S gives a method: chol(H_d) is SVD-LLM (arXiv 2403.07378), S = diag(mean
square of the input)^α/2 is ASVD (arXiv 2312.05821), the identity is plain SVD (Greenformers, LRT). Pᵀ W = Σ Vᵀ S⁻¹, so nothing is inverted. Since P
is orthonormal, an error in B costs what GPTQ minimises with the site's own H; given B, the best A and the price of an error in it come from
B H Bᵀ: so with `bits` both factors are quantized by GPTQ, the second making up for the first. A rank above mn/(m+n) would store more than W.
Cost: one eigenproblem of the smaller side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..calibration.statistics import Stats
from ..errors import CompressError
from ..formats import Dense, Format, IntGroup, Product
from ..formats.int_group import check_group_size
from .gptq import GPTQ
from .options import IntOptions
from .target import TargetOptions, importance

STEP = 32  # the rank of quantized factors is a multiple of this, so that a row of A is whole groups


@dataclass(frozen=True)
class SVD(TargetOptions):
    ratio: float = 0.2  # share of the weight's parameters that goes away, the rank is what the others allow; 0: the weight stays as it is
    rank: int = 0  # a rank, in the place of ratio; 0: by ratio
    whiten: Literal["cholesky", "asvd", "inputs", "none"] = "cholesky"  # least error of the output, of inputs scaled by loudness, of the input, of W
    alpha: float = 0.5  # for asvd: the power of the input's loudness
    gradient: bool = False  # rows count by what an error in their output does to the model's loss; False: outputs alike
    joint: bool = False  # one right factor for all linears that read the same input (q, k, v; gate, up), stored once; the rank is then theirs together
    refit: bool = True  # solve A anew for the B that is stored, by least squares
    bits: Literal[None, 2, 3, 4, 5, 6, 7, 8] = None  # quantize both factors by GPTQ; None: they have the dtype that the model is stored in
    group_size: int = 128  # with bits: input columns that share a scale; -1: one scale a row
    damp: float = 0.01  # added to the diagonal of H, relative to its mean; raised tenfold until H can be factored

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | ({"gradient"} if self.gradient else set())

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.ratio < 1 or self.rank < 0:
            raise CompressError(f"ratio {self.ratio} must be a share from 0 to below 1 and rank {self.rank} at least 0")
        if self.joint and self.guided:
            raise CompressError("joint solves q, k and v on one H, guided weighs their tokens apart; set one of the two to false")

    def rank_of(self, shape: tuple[int, int], where: str) -> int:
        """The rank for a weight of that shape. Raises CompressError naming the break-even where factors would not save anything."""
        m, n = shape
        even, step = m * n / (m + n), STEP if self.bits else 1
        rank = self.rank or int(even * (1 - self.ratio)) // step * step
        if rank > even or rank % step or not rank:
            raise CompressError(f"{where}: rank {rank} of [{m}, {n}]: two factors of rank r store r·{m + n} numbers, break-even is {even:.0f}; use rank "
                                f"{step} to {int(even) // step * step}{f' in steps of {step}' if step > 1 else ''}, or ignore the layer")  # fmt: skip
        return rank

    @property
    def nothing(self) -> bool:
        """Factors of as many numbers as the weight has would only lose."""
        return not (self.ratio or self.rank or self.bits)

    def planned(self, shape: tuple[int, int], stored: torch.dtype, where: str) -> Format:
        if self.nothing:
            return Dense(torch.empty(shape, dtype=stored, device="meta"))
        (m, n), rank = shape, self.rank_of(shape, where)
        if self.bits is None:
            return Product(tuple(Dense(torch.empty(s, dtype=stored, device="meta")) for s in ((m, rank), (rank, n))))
        plan = lambda m, n, size: IntGroup.planned((m, n), self.bits, size, False, IntOptions.scale_dtype(stored))
        return Product((plan(m, rank, STEP), plan(rank, n, check_group_size(n, self.group_size, where))))

    def __call__(self, weight: Tensor, stats: Stats, *, stored: torch.dtype, where: str = "weight") -> Format:
        """weight [out, in] fp32 (fp64 in tests) → Product of A [out, rank] and B [rank, in], Dense or IntGroup."""
        if self.nothing:
            return Dense(weight.to(stored))
        rank, factor, h = self.rank_of(tuple(weight.shape), where), stats.factor(self.damp, False), stats.hessian.diagonal()
        W = self.target(weight, stats, factor)
        a = importance(W, stats) if self.gradient else torch.ones_like(W[:, :1])
        Hd = torch.eye(len(h), dtype=h.dtype, device=h.device) if factor.failed else stats.hessian + stats.ridge(factor).diag()
        if self.whiten == "inputs":
            B = leading(Hd, rank).T
        else:
            S = h.clamp(min=1e-12 * h.max()).pow(self.alpha / 2).diag() if self.whiten == "asvd" and not factor.failed else torch.eye(len(h)).to(W)
            P = leading(a * W @ (torch.linalg.cholesky(Hd) if self.whiten == "cholesky" else S), rank)
            B = P.T @ (a * W)
        quantize = lambda bits, size: GPTQ(bits=bits, group_size=size, damp=self.damp)
        right = quantize(self.bits, self.group_size)(B, stats, stored=stored, where=where) if self.bits else Dense(B.to(stored))
        B = right.dequantize(W.dtype)
        A = answer(W, B, Hd) if self.refit else W @ B.T if self.whiten == "inputs" else P / a
        left = quantize(self.bits, STEP)(A, Stats(B @ Hd @ B.T), stored=stored, where=where) if self.bits else Dense(A.to(stored))
        return Product((left, right))


def leading(K: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors [m, rank] of K [m, n], orthonormal: eigenvectors of the smaller Gram matrix, in fp64."""
    D = K.double()
    if D.shape[0] <= D.shape[1]:
        P = torch.linalg.eigh(D @ D.T).eigenvectors[:, -rank:].flip(1)
    else:
        P = torch.linalg.qr(D @ torch.linalg.eigh(D.T @ D).eigenvectors[:, -rank:].flip(1)).Q
    return P.to(K.dtype).contiguous()


def answer(W: Tensor, B: Tensor, H: Tensor | None) -> Tensor:
    """The best A [m, rank] for a B [rank, n] that is given: W H Bᵀ (B H Bᵀ)⁻¹, in fp64. None: H = I."""
    C = (B.T if H is None else H @ B.T).double()
    G = B.double() @ C
    G.diagonal().add_(1e-10 * G.diagonal().mean())
    return torch.linalg.solve(G, (W.double() @ C).T, left=True).T.to(W.dtype).contiguous()
