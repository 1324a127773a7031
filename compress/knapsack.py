"""The multiple-choice knapsack: one choice a group, least damage for every number of bytes at once.

    front(g) = the undominated sums of front(g−1) and the choices of group g

Dynamic programming over whole fronts (Dudziński and Walukiewicz 1987): groups are merged one after the other, and of their sums only those stay that no
other sum beats in both bytes and damage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import CompressError

SUMS = 4096  # points of the front that are kept; below that it is exact


@dataclass(frozen=True)
class Front:
    """The sums that no other sum beats: bytes rising, damage falling; picks [points, groups] says how each is made."""

    nbytes: Tensor  # int64 [points]
    damage: Tensor  # fp64 [points]
    picks: Tensor  # uint8 [points, groups]

    def within(self, budget: int) -> int:
        """The point of least damage that the budget pays for. Raises CompressError where none is that small."""
        if budget < int(self.nbytes[0]):
            raise CompressError(f"the smallest allocation takes {int(self.nbytes[0])} bytes of linears, the budget leaves {budget}; "
                                "raise it, or add smaller choices to the menu")  # fmt: skip
        return int(torch.searchsorted(self.nbytes, torch.tensor(budget), right=True)) - 1


def knapsack(nbytes: Sequence[Sequence[int]], damage: Sequence[Sequence[float]]) -> Front:
    """The front of a multiple-choice knapsack: one choice a group, nbytes[g][k] and damage[g][k]. Exact up to SUMS points; then the best of each
    of SUMS ranges of bytes is kept, its bytes as they are, so that no budget is ever passed."""
    front = Front(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64), torch.zeros(1, 0, dtype=torch.uint8))
    for b, d in zip(nbytes, damage, strict=True):
        total = (front.nbytes[:, None] + torch.tensor(b)).flatten()
        loss = (front.damage[:, None] + torch.tensor(d, dtype=torch.float64)).flatten()
        order = torch.argsort(loss, stable=True)
        order = order[torch.argsort(total[order], stable=True)]  # by bytes, then by damage
        best = torch.cummin(loss[order], 0).values
        order = order[torch.cat([torch.tensor([True]), best[1:] < best[:-1]])]
        if len(order) > SUMS:
            t = total[order].double()
            place = ((t - t[0]) / (t[-1] - t[0]) * (SUMS - 1)).ceil().long()
            order = order[torch.cat([place[1:] != place[:-1], torch.tensor([True])])]  # the last of a range has the least damage
        picks = torch.cat([front.picks[order // len(b)], (order % len(b)).to(torch.uint8)[:, None]], 1)
        front = Front(total[order], loss[order], picks)
    return front
