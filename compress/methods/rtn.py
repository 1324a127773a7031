"""Round to nearest: every weight to the closest level of its group's grid, no calibration (unless the clip
is to be weighted by the Hessian). The baseline that every method must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration.statistics import Stats
from ..formats import IntGroup
from ..formats.int_group import check_group_size
from . import grid
from .options import IntOptions


@dataclass(frozen=True)
class RTN(IntOptions):
    clip: grid.Clip = "none"  # min-max as everyone's baseline; "mse" and "hessian" (needs calibration) as in gptq

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"hessian"}) if self.clip in ("hessian", "asymmetric") else frozenset()

    def __call__(self, weight: Tensor, stats: Stats | None, *, stored: torch.dtype, where: str = "weight") -> IntGroup:
        """weight [out, in] fp32 → IntGroup. `stats` is needed for clip "hessian" and "asymmetric" only."""
        out, n = weight.shape
        size = check_group_size(n, self.group_size, where)
        groups = weight.view(out, n // size, size)
        h = stats.hessian.diagonal().view(-1, size) if stats is not None and "hessian" in self.needs else None
        g = grid.fit(groups, self.levels, self.code_bits, self.sym, self.clip, h, self.scale_dtype(stored))
        codes = g.codes(groups, g.scale[..., None], g.zero[..., None]).to(torch.uint8).view(out, n)
        zeros = None if self.sym else g.zero.to(torch.uint8)
        return IntGroup.pack(codes, g.scale.to(self.scale_dtype(stored)), zeros, self.code_bits, self.levels)
