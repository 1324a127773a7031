"""The oracle: y = x · Ŵᵀ + b with the weight written out. Every kernel is checked against this file; nothing fast ever calls it."""

import torch
from torch import Tensor

from ..formats import Columns, Format, Product, Scaled, Sum, Transformed


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


def matmul(x: Tensor, format: Format, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """x [..., in] in any float dtype → [..., out] in `dtype`: fp32, or fp64 to judge fp32 paths."""
    y = x.to(dtype) @ dense(format, dtype).T
    return y if bias is None else y + bias.to(dtype)
