"""SiLU(gate) · up as part of the product that makes both: half as many outputs are written, and none is read again.

    y = SiLU(x · W_gᵀ + b_g) · (x · W_uᵀ + b_u)        for W = [W_g; W_u], the gate's rows first

`Gated(W)` is to dispatch what a weight is: kernels say whether they can, and what always works is the product, then the two halves.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..formats import Format


@dataclass(frozen=True)
class Gated:
    """A weight of gate and up, of whose product [..., out] SiLU(gate) · up is wanted, [..., out / 2]."""

    inner: Format

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape[0] // 2, self.inner.shape[1]

    def describe(self) -> str:
        return f"gated {self.inner.describe()}"


def apply(y: Tensor) -> Tensor:
    """The product [..., out] → [..., out / 2]."""
    gate, up = y.chunk(2, -1)
    return F.silu(gate) * up
