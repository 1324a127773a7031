"""Omit: what may be left out, as choices beside the formats: the attention or the MLP of a block, the whole block, a share of an MLP's neurons.

A sublayer that is left out takes its linears' choices with it, and one that is narrower changes what each of them takes. So the knapsack is a tree:

    sublayer = min over { whole, narrower, absent } of  d_option + Σ_linears d(choice)      at its cost
    block    = min over { attention + MLP, absent }                                        model = Σ_blocks

each node the front of (cost, damage) of its parts (allocate.py): still exact, all budgets at once. d_option is the KL of the whole model with that alone,
measured. An MLP keeps the neurons of largest √E[x_j²]·‖W_:j‖ (importance.py: activation), and down_proj is solved again for them,

    Ŵ_K = W_K + (W − W_K) H_{:,K} (H_KK + λI)⁻¹                                           H = E[x xᵀ] of its inputs

as the `refit` of the recipe does (structure/refit.py), which also makes up for what was left out before. Cost: one streamed pass, and up to five
trials a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .allocate import Cut, Group, Solution, Watch
from .arch import table_entry
from .artifact import writing
from .checkpoint import Checkpoint
from .errors import CompressError
from .formats import Format
from .judge import Judge, Weights
from .knapsack import Front, either, joined, knapsack, shifted
from .latency import children_of
from .linear import get_weight
from .skeleton import neurons
from .stream import Stream
from .structure.width import Width

SHARES = (0.25, 0.5)  # of an MLP's neurons that may go
DAMP = 0.001  # as `refit`
ABSENT = 1  # the place of that among a block's options
INNER = 256  # points of the front of a block
Shapes = dict[str, tuple[int, int]]  # linear → [out, in]
Cost = Callable[[dict | None, str, tuple[int, int]], tuple[int, int, Format]]  # (step, linear, shape) → (cost, bytes, format), as allocate.bytes_of


@dataclass
class Option:
    """One thing that a sublayer or a block may be. costs: of its groups' choices, with their bytes; None where none of them is left."""

    what: str  # "whole", "absent" or "narrow"
    costs: list[list[tuple[int, int]]] | None
    base: int = 0  # taken whatever its groups are
    share: float = 0.0
    damage: float = 0.0
    cuts: dict[str, Cut] = field(default_factory=dict)  # linear → how its columns are cut


@dataclass
class Node:
    """A sublayer, with the groups of its linears, or a block, with its sublayers; options[0] is to keep it whole."""

    name: str
    kind: str  # "attention", "mlp" or "block"
    groups: list[int]
    options: list[Option]
    writers: list[str]  # the linears that add to the stream
    children: list[Node] = field(default_factory=list)

    def front(self, groups: list[Group], banned: frozenset[tuple[str, int]]) -> Front:
        """Its columns: the option, then those of its groups, then those of its children."""
        width, fronts = self.width(), []
        for k, o in enumerate(self.options):
            if (self.name, k) in banned:
                continue
            if o.costs is None:
                inside = Front(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64), torch.zeros(1, width - 1, dtype=torch.uint8))
            else:
                inside = knapsack([[c for c, _ in costs] for costs in o.costs], [[c.damage for c in groups[g].choices] for g in self.groups])
                for child in self.children:
                    inside = joined(inside, child.front(groups, banned), INNER)
            fronts.append(shifted(inside, o.base, o.damage, k))
        return either(fronts, INNER)

    def width(self) -> int:
        return 1 + len(self.groups) + sum(child.width() for child in self.children)

    def absent(self) -> Weights:
        return dict.fromkeys(self.writers, 0)


@dataclass
class Omit:
    """The tree over a model's groups."""

    blocks: list[Node]
    multiple: int

    def nodes(self) -> list[Node]:
        return [node for block in self.blocks for node in (block, *block.children)]

    def probe(self, judge: Judge, known: dict[str, float], watch: Watch) -> None:
        """Fill every option's damage, the KL of the model with it alone; `known` keeps them."""
        todo = [(node, o) for node in self.nodes() for o in node.options[1:]]
        for node, o in watch(todo, "measuring what may be left out, option"):
            key = f"{node.name}|{o.what}|{o.share}"
            if key not in known:
                known[key] = judge(node.absent() if o.what == "absent" else {path: cut.weight(None) for path, cut in o.cuts.items()})
            o.damage = known[key]

    def front(self, groups: list[Group], banned: frozenset[tuple[str, int]] = frozenset()) -> Front:
        """Of the whole model. One block stays at least: `some` has one already, `none` is the point where all so far are gone."""
        some: Front | None = None
        none: Front | None = Front(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64), torch.zeros(1, 0, dtype=torch.uint8))
        for block in self.blocks:
            here = block.front(groups, banned | {(block.name, ABSENT)})
            gone = None if (block.name, ABSENT) in banned else block.front(groups, banned | {(block.name, 0)})
            any_way = here if gone is None else either([here, gone], INNER)
            some = either([*([joined(none, here)] if none else []), *([joined(some, any_way)] if some else [])])
            none = joined(none, gone) if none and gone else None
        assert some is not None
        return some

    def solution(self, groups: list[Group], picks: list[int], fixed: int = 0) -> Solution:
        """What a point of the front stands for; the groups that are left have the costs that they have there."""
        out = Solution([], [], base=fixed)
        queue = iter(picks)
        for block in self.blocks:
            self._read(block, groups, queue, out, True)
        return out

    def _read(self, node: Node, groups: list[Group], queue, out: Solution, there: bool) -> None:
        option = node.options[next(queue)]
        if there:
            out.base += option.base
            if option.what != "whole":
                out.damage += option.damage
                out.taken.append((node.name, node.options.index(option)))
                out.omitted.append({"what": option.what, "kind": node.kind, "name": node.name, "share": option.share, "damage": option.damage})
                out.weights |= node.absent() if option.what == "absent" else {}
        for at, g in enumerate(node.groups):
            k = next(queue)
            if there and option.costs is not None:
                now = [replace(c, cost=cost, nbytes=nbytes) for c, (cost, nbytes) in zip(groups[g].choices, option.costs[at], strict=True)]
                out.groups.append(replace(groups[g], cuts=option.cuts, choices=now))
                out.picks.append(k)
        for child in node.children:
            self._read(child, groups, queue, out, there and option.what != "absent")

    def structure(self, omitted: list[dict[str, Any]]) -> list[dict[str, Any] | str]:
        """The steps of a recipe that leave these out, and solve again what is left."""
        index = {node.name: i for i, block in enumerate(self.blocks) for node in (block, *block.children)}
        where = lambda **wanted: [index[o["name"]] for o in omitted if all(o[k] == v for k, v in wanted.items())]
        steps: list[dict[str, Any] | str] = []
        for share in SHARES:
            if at := where(what="narrow", share=share):
                left = [i for i in range(len(self.blocks)) if i not in at]
                steps.append({"width": {"mlp": share, "by": "activation", "across": "layer", "multiple": self.multiple, "skip": left}})
        for kind in ("attention", "mlp", "block"):
            if at := where(what="absent", kind=kind):
                steps.append({"drop": {"what": kind, "blocks": at}})
        return [*steps, "refit"] if steps else []


def offered(source: Checkpoint, groups: list[Group], shapes: Shapes, stream: Stream | None, folder: Path, cost: Cost, around: Sequence[dict[str, int]],
            *, plain: bool, watch: Watch) -> Omit:  # fmt: skip
    """The tree of a model. cost: what a step makes a linear of a shape take; around: what a block and its children take beside their linears, by
    block. plain: whole blocks only, which every consumer's configuration can say. Raises CompressError where sublayers are no modules of their own."""
    place = {path: g for g, group in enumerate(groups) for path in group.linears}
    multiple = 1 if plain or stream is None else _multiple(source)
    cuts = narrower(source, shapes, stream, folder, multiple, watch) if multiple > 1 and stream is not None else {}
    blocks = []
    for i in range(source.num_blocks):
        name, children = source.block_name(i), []
        found = children_of(source, i)
        if not found:
            raise CompressError(f"{source.name}: the sublayers of {source.config.model_type} are not modules of their own: nothing can be left out; "
                                "use --no-omit")  # fmt: skip
        for child, kind in zip(found, ("attention", "mlp"), strict=True):
            path = f"{name}.{child}"
            own = sorted({g for p, g in place.items() if p.startswith(f"{path}.")})
            base = around[i].get(child, 0)
            options = [Option("whole", [[cost_of(cost, groups[g], k, shapes) for k in range(len(groups[g].choices))] for g in own], base)]
            if not plain:
                options.append(Option("absent", None))
                for share, (cut, trimmed) in cuts.get(path, {}).items():
                    now = shapes | trimmed
                    try:
                        costs = [[cost_of(cost, groups[g], k, now) for k in range(len(groups[g].choices))] for g in own]
                    except CompressError:  # a group size of the menu does not divide the narrower layer
                        continue
                    options.append(Option("narrow", costs, base, share, cuts={cut.reader: cut}))
            children.append(Node(path, kind, own, options, [_writer(source, i, kind)]))
        loose = sorted({g for p, g in place.items() if p.startswith(f"{name}.")} - {g for c in children for g in c.groups})
        whole = Option("whole", [[cost_of(cost, groups[g], k, shapes) for k in range(len(groups[g].choices))] for g in loose], around[i].get("", 0))
        blocks.append(Node(name, "block", loose, [whole, Option("absent", None)], [w for c in children for w in c.writers], children))
    return Omit(blocks, multiple)


def priced(groups: list[Group], cost: Cost, shapes: Shapes) -> None:
    """Count what every choice takes anew."""
    for group in groups:
        for k, c in enumerate(group.choices):
            c.cost = cost_of(cost, group, k, shapes)[0]


def cost_of(cost: Cost, group: Group, k: int, shapes: Shapes) -> tuple[int, int]:
    each = [cost(group.choices[k].step, path, shapes[path]) for path in group.linears]
    return sum(c for c, _, _ in each), sum(nbytes for _, nbytes, _ in each)


def narrower(source: Checkpoint, shapes: Shapes, stream: Stream, folder: Path, multiple: int, watch: Watch) -> dict[str, dict[float, tuple[Cut, Shapes]]]:
    """MLP → share → how its reader is cut, and the shapes of its linears then. Solved from one pass, one file a block, found again by a second call."""
    arch, found = table_entry(source.model), dict[str, dict[float, tuple[Cut, Shapes]]]()
    assert arch is not None
    for i in watch(range(source.num_blocks), "narrower MLPs, block"):
        name, skeleton, file = source.block_name(i), source.model.get_submodule(source.block_name(i)), folder / f"narrow-{i:05d}.safetensors"
        mlp = neurons(arch, skeleton)
        if mlp is not None and not file.is_file():
            block = source.load_block(i, stream.device)
            stats = stream.collect(block, {"": mlp.reader})[""]
            W = get_weight(block.get_submodule(mlp.reader), block.originals.get(f"{mlp.reader}.weight"))
            tensors = {f"{share}.{key}": t for share in SHARES for key, t in refitted(W, stats.hessian, kept(W, stats.hessian, share, multiple)).items()}
            with writing(folder):
                save_file(tensors, file.with_suffix(".tmp"))
                file.with_suffix(".tmp").replace(file)
            stream.advance(block)
        elif stream.at == i and i + 1 < source.num_blocks:
            stream.advance(source.load_block(i, stream.device))
        if mlp is not None:
            shares = {}
            for share in SHARES:
                n = Width(mlp=share, across="layer", multiple=multiple)._threshold({0: torch.arange(mlp.width).double()}, share, multiple)[0]
                now = {path: (shapes[path][0] // mlp.width * len(n), shapes[path][1]) for m in mlp.makers if (path := f"{name}.{m}") in shapes}
                now[f"{name}.{mlp.reader}"] = (shapes[f"{name}.{mlp.reader}"][0], len(n))
                shares[share] = Cut(file, f"{name}.{mlp.reader}", share), now
            found[f"{name}.{mlp.reader.rpartition('.')[0]}"] = shares
    return found


def kept(W: Tensor, H: Tensor, share: float, multiple: int) -> Tensor:
    """The inputs of W [out, n] that stay, as a step `width: {by: activation, across: layer}` keeps them."""
    score = (H.diagonal().double() * W.double().square().sum(0)).sqrt()
    return torch.tensor(Width()._threshold({0: score.cpu()}, share, multiple, "layer")[0])


def refitted(W: Tensor, H: Tensor, keep: Tensor) -> dict[str, Tensor]:
    """{"weight": least-squares W over the columns `keep`, 0 elsewhere, "move": by how much it differs from W there}, [out, n] fp32."""
    keep = keep.to(W.device)
    lost = W.clone()
    lost[:, keep] = 0
    A = H[keep][:, keep] + DAMP * H.diagonal().mean() * torch.eye(len(keep), device=H.device)
    move = torch.zeros_like(W)
    move[:, keep] = torch.linalg.solve(A.double(), (lost @ H[:, keep]).double().T).T.float()
    return {"weight": (W - lost + move).cpu().contiguous(), "move": move.cpu().contiguous()}


def _multiple(source: Checkpoint) -> int:
    """MLP widths are multiples of it: as large as kernels and groups like, while an MLP still has eight such pieces. 1: no dense MLP in the table."""
    arch = table_entry(source.model)
    widths = {m.width for i in range(source.num_blocks) if arch and (m := neurons(arch, source.model.get_submodule(source.block_name(i)))) is not None}
    n = math.gcd(*widths) if widths else 1
    return next((m for m in (128, 64, 32, 16, 8) if n % m == 0 and n >= 8 * m), 1)


def _writer(source: Checkpoint, i: int, kind: str) -> str:
    arch, site = table_entry(source.model), {"attention": "attn.output", "mlp": "mlp.output"}[kind]
    assert arch is not None
    return f"{source.block_name(i)}.{next(s.linears[0] for s in arch.sites if s.name == site)}"
