"""HQQ, half-quadratic quantization: round to nearest, with a zero point that is a fraction of a step and fitted to the weights; no calibration.

    minimise over z, per group:  Σ |w − s (q − z)|^p,   q = clamp(round(w/s + z), 0, 2^b − 1),   s fixed
    e ← sign(r) max(0, |r| − |r|^(p−1)/β),  r = w − s (q − z);     z ← mean(q − (w − e)/s);     β ← κβ

p < 1 forgives outliers: e takes over what is far off, the mean fits the rest (Badri and Shaji, Half-Quadratic Quantization of Large Machine
Learning Models, 2023). What we do differently: r is measured in steps, not in the units of the weight, where e would vanish for every
|r| < β^(−1/(2−p)) = 0.17, which is all of a usual model; s may come from a clipped span, by which the zero point gains most at 2 bits; each group
keeps the best zero point it met, judged by Σ|r|, instead of all groups stopping at once. Zero points are stored as fp16, off by at most 1/256 of
a step at 4 bits, where bf16 could be off by 1/32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..calibration.statistics import Stats
from ..errors import CompressError
from ..formats import IntGroup
from ..formats.int_group import check_group_size
from . import grid
from .options import IntOptions


@dataclass(frozen=True)
class HQQ:
    bits: Literal[1, 2, 3, 4, 5, 6, 7, 8] = 4  # bits of a code
    group_size: int = 64  # input columns that share a scale and a zero point; -1: one of each a row
    clip: Literal["none", "mse"] = "mse"  # how the span of a group is shrunk before the zero point is fitted; "none": min to max, as in the paper
    p: float = 0.7  # power of the error that is minimised; the smaller, the less an outlier counts
    beta: float = 10.0  # weight of the quadratic that ties e to the error; inf with p = 1: rounding to nearest
    kappa: float = 1.01  # growth of beta from one iteration to the next
    iterations: int = 20  # of the zero point; 0: rounding to nearest

    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self):
        if not (0 < self.p <= 1 and self.beta > 0 and self.kappa >= 1 and self.iterations >= 0):
            raise CompressError(f"p {self.p} must lie in (0, 1], beta {self.beta} above 0, kappa {self.kappa} from 1, iterations {self.iterations} from 0 up")

    def __call__(self, weight: Tensor, stats: Stats | None, *, stored: torch.dtype, where: str = "weight") -> IntGroup:
        """weight [out, in] fp32 → IntGroup with fp16 zero points [out, groups]."""
        (out, n), size = weight.shape, check_group_size(weight.shape[1], self.group_size, where)
        dtype, levels = IntOptions.scale_dtype(stored), 2**self.bits
        groups = weight.reshape(out, n // size, size)
        g = grid.fit(groups, levels, self.bits, False, self.clip, None, dtype)
        rows = max(1, grid.CHUNK // n)
        zero = torch.cat([self._zero(w, s, z, g) for w, s, z in zip(groups.split(rows), g.scale.split(rows), g.zero.split(rows), strict=True)])
        codes = g.codes(groups, g.scale[..., None], zero.float()[..., None]).to(torch.uint8).view(out, n)
        return IntGroup.pack(codes, g.scale.to(dtype), zero, self.bits)

    def _zero(self, W: Tensor, scale: Tensor, zero: Tensor, g: grid.Grid) -> Tensor:
        """The best zero points, fp16 [rows, groups], of W [rows, groups, size]."""
        w = W / scale[..., None]  # in steps
        beta, best, lowest = self.beta, zero, torch.full_like(zero, torch.inf)
        for i in range(self.iterations + 1):
            z = zero.half().float()[..., None]  # judged as it will be stored
            q = g.codes(w, torch.ones_like(z), z)
            r = w - (q - z)
            distance = r.abs()
            error = distance.sum(-1)
            best, lowest = torch.where(error < lowest, z[..., 0], best), torch.minimum(error, lowest)
            if i < self.iterations:
                e = r.sign() * (distance - distance.pow(self.p - 1) / beta).clamp_(min=0)
                zero, beta = (q - w + e).mean(-1), beta * self.kappa
        return best.half()

    def planned(self, shape: tuple[int, int], stored: torch.dtype, where: str) -> IntGroup:
        """The format this gives for a weight of that shape, on meta. Raises CompressError where it cannot be done."""
        (out, n), size = shape, check_group_size(shape[1], self.group_size, where)
        empty = lambda *shape, dtype: torch.empty(shape, dtype=dtype, device="meta")
        return IntGroup.pack(empty(out, n, dtype=torch.uint8), empty(out, n // size, dtype=IntOptions.scale_dtype(stored)),
                             empty(out, n // size, dtype=torch.float16), self.bits)  # fmt: skip
