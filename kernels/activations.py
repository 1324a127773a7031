"""Rounded activations: the input of a quantized weight goes onto a grid as it comes, one scale a token, so that integers meet integers.

    s_x = max|x| / L,   q_x = round(x / s_x),   y = s_x · (q_x · Ŵᵀ)           L = 127 (int8), 7 (int4), 448 (fp8: E4M3 keeps three bits of mantissa)

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
TINY = 1e-30  # a token whose scale is less is zero


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


def quantize(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """x [..., in] → codes [..., in] (int8, or E4M3) and scales fp32 [..., 1]; a token of zeros has scale 0 and any codes. In fp32, x fp64 too.

    Eight short passes, each of which vectorizes: a product with a number a row does, a quotient does not."""
    y = x.to(torch.float32, copy=True)
    scale = y.abs().amax(-1, keepdim=True)
    scale.div_(scale.new_full((), LARGEST[grid]) if scale.is_cuda else LARGEST[grid])  # by a number a GPU multiplies by its reciprocal: other bits
    if grid == "fp8":
        return y.mul_(scale.clamp(min=TINY).reciprocal_()).to(torch.float8_e4m3fn), scale
    return y.mul_(scale.reciprocal()).round_().to(torch.int8), scale


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return (codes.float() * scales).to(dtype)
