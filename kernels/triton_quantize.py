"""Activations to 8 bits, one scale a token: reads 2 bytes and writes 1 a channel.

    s = max|x| / L,   q = round(x · 1/s)                                      L = 127 (int8), 7 (int4 values in int8), 448 (FP8 E4M3)

Rounding is that of activations.py, which evaluation uses, to the bit. One program a token. In a compiled graph the same arithmetic is traced in its place,
so that Inductor fuses it with whatever makes x, a norm or SiLU(gate) · up, of any model (and divides its own way); what an online transform makes is
rounded in its kernel (triton_transform.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import activations, ops
from .activations import LARGEST, Grid


@triton.jit
def rounded(y, scale, LARGEST: tl.constexpr, FP8: tl.constexpr):
    """y to its grid: integers for the cast to int8, half to even, as fp32 has integers only at 1.5·2²³; FP8's own cast rounds, its range is kept."""
    y *= tl.div_rn(1.0, tl.maximum(scale, 1e-30))
    y = tl.minimum(tl.maximum(y, -LARGEST), LARGEST)
    return y if FP8 else (y + 12582912.0) - 12582912.0


@triton.jit
def _quantize(x, codes, scales, n, stride, LARGEST: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr):
    token, k = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = k < n
    y = tl.load(x + token * stride + k, inside, 0.0).to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(y), 0), LARGEST)  # what / compiles to is not rounded as a CPU's quotient is
    tl.store(scales + token, scale)
    q = rounded(y, scale, LARGEST, FP8)
    tl.store(codes + token * n + k, q.to(codes.dtype.element_ty), inside)


def codes_like(grid: str) -> torch.dtype:
    return torch.float8_e4m3fn if grid == "fp8" else torch.int8


def quantize(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """x [m, n] → codes [m, n] (int8, or E4M3) and scales fp32 [m, 1]; a token of zeros has scale 0 and any codes."""
    return activations.quantize(x, grid) if torch.compiler.is_compiling() else op(x, grid)


def _launch(x: Tensor, grid: str) -> tuple[Tensor, Tensor]:
    m, n = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    codes, scales = _empty(x, grid)
    if m:
        block = triton.next_power_of_2(n)
        _quantize[(m,)](x, codes, scales, n, x.stride(0), LARGEST=LARGEST[grid], FP8=grid == "fp8", BLOCK=block, num_warps=launch(block))
    return codes, scales


def _empty(x: Tensor, grid: str) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=codes_like(grid), device=x.device), torch.empty(x.shape[0], 1, device=x.device)


def launch(block: int) -> int:
    """Warps: 16 channels a thread, 64 at most."""
    return min(32, max(4, block // 512))


op = ops.define("quantize", "(Tensor x, str grid) -> (Tensor, Tensor)", _empty, CPU=_launch, CUDA=_launch)
