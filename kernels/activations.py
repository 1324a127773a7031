"""Rounded activations: the input of a quantized weight goes onto a grid as it comes, one scale a token, so that integers meet integers.

    s_x = max|x| / L,   q_x = ⌊x / s_x + ½⌋,   y = s_x · (q_x · Ŵᵀ)           L = 127 (int8), 7 (int4), 448 (fp8: E4M3 keeps three bits of mantissa)

Nothing is calibrated and nothing stored: it is how a model is run (`compress.load(…, activations="int8")`), not what it is, and it costs
quality, which `compress eval --activations int8` measures with this same arithmetic. It applies where a quantized leaf is multiplied: behind an
online transform, and not on the dense factors of a low-rank correction (as SVDQuant has it, arXiv 2411.05007). LLM.int8() (arXiv 2208.07339) and
SmoothQuant (arXiv 2211.10438) tell what outliers do to it.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..formats import Dense, Format, Kronecker

Grid = Literal["int8", "int4", "fp8"]
LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
TINY = 1e-30  # less than any scale of a token that is not zero in bf16 or fp16


@dataclass(frozen=True)
class Rounded:
    """A leaf whose input is rounded: what kernels are asked to support where activations are."""

    inner: Format
    grid: Grid

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def describe(self) -> str:
        return f"{self.inner.describe()}, {self.grid} activations"

    def nbytes(self) -> int:
        return self.inner.nbytes()

    def to(self, device: torch.device | str) -> "Rounded":
        return Rounded(self.inner.to(device), self.grid)


def rounded(format: Format, grid: Grid | None) -> Format | Rounded:
    """`format` as kernels see it: leaves that are quantized say how their input is rounded."""
    return format if grid is None or isinstance(format, Dense | Kronecker) else Rounded(format, grid)


def unsigned(x: Tensor, largest: Tensor, L: float) -> Tensor:
    """uint8 ⌊L·x / largest + 128½⌋ = q + 128 in fp32: one pass over x and one that casts. A token of zeros has largest 0 and any codes."""
    return torch.addcdiv(largest.new_full((), 128.5), x, largest, value=L).to(torch.uint8)


def quantize(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """x [..., in] → codes [..., in] (int8, or E4M3) and scales fp32 [..., 1]; a token of zeros has scale 0. In fp32, x fp64 too."""
    x = x.float() if x.dtype == torch.float64 else x
    largest = x.abs().amax(-1, keepdim=True).float()
    if grid == "fp8":
        return (x * (LARGEST[grid] / largest.clamp(min=TINY))).to(torch.float8_e4m3fn), largest / LARGEST[grid]
    return unsigned(x, largest, LARGEST[grid]).bitwise_xor_(128).view(torch.int8), largest / LARGEST[grid]


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return (codes.float() * scales).to(dtype)
