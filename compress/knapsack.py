"""The multiple-choice knapsack: one choice a group, least damage for every cost at once.

    front(g) = the undominated sums of front(g−1) and the choices of group g

Dynamic programming over whole fronts (Dudziński and Walukiewicz 1987): groups are merged one after the other, and of their sums only those stay that no
other sum beats in both cost (bytes, or nanoseconds a token) and damage.
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
    """The sums that no other sum beats: cost (bytes, or nanoseconds a token) rising, damage falling; picks [points, columns] says how each is made."""

    cost: Tensor  # int64 [points]
    damage: Tensor  # fp64 [points]
    picks: Tensor  # uint8 [points, columns]

    def within(self, budget: int) -> int:
        """The point of least damage that the budget pays for. Raises CompressError where none is that small."""
        if budget < int(self.cost[0]):
            raise CompressError(f"the smallest allocation takes {int(self.cost[0])} bytes of linears, the budget leaves {budget}; "
                                "raise it, or add smaller choices to the menu")  # fmt: skip
        return int(torch.searchsorted(self.cost, torch.tensor(budget), right=True)) - 1


def knapsack(cost: Sequence[Sequence[int]], damage: Sequence[Sequence[float]]) -> Front:
    """The front of a multiple-choice knapsack: one choice a group, cost[g][k] and damage[g][k]. Exact up to SUMS points; then the best of each
    of SUMS ranges of cost is kept, its cost as it is, so that no budget is ever passed."""
    front = Front(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64), torch.zeros(1, 0, dtype=torch.uint8))
    for c, d in zip(cost, damage, strict=True):
        front = joined(front, Front(torch.tensor(c), torch.tensor(d, dtype=torch.float64), torch.arange(len(c), dtype=torch.uint8)[:, None]))
    return front


def joined(a: Front, b: Front, points: int | None = None) -> Front:
    """One choice from each: the sums of every pair, the columns side by side."""
    total, loss = (a.cost[:, None] + b.cost).flatten(), (a.damage[:, None] + b.damage).flatten()
    order = undominated(total, loss, points or SUMS)
    return Front(total[order], loss[order], torch.cat([a.picks[order // len(b.cost)], b.picks[order % len(b.cost)]], 1))


def either(fronts: Sequence[Front], points: int | None = None) -> Front:
    """One choice from all of them together; they have the same columns."""
    total, loss, picks = (torch.cat([getattr(f, name) for f in fronts]) for name in ("cost", "damage", "picks"))
    order = undominated(total, loss, points or SUMS)
    return Front(total[order], loss[order], picks[order])


def shifted(front: Front, cost: int, damage: float, pick: int) -> Front:
    """The front with a cost and a damage that come with it, and a first column that says so."""
    return Front(front.cost + cost, front.damage + damage, torch.cat([torch.full((len(front.cost), 1), pick, dtype=torch.uint8), front.picks], 1))


def undominated(total: Tensor, loss: Tensor, points: int) -> Tensor:
    """The order of those that no other beats, by cost; thinned to the best of each of `points` ranges."""
    order = torch.argsort(loss, stable=True)
    order = order[torch.argsort(total[order], stable=True)]  # by cost, then by damage
    best = torch.cummin(loss[order], 0).values
    order = order[torch.cat([torch.tensor([True]), best[1:] < best[:-1]])]
    if len(order) > points:
        t = total[order].double()
        place = ((t - t[0]) / (t[-1] - t[0]) * (points - 1)).ceil().long()
        order = order[torch.cat([place[1:] != place[:-1], torch.tensor([True])])]  # the last of a range has the least damage
    return order
