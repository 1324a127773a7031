"""Allocate: which layer gets how much of a byte budget, so that the divergence of the whole model is least.

    minimise  Σ_g d(g, k_g)   with   Σ_g bytes(g, k_g) ≤ budget          d = what choice k does to group g, in nats of KL

Five steps, the expensive ones done once and kept on disk:

1. survey: one streamed pass gathers the Hessian of every site; every choice of the menu is solved from it. A choice that is larger and no better
   than another in tr[ΔW H ΔWᵀ] is dropped (the intra-layer front of MLoRQ, whose candidates are rank × bits).
2. probe: the KL of the model with one group replaced, for two choices a group; the others follow their error by the power law through the two points.
3. knapsack: groups are merged one after the other, keeping the sums that no other sum beats (exact dynamic programming). All budgets at once.
4. refine: divergences do not quite add up, so each group's steps up and down are measured again where they will be taken, among layers that are
   compressed already, and the knapsack is solved again over these steps.
5. switch: pairs of steps, one layer up and another down, judged by the true KL (the level switches of EvoPress, arXiv 2410.14649).

A group is a linear; the linears that a consumer serves as one matrix (q, k and v) share one choice; so do the experts of a block. The knapsack
knows nothing of bits: a choice is any method with options, bytes and a damage. Steps 2, 4 and 5 hold the model's blocks in memory; a probe runs only
the blocks behind the change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .artifact import write_json
from .calibration import hidden
from .checkpoint import Checkpoint
from .errors import CompressError
from .experts import unfuse_experts
from .export.base import FUSED
from .formats import Format, build
from .linear import get_weight, set_weight
from .recipe import Recipe, Step
from .stream import Stream
from .walk import sites_of, stages

SUMS = 4096  # points of the front that the knapsack keeps; below that it is exact
GPTQ = {"method": "gptq", "propagate": 1.0, "refits": 1}  # what the `balanced` recipes do


@dataclass(frozen=True)
class Menu:
    """What a layer may become. `steps` are steps of a recipe without `match`; `fused`: linears served as one matrix share a choice."""

    steps: tuple[dict[str, Any], ...]
    fused: bool = False
    uniform: bool = False  # one scheme for the whole model: the only other choice of a layer is to stay as it is


def integers(widths: Iterable[int], groups: Iterable[int], **options) -> tuple[dict[str, Any], ...]:
    return tuple(GPTQ | {"bits": b, "group_size": g} | options for b in widths for g in groups)


MENUS = {
    "ours": Menu(integers((2, 3, 4, 5, 6, 8), (-1, 128, 64, 32))),
    "vllm": Menu(integers((4, 8), (128, 32), sym=True) + integers((8,), (-1,), sym=True), fused=True),
    "gptq": Menu(integers((2, 3, 4, 8), (128, 32), sym=True), fused=True, uniform=True),
    "gguf": Menu(integers((4, 5, 8), (32,), sym=True)),
    "trellis": Menu(tuple({"method": "trellis", "propagate": 1.0, "bits": b} for b in (1.5, 2, 2.5, 3, 3.5, 4, 5))),
    "mlorq": Menu(integers((2, 3, 4, 8), (128,))
                  + tuple({"method": "svd", "ratio": r, "bits": b, "group_size": 128} for b in (4, 8) for r in (0.2, 0.4, 0.6, 0.8))),
    "sparse": Menu(integers((4,), (128,)) + tuple({"method": "admm", "sparsity": s, "bits": 4, "group_size": 128} for s in (0.3, 0.5, 0.7))
                   + ({"method": "admm", "pattern": "2:4", "bits": 4, "group_size": 128},)),
}  # fmt: skip


# ---- the knapsack


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


# ---- what there is to choose from


@dataclass
class Group:
    """Linears that share a choice, with what each choice costs and does. `damage` is filled by probing."""

    name: str
    linears: tuple[str, ...]
    steps: list[dict[str, Any] | None]  # None: stays as it is
    nbytes: list[int]
    errors: list[float]  # Σ tr[ΔW H ΔWᵀ], by which choices of one group are compared
    damage: list[float]


def grouped(paths: Iterable[str], fused: bool) -> dict[str, list[str]]:
    """Name of a group → its linears: the experts of a kind together, and what a server multiplies as one matrix."""
    found: dict[str, list[str]] = {}
    for path in paths:
        name = re.sub(r"\.experts\.\d+\.", ".experts.*.", path)
        parent, _, leaf = name.rpartition(".")
        if fused:
            whole = next((whole for whole, parts in FUSED.items() if leaf in parts), leaf)
            name = parent if ".experts.*" in parent else f"{parent}.{whole}"
        found.setdefault(name, []).append(path)
    return found


def survey(source: Checkpoint, menu: Menu, stream: Stream, folder: Path, watch: Callable[[Sequence], Iterable]) -> list[Group]:
    """Solve every choice of every linear from one pass of `stream`; weights go to `folder`, one file a block, which a second call finds there."""
    steps = [Step.model_validate(s) for s in menu.steps]
    groups: list[Group] = []
    for i in watch(range(source.num_blocks)):
        block, name, record = source.load_block(i, stream.device), source.block_name(i), folder / f"block-{i:05d}.json"
        if not record.is_file():
            weights: dict[str, list[tuple[int, float, Format]]] = {}
            for stage in stages(block, list(sites_of(source, block, stream)), False):
                stats = stream.collect(block, {site.name: site.linears[0] for site in stage})
                for site in stage:
                    seen = stats.pop(site.name)
                    for path in site.linears:
                        W = get_weight(block.get_submodule(path), block.originals.get(f"{path}.weight"))
                        stored, where = block.stored[f"{path}.weight"], f"{name}.{path}"
                        weights[where] = []
                        for k, step in enumerate(steps):
                            try:
                                weight = step.build()(W, seen, stored=stored, where=where)
                            except CompressError:  # a group size that does not divide, say: not a choice of this layer
                                continue
                            D = weight.dequantize() - W
                            weights[where].append((k, float((D @ seen.hessian).mul_(D).sum(dtype=torch.float64)) * max(seen.count, 1), weight))
            _keep(weights, menu, block, name, record)
        for g in json.loads(record.read_text()):
            groups.append(Group(g["name"], tuple(g["linears"]), g["steps"], g["nbytes"], g["errors"], [0.0] * len(g["steps"])))
        stream.advance(block)
    return groups


def _keep(weights: dict[str, list[tuple[int, float, Format]]], menu: Menu, block, name: str, record: Path) -> None:
    """Write the choices of a block that lie on the front of (bytes, error), smallest first; the last choice is to leave the group as it is."""
    described, tensors = [], {}
    for group, linears in grouped(weights, menu.fused).items():
        of = {path: {k: (error, weight) for k, error, weight in weights[path]} for path in linears}
        common = set.intersection(*(set(c) for c in of.values()))
        sums = sorted((sum(of[p][k][1].nbytes() for p in linears), sum(of[p][k][0] for p in linears), k) for k in common)
        front: list[tuple[int, float, int]] = []
        for size, error, k in sums:
            if menu.uniform or not front or error < front[-1][1]:
                front.append((size, error, k))
        kept = sum(block.get_submodule(p.removeprefix(name + ".")).weight.numel() * block.stored[f"{p.removeprefix(name + '.')}.weight"].itemsize
                   for p in linears)  # fmt: skip
        described.append({"name": group, "linears": linears, "steps": [menu.steps[k] for _, _, k in front] + [None],
                          "nbytes": [b for b, _, _ in front] + [kept], "errors": [e for _, e, _ in front] + [0.0],
                          "formats": [{p: of[p][k][1].meta() for p in linears} for _, _, k in front]})  # fmt: skip
        tensors |= {f"{p}.{c}.{t}": value for c, (_, _, k) in enumerate(front) for p in linears for t, value in of[p][k][1].tensors().items()}
    from safetensors.torch import save_file

    save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, record.with_suffix(".safetensors"))
    write_json(record, described)


class Bank:
    """The weights that the survey kept: bank(group, choice) → {path: [out, in] fp32}."""

    def __init__(self, folder: Path):
        self.files = {g["name"]: (f.with_suffix(".safetensors"), g["formats"]) for f in sorted(folder.glob("block-*.json")) for g in json.loads(f.read_text())}

    def __call__(self, group: Group, choice: int) -> dict[str, Tensor]:
        file, formats = self.files[group.name]
        with safe_open(file, framework="pt") as f:
            names = list(f.keys())
            read = lambda prefix: {n.removeprefix(prefix): f.get_tensor(n) for n in names if n.startswith(prefix)}
            return {path: build(meta, read(f"{path}.{choice}.")).dequantize() for path, meta in formats[choice].items()}


# ---- the true divergence


class Judge:
    """KL(original ‖ model with some weights replaced) in nats a token, on a few windows. The blocks and their inputs are in memory."""

    @torch.no_grad()
    def __init__(self, source: Checkpoint, tokens: Tensor, mask: Tensor | None, *, batch: int, device: str, folder: Path):
        stream = Stream(source, tokens, mask, batch=batch, device=device, folder=folder)
        self.source, self.rows, self.calls = source, list(stream.batches()), [list(c) for c in stream.calls]
        self.mask, self.device = mask, torch.device(device)
        self.blocks, self.states = [], []
        for i in range(source.num_blocks):
            self.blocks.append(source.load_block(i, device))
            self.states.append(hidden.allocate(tuple(stream.hidden.shape), stream.hidden.dtype, folder).copy_(stream.hidden))
            stream.advance(self.blocks[-1])
        self.tail = stream.tail()
        first = self.tail(stream.hidden[:1].to(device))
        self.log_p = hidden.allocate((len(tokens), *first.shape[1:]), torch.float32, folder)
        for rows in self.rows:
            self.log_p[rows] = self.tail(stream.hidden[rows].to(device)).float().log_softmax(-1)
        self.originals = {f"{source.block_name(i)}.{path}": module.weight for i, b in enumerate(self.blocks) for path, module in b.named_modules()
                          if getattr(module, "weight", None) is not None and module.weight.dim() == 2}  # fmt: skip

    def block_of(self, path: str) -> int:
        return int(path.removeprefix(self.source.blocks_path + ".").split(".")[0])

    def _module(self, path: str):
        i = self.block_of(path)
        return self.blocks[i].get_submodule(path.removeprefix(self.source.block_name(i) + "."))

    def put(self, weights: dict[str, Tensor | None]) -> None:
        """Replace weights for good (None: the original), and bring the inputs of later blocks up to date."""
        for path, W in weights.items():
            if W is None:
                self._module(path).weight = self.originals[path]
            else:
                set_weight(self._module(path), W)
        if weights:
            start = min(map(self.block_of, weights))
            for b, rows in enumerate(self.rows):
                for i, h in self._forward(b, rows, start):
                    if i < len(self.blocks):
                        self.states[i][rows] = h

    @torch.no_grad()
    def _forward(self, b: int, rows: slice, start: int):
        h = self.states[start][rows].to(self.device, copy=True)
        for i in range(start, len(self.blocks)):
            args, kwargs = self.calls[i][b]
            out = self.blocks[i](h, *args, **kwargs)
            h = out[0] if isinstance(out, tuple) else out
            yield i + 1, h

    @torch.no_grad()
    def __call__(self, weights: dict[str, Tensor | None]) -> float:
        """The KL with these weights in the place of what is there now (None: the original)."""
        now = {path: self._module(path).weight for path in weights}
        start = min(map(self.block_of, weights), default=len(self.blocks) - 1)
        total, count = 0.0, 0
        try:
            for path, W in weights.items():
                if W is None:
                    self._module(path).weight = self.originals[path]
                else:
                    set_weight(self._module(path), W)
            for b, rows in enumerate(self.rows):
                for _, h in self._forward(b, rows, start):
                    pass
                log_p = self.log_p[rows].to(self.device)
                kl = (log_p.exp() * (log_p - self.tail(h).float().log_softmax(-1))).sum(-1)
                kl = kl if self.mask is None else kl[self.mask[rows].to(kl.device)]
                total, count = total + float(kl.sum(dtype=torch.float64)), count + kl.numel()
        finally:
            for path, weight in now.items():
                self._module(path).weight = weight
        return total / count


def probe(groups: list[Group], judge: Judge, bank: Callable, known: dict[str, float], save: Callable[[], None], watch: Callable[[Sequence], Iterable]) -> None:
    """Fill `damage`: two choices of each group are measured with all others as they were, the rest follow their error by the power law through them.

    `known` {"group|choice": KL} is what was measured before, on disk; `save` writes it.
    """
    for g in watch(groups):
        last = len(g.steps) - 1  # the original
        at = sorted({0, last // 2} if last else set())
        for k in at:
            if f"{g.name}|{k}" not in known:
                known[f"{g.name}|{k}"] = judge(bank(g, k))
        save()
        points = [(g.errors[k], max(known[f"{g.name}|{k}"], 1e-12)) for k in at]
        g.damage = _along(points, g.errors)


def _along(points: list[tuple[float, float]], errors: list[float]) -> list[float]:
    """d(e) = d₁ (e / e₁)^p through the points (e, d), p held to 0.5 … 1.5: at small damage KL is quadratic in ΔW, as e is."""
    (e0, d0), (e1, d1) = points[0], points[-1]
    e0, e1 = max(e0, 1e-30), max(e1, 1e-30)
    x, y = torch.tensor(e0 / e1).log(), torch.tensor(d0 / d1).log()
    p = min(1.5, max(0.5, float(y / x))) if x else 1.0
    near = lambda e: (e0, d0) if abs(torch.tensor(max(e, 1e-30) / e0).log()) < abs(torch.tensor(max(e, 1e-30) / e1).log()) else (e1, d1)
    return [d * (e / e_) ** p if e > 0 else 0.0 for e in errors for e_, d in [near(e)]]


def weights_of(groups: list[Group], picks: Sequence[int], bank: Callable, changed: Iterable[int] | None = None) -> dict[str, Tensor | None]:
    """The weights that an allocation stands for, of all groups or of those that `changed`."""
    made: dict[str, Tensor | None] = {}
    for i in range(len(groups)) if changed is None else changed:
        g, k = groups[i], int(picks[i])
        made |= dict.fromkeys(g.linears) if g.steps[k] is None else bank(g, k)
    return made


def refine(groups: list[Group], picks: list[int], budget: int, judge: Judge, bank: Callable, watch: Callable[[Sequence], Iterable]) -> tuple[list[int], float]:
    """Measure what a step up and down does to each group while the others are as picked, and solve the knapsack again over these steps.

    judge holds the allocation and is left with the one that is returned. A step that the true KL does not confirm is not taken.
    """
    now = judge({})
    nbytes, damage, choices = [], [], []
    for i in watch(range(len(groups))):
        g, k = groups[i], picks[i]
        ladder = convex(g)
        up = [j for j in ladder if g.nbytes[j] > g.nbytes[k]][:1]
        down = [j for j in ladder if g.nbytes[j] < g.nbytes[k]][-1:]
        options = [*down, k, *up]
        d = [0.0 if j == k else judge(weights_of(groups, [j], bank, [0]) if False else _of(g, j, bank)) - now for j in options]
        g.damage = [d_ for d_ in g.damage]
        choices.append(options)
        nbytes.append([g.nbytes[j] for j in options])
        damage.append(d)
    front = knapsack(nbytes, damage)
    found = front.picks[front.within(budget)].tolist()
    new = [options[c] for options, c in zip(choices, found, strict=True)]
    changed = [i for i, (a, b) in enumerate(zip(picks, new, strict=True)) if a != b]
    kl = judge(weights_of(groups, new, bank, changed))
    print("refine", now, "predicted", now + float(front.damage[front.within(budget)]), "true", kl, "changed", len(changed))
    if kl < now:
        judge.put(weights_of(groups, new, bank, changed))
        return new, kl
    return picks, now


def _of(g: Group, k: int, bank: Callable) -> dict[str, Tensor | None]:
    return dict.fromkeys(g.linears) if g.steps[k] is None else bank(g, k)


def convex(g: Group) -> list[int]:
    """Choices on the lower convex hull of (bytes, damage)."""
    hull: list[int] = []
    for k in range(len(g.steps)):
        cross = lambda a, b, c: (g.nbytes[b] - g.nbytes[a]) * (g.damage[c] - g.damage[a]) - (g.damage[b] - g.damage[a]) * (g.nbytes[c] - g.nbytes[a])
        while len(hull) > 1 and cross(hull[-2], hull[-1], k) <= 0:
            hull.pop()
        hull.append(k)
    return hull


def recipe_of(name: str, groups: list[Group], picks: Sequence[int]) -> Recipe:
    """An ordinary recipe: one step a choice, matching the linears that take it; linears that stay as they are match none."""
    steps: dict[str, dict] = {}
    for g, k in zip(groups, picks, strict=True):
        if (step := g.steps[k]) is not None:
            steps.setdefault(json.dumps(step), step | {"match": []})["match"] += g.linears
    return Recipe.model_validate({"name": name, "steps": list(steps.values())})
