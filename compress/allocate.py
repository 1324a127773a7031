"""Allocate: which layer gets how much of a budget, so that the divergence of the whole model is least.

    minimise  Σ_g d(g, k_g)   with   Σ_g cost(g, k_g) ≤ budget          d = what choice k does to group g, in nats of KL

cost is bytes, or nanoseconds of a decoded token (latency.py); what may be left out makes the knapsack a tree (omit.py).

Five steps, the expensive ones done once and kept on disk:

1. survey: one streamed pass gathers the Hessian of every site; every choice of the menu is solved from it. A choice that is larger and no better
   than another in tr[ΔW H ΔWᵀ] is dropped (the intra-layer front of MLoRQ, whose candidates are rank × bits).
2. probe: the KL of the model with one group replaced, for two choices a group; the others follow their error by the power law through the two points.
3. knapsack: groups are merged one after the other, keeping the sums that no other sum beats (exact dynamic programming). All budgets at once.
4. refine: divergences do not quite add up, so each group's steps up and down are measured again where they will be taken, among layers that are
   compressed already, and the knapsack is solved again over these steps; the true KL decides whether they are taken.
5. switch: pairs of steps, one group up and another down, judged by the true KL (the level switches of EvoPress, arXiv 2410.14649).

A group is a linear; the linears that a consumer serves as one matrix (q, k and v) share one choice; so do the experts of a block. The knapsack
knows nothing of bits: a choice is any method with options, a cost and a damage. Steps 2, 4 and 5 hold the model's blocks in memory; a probe runs only
the blocks behind the change.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache as remembered
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .artifact import write_json, writing
from .calibration.statistics import Stats
from .checkpoint import Checkpoint
from .errors import CompressError
from .export.base import FUSED
from .formats import Dense, Format, build
from .judge import Judge, Weight
from .knapsack import Front, knapsack
from .linear import get_weight
from .recipe import Recipe, Step, nearest
from .stream import Stream
from .walk import sites_of, stages

if TYPE_CHECKING:
    from .omit import Omit

Watch = Callable[[Sequence, str], Iterable]  # (items, what is done) → the items, with a bar
GPTQ = {"method": "gptq", "propagate": 1.0, "refits": 1}  # what the `balanced` recipes do


@dataclass(frozen=True)
class Menu:
    """What a layer may become: steps of a recipe without `match`, and what the consumer that is to load it demands."""

    steps: tuple[dict[str, Any], ...]
    fused: bool = False  # linears that are served as one matrix share a choice
    uniform: bool = False  # one scheme for the whole model: the only other choice of a layer is to stay as it is
    export: str | None = None  # what `compress export --to` is to accept


def integers(widths: Iterable[int], groups: Iterable[int], **options) -> tuple[dict[str, Any], ...]:
    return tuple(GPTQ | {"bits": b, "group_size": g} | options for b in widths for g in groups)


CONSUMERS = {
    "ours": Menu(integers((2, 3, 4, 5, 6, 8), (-1, 128, 64))),
    "vllm": Menu(integers((4, 8), (128, 32), sym=True), fused=True, export="compressed-tensors"),
    "gptq": Menu(integers((2, 3, 4, 8), (128, 32), sym=True), fused=True, uniform=True, export="gptq"),
    "awq": Menu(integers((4,), (128, 64, 32)), fused=True, uniform=True, export="awq"),
    "gguf": Menu(integers((4, 5, 8), (32,), sym=True), export="gguf"),
}  # fmt: skip
MENUS = {
    "trellis": tuple({"method": "trellis", "propagate": 1.0, "bits": b} for b in (1.5, 2, 2.5, 3, 3.5, 4, 5)),
    "mlorq": (*integers((2, 3, 4, 8), (128,)),  # rank × bits beside plain bits, MLoRQ (arXiv 2507.09616)
              *({"method": "svd", "ratio": r, "bits": b, "group_size": 128} for b in (4, 8) for r in (0.2, 0.4, 0.6, 0.8))),
    "sparse": (*integers((4,), (128,)), {"method": "admm", "pattern": "2:4", "bits": 4, "group_size": 128},
               *({"method": "admm", "sparsity": s, "bits": 4, "group_size": 128} for s in (0.3, 0.5, 0.7))),
}  # fmt: skip


def menu_for(consumer: str, steps: str | Path | Sequence[dict[str, Any]] | None = None, bits: float | None = None) -> Menu:
    """What a consumer loads; `steps` puts others in their place: a name of MENUS, a YAML file with a list of steps, or the list itself.

    bits: the mean aimed at; widths far from it are left out of our own menu, which saves the time of solving them.
    """
    if consumer not in CONSUMERS:
        raise CompressError(f"unknown consumer {consumer!r}{nearest(consumer, CONSUMERS)}")
    menu = CONSUMERS[consumer]
    if steps is None:
        near = lambda s: bits is None or int(bits) - 1 <= s["bits"] <= int(bits) + 2 + (bits >= 5)
        return menu if consumer != "ours" else replace(menu, steps=tuple(s for s in menu.steps if near(s)) or menu.steps)
    if isinstance(steps, str | Path) and steps not in MENUS:
        try:
            steps = yaml.safe_load(Path(steps).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise CompressError(f"menu {steps}: neither one of {', '.join(MENUS)} nor a YAML file with a list of steps ({type(error).__name__})") from error
    listed = MENUS[steps] if isinstance(steps, str) else steps
    if not isinstance(listed, list | tuple) or not listed or not all(isinstance(s, dict) and "method" in s and "match" not in s for s in listed):
        raise CompressError("a menu is a list of steps without match, e.g. [{method: gptq, bits: 3}, {method: gptq, bits: 4}]")
    for s in listed:
        Step.model_validate(s).build()
    return replace(menu, steps=tuple(listed))


def smallest(source: Checkpoint, menu: Menu, shapes: dict[str, tuple[int, int]]) -> int:
    """Bytes that the linears take at least, from headers alone."""
    methods, total = [Step.model_validate(s).build() for s in menu.steps], 0
    for name, shape in shapes.items():
        sizes = [math.prod(shape) * source.dtype_of(f"{name}.weight").itemsize]
        for method in methods:
            with suppress(CompressError):  # not a choice of this layer
                sizes.append(method.planned(shape, source.dtype_of(f"{name}.weight"), name).nbytes())
        total += min(sizes)
    return total


def bytes_of(source: Checkpoint) -> Callable[[dict | None, str, tuple[int, int]], tuple[int, int, Format]]:
    """(step, linear, shape) → its bytes as a cost and as bytes, and its format on meta; a step of None keeps it as it is. Raises CompressError
    where the step cannot be applied to it."""

    @remembered
    def planned(step: str, path: str, shape: tuple[int, int]) -> tuple[int, int, Format]:
        stored = source.dtype_of(f"{path}.weight")
        kept = Dense(torch.empty(shape, dtype=stored, device="meta"))
        format = kept if step == "null" else Step.model_validate(json.loads(step)).build().planned(shape, stored, path)
        return format.nbytes(), format.nbytes(), format

    return lambda step, path, shape: planned(json.dumps(step), path, shape)


def parse_size(text: str | int) -> int:
    """Bytes of `4GB`, `700 MB`, `3.5GiB`, 1000000."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(text), re.I)
    if not found:
        raise CompressError(f"size {text!r}: give bytes like 4GB, 700MB or 3.5GiB")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " "))


# ---- what there is to choose from


@dataclass
class Choice:
    """One thing that a group may become."""

    step: dict[str, Any] | None  # of a recipe, without `match`; None: stays as it is
    describe: str
    nbytes: int
    error: float  # Σ tr[ΔW H ΔWᵀ] over the group's tokens, by which choices of one group compare
    formats: dict[str, dict]  # path → meta of its format, to find the weights that the survey kept
    place: int  # among the tensors that the survey kept
    damage: float = 0.0  # KL in nats of the model with this choice alone, filled by `probe`
    cost: int = 0  # what the budget counts: bytes, or nanoseconds a token

    def __post_init__(self):
        self.cost = self.cost or self.nbytes


@dataclass(frozen=True)
class Cut:
    """How a linear looks when a share of its inputs is gone (omit.py): `file` holds it solved again for those that stay, and by how much it moved."""

    file: Path
    reader: str
    share: float

    def weight(self, W: Tensor | None) -> Tensor:
        """[out, in] with zeros where inputs are gone: of the linear as it was (None), or of a choice of it."""
        with safe_open(self.file, framework="pt") as f:
            if W is None:
                return f.get_tensor(f"{self.share}.weight")
            move = f.get_tensor(f"{self.share}.move")
            return (W + move) * f.get_tensor(f"{self.share}.weight").any(0)


@dataclass
class Group:
    """Linears that share a choice; choices by rising bytes, the last is to stay as they are."""

    name: str
    linears: tuple[str, ...]
    choices: list[Choice]
    file: Path
    cuts: dict[str, Cut] = field(default_factory=dict)  # linear → how it is cut

    def hull(self) -> list[int]:
        """Choices on the lower convex hull of (cost, damage): the ladder that steps up and down are taken on."""
        c, hull = self.choices, list[int]()
        for k in sorted(range(len(c)), key=lambda k: (c[k].cost, c[k].damage)):
            if hull and c[k].damage > c[hull[-1]].damage:
                continue
            while len(hull) > 1:
                a, b = c[hull[-2]], c[hull[-1]]
                if (b.cost - a.cost) * (c[k].damage - a.damage) > (b.damage - a.damage) * (c[k].cost - a.cost):
                    break
                hull.pop()
            hull.append(k)
        return hull

    def steps_from(self, k: int) -> list[int]:
        """The choices one step down the ladder, as it is, and one step up."""
        c, ladder = self.choices, self.hull()
        return [*[j for j in ladder if c[j].cost < c[k].cost][-1:], k, *[j for j in ladder if c[j].cost > c[k].cost][:1]]

    def weights(self, k: int) -> dict[str, Weight]:
        """path → [out, in] fp32 of a choice, None for the original."""
        choice = self.choices[k]
        made: dict[str, Weight] = dict.fromkeys(self.linears)
        if choice.step is not None:
            with safe_open(self.file, framework="pt") as f:
                read = lambda prefix: {n.removeprefix(prefix): f.get_tensor(n) for n in f.keys() if n.startswith(prefix)}  # noqa: SIM118
                made = {path: build(meta, read(f"{path}.{choice.place}.")).dequantize() for path, meta in choice.formats.items()}
        return made | {path: cut.weight(made[path]) for path, cut in self.cuts.items() if path in made}


@dataclass
class Solution:
    """A point of a front: the groups that are left, what each takes, and what is left out (omit.py)."""

    groups: list[Group]
    picks: list[int]
    base: int = 0  # cost of what is no group's
    damage: float = 0.0  # of what is left out, each alone
    omitted: list[dict[str, Any]] = field(default_factory=list)
    taken: list[tuple[str, int]] = field(default_factory=list)  # (node, option) of what is left out
    weights: dict[str, Weight] = field(default_factory=dict)  # that stand for what is left out

    def all_weights(self) -> dict[str, Weight]:
        return weights_of(self.groups, self.picks) | self.weights

    def cost(self) -> int:
        return self.base + sum(g.choices[k].cost for g, k in zip(self.groups, self.picks, strict=True))


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


def survey(source: Checkpoint, menu: Menu, stream: Stream, folder: Path, watch: Watch) -> list[Group]:
    """Solve every choice of every linear from one pass of `stream`; weights go to `folder`, one file a block, where a second call finds them.

    Raises CompressError where no choice fits a group (a group size that does not divide its width, say).
    """
    steps = [Step.model_validate(s).build() for s in menu.steps]
    groups: list[Group] = []
    for i in watch(range(source.num_blocks), "solving every choice, block"):
        block, name, record = source.load_block(i, stream.device), source.block_name(i), folder / f"block-{i:05d}.json"
        if not record.is_file():
            solved: dict[str, dict[int, tuple[float, Format]]] = {}
            refused = ""
            for stage in stages(block, list(sites_of(source, block, stream)), False):
                found = stream.collect(block, {site.name: site.linears[0] for site in stage})
                for site in stage:
                    stats = found.pop(site.name)
                    for path in site.linears:
                        W, stored = get_weight(block.get_submodule(path), block.originals.get(f"{path}.weight")), block.stored[f"{path}.weight"]
                        solved[f"{name}.{path}"] = made = {}
                        for k, method in enumerate(steps):
                            try:
                                method.planned(tuple(W.shape), stored, f"{name}.{path}")
                            except CompressError as error:  # not a choice of this layer
                                refused = str(error)
                                continue
                            weight = method(W, stats if stats.count else Stats(torch.eye(W.shape[1], device=W.device)), stored=stored, where=path)
                            D = weight.dequantize() - W
                            made[k] = float((D @ stats.hessian).mul_(D).sum(dtype=torch.float64)) * stats.count, weight
            _keep(solved, menu, block, name, record, refused)
        groups += [Group(g["name"], tuple(g["linears"]), [Choice(**c) for c in g["choices"]], record.with_suffix(".safetensors"))
                   for g in json.loads(record.read_text())]  # fmt: skip
        if i + 1 < source.num_blocks:
            stream.advance(block)
    return groups


def _keep(solved: dict[str, dict[int, tuple[float, Format]]], menu: Menu, block: nn.Module, name: str, record: Path, refused: str) -> None:
    """Write the choices of a block that lie on the front of (bytes, error); the record comes last, its presence means complete."""
    described, tensors = [], dict[str, Tensor]()
    for group, linears in grouped(solved, menu.fused).items():
        common = set.intersection(*(set(solved[p]) for p in linears))
        if not common:
            raise CompressError(f"{group}: no choice of the menu fits it; the last one: {refused}")
        front: list[Choice] = []
        for nbytes, error, k in sorted((sum(solved[p][k][1].nbytes() for p in linears), sum(solved[p][k][0] for p in linears), k) for k in common):
            if menu.uniform or not front or error < front[-1].error:
                formats = {p: solved[p][k][1].meta() for p in linears}
                front.append(Choice(menu.steps[k], solved[linears[0]][k][1].describe(), nbytes, error, formats, k))
                tensors |= {f"{p}.{k}.{t}": value.cpu().contiguous() for p in linears for t, value in solved[p][k][1].tensors().items()}
        local = [p.removeprefix(name + ".") for p in linears]
        kept = sum(block.get_submodule(p).weight.numel() * block.stored[f"{p}.weight"].itemsize for p in local)
        front.append(Choice(None, "kept", kept, 0.0, {}, -1))
        described.append({"name": group, "linears": linears, "choices": [asdict(c) for c in front]})
    with writing(record.parent):
        save_file(tensors, record.with_suffix(".safetensors"))
    write_json(record, described)


# ---- the search


def probe(groups: list[Group], judge: Judge, cache: Path, watch: Watch) -> None:
    """Fill every `damage`: two choices of each group are measured, all others as in the original; the rest follow their error by the power law
    through the two. What was measured before is in `cache`, {"group|place": KL}."""
    known: dict[str, float] = json.loads(cache.read_text()) if cache.is_file() else {}
    for group in watch(groups, "measuring sensitivities, group"):
        solved = group.choices[:-1]
        points = []
        for k in sorted({0, len(solved) // 2}):
            key = f"{group.name}|{solved[k].place}"
            if key not in known:
                known[key] = judge(group.weights(k))
                write_json(cache, known)
            points.append((max(solved[k].error, 1e-30), max(known[key], 1e-12)))
        (e0, d0), (e1, d1) = points[0], points[-1]
        power = min(1.5, max(0.5, math.log(d0 / d1) / math.log(e0 / e1))) if e0 != e1 else 1.0  # 1 for small damage
        for choice in solved:
            e, d = (e0, d0) if choice.error >= (e0 * e1) ** 0.5 else (e1, d1)
            choice.damage = d * (choice.error / e) ** power



def kept_to_one_scheme(groups: list[Group]) -> Iterator[list[Group]]:
    """The same groups once for every choice of the menu, each group free only to take that or to stay as it is."""
    for place in sorted({c.place for g in groups for c in g.choices[:-1]}):
        yield [replace(g, choices=[c for c in g.choices if c.place in (place, -1)]) for g in groups]


def front_of(groups: list[Group]) -> Front:
    return knapsack([[c.cost for c in g.choices] for g in groups], [[c.damage for c in g.choices] for g in groups])


def weights_of(groups: list[Group], picks: Sequence[int], among: Iterable[int] | None = None) -> dict[str, Weight]:
    """The weights that an allocation stands for, of all groups or of those `among` them."""
    return {path: W for i in (range(len(groups)) if among is None else among) for path, W in groups[i].weights(picks[i]).items()}


def improve(groups: list[Group], picks: list[int], budget: int, judge: Judge, *, rounds: int, tries: int, watch: Watch) -> tuple[list[int], float]:
    """Better picks and their KL, never above that of those given: `rounds` times the knapsack over measured steps, then `tries` switches.

    judge holds the picks given, and afterwards those returned.
    """
    kl, moved = judge({}), set[int]()
    options = [g.steps_from(k) for g, k in zip(groups, picks, strict=True)]
    damage = [[g.choices[j].damage - g.choices[k].damage for j in o] for g, k, o in zip(groups, picks, options, strict=True)]
    for _ in range(rounds):
        options = [g.steps_from(k) for g, k in zip(groups, picks, strict=True)]
        damage = [[0.0 if k == picks[i] else judge(groups[i].weights(k)) - kl for k in options[i]] for i in watch(range(len(groups)), "measuring steps, group")]
        front = knapsack([[g.choices[k].cost for k in o] for g, o in zip(groups, options, strict=True)], damage)
        new = [o[c] for o, c in zip(options, front.picks[front.within(budget)].tolist(), strict=True)]
        moved = {i for i, k in enumerate(picks) if new[i] != k}
        if not moved or (now := judge(weights_of(groups, new, moved))) >= kl:
            moved = set()
            break
        judge.put(weights_of(groups, new, moved))
        picks, kl = new, now
    spent = sum(g.choices[k].cost for g, k in zip(groups, picks, strict=True))
    moves = sorted((d, groups[i].choices[k].cost - groups[i].choices[picks[i]].cost, i, k) for i in range(len(groups)) if i not in moved
                   for k, d in zip(options[i], damage[i], strict=True) if k != picks[i])  # fmt: skip
    ups, downs = [m for m in moves if m[1] > 0][:64], [m for m in moves if m[1] < 0][:64]
    pairs = sorted((up[0] + down[0], up, down) for up in ups for down in downs if up[2] != down[2])
    for _ in watch(range(tries), "switching, try"):
        pairs = pairs[next((n for n, (_, u, v) in enumerate(pairs) if not {u[2], v[2]} & moved and spent + u[1] + v[1] <= budget), len(pairs)) :]
        if not pairs:
            break
        _, up, down = pairs.pop(0)
        weights = groups[up[2]].weights(up[3]) | groups[down[2]].weights(down[3])
        if (now := judge(weights)) < kl:
            judge.put(weights)
            kl, spent, moved = now, spent + up[1] + down[1], moved | {up[2], down[2]}
            picks = [up[3] if i == up[2] else down[3] if i == down[2] else k for i, k in enumerate(picks)]
    return picks, kl


# ---- what comes of it


@dataclass
class Allocation:
    """A budget spent: an ordinary recipe, and what is known of it. Divergences are in nats a token on the probes' windows."""

    model: str
    consumer: str
    budget: int  # bytes of the linears, or nanoseconds a token
    cost: int  # of it taken
    nbytes: int  # of the linears
    bits: float  # per weight of the linears there were, scales included
    latency: float | None  # share of the original's time a token, None where nothing was timed
    layers: dict[str, dict[str, Any] | None]  # path → method and options, None: stays as it is
    groups: list[dict[str, Any]]  # name, linears, format, bytes, bits, damage alone
    omitted: list[dict[str, Any]]  # what, kind, name, share, damage alone
    predicted: float  # sum of the damages alone
    before: float  # measured, of the knapsack's allocation
    kl: float  # measured, after the search
    curve: list[dict[str, Any]]  # the front: bits (or latency), predicted, and measured at some points
    uniform: list[dict[str, Any]]  # every layer the same choice: step, bits (or latency), predicted
    trials: int
    recipe: Recipe
    artifact_kl: float | None = None  # of the finished artifact, whose later layers make up for earlier ones
    speed: dict[str, float] | None = None  # decoded tokens a second: original, artifact
    report: Any = None  # of the run

    def to_json(self) -> dict[str, Any]:
        kept = {k: v for k, v in self.__dict__.items() if k not in ("recipe", "report")}
        return kept | {"recipe": self.recipe.model_dump(mode="json", exclude_defaults=True), "report": self.report and self.report.to_json()}


def allocate(source: Checkpoint, menu: Menu, groups: list[Group], judge: Judge, budget: int, cache: Path, *, consumer: str = "ours", rounds: int = 0,
             tries: int = 16, points: int = 4, omit: Omit | None = None, fixed: int = 0, token: int = 0, watch: Watch) -> Allocation:  # fmt: skip
    """The allocation of least KL whose cost is at most `budget`: bytes of the linears, or with `token`, the original's, nanoseconds, `fixed` of which are
    no choice's. omit: what may be left out. Raises CompressError where the menu has none so small."""
    probe(groups, judge, cache, watch)
    if omit is not None:
        known: dict[str, float] = json.loads(cache.read_text())
        omit.probe(judge, known, watch)
        write_json(cache, known)
    size = {g.name: sum(math.prod(judge.originals[p][0].shape) for p in g.linears) for g in groups}
    parameters = sum(size.values())
    unit, scale = ("latency", 1 / token) if token else ("bits", 8 / parameters)

    def front_without(banned: frozenset[tuple[str, int]] = frozenset()) -> Front:
        found = front_of(groups) if omit is None else omit.front(groups, banned)
        return replace(found, cost=found.cost + fixed)

    solve = lambda picks: Solution(groups, picks, fixed) if omit is None else omit.solution(groups, picks, fixed)
    if menu.uniform and omit is None:
        variants = [(v, front_of(v)) for v in kept_to_one_scheme(groups)]
        fits = [(v, f) for v, f in variants if int(f.cost[0]) <= budget] or [min(variants, key=lambda vf: int(vf[1].cost[0]))]
        groups, front = min(fits, key=lambda vf: float(vf[1].damage[vf[1].within(budget)]))
    else:
        front = front_without()
    if token and budget < int(front.cost[0]):
        raise CompressError(f"the fastest choices take {int(front.cost[0]) / token:.2f} of the original's {token / 1e6:.2f} ms a token on this machine, "
                            f"{fixed / token:.2f} is no layer's; the budget is {budget / token:.2f}: raise it")  # fmt: skip
    at = front.within(budget)
    curve = [{unit: int(b) * scale, "predicted": float(d)} for b, d in zip(front.cost, front.damage, strict=True)]
    span = 0.75 if unit == "bits" else 0.15
    low, high = max(0.0, curve[at][unit] - span), curve[at][unit] + span
    for x in (low + (high - low) * j / (points - 1) for j in range(points)):
        j = max((j for j, c in enumerate(curve) if c[unit] <= x), default=0)
        curve[j]["measured"] = judge(solve(front.picks[j].tolist()).all_weights())
    curve = [c for j, c in enumerate(curve) if "measured" in c or j % max(1, len(curve) // 200) == 0]
    best = solve(front.picks[at].tolist())
    judge.put(best.all_weights())
    before = kl = judge({})
    for node in watch(best.taken[:tries], "trying without, omission"):  # switches of what is left out: something else pays for it
        other = front_without(frozenset([node]))
        if int(other.cost[0]) <= budget:
            now = solve(other.picks[other.within(budget)].tolist())
            weights: dict[str, Weight] = dict.fromkeys(judge.originals) | now.all_weights()
            if (trial := judge(weights)) < kl:
                judge.put(weights)
                best, kl = now, trial
    best.picks, kl = improve(best.groups, best.picks, budget - best.base, judge, rounds=rounds, tries=tries, watch=watch)
    chosen = {g.name: g.choices[k] for g, k in zip(best.groups, best.picks, strict=True)}
    nbytes = sum(c.nbytes for c in chosen.values())
    uniform = list[dict[str, Any]]()
    for place, step in enumerate(menu.steps):
        same = [c for g in groups for c in g.choices if c.place == place]
        if len(same) == len(groups):
            around = fixed + sum(o.options[0].base for o in omit.nodes()) if omit else fixed
            uniform.append({"step": step, unit: (around + sum(c.cost for c in same)) * scale, "predicted": sum(c.damage for c in same)})
    gone = {"format": "left out", "bytes": 0, "bits": 0.0, "damage": 0.0}
    rows = [{"name": g.name, "linears": len(g.linears)} | (gone if (c := chosen.get(g.name)) is None else
            {"format": c.describe, "bytes": c.nbytes, "bits": 8 * c.nbytes / size[g.name], "damage": c.damage}) for g in groups]  # fmt: skip
    bits, layers = 8 * nbytes / parameters, {p: chosen[g.name].step for g in best.groups for p in g.linears}
    name = f"auto-{best.cost() / token:.2f}x" if token else f"auto-{bits:.2f}"
    return Allocation(source.name, consumer, budget, best.cost(), nbytes, bits, best.cost() / token if token else None, layers, rows, best.omitted,
                      best.damage + sum(c.damage for c in chosen.values()), before, kl, curve, uniform, judge.trials,
                      recipe_of(name, best, source, omit))  # fmt: skip


def recipe_of(name: str, found: Solution, source: Checkpoint, omit: Omit | None) -> Recipe:
    """An ordinary recipe: what is left out, and one step a choice, matching the linears that take it; those that stay as they are match none."""
    steps: dict[str, dict] = {}
    gone = sorted(i for i in range(source.num_blocks) if any(o["what"] == "absent" and o["name"] == source.block_name(i) for o in found.omitted))
    for g, k in zip(found.groups, found.picks, strict=True):
        if (step := g.choices[k].step) is not None:
            steps.setdefault(json.dumps(step), step | {"match": []})["match"] += [_moved(source, path, gone) for path in g.linears]
    structure = omit.structure(found.omitted) if omit else []
    if not steps and not structure:
        raise CompressError("the budget pays for every layer as it is: nothing to compress")
    return Recipe.model_validate({"name": name, "description": "made by compress auto", "structure": structure, "steps": list(steps.values())}).check()


def _moved(source: Checkpoint, path: str, gone: list[int]) -> str:
    """The path of a linear once the blocks `gone` are."""
    i, _, local = path.removeprefix(source.blocks_path + ".").partition(".")
    return f"{source.block_name(int(i) - sum(b < int(i) for b in gone))}.{local}"


def draw(a: Allocation, path: Path) -> None:
    """The curve of cost against divergence as a picture: predicted sums, what was measured, the allocation that was chosen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    unit, x = ("bits", a.bits) if a.latency is None else ("latency", a.latency)
    label = {"bits": "bits per weight of the linears, scales included", "latency": "time a token, of the original's on this machine"}[unit]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel=label, ylabel="KL(original ‖ compressed), nats", yscale="log",
                              title=f"{Path(a.model).name}: {len(a.groups)} groups, {x:.2f} chosen")  # fmt: skip
    near = lambda rows: [r for r in rows if r["predicted"] > 0 and r[unit] < x + 2]
    shown, same = near(a.curve), near(a.uniform)
    measured = [c for c in shown if "measured" in c]
    axes.plot([c[unit] for c in shown], [c["predicted"] for c in shown], color="#2463a6", label="best mixture, predicted")
    axes.plot([c[unit] for c in measured], [c["measured"] for c in measured], "o", color="#2463a6", mfc="white", label="best mixture, measured")
    axes.plot([u[unit] for u in same], [u["predicted"] for u in same], "s", color="#999", label="one choice for all, predicted")
    axes.plot([x], [a.kl], "*", ms=13, color="#c0392b", label="chosen, after the search")
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
