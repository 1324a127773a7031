"""Which weights are kept, and how they are stored: the options, the counting and the packing that every pruning method shares.

    keep = the weights of highest score in each row, in the whole layer, or N in every M neighbours of a row (N:M)

Counts are exact, ties go to the earlier column, so the bytes are known before a weight is read. Where the kept weights are quantized too, every
group of columns keeps equally many (unstructured sparsity becomes N:M with M the group), so that a group has one scale and no index.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..calibration.statistics import Factor, Stats
from ..errors import CompressError
from ..formats import Dense, Format, IntGroup, Masked, Sparse24
from ..formats.int_group import check_group_size
from ..formats.sparse24 import place_bits
from .options import IntOptions
from .target import TargetOptions, importance


def top(score: Tensor, count: int) -> Tensor:
    """bool like score [rows, n]: exactly `count` of each row, the highest; of equal ones the first."""
    rows, n = score.shape
    if count in (0, n):
        return torch.full_like(score, count > 0, dtype=torch.bool)
    least = score.kthvalue(n - count + 1, dim=1, keepdim=True).values
    keep = score >= least
    if int(keep.sum()) > rows * count:
        above, level = score > least, score == least
        keep = above | (level & (level.cumsum(1) <= count - above.sum(1, keepdim=True)))
    return keep


@dataclass(frozen=True)
class SparseOptions:
    sparsity: float = 0.5  # share of the weights that become zero, from 0 to below 1
    pattern: str = "none"  # "2:4" keeps 2 of every 4 neighbours in a row (any N:M), in the place of sparsity
    scope: Literal["row", "layer"] = "row"  # without a pattern: as many in every row, or wherever in the layer they matter most

    def __post_init__(self):
        if not 0 <= self.sparsity < 1:
            raise CompressError(f"sparsity {self.sparsity} is not a share of zeros from 0 to below 1; 0.5 keeps every second weight")
        if self.pattern != "none":
            found = re.fullmatch(r"(\d+):(\d+)", self.pattern)
            if not found or not 0 < int(found[1]) <= int(found[2]) <= 256:
                raise CompressError(f'pattern {self.pattern!r} is not "none" or N:M with 0 < N <= M <= 256, as in "2:4": 2 of every 4 are kept')

    def nm(self, columns: int, where: str = "weight") -> tuple[int, int] | None:
        """(N, M) for a weight of that many columns, None where any number of neighbours may stay. Raises CompressError where M does not divide."""
        if self.pattern == "none":
            return None
        n, m = map(int, self.pattern.split(":"))
        if columns % m:
            fits = [k for k in (2, 4, 8, 16, 32, 64) if columns % k == 0] or [1]
            raise CompressError(f"{where}: in_features {columns} is not a multiple of {m}, as pattern {self.pattern} needs; "
                                f"use an M of {', '.join(map(str, fits))}, or sparsity {1 - n / m:g} without a pattern")  # fmt: skip
        return n, m

    def kept(self, columns: int) -> int:
        """How many of so many weights stay where no pattern says it."""
        return min(columns, max(1, columns - round(self.sparsity * columns)))

    def select(self, score: Tensor, nm: tuple[int, int] | None, before: int = 0) -> Tensor:
        """bool like score [out, columns]: what is kept, higher scores first. Parts of a layer, of which `before` columns were decided
        already, keep together what the whole layer would."""
        out, n = score.shape
        count = lambda width: self.kept(width * (before + n)) - self.kept(width * before)
        if nm:
            return top(score.reshape(-1, nm[1]), nm[0]).view(out, n)
        return top(score, count(1)) if self.scope == "row" else top(score.reshape(1, -1), count(out)).view(out, n)

    def planned(self, shape: tuple[int, int], stored: torch.dtype, where: str) -> Format:
        """The format this gives for a weight of that shape, on meta. Raises CompressError where it cannot be done."""
        out, n = shape
        nm = self.nm(n, where)
        size = (out, n // nm[1] * nm[0]) if nm else (out, self.kept(n)) if self.scope == "row" else (1, self.kept(out * n))
        return self.holding(self.planned_values(size, n, stored, where), shape)

    def planned_values(self, kept: tuple[int, int], columns: int, stored: torch.dtype, where: str) -> Format:
        return Dense(torch.empty(kept, dtype=stored, device="meta"))

    def holding(self, values: Format, shape: tuple[int, int], keep: Tensor | None = None) -> Format:
        """Values in the smaller of the two layouts: a bit a weight, or the places in every M. Without `keep`: planned."""
        nm = self.nm(shape[1])
        if nm and nm[1] <= 256 and nm[0] * place_bits(nm[1]) <= nm[1]:  # a place is packed from a byte
            return Sparse24.planned(values, *nm) if keep is None else Sparse24.pack(keep, values, *nm)
        return Masked.planned(shape, values) if keep is None else Masked.pack(keep, values)

    def store(self, W: Tensor, keep: Tensor, stored: torch.dtype) -> Format:
        """The kept entries of W [out, in], rounded once to the dtype that the model is stored in."""
        rows = 1 if self.nm(W.shape[1]) is None and self.scope == "layer" else W.shape[0]
        return self.holding(Dense(W[keep].view(rows, -1).to(stored)), tuple(W.shape), keep)

    def live(self, W: Tensor, stats: Stats) -> Tensor:
        """bool like W: what may be other than 0. All of it, unless W was pruned before, which is told: what is 0 then stays 0."""
        zeros = float((W == 0).float().mean())
        if zeros <= 0.01:
            return torch.ones_like(W, dtype=torch.bool)
        stats.note("pruned before", f"{100 * zeros:.1f}% of the weights are 0 already, and stay 0")
        return W != 0


@dataclass(frozen=True)
class SparseIntOptions(TargetOptions, SparseOptions):
    """Sparsity, and optionally integers for what is kept."""

    bits: Literal[None, 2, 3, 4, 5, 6, 7, 8] = None  # quantize the kept weights too, in the same sweep; None: they stay as the model is stored
    group_size: int = 128  # with bits: input columns, kept or not, that share a scale; -1: one scale a row
    sym: bool = False  # with bits: True puts zero in the middle, False stores a zero point a group
    sweeps: int = 2  # with bits: rounds of coordinate descent on the codes after the column sweep
    refit: bool = True  # solve the kept weights exactly, by least squares on the mask (before they are quantized)
    gradient: bool = False  # choose masks by what an error in each output does to the model's loss (where rows compete); False: outputs alike
    damp: float = 0.01  # added to the diagonal of H, relative to its mean; raised tenfold until H can be factored

    def __post_init__(self):
        SparseOptions.__post_init__(self)
        TargetOptions.__post_init__(self)
        if not 0 <= self.damp < math.inf or self.sweeps < 0:
            raise CompressError(f"damp {self.damp} and sweeps {self.sweeps} must be numbers from 0 up; 0.01 and 2 are usual")

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | ({"gradient"} if self.gradient else set())

    def task(self, weight: Tensor, stats: Stats, factor: Factor) -> tuple[Tensor, Tensor]:
        """What to come near to, and what each weight counts in the choice of a mask: 0 where it must stay 0. Both [out, in]."""
        live = self.live(weight, stats)
        return self.target(weight, stats, factor), live * importance(weight, stats) if self.gradient else live.to(weight.dtype)

    def nm(self, columns: int, where: str = "weight") -> tuple[int, int] | None:
        given = super().nm(columns, where)
        if self.bits is None:
            return given
        size = check_group_size(columns, self.group_size, where)
        if given is None:
            return self.kept(size), size
        if size % given[1]:
            raise CompressError(f"{where}: group_size {size} is not a multiple of {given[1]}, as pattern {self.pattern} needs; use {8 * given[1]}")
        return given

    def planned_values(self, kept: tuple[int, int], columns: int, stored: torch.dtype, where: str) -> Format:
        if self.bits is None:
            return super().planned_values(kept, columns, stored, where)
        size = check_group_size(columns, self.group_size, where) * kept[1] // columns
        return IntGroup.planned(kept, self.bits, size, self.sym, IntOptions.scale_dtype(stored))
