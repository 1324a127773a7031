"""Rounded activations on CPU through `torch._int_mm`, for small weights: its fixed cost is a tenth of qlinear's (cpu_int8.py), its speed a half.

    y[m, n] = s_x[m] · s_w[n] · (q_x · q_wᵀ)[m, n]       an int32 matrix in between

In a compiled graph the product stays an op of ours: Inductor (torch 2.13) would make qlinear of it with signed codes, or a loop of its own, and both take
20 to 2000 times as long on a processor without AMX.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats import Format
from . import ops
from .activations import Grid, Rounded, quantize
from .cpu_int import bytes_per_row
from .cpu_int8 import integers


@dataclass(frozen=True)
class Packed:
    weight: Tensor  # int8 [in, out], the transposed view of rows: a contiguous [in, out] is three times slower
    scales: Tensor  # fp32 [out]
    grid: Grid  # of the activations


def supports(format: Format | Rounded, x: Tensor) -> str | None:
    """None if `prepare` and `matmul` run this, else the reason."""
    if not isinstance(format, Rounded):
        return "activations are not rounded"
    return "this processor has no fp8" if format.grid == "fp8" else bytes_per_row(format.inner)


def prepare(format: Rounded, dtype: torch.dtype = torch.bfloat16) -> Packed:
    """One byte a weight."""
    q, s = integers(format.inner)
    return Packed(q.contiguous().t(), s, format.grid)


def _multiply(codes: Tensor, token: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = torch._int_mm(codes, weight).float().mul_(token).mul_(scales)
    return (y if bias is None else y.add_(bias)).to(dtype)


op = ops.define("cpu_int_mm", "(Tensor codes, Tensor token, Tensor weight, Tensor scales, Tensor? bias, ScalarType dtype) -> Tensor",
                lambda codes, token, weight, scales, bias, dtype: token.new_empty(codes.shape[0], scales.shape[0], dtype=dtype), CPU=_multiply)  # fmt: skip


def matmul(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x [m, in] → [m, out] in x's dtype."""
    codes, token = quantize(x, packed.grid)
    return (op if torch.compiler.is_compiling() else _multiply)(codes, token, packed.weight, packed.scales, bias, x.dtype)
