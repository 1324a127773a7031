"""The uniform grid: where the levels of each group lie, and how far to clip.

    q = clamp(round(w / s) + z, 0, levels − 1),     ŵ = (q − z) · s

Asymmetric grids span min … max of a group (zero included), symmetric ones −2^(b−1) … 2^(b−1)−1 around zero, `sym="full"` lets the scale take
the sign of the largest weight so that the one extra negative level is never wasted (the Q4_0 idea). Clipping shrinks the span to trade the
error of few large weights against the resolution of all others: by Σ|ŵ−w|^2.4 (GPTQ's, arXiv 2210.17323) or by Σ_j h_j |ŵ_j−w_j|^p with h_j what an error
in column j costs; "asymmetric" also moves the zero point by a level, which clips one end more than the other: with four levels that is much.
Scales are rounded to their storage dtype BEFORE any code is chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..formats.int_group import symmetric_zero

Sym = Literal[False, True, "full"]
Clip = Literal["none", "mse", "hessian", "asymmetric"]
CHUNK = 1 << 15  # weights searched together: the working set stays in cache, and torch does not split so little over threads


@dataclass(frozen=True, eq=False)
class Grid:
    scale: Tensor  # [out, groups] fp32, representable in the storage dtype
    zero: Tensor  # [out, groups] fp32: an integer, or 0.5 for one symmetric bit
    levels: int

    def codes(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The nearest level of each weight, as float codes; scale and zero broadcast against w. One rounding, used everywhere."""
        return (w / scale + zero).round_().clamp_(0, self.levels - 1)

    def project(self, w: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Those codes and the values they stand for."""
        q = self.codes(w, scale, zero)
        return q, (q - zero) * scale


def fit(W: Tensor, levels: int, bits: int, sym: Sym, clip: Clip, weight: Tensor | None, scale_dtype: torch.dtype, power: int = 2) -> Grid:
    """The grid of each group of W [out, groups, group_size] (fp32); for clip "hessian" and "asymmetric", `weight` [(out,) groups, group_size] is h and
    `power` is p."""
    out, groups, size = W.shape
    rows = max(1, CHUNK // (groups * size))
    h = lambda r: weight[r : r + rows] if weight is not None and weight.dim() == 3 else weight
    parts = [_fit(W[r : r + rows], levels, bits, sym, clip, h(r), scale_dtype, power) for r in range(0, out, rows)]
    scale, zero = (torch.cat(p) for p in zip(*parts, strict=True))
    return Grid(scale, zero, levels)


def _fit(W: Tensor, levels: int, bits: int, sym: Sym, clip: Clip, weight: Tensor | None, dtype: torch.dtype, power: int) -> tuple[Tensor, Tensor]:
    low, high = W.amin(-1).clamp(max=0), W.amax(-1).clamp(min=0)
    scale, zero = _span(W, low, high, levels, bits, sym, dtype, 1.0)
    if clip == "none":
        return scale, zero
    best = _damage(W, scale, zero, levels, clip, weight, power)
    for shrink in _shrinks(levels):
        s, middle = _span(W, low, high, levels, bits, sym, dtype, shrink)
        for shift in (0, -1, 1) if clip == "asymmetric" else (0,):
            z = (middle + shift).clamp(0, levels - 1) if shift else middle
            damage = _damage(W, s, z, levels, clip, weight, power)
            better = damage < best
            best, scale, zero = torch.where(better, damage, best), torch.where(better, s, scale), torch.where(better, z, zero)
    return scale, zero


def _shrinks(levels: int) -> list[float]:
    """Candidates below 1: the fewer the levels, the deeper the cut that can pay."""
    lowest, steps = (0.2, 32) if levels <= 4 else (0.4, 24) if levels <= 8 else (0.6, 16)
    return [1 - (1 - lowest) * i / steps for i in range(1, steps + 1)]


def _span(W: Tensor, low: Tensor, high: Tensor, levels: int, bits: int, sym: Sym, dtype: torch.dtype, shrink: float) -> tuple[Tensor, Tensor]:
    if sym:
        extreme = torch.where(-low > high, low, high) * shrink
        if levels == 3:
            scale = extreme.abs()
        elif sym == "full" and bits > 1:
            scale = extreme / -(2 ** (bits - 1))
        else:
            scale = 2 * extreme.abs() / (levels - 1)
        zero = torch.full_like(scale, symmetric_zero(bits, levels))
    else:
        scale = (high - low) * shrink / (levels - 1)
        zero = low * shrink
    scale = scale.to(dtype).float()
    scale = torch.where(scale == 0, 1.0, scale)
    return scale, zero if sym else (-zero / scale).round_().clamp_(0, levels - 1)


def _damage(W: Tensor, scale: Tensor, zero: Tensor, levels: int, clip: Clip, weight: Tensor | None, power: int) -> Tensor:
    s, z = scale[..., None], zero[..., None]
    error = (W / s).add_(z).round_().clamp_(0, levels - 1).sub_(z).mul_(s).sub_(W)
    return error.abs_().pow_(2.4).sum(-1) if clip == "mse" else error.abs_().pow_(power).mul_(weight).sum(-1)
