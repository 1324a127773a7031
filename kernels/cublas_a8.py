"""8-bit activations through cuBLAS: `torch._int_mm` and `torch._scaled_mm`, for prompts, where a tuned GEMM is hard to beat.

    y = sx · (qx · qᵀ) · s + b       integers, int32 sums, then one pass for both scales;      FP8: the scales are arguments of the product

Per-token scales and one scale a row, no groups. Dispatch measures them against the Triton kernel of the same arithmetic (triton_a8.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats import FloatBlock, Format, IntGroup
from .activations import Grid, Rounded
from .triton_quantize import quantize

MORE_THAN = 16  # rows of x: what _int_mm asks


@dataclass(frozen=True)
class Prepared:
    weight: Tensor  # int8 or E4M3 [in, out], the transposed view of rows
    scales: Tensor  # fp32 [1, out]
    grid: Grid


def supports(format: Format | Rounded, x: Tensor) -> str | None:
    """None if `prepare` and `matmul` run this, else the reason."""
    if not isinstance(format, Rounded):
        return "activations are not rounded"
    leaf, fp8 = format.inner, format.grid == "fp8"
    if fp8 != (isinstance(leaf, FloatBlock) and leaf.name == "fp8"):
        return f"{leaf.describe()} and {format.grid} activations: both are to be integers, or both fp8"
    if not isinstance(leaf, FloatBlock | IntGroup) or leaf.scales.shape[1] > 1 or len(leaf.scales) not in (1, leaf.shape[0]):
        return f"{leaf.describe()}: one scale a row is what a product in one piece can have"
    if isinstance(leaf, IntGroup) and leaf.zeros is not None and (leaf.zeros.is_floating_point() or leaf.bits_per_code == 8):
        return f"{leaf.describe()}: codes minus zero points are not int8"
    if not x.is_cuda:
        return f"activations are on {x.device}, not on CUDA"
    if fp8 and (torch.cuda.get_device_capability(x.device) < (8, 9) or x.dtype != torch.bfloat16):
        return f"FP8 tensor cores came with compute capability 8.9 and give bf16; this is {torch.cuda.get_device_capability(x.device)} and {x.dtype}"
    if leaf.shape[0] % 16 or leaf.shape[1] % 16:
        return f"{leaf.shape[0]}×{leaf.shape[1]}: both are to be multiples of 16"
    return None if x.shape[0] > MORE_THAN else f"{x.shape[0]} rows: _int_mm asks for more than {MORE_THAN}"


def prepare(format: Rounded, dtype: torch.dtype) -> Prepared:
    leaf = format.inner
    if isinstance(leaf, FloatBlock):
        return Prepared(leaf.codes.contiguous().view(torch.float8_e4m3fn).T, leaf.factors().expand(leaf.shape[0], 1).T.contiguous(), "fp8")
    q, s = leaf.unpack().float() - leaf.zero_points(), leaf.scales.float().T  # type: ignore[attr-defined]
    q, s = (2 * q, s / 2) if leaf.bits_per_code == 1 else (q, s)  # type: ignore[attr-defined]
    return Prepared(q.to(torch.int8).T, s.contiguous(), format.grid)


def matmul(x: Tensor, prepared: Prepared, bias: Tensor | None = None) -> Tensor:
    """x [m, in], m > 16, rounded to the prepared grid → [m, out] in its dtype."""
    codes, sx = quantize(x, prepared.grid)
    if prepared.grid == "fp8":
        return torch._scaled_mm(codes, prepared.weight, sx, prepared.scales, bias=bias, out_dtype=x.dtype)
    y = torch._int_mm(codes, prepared.weight) * sx * prepared.scales
    return (y if bias is None else y + bias).to(x.dtype)
