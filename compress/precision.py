"""Precision: more bits where the model feels them, fewer where it does not, for the bytes that the recipe's own bits would take.

    minimise Σ_g D_g(c)  with  Σ_g bytes_g(c) ≤ Σ_g bytes_g(recipe);   D_g(c) = Σ_i a_i (ŵ_i−w_i)ᵀ H (ŵ_i−w_i) over the rows of group g

A choice c is a width near the recipe's, in groups like the recipe's, half or twice as long. Each is solved once, alone and plainly, on the original model's H;
a, the squared gradient of the loss at each output, makes layers comparable (HAWQ-V2, arXiv 1911.03852, has the trace of the Hessian in its place); the
knapsack of `auto` does the rest. Linears that read the same input (q, k, v; gate, up) share a choice, as servers fuse them. `auto` measures true
divergences instead, at many times the cost.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .calibration.statistics import Stats
from .knapsack import knapsack

if TYPE_CHECKING:
    from .recipe import Step

PLAIN = {"propagate": 0.0, "guided": False, "bias_correction": False, "sweeps": 0, "refits": 0}  # options that a comparison of widths can do without


@dataclass(frozen=True)
class Ladder:
    """Linears that share a choice, and what there is to choose from."""

    names: tuple[str, ...]
    step: Step
    choices: list[dict[str, Any]]  # options of the step; the first is the recipe's own
    nbytes: list[int]
    damage: list[float]


def mixed(step: Step) -> bool:
    """Can a schedule set the bits of this step? Not where zeros or ranks are what it sets."""
    method = step.build()
    return isinstance(getattr(method, "bits", None), int) and hasattr(method, "group_size") and not any(hasattr(method, o) for o in ("sparsity", "ratio"))


def candidates(bits: int, group_size: int, reach: int, n: int) -> list[dict[str, Any]]:
    """Fewer bits with smaller groups too, as many or more with larger ones too; 32 to 128 columns, and divisors of n, unless the recipe has others."""
    found = []
    for b in range(max(2, bits - reach), min(8, bits + reach + 1) + 1) if reach else ():
        sizes = {group_size, group_size // 2 if b < bits else 2 * group_size}
        found += [{"bits": b, "group_size": g} for g in sorted(sizes) if g == group_size or (32 <= g <= 128 and n % g == 0)]
    return found


def ladder(names: tuple[str, ...], step: Step, reach: int, weights: list[Tensor], stored: torch.dtype, stats: Stats, a: list[Tensor]) -> Ladder:
    """weights [out, in] each, a [out, 1] each: what an error in each output counts."""
    method, n = step.build(), weights[0].shape[1]
    own = {"bits": method.bits, "group_size": method.group_size}
    choices = [own, *(c for c in candidates(method.bits, method.group_size, reach, n) if c != own)]
    plain = replace(method, **{o: v for o, v in PLAIN.items() if hasattr(method, o)})
    nbytes, damage = [], []
    for choice in choices:
        solved = [replace(plain, **choice)(W, stats, stored=stored, where=names[0]) for W in weights]
        nbytes.append(sum(f.nbytes() for f in solved))
        errors = [f.dequantize() - W for f, W in zip(solved, weights, strict=True)]
        damage.append(sum(float((w * (D @ stats.hessian) * D).sum(dtype=torch.float64)) for D, w in zip(errors, a, strict=True)))
    return Ladder(names, step, choices, nbytes, damage)


def chosen(ladders: list[Ladder]) -> list[Step]:
    """A step for every group, of least damage within the bytes of the recipe's own choice."""
    front = knapsack([x.nbytes for x in ladders], [x.damage for x in ladders])
    picks = front.picks[front.within(sum(x.nbytes[0] for x in ladders))].tolist()
    return [x.step.model_copy(update={"match": list(x.names), **x.choices[k]}) for x, k in zip(ladders, picks, strict=True)]
