"""A transformed weight with rounded activations: the token is transformed and rounded in one kernel, and what is written of it are bytes.

    q_x, s_x = round(x · T)              y = s_x · (q_x · Ŵᵀ) + b              T Kronecker (triton_transform.py), the product triton_a8.py's

Apart, the rotated token is written in 16 bits and read again to be rounded: 5 bytes a channel more than the 3 of this.
"""

from dataclasses import dataclass

from torch import Tensor

from ..formats import Format, Transformed
from . import triton_a8, triton_transform
from .activations import Rounded


@dataclass(frozen=True)
class Prepared:
    transform: triton_transform.Prepared
    weight: triton_a8.Prepared


def supports(format: Format | Rounded, x: Tensor) -> str | None:
    """None if `prepare` and `matmul` run this, else the reason."""
    if not (isinstance(format, Rounded) and isinstance(format.inner, Transformed)):
        return "not a transformed weight with rounded activations"
    return triton_transform.supports(format.inner.transform, x) or triton_a8.supports(Rounded(format.inner.inner, format.grid), x)


def prepare(format: Rounded, dtype) -> Prepared:
    assert isinstance(format.inner, Transformed)
    weight = triton_a8.prepare(Rounded(format.inner.inner, format.grid), dtype)
    return Prepared(triton_transform.prepared(format.inner.transform, dtype), weight)  # type: ignore[arg-type]


def matmul(x: Tensor, prepared: Prepared, bias: Tensor | None = None) -> Tensor:
    """x [m, in] bf16 or fp16 → [m, out] in its dtype."""
    codes, scales = triton_transform.quantized(x, prepared.transform, prepared.weight.grid)
    return triton_a8.multiply(codes, scales, prepared.weight, bias, x.dtype)
