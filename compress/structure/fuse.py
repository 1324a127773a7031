"""Fuse: leave a block out and let its neighbours take over what they can use of its weights.

    MI_i = 1 − E cos(h_L, h_L without block i)             macro influence: what the end of the model misses, not what the block itself changes
    W_j ← W_j + B_j A_j + (C_j D_j) ⊙ W_i                  each linear of the blocks around i; C = B = 0 is plain leaving out

FuseGPT (Pei et al., arXiv 2411.14507). The block of least MI goes; coefficients [out, rank]·[rank, in] say how much of each of its weights is added to the
same linear of a neighbour, low-rank changes do the rest, and both train on the states behind the group, ‖h − h_whole‖²/‖h_whole‖², with all other blocks
out of the way. Then the sums are written out and the next block is chosen. The paper compares states by a softmax over the batch; distance is what is meant.

One round costs L/2 passes for the influence and `steps` batches forward and backward through `window` blocks, which are in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..arch import LINEARS, routers
from ..checkpoint import Checkpoint
from ..errors import CompressError, at_least
from ..healing.adapters import LowRank
from ..healing.losses import distance
from ..stream import Stream
from .drop import fewer, how_many, without
from .refit import instead
from .smaller import Smaller


class Fused(nn.Module):
    """x (W + B A + (C D) ⊙ V)ᵀ, V the linear in this one's place in the block that goes."""

    def __init__(self, W: Tensor, V: Tensor, bias: Tensor | None, rank: int, generator: torch.Generator):
        super().__init__()
        self.W, self.V, self.bias = W, V, bias
        self.change, self.coefficients = (LowRank(tuple(W.shape), rank, rank, W.dtype, generator, W.device) for _ in range(2))  # type: ignore[arg-type]

    def matrix(self) -> Tensor:
        return self.W.float() + self.change.matrix() + self.coefficients.matrix() * self.V.float()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix().to(x.dtype), self.bias)


@dataclass(frozen=True)
class Fuse:
    """Leave out blocks one after the other, fusing each into its neighbours."""

    count: float = 0.25  # how many, or (below 1) which share of all, rounded to the nearest
    window: int = 4  # blocks of a group, the one that goes among them
    rank: int = 16  # of changes and of coefficients
    steps: int = 100  # of training a round, each with one batch of the calibration windows
    lr: float = 1e-3  # Adam's for the coefficients; a tenth of it for the changes
    samples: int = 32  # calibration windows on which influence is measured; 0: all
    needs_text = True

    def __post_init__(self):
        at_least(self, count=0, window=2, rank=1, steps=0, lr=0, samples=0)

    def guess(self, source: Checkpoint) -> dict[str, Any]:
        L, n = source.num_blocks, how_many(source, "fuse", self.count, source.num_blocks, "block")
        if n >= L:
            raise CompressError(f"{source.name}: fuse: {n} of {L} blocks cannot be left out; use a count from 0 to {L - 1}")
        return {"left_out": [L - 1 - k for k in range(n)], "learned": {}}

    def measure(self, source: Checkpoint, enter, scratch) -> dict[str, Any]:
        """{"left_out": blocks, numbered in what the rounds before left, "influence": theirs, "distance": [[without, fused]], "learned": {round: tensors}}."""
        plan: dict[str, Any] = {"left_out": [], "influence": [], "distance": [], "learned": {}}
        for k in range(len(self.guess(source)["left_out"])):
            influence = macro(source, enter(source, self.samples))
            i = min(influence, key=lambda b: (influence[b], b))
            made = scratch.tensors(f"fuse-{k}", partial(self._train, source, enter, i))
            plan["left_out"].append(i)
            plan["influence"].append(influence[i])
            plan["distance"].append(made.pop("distance").tolist())
            plan["learned"][str(k)] = list(made)
            source = _round(source, i, list(made), k, scratch)
        return plan

    def apply(self, source: Checkpoint, plan: dict[str, Any], scratch=None) -> Checkpoint:
        for k, i in enumerate(plan["left_out"]):
            source = _round(source, i, plan["learned"].get(str(k), []), k, scratch)
        return source

    def _train(self, source: Checkpoint, enter, i: int) -> dict[str, Tensor]:
        """The weights, by their names in `source`, of the blocks around i, which is out, none where they come no nearer than without it; and "distance"."""
        stream, generator = enter(source, 0), torch.Generator().manual_seed(0)
        size = min(self.window, source.num_blocks)
        start = min(max(0, i - size // 2), source.num_blocks - size)
        for j in range(start):
            stream.advance(source.load_block(j, stream.device))
        calls = [list(c) for c in stream.calls[start : start + size]]
        before = stream.hidden.clone()
        removed = source.load_block(i, stream.device)
        theirs = {path: _weight(m) for path, m in removed.named_modules() if isinstance(m, LINEARS)}
        blocks, fused = dict[int, nn.Module](), dict[tuple[int, str], Fused]()
        for j in range(start, start + size):
            block = source.load_block(j, stream.device)
            stream.advance(block)
            if j == i:
                continue
            block.requires_grad_(False)
            skip = routers(block)
            for path, linear in [(p, m) for p, m in block.named_modules() if isinstance(m, LINEARS) and p not in skip and ".experts." not in f".{p}"]:
                if path in theirs and theirs[path].shape == (W := _weight(linear)).shape:
                    fused[j, path] = Fused(W, theirs[path], linear.bias, self.rank, generator)
                    block.set_submodule(path, fused[j, path])
            blocks[j] = block
        rows = list(stream.batches())
        adam = torch.optim.Adam([{"params": [p for f in fused.values() for p in f.coefficients.parameters()], "peak": self.lr},
                                 {"params": [p for f in fused.values() for p in f.change.parameters()], "peak": self.lr / 10}])  # fmt: skip

        def loss(b: int) -> Tensor:
            h = before[rows[b]].to(stream.device)
            for j, block in blocks.items():
                args, kwargs = calls[j - start][b]
                h = block(h, *args, **kwargs)
                h = h[0] if isinstance(h, tuple) else h
            each = distance(h, stream.hidden[rows[b]].to(stream.device))
            return (each if stream.mask is None else each[stream.mask[rows[b]].to(each.device)]).mean()

        def judged() -> float:
            with torch.no_grad():
                return sum(float(loss(b)) for b in range(len(rows))) / len(rows)

        first = judged()
        for step in range(self.steps):
            with torch.enable_grad():
                loss(int(torch.randint(len(rows), (), generator=generator))).backward()
            for group in adam.param_groups:
                group["lr"] = group["peak"] * (0.5 + 0.5 * math.cos(math.pi * step / self.steps))
            adam.step()
            adam.zero_grad(set_to_none=True)
        last = judged()
        report = {"distance": torch.tensor([first, last], dtype=torch.float64)}
        if not last < first:
            return report
        with torch.no_grad():
            made = {(j, path): f.matrix() for (j, path), f in fused.items()}
        for (j, path), W in made.items():
            W = W.T if isinstance(removed.get_submodule(path), Conv1D) else W
            report[f"{source.block_name(j)}.{path}.weight"] = W.to(removed.stored[f"{path}.weight"])
        return report


def _weight(linear: nn.Module) -> Tensor:
    return linear.weight.data.T if isinstance(linear, Conv1D) else linear.weight.data  # type: ignore[operator, return-value, union-attr]


def _round(source: Checkpoint, i: int, learned: list[str], k: int, scratch) -> Checkpoint:
    source = Smaller(source, edits={name: partial(instead, scratch, f"fuse-{k}", name) for name in learned}) if learned else source
    return fewer(source, [j for j in range(source.num_blocks) if j != i])


def macro(source: Checkpoint, stream: Stream) -> dict[int, float]:
    """{block: 1 − E cos of the states behind the last block, with it and without it}."""
    states = without(source, stream, {}, {i: {i: ""} for i in range(source.num_blocks)})
    whole = states.pop(None)
    found = {}
    for i, h in states.items():
        cos = F.cosine_similarity(whole.float(), h.float(), dim=-1)
        found[i] = 1 - float((cos if stream.mask is None else cos[stream.mask]).mean(dtype=torch.float64))
    return found
