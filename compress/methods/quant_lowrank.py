"""Quantized + low rank: what any quantizer leaves of a weight is given, where the layer's output misses it most, to a thin product; by turns.

    Ŵ = Q + AB:   Q ← leaf(W − AB),   R = W − Q,   B ← Pᵀ R,  P the r leading left singular vectors of R S,   A ← R H_d Bᵀ (B H_d Bᵀ)⁻¹

S Sᵀ = H_d makes AB the best product of rank r for the Q at hand (svd.py), and the leaf solves the layer's own problem for the AB at hand: CALDERA (Saha
et al., arXiv 2405.18886), with 4-bit factors. S = diag(H)^½ and no turn after the first is LQER (arXiv 2402.02446); S = I, a vector quantizer and
factors trained per block is ReALLM (arXiv 2405.13155). What we do differently: any of our quantizers is the leaf, A is always the least-squares answer
in the norm of H for the B that is stored, quantized factors come from GPTQ (A under B H_d Bᵀ, so that it makes up for what rounding did to B), and the
best turn is kept, so more turns never harm. The rank is what `extra` bits a weight buy: a layer of any shape pays the same share. Cost: `rounds` + 1
times the leaf and one eigenproblem of the smaller side each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..calibration.statistics import Stats
from ..errors import CompressError
from ..formats import Dense, Format, IntGroup, Product, Sum
from .binary import Binary
from .gptq import GPTQ
from .lnq import LNQ
from .nf import NF
from .options import IntOptions
from .rtn import RTN
from .svd import answer, leading
from .target import TargetOptions
from .ternary import Ternary
from .trellis import TrellisCoding

LEAVES: dict[str, tuple[Any, Callable[[Any, Any], Any]]] = {  # the bits that a leaf can have, and the leaf
    "rtn": (range(2, 9), lambda o, bits: RTN(bits=bits, group_size=o.group_size)),
    "gptq": (range(2, 9), lambda o, bits: GPTQ(bits=bits, group_size=o.group_size, damp=o.damp)),
    "lnq": (range(1, 5), lambda o, bits: LNQ(bits=bits, damp=o.damp)),
    "nf": ((4,), lambda o, bits: NF(group_size=o.group_size)),
    "trellis": (None, lambda o, bits: TrellisCoding(bits=bits, damp=o.damp)),
    "ternary": ((1.6,), lambda o, bits: Ternary(damp=o.damp)),
    "binary": ((1,), lambda o, bits: Binary(damp=o.damp)),
}


@dataclass(frozen=True)
class QuantLowRank(TargetOptions):
    leaf: Literal["rtn", "gptq", "lnq", "nf", "trellis", "ternary", "binary"] = "gptq"  # the quantizer, with the defaults of its own method
    bits: float = 2  # of the leaf: 1.6 for ternary, 1 for binary, 4 for nf
    group_size: int = 128  # of the leaf, where it has groups: input columns that share a scale; -1: one scale a row
    extra: float = 0.25  # bits a weight that the product may take, which decides its rank
    rank: int = -1  # a rank, in the place of extra; 0: the leaf alone
    factor_bits: Literal[None, 4, 8] = None  # quantize both factors by GPTQ, a scale a row; None: they have the dtype that the model is stored in
    whiten: Literal["hessian", "diagonal", "none"] = "hessian"  # the norm in which the product is the best one
    rounds: int = 3  # times that the leaf is solved again for what the product leaves; 0: the residual alone
    damp: float = 0.01  # added to the diagonal of H, relative to its mean; raised tenfold until H can be factored

    def __post_init__(self):
        super().__post_init__()
        allowed = LEAVES[self.leaf][0]
        if allowed is not None and self.bits not in allowed:
            raise CompressError(f"bits {self.bits:g} is not what leaf {self.leaf} has; set bits to {', '.join(f'{b:g}' for b in allowed)}")
        if self.rounds < 0 or self.rank < -1 or not 0 <= self.extra < math.inf or not 0 <= self.damp < math.inf:
            raise CompressError(f"rounds {self.rounds}, extra {self.extra} and damp {self.damp} must be at least 0, rank {self.rank} at least -1")
        self.quantizer()  # its own check of what it is given

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | self.quantizer().needs

    def quantizer(self):
        return LEAVES[self.leaf][1](self, int(self.bits) if self.bits % 1 == 0 else self.bits)

    def rank_of(self, shape: tuple[int, int], stored: torch.dtype, where: str) -> int:
        """The rank for a weight of that shape. Raises CompressError where `extra` buys none, or `rank` is more than the weight can have."""
        (m, n), step = shape, 32 // self.factor_bits if self.factor_bits else 1  # rows of codes are whole words
        price, fixed = (self.factor_bits * (m + n) + 16, 16 * m) if self.factor_bits else (8 * stored.itemsize * (m + n), 0)
        if self.rank >= 0:
            if self.rank > min(m, n) or self.rank % step:
                raise CompressError(f"{where}: rank {self.rank} of [{m}, {n}] must be 0 to {min(m, n) // step * step}, in steps of {step}")
            return self.rank
        rank = int((self.extra * m * n - fixed) / price) // step * step
        if self.extra and rank < 1:
            least = (fixed + step * price) / (m * n)
            raise CompressError(f"{where}: {self.extra} extra bits a weight of [{m}, {n}] buy no product, rank {step} costs {least:.3g}; "
                                "set extra to that, or ignore the layer")  # fmt: skip
        return min(max(rank, 0), min(m, n) // step * step)

    def planned(self, shape: tuple[int, int], stored: torch.dtype, where: str) -> Format:
        """The format this gives for a weight of that shape, on meta. Raises CompressError where it cannot be done."""
        (m, n), rank, leaf = shape, self.rank_of(shape, stored, where), self.quantizer().planned(shape, stored, where)
        if not rank:
            return leaf

        def factor(m: int, n: int) -> Format:
            if self.factor_bits is None:
                return Dense(torch.empty(m, n, dtype=stored, device="meta"))
            return IntGroup.planned((m, n), self.factor_bits, n, True, IntOptions.scale_dtype(stored))

        return Sum((leaf, Product((factor(m, rank), factor(rank, n)))))

    def __call__(self, weight: Tensor, stats: Stats, *, stored: torch.dtype, where: str = "weight") -> Format:
        """weight [out, in] fp32 (fp64 in tests) → Sum of the leaf's format and a Product of two Dense or IntGroup; the leaf's alone at rank 0."""
        found, errors = self.solve(weight, stats, stored, where)
        return found[errors.index(min(errors))]

    def solve(self, weight: Tensor, stats: Stats, stored: torch.dtype, where: str) -> tuple[list[Format], list[float]]:
        """What every turn gave, and its error in the damped H-norm."""
        factor, leaf, rank = stats.factor(self.damp, True), self.quantizer(), self.rank_of(tuple(weight.shape), stored, where)
        W = self.target(weight, stats, factor)
        if not rank:
            return [leaf(W, stats, stored=stored, where=where)], [0.0]
        Hd = torch.eye(len(W.T), dtype=W.dtype, device=W.device) if factor.failed else stats.hessian + stats.ridge(factor).diag()
        whitened = {"hessian": lambda R: R @ torch.linalg.cholesky(Hd), "diagonal": lambda R: R * Hd.diagonal().sqrt(), "none": lambda R: R}[self.whiten]
        low, found, errors = torch.zeros_like(W), list[Format](), list[float]()
        for _ in range(self.rounds + 1):
            quantized = leaf(W - low, stats, stored=stored, where=where)
            R = W - quantized.dequantize(W.dtype)
            product = self._product(R, leading(whitened(R), rank).T @ R, Hd, stats, stored, where)
            low = product.dequantize(W.dtype)
            D = R - low
            errors.append(float((D @ Hd).mul_(D).sum(dtype=torch.float64)))
            found.append(Sum((quantized, product)))
        return found, errors

    def _product(self, R: Tensor, B: Tensor, Hd: Tensor, stats: Stats, stored: torch.dtype, where: str) -> Product:
        def store(M: Tensor, seen: Stats) -> Format:
            if self.factor_bits is None:
                return Dense(M.to(stored))
            return GPTQ(bits=self.factor_bits, group_size=-1, sym=True, damp=self.damp)(M, seen, stored=stored, where=where)

        right = store(B, stats)
        B = right.dequantize(R.dtype)
        return Product((store(answer(R, B, Hd), Stats(B @ Hd @ B.T)), right))
