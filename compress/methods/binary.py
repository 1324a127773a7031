"""Binary: one bit a weight with a scale a row and one a column, chosen in the norm of H; with `salient` columns at more bits it is PTQ1.61 in closed form.

    Ŵ = diag(s) (C / 2) diag(t),  C ∈ {−1, 1};       first s of a row:  2 Σ_j h_j|w_j| / Σ_j h_j, exact for Σ h (w − s c/2)²

PTQ1.61 (arXiv 2502.13179) keeps a fifth of the input columns at 4 bits and trains the scales of the others block by block; BiLLM (arXiv
2402.04291) gives its salient columns a second binary plane, which is `salient_bits: 2`. What we do differently: codes by GPTQ's sweep and descent, both
scales by their exact refits (dual.py), salient columns by what their error would cost under H instead of by the largest activation; a block tuner may follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .dual import DualScale


@dataclass(frozen=True)
class Binary(DualScale):
    levels: ClassVar[int] = 2

    @staticmethod
    def optimum(W: Tensor, h: Tensor) -> Tensor:
        return 2 * (W.abs() @ h) / h.sum()
