"""Ternary: weights of −1, 0 and 1 with a scale a row and one a column, 1.6 bits each, chosen in the norm of H; no multiplication is left in the product.

    Ŵ = diag(s) C diag(t),  C ∈ {−1, 0, 1}
    first s of a row:  with |w| sorted, the k that maximises (Σ_{j≤k} h_j|w_j|)² / Σ_{j≤k} h_j;   s = Σ_{j≤k} h_j|w_j| / Σ_{j≤k} h_j

The layout is that of BitNet b1.58 (arXiv 2402.17764), five digits a byte, with a scale a row in the place of one a matrix. BitNet trains its weights
for mean|w| as scale and half of it as threshold; for given weights the scale above is the exact optimum of Σ h (w − s c)², since the best codes for any
s are a top-k of |w|. From there on codes and scales answer to the whole of H (dual.py). The trellis has
a third less error at the same bytes, but needs a decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .dual import DualScale


@dataclass(frozen=True)
class Ternary(DualScale):
    levels: ClassVar[int] = 3

    @staticmethod
    def optimum(W: Tensor, h: Tensor) -> Tensor:
        size, order = W.abs().sort(dim=1, descending=True, stable=True)
        h = h.expand_as(W).gather(1, order)
        reached, mass = (h * size).cumsum(1), h.cumsum(1)
        k = (reached.square() / mass).argmax(1, keepdim=True)
        return (reached.gather(1, k) / mass.gather(1, k))[:, 0]
