"""The oracle: y = x · Ŵᵀ + b with the weight written out. Every kernel is checked against this file; nothing fast ever calls it."""

import torch
from torch import Tensor

from ..formats import Columns, Dense, Format, Product, Scaled, Sum, Transformed
from .activations import Grid, Rounded, dequantize, quantize
from .gated import Gated, apply


def dense(format: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix [out, in] that `format` stands for. Leaves are exact to fp32; the combinators' arithmetic runs in `dtype`."""
    if isinstance(format, Sum):
        return sum(dense(term, dtype) for term in format.terms)  # type: ignore[return-value]
    if isinstance(format, Product):
        return torch.linalg.multi_dot([dense(factor, dtype) for factor in format.factors])
    if isinstance(format, Transformed):
        return dense(format.inner, dtype) @ dense(format.transform, dtype).T
    if isinstance(format, Scaled):
        return dense(format.inner, dtype) * format.columns.to(dtype)
    if isinstance(format, Columns):
        return torch.cat([dense(format.first, dtype), dense(format.second, dtype)], 1)[:, torch.cat(format.places()).argsort()]
    return format.dequantize().to(dtype)


def rounded(x: Tensor, format: Format, grid: Grid) -> Tensor:
    """x · Ŵᵀ where every quantized leaf sees its input on `grid`."""
    if isinstance(format, Sum):
        return sum(rounded(x, term, grid) for term in format.terms)  # type: ignore[return-value]
    if isinstance(format, Product):
        for factor in reversed(format.factors):
            x = rounded(x, factor, grid)
        return x
    if isinstance(format, Transformed):
        return rounded(x @ dense(format.transform, x.dtype), format.inner, grid)
    if isinstance(format, Scaled):
        return rounded(x * format.columns.to(x.dtype), format.inner, grid)
    if isinstance(format, Columns):
        return sum(rounded(x[..., p], part, grid) for p, part in zip(format.places(), (format.first, format.second), strict=True))  # type: ignore[return-value]
    return (x if isinstance(format, Dense) else dequantize(*quantize(x, grid), x.dtype)) @ dense(format, x.dtype).T


def matmul(x: Tensor, format: Format | Rounded | Gated, bias: Tensor | None = None, dtype: torch.dtype = torch.float32,
           activations: Grid | None = None) -> Tensor:  # fmt: skip
    """x [..., in] in any float dtype → [..., out] in `dtype`: fp32, or fp64 to judge fp32 paths."""
    if isinstance(format, Gated):
        return apply(matmul(x, format.inner, bias, dtype, activations))
    if isinstance(format, Rounded):
        format, activations = format.inner, format.grid
    x = x.to(dtype)
    y = x @ dense(format, dtype).T if activations is None else rounded(x, format, activations)
    return y if bias is None else y + bias.to(dtype)
