"""Program: for every block keep it, leave out its attention, its MLP or both, or merge it into another, so that a budget is met at the least cost.

    D[e, t] = max over segments [s, e) and their options o with cost c_o ≤ t:   D[s, t − c_o] + I_o          Kim et al., arXiv 2406.12837

LayerMerge's dynamic programme, exact over all ways to cut the L blocks into segments. D[e, ·] is kept as its front, the sums of (cost, value) that no other
beats in both (knapsack.py), so that costs are never rounded: O(L · span · options · points). A segment is one block with one of its options, a run of up to
`span` blocks left out together, or a block and the run behind it merged into that one block, by least squares (merge.py). Runs are measured as a whole, for
the damage of neighbours does not add up. I = −KL(original ‖ model with that segment's option alone) on a few windows: one pass over the blocks measures all
(drop.py), one before it solves what is merged. Between segments damages are taken to add up; the KL that was reached in the end is on record in the plan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..checkpoint import Checkpoint
from ..errors import CompressError, at_least
from ..knapsack import SUMS, undominated
from ..skeleton import KEY
from .cost import Cost, clocked, sublayers
from .drop import divergences, fewer, sublayer, without
from .merge import merges
from .refit import instead
from .scratch import note
from .smaller import Edit, Smaller, blocks_of

TOLERANCE = 1e-9  # of a budget: sums of the same costs in another order differ in their last digits


@dataclass(frozen=True)
class Option:
    """Blocks start … end − 1, each without the sublayers that `absent` names ({block: child, "" for all of it}), at a cost and with a value.

    merged: of the first of them, which has taken the others over, the weight that is new."""

    start: int
    end: int
    absent: tuple[tuple[int, str], ...]
    cost: float
    value: float
    merged: str = ""


@dataclass(frozen=True)
class Program:
    """Leave out attentions, MLPs and blocks under one budget, by an exact dynamic programme over segments."""

    budget: float = 0.75  # share of the blocks' cost that may stay
    cost: Cost = "parameters"  # what is counted: weights, FLOPs, bytes, or seconds of a forward pass measured on this machine (cost.py)
    span: int = 2  # blocks of the longest run that is measured as a whole
    sublayers: bool = True  # an attention or an MLP may go alone (such a model loads through this package); --uniform: no
    merge: bool = True  # a block may take over the run behind it, by least squares of its last linear
    samples: int = 16  # calibration windows on which damage is measured, 0: all; merges are solved on the others
    needs_text = True

    def __post_init__(self):
        at_least(self, span=1, samples=0)
        if not 0 < self.budget <= 1:
            raise CompressError(f"program.budget = {self.budget}: the share of the cost that may stay, above 0 and at most 1")

    def measure(self, source: Checkpoint, enter, scratch=None) -> dict[str, Any]:
        """{"absent": [[block, child]], "merged": {weight: "b-e", where blocks b … e − 1 are one}, "expected": sum of the segments' KL, "reached": KL of all
        together, "cost": share of the whole, "notes", of a latency also "seconds": what was measured, predicted, and measured again}."""
        stream = enter(source, self.samples)
        children, notes = self._children(source)
        costs = [sublayers(source, i, self.cost, stream, there) for i, there in enumerate(children)]
        absent = {(i, i + 1, child): {i: child} for i, c in enumerate(costs) for child in c if child}
        absent |= {(i, i + n, ""): dict.fromkeys(range(i, i + n), "") for n in range(1, self.span + 1) for i in range(source.num_blocks - n + 1)}
        weights, joining, names, unmerged = merges(source, enter(source, 0), len(stream.tokens), self.span) if self.merge else ({}, {}, {}, [])
        if weights:
            scratch.tensors("program", lambda: weights)
        states, tail = without(source, stream, {}, absent, joining), stream.tail()
        options = [Option(i, i + 1, (), sum(c.values()), 0.0) for i, c in enumerate(costs)]
        unharmed = states.pop(None)
        damage = divergences(stream, tail, unharmed, states)
        options += [Option(b, e, tuple((i, "") for i in range(b + 1, e)), sum(costs[b].values()), -damage[b, e], names[b]) for b, e in joining]
        for (start, end, child), lacks in absent.items():
            stays = sum(c for k, c in costs[start].items() if k != child) if child else 0.0
            options.append(Option(start, end, tuple(lacks.items()), stays, -damage[start, end, child]))
        whole = sum(sum(c.values()) for c in costs)
        chosen = best(options, source.num_blocks, self.budget * whole)
        lacking = dict(pair for o in chosen for pair in o.absent)
        if list(lacking.values()).count("") == source.num_blocks:
            raise CompressError(f"{source.name}: program.budget = {self.budget} of the {self.cost}: no block would stay; raise the budget")
        merged = {o.merged: f"{o.start}-{o.end}" for o in chosen if o.merged}
        reached = divergences(stream, tail, unharmed, without(_merged(source, merged, scratch), stream, lacking, {}))[None] if lacking else 0.0
        plan = {"absent": [list(pair) for pair in lacking.items()], "merged": merged, "expected": -sum(o.value for o in chosen), "reached": reached,
                "cost": sum(o.cost for o in chosen) / whole, "notes": notes + unmerged}  # fmt: skip
        if self.cost == "latency":
            smaller = self.apply(source, plan, scratch)
            plan["seconds"] = {"blocks": costs, "whole": whole, "predicted": sum(o.cost for o in chosen),
                               "timed": clocked(smaller, enter(smaller, self.samples))}  # fmt: skip
        return plan

    def _children(self, source: Checkpoint) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
        """{"attention": child, "mlp": child} of every block, those that are there and may go alone; and notes."""
        if not self.sublayers:
            return [{} for _ in range(source.num_blocks)], []
        try:
            found = [{what: sublayer(source, i, what) for what in ("attention", "mlp")} for i in range(source.num_blocks)]
        except CompressError as error:
            told = str(error).removeprefix(f"{source.name}: ").partition(";")[0]
            return [{} for _ in range(source.num_blocks)], [note("no sublayer can go alone", source.blocks_path, told)]
        return [{what: child for what, child in each.items() if child not in fields.get("without", ())}
                for each, fields in zip(found, blocks_of(source), strict=True)], []  # fmt: skip

    def guess(self, source: Checkpoint) -> dict[str, Any]:
        """Whole blocks from the end until the budget is met: without text, nothing tells which sublayers will go."""
        return {"absent": [[i, ""] for i in range(math.floor(self.budget * source.num_blocks), source.num_blocks)], "merged": {}}

    def apply(self, source: Checkpoint, plan: dict[str, Any], scratch=None) -> Checkpoint:
        absent = {int(i): child for i, child in plan["absent"]}
        kept = [i for i in range(source.num_blocks) if absent.get(i) != ""]
        source = _merged(source, plan["merged"], scratch)
        view = fewer(source, kept) if len(kept) < source.num_blocks else source
        blocks = blocks_of(view)
        for j, i in enumerate(kept):
            if i in absent:
                blocks[j]["without"] = sorted({*blocks[j].get("without", ()), absent[i]})
        return Smaller(view, changes={KEY: blocks}) if any(blocks) else view


def _merged(source: Checkpoint, merged: dict[str, str], scratch) -> Checkpoint:
    """`source` with the last linears of the blocks that others are merged into."""
    edits: dict[str, Edit] = {name: partial(instead, scratch, "program", key) for name, key in merged.items()}
    return Smaller(source, edits=edits) if edits else source


def best(options: Sequence[Option], length: int, budget: float) -> list[Option]:
    """The segments that cover blocks 0 … length − 1 with the largest sum of values at a sum of costs within the budget.

    Exact while no front has more than SUMS points; then the best of each of SUMS ranges of cost stay, at what they cost. Raises CompressError where even
    the cheapest options cost more.
    """
    limit = budget * (1 + TOLERANCE)
    start = torch.zeros(1, dtype=torch.float64)
    cost, damage, came = [start], [start], [torch.zeros(1, 2, dtype=torch.long)]  # [end] → of every point; came [points, 2]: the last option, the point before
    for end in range(1, length + 1):
        last = [(k, o) for k, o in enumerate(options) if o.end == end]
        total, loss = torch.cat([cost[o.start] + o.cost for _, o in last]), torch.cat([damage[o.start] - o.value for _, o in last])
        place = torch.cat([torch.stack([torch.full((len(cost[o.start]),), k), torch.arange(len(cost[o.start]))], 1) for k, o in last])
        within = (total <= limit).nonzero().flatten()
        keep = within[undominated(total[within], loss[within], SUMS)] if len(within) else within
        cost, damage, came = [*cost, total[keep]], [*damage, loss[keep]], [*came, place[keep]]
    if not len(cost[length]):
        cheapest = [0.0]
        for end in range(1, length + 1):
            cheapest.append(min(cheapest[o.start] + o.cost for o in options if o.end == end))
        raise CompressError(f"program: the cheapest choice of segments costs {cheapest[-1]:.4g}, the budget is {budget:.4g}; raise the budget")
    chosen: list[Option] = []
    end, point = length, len(cost[length]) - 1
    while end:
        k, point = came[end][point].tolist()
        chosen.insert(0, options[k])
        end = options[k].start
    return chosen
