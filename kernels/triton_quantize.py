"""Activations to 8 bits, one scale a token, in the pass over memory that makes them.

    y = x      or   x / √(mean x² + ε) · w  (RMSNorm)     or   SiLU(gate) · up
    s = max|y| / L,   q = round(y · 1/s)                                      L = 127 (int8), 7 (int4 values in int8), 448 (FP8 E4M3)

Alone it reads 2 bytes and writes 1 a channel; behind the norm or the gate it replaces their write of 2 and this read of 2. Rounding is
that of activations.py, which evaluation uses. One program a token; nothing is rounded before s.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import ops
from .activations import LARGEST


@triton.jit
def rounded(y, scale, LARGEST: tl.constexpr, FP8: tl.constexpr):
    """y to its grid: integers for the cast to int8, half to even, as fp32 has integers only at 1.5·2²³; FP8's own cast rounds, its range is kept."""
    y *= tl.div_rn(1.0, tl.maximum(scale, 1e-30))
    y = tl.minimum(tl.maximum(y, -LARGEST), LARGEST)
    return y if FP8 else (y + 12582912.0) - 12582912.0


@triton.jit
def _quantize(x, other, codes, scales, n, stride, eps, KIND: tl.constexpr, LARGEST: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr):
    """KIND: plain, norm (other: w [n]) or gate (other: up, as x)."""
    token, k = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = k < n
    y = tl.load(x + token * stride + k, inside, 0.0).to(tl.float32)
    if KIND == "norm":
        y *= tl.rsqrt(tl.sum(y * y) / n + eps) * tl.load(other + k, inside, 0.0).to(tl.float32)
    if KIND == "gate":
        y *= tl.load(other + token * stride + k, inside, 0.0).to(tl.float32) / (1 + tl.exp(-y))
    scale = tl.max(tl.abs(y), 0) / LARGEST
    tl.store(scales + token, scale)
    q = rounded(y, scale, LARGEST, FP8)
    tl.store(codes + token * n + k, q.to(codes.dtype.element_ty), inside)


def codes_like(grid: str) -> torch.dtype:
    return torch.float8_e4m3fn if grid == "fp8" else torch.int8


def quantize(x: Tensor, grid: str, *, norm: Tensor | None = None, eps: float = 0.0, up: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [m, n] → codes [m, n] (int8, or E4M3) and scales fp32 [m, 1]; a token of zeros has scale 0 and codes 0.

    norm: quantize RMSNorm(x) with these weights [n] and eps; up: quantize SiLU(x)·up, up [m, n], both halves of one matmul."""
    return op(x, norm if up is None else up, "gate" if up is not None else "plain" if norm is None else "norm", grid, eps)


def _launch(x: Tensor, other: Tensor | None, kind: str, grid: str, eps: float) -> tuple[Tensor, Tensor]:
    m, n = x.shape
    if x.stride(1) != 1 or (kind == "gate" and other.stride() != x.stride()):  # type: ignore[union-attr]
        x, other = x.contiguous(), None if other is None else other.contiguous()
    codes, scales = _empty(x, other, kind, grid, eps)
    if m:
        block = triton.next_power_of_2(n)
        _quantize[(m,)](x, other, codes, scales, n, x.stride(0), eps, KIND=kind, LARGEST=LARGEST[grid], FP8=grid == "fp8", BLOCK=block,
                        num_warps=launch(block))  # fmt: skip
    return codes, scales


def _empty(x: Tensor, other: Tensor | None, kind: str, grid: str, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=codes_like(grid), device=x.device), torch.empty(x.shape[0], 1, device=x.device)


def launch(block: int) -> int:
    """Warps: 16 channels a thread, 64 at most."""
    return min(32, max(4, block // 512))


op = ops.define("quantize", "(Tensor x, Tensor? other, str kind, str grid, float eps) -> (Tensor, Tensor)", _empty, CPU=_launch, CUDA=_launch)
