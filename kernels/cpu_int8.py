"""Rounded activations on CPU: oneDNN multiplies bytes, one scale a token and one a row of the weight put the floats back.

    y[m, n] = s_x[m] · s_w[n] · Σ_k q_x[m, k] · (q_w[n, k] − z[n])        integers are summed exactly, each output is rounded once

The one route that is fast at every number of rows: a byte a weight is half of what bf16 reads while decoding, and VNNI or AMX add four products in
the time of two or one in bf16. `onednn::qlinear_pointwise` knows one scale for all tokens, so it gets 1 and answers in fp32; the tokens' scales
are multiplied in behind it. A single token's scale goes in directly. Its activations are unsigned: q + 128 with 128 as the zero point, because on
processors without AMX signed ones go through a reference loop, 200 times slower.

1 to 8 bits with one group a row fit, zero points included as long as q − z fits a byte: W8A8, W4A8, W4A4 run alike. The packed weight depends on
this processor: it is never stored.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats import Format, IntGroup
from . import ops
from .activations import Grid, Rounded, quantize
from .cpu_int import bytes_per_row


@dataclass(frozen=True)
class Packed:
    weight: Tensor  # s8, oneDNN's own layout of [in, out]
    scales: Tensor  # fp32 [out]
    zeros: Tensor  # int64 [out], all 0: what the op calls the weight's zero points
    grid: Grid  # of the activations


def supports(format: Format | Rounded, x: Tensor) -> str | None:
    """None if `prepare` and `matmul` run this, else the reason."""
    if not isinstance(format, Rounded):
        return "activations are not rounded"
    if format.grid == "fp8":
        return "this processor has no fp8"
    return bytes_per_row(format.inner) or unavailable()


@functools.cache
def unavailable() -> str | None:
    """Why oneDNN's op cannot be used in this process, tried out on the largest products there are; None if it can."""
    a, w = torch.full((2, 64), 255, dtype=torch.uint8), torch.full((16, 64), -127, dtype=torch.int8)
    try:
        packed = torch.ops.onednn.qlinear_prepack(w, [2, 64])
        y = _linear(a, 1.0, packed, torch.ones(16), torch.zeros(16, dtype=torch.int64), torch.float32)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return f"this torch has no onednn::qlinear_pointwise for this processor ({str(error).splitlines()[0]})"
    return None if torch.equal(y, torch.full((2, 16), 127.0 * -127 * 64)) else "oneDNN's int8 sums saturate on this processor"


def integers(format: Format) -> tuple[Tensor, Tensor]:
    """q − z int8 [out, in] and s fp32 [out] of a weight that `bytes_per_row` allows."""
    assert isinstance(format, IntGroup)
    q, s = format.unpack().float() - format.zero_points(), format.scales[:, 0].float()
    return ((2 * q).to(torch.int8), s / 2) if format.bits_per_code == 1 else (q.to(torch.int8), s)  # one bit is ±½


def prepare(format: Rounded, dtype: torch.dtype = torch.bfloat16) -> Packed:
    """One byte a weight."""
    q, s = integers(format.inner)
    weight = torch.ops.onednn.qlinear_prepack(q, [1, q.shape[1]])
    return Packed(weight, s, torch.zeros(len(s), dtype=torch.int64), format.grid)


def _linear(codes: Tensor, scale: float, weight: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ops.onednn.qlinear_pointwise(codes, scale, 128, weight, scales, zeros, None, 1.0, 0, dtype, "none", [], "")


def _multiply(codes: Tensor, token: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if len(codes) == 1 and bias is None and dtype == torch.bfloat16:
        return _linear(codes, token.item() or 1.0, weight, scales, zeros, dtype)
    y = _linear(codes, 1.0, weight, scales, zeros, torch.float32).mul_(token)
    return (y if bias is None else y.add_(bias)).to(dtype)


op = ops.define("cpu_int8_matmul", "(Tensor codes, Tensor token, Tensor weight, Tensor scales, Tensor zeros, Tensor? bias, ScalarType dtype) -> Tensor",
                lambda codes, token, weight, scales, zeros, bias, dtype: token.new_empty(codes.shape[0], scales.shape[0], dtype=dtype),
                CPU=_multiply, MkldnnCPU=_multiply)  # fmt: skip


def matmul(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x [m, in] → [m, out] in x's dtype."""
    if not x.shape[0]:
        return x.new_empty(0, packed.scales.shape[0])
    codes, token = quantize(x, packed.grid)
    codes = codes.bitwise_xor_(-128).view(torch.uint8)  # q + 128
    return (op if torch.compiler.is_compiling() else _multiply)(codes, token, packed.weight, packed.scales, packed.zeros, bias, x.dtype)
