"""Allocate: which layer gets how much of a byte budget, so that the divergence of the whole model is least.

    minimise  Σ_g d(g, k_g)   with   Σ_g bytes(g, k_g) ≤ budget          d = what choice k does to group g, in nats of KL

Five steps, the expensive ones done once and kept on disk:

1. survey: one streamed pass gathers the Hessian of every site; every choice of the menu is solved from it. A choice that is larger and no better
   than another in tr[ΔW H ΔWᵀ] is dropped (the intra-layer front of MLoRQ, whose candidates are rank × bits).
2. probe: the KL of the model with one group replaced, for two choices a group; the others follow their error by the power law through the two points.
3. knapsack: groups are merged one after the other, keeping the sums that no other sum beats (exact dynamic programming). All budgets at once.
4. refine: divergences do not quite add up, so each group's steps up and down are measured again where they will be taken, among layers that are
   compressed already, and the knapsack is solved again over these steps; the true KL decides whether they are taken.
5. switch: pairs of steps, one group up and another down, judged by the true KL (the level switches of EvoPress, arXiv 2410.14649).

A group is a linear; the linears that a consumer serves as one matrix (q, k and v) share one choice; so do the experts of a block. The knapsack
knows nothing of bits: a choice is any method with options, bytes and a damage. Steps 2, 4 and 5 hold the model's blocks in memory; a probe runs only
the blocks behind the change.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

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
from .formats import Format, build
from .judge import Judge
from .knapsack import Front, knapsack
from .linear import get_weight
from .recipe import Recipe, Step, nearest
from .stream import Stream
from .walk import sites_of, stages

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


@dataclass
class Group:
    """Linears that share a choice; choices by rising bytes, the last is to stay as they are."""

    name: str
    linears: tuple[str, ...]
    choices: list[Choice]
    file: Path

    def hull(self) -> list[int]:
        """Choices on the lower convex hull of (bytes, damage): the ladder that steps up and down are taken on."""
        c, hull = self.choices, list[int]()
        for k in range(len(c)):
            while len(hull) > 1:
                a, b = c[hull[-2]], c[hull[-1]]
                if (b.nbytes - a.nbytes) * (c[k].damage - a.damage) > (b.damage - a.damage) * (c[k].nbytes - a.nbytes):
                    break
                hull.pop()
            hull.append(k)
        return hull

    def steps_from(self, k: int) -> list[int]:
        """The choices one step down the ladder, as it is, and one step up."""
        c, ladder = self.choices, self.hull()
        return [*[j for j in ladder if c[j].nbytes < c[k].nbytes][-1:], k, *[j for j in ladder if c[j].nbytes > c[k].nbytes][:1]]

    def weights(self, k: int) -> dict[str, Tensor | None]:
        """path → [out, in] fp32 of a choice, None for the original."""
        choice = self.choices[k]
        if choice.step is None:
            return dict.fromkeys(self.linears)
        with safe_open(self.file, framework="pt") as f:
            read = lambda prefix: {n.removeprefix(prefix): f.get_tensor(n) for n in f.keys() if n.startswith(prefix)}  # noqa: SIM118
            return {path: build(meta, read(f"{path}.{choice.place}.")).dequantize() for path, meta in choice.formats.items()}


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
    return knapsack([[c.nbytes for c in g.choices] for g in groups], [[c.damage for c in g.choices] for g in groups])


def weights_of(groups: list[Group], picks: Sequence[int], among: Iterable[int] | None = None) -> dict[str, Tensor | None]:
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
        front = knapsack([[g.choices[k].nbytes for k in o] for g, o in zip(groups, options, strict=True)], damage)
        new = [o[c] for o, c in zip(options, front.picks[front.within(budget)].tolist(), strict=True)]
        moved = {i for i, k in enumerate(picks) if new[i] != k}
        if not moved or (now := judge(weights_of(groups, new, moved))) >= kl:
            moved = set()
            break
        judge.put(weights_of(groups, new, moved))
        picks, kl = new, now
    spent = sum(g.choices[k].nbytes for g, k in zip(groups, picks, strict=True))
    moves = sorted((d, groups[i].choices[k].nbytes - groups[i].choices[picks[i]].nbytes, i, k) for i in range(len(groups)) if i not in moved
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
    budget: int  # bytes of the linears
    nbytes: int  # of them taken
    bits: float  # per weight of the linears, scales included
    layers: dict[str, dict[str, Any] | None]  # path → method and options, None: stays as it is
    groups: list[dict[str, Any]]  # name, linears, format, bytes, bits, damage alone
    predicted: float  # sum of the damages alone
    before: float  # measured, of the knapsack's allocation
    kl: float  # measured, after the search
    curve: list[dict[str, Any]]  # the front: bits, predicted, and measured at some points
    uniform: list[dict[str, Any]]  # every layer the same choice: format, bits, predicted
    trials: int
    recipe: Recipe
    artifact_kl: float | None = None  # of the finished artifact, whose later layers make up for earlier ones
    report: Any = None  # of the run

    def to_json(self) -> dict[str, Any]:
        kept = {k: v for k, v in self.__dict__.items() if k not in ("recipe", "report")}
        return kept | {"recipe": self.recipe.model_dump(mode="json", exclude_defaults=True), "report": self.report and self.report.to_json()}


def allocate(source: Checkpoint, menu: Menu, groups: list[Group], judge: Judge, budget: int, cache: Path, *, consumer: str = "ours", rounds: int = 0,
             tries: int = 16, points: int = 4, watch: Watch) -> Allocation:  # fmt: skip
    """The allocation of least KL whose linears take at most `budget` bytes. Raises CompressError where the menu has none so small."""
    probe(groups, judge, cache, watch)
    if menu.uniform:
        variants = [(v, front_of(v)) for v in kept_to_one_scheme(groups)]
        fits = [(v, f) for v, f in variants if int(f.nbytes[0]) <= budget] or [min(variants, key=lambda vf: int(vf[1].nbytes[0]))]
        groups, front = min(fits, key=lambda vf: float(vf[1].damage[vf[1].within(budget)]))
    else:
        front = front_of(groups)
    size = {g.name: sum(math.prod(judge.originals[p].shape) for p in g.linears) for g in groups}
    parameters = sum(size.values())
    at = front.within(budget)
    curve = [{"bits": 8 * int(b) / parameters, "predicted": float(d)} for b, d in zip(front.nbytes, front.damage, strict=True)]
    low, high = max(0.0, curve[at]["bits"] - 0.75), curve[at]["bits"] + 0.75
    for bits in (low + (high - low) * j / (points - 1) for j in range(points)):
        j = max((j for j, c in enumerate(curve) if c["bits"] <= bits), default=0)
        curve[j]["measured"] = judge(weights_of(groups, front.picks[j].tolist()))
    curve = [c for j, c in enumerate(curve) if "measured" in c or j % max(1, len(curve) // 200) == 0]
    picks = front.picks[at].tolist()
    judge.put(weights_of(groups, picks))
    before = judge({})
    picks, kl = improve(groups, picks, budget, judge, rounds=rounds, tries=tries, watch=watch)
    chosen = [g.choices[k] for g, k in zip(groups, picks, strict=True)]
    nbytes, uniform = sum(c.nbytes for c in chosen), list[dict[str, Any]]()
    for place, step in enumerate(menu.steps):
        same = [c for g in groups for c in g.choices if c.place == place]
        if len(same) == len(groups):
            uniform.append({"step": step, "bits": 8 * sum(c.nbytes for c in same) / parameters, "predicted": sum(c.damage for c in same)})
    rows = [{"name": g.name, "linears": len(g.linears), "format": c.describe, "bytes": c.nbytes, "bits": 8 * c.nbytes / size[g.name], "damage": c.damage}
            for g, c in zip(groups, chosen, strict=True)]  # fmt: skip
    bits, layers = 8 * nbytes / parameters, {p: c.step for g, c in zip(groups, chosen, strict=True) for p in g.linears}
    return Allocation(source.name, consumer, budget, nbytes, bits, layers, rows, sum(c.damage for c in chosen), before, kl, curve, uniform, judge.trials,
                      recipe_of(f"auto-{bits:.2f}", groups, picks))  # fmt: skip


def recipe_of(name: str, groups: list[Group], picks: Sequence[int]) -> Recipe:
    """An ordinary recipe: one step a choice, matching the linears that take it; those that stay as they are match none."""
    steps: dict[str, dict] = {}
    for g, k in zip(groups, picks, strict=True):
        if (step := g.choices[k].step) is not None:
            steps.setdefault(json.dumps(step), step | {"match": []})["match"] += g.linears
    if not steps:
        raise CompressError("the budget pays for every layer as it is: nothing to compress")
    return Recipe.model_validate({"name": name, "description": "made by compress auto", "steps": list(steps.values())}).check()


def draw(a: Allocation, path: Path) -> None:
    """The curve of size against divergence as a picture: predicted sums, what was measured, the allocation that was chosen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="bits per weight of the linears, scales included", ylabel="KL(original ‖ compressed), nats", yscale="log",
                              title=f"{Path(a.model).name}: {len(a.groups)} groups, {a.bits:.2f} bits chosen")  # fmt: skip
    shown = [c for c in a.curve if c["predicted"] > 0 and c["bits"] < a.bits + 2]
    axes.plot([c["bits"] for c in shown], [c["predicted"] for c in shown], color="#2463a6", label="best mixture, predicted")
    measured = [c for c in shown if "measured" in c]
    axes.plot([c["bits"] for c in measured], [c["measured"] for c in measured], "o", color="#2463a6", mfc="white", label="best mixture, measured")
    same = [u for u in a.uniform if u["bits"] < a.bits + 2 and u["predicted"] > 0]
    axes.plot([u["bits"] for u in same], [u["predicted"] for u in same], "s", color="#999", label="one choice for all, predicted")
    axes.plot([a.bits], [a.kl], "*", ms=13, color="#c0392b", label="chosen, after the search")
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
