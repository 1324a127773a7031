"""Width: cut neurons out of MLPs, key-value groups (or single query heads) out of attention, experts out of mixtures.

What makes a neuron or a head, and what reads it, goes with it: rows of q, k, v, gate, up, columns of o and down (skeleton.py finds them). The score of a unit
says what its loss would cost (importance.py); scores are standardised a layer, (s − mean)/std, where one threshold cuts all layers (`across: model`), as
FLAP does (An et al., arXiv 2312.11983), or each layer loses the same share (`across: layer`), which plain Hugging Face configurations can say. With a
`budget` neurons and key-value groups compete: the highest standardised scores stay until what they cost together (cost.py) has used it up.

Nothing makes up for what is cut here: a step `refit` behind it does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..arch import Arch, table_entry
from ..checkpoint import Checkpoint
from ..errors import CompressError, at_least
from ..skeleton import Heads, Neurons, heads, neurons, shape
from ..stream import Stream
from .cost import Cost, clocked, units
from .importance import By, expert_neurons, experts, scores
from .smaller import Edit, Smaller, narrower, numbers, picked, spans


@dataclass(frozen=True)
class Width:
    """Cut neurons out of MLPs, heads out of attention, experts out of mixtures."""

    mlp: float = 0.0  # share of all MLP neurons to cut
    groups: float = 0.0  # share of all key-value groups to cut, each with its query heads
    budget: float = 0.0  # instead of these two: share of what the blocks cost that is to go, from neurons and key-value groups together
    cost: Cost = "parameters"  # in what the budget is measured (cost.py)
    queries: float = 0.0  # share of the query heads of every group to cut
    experts: float = 0.0  # share of the experts of every layer to cut
    neurons: float = 0.0  # share of the neurons of every expert to cut
    by: By = "flap"  # how units are scored (importance.py)
    across: Literal["model", "layer"] = "model"  # one threshold for all layers, or the same share of each (plain Hugging Face)
    multiple: int = 8  # MLP widths are multiples of it
    skip: tuple[int, ...] = ()  # blocks that keep their widths; -1: the last
    cut: tuple[str, ...] = ()  # these neurons and query heads and no others, whatever the shares say: ["3.mlp 0-127", "5.heads 2 3"]

    def __post_init__(self):
        at_least(self, multiple=1)
        for name in ("mlp", "groups", "queries", "experts", "neurons", "budget"):
            if not 0 <= getattr(self, name) < 1:
                raise CompressError(f"width.{name} = {getattr(self, name)}: a share to cut, from 0 to below 1")
        if self.budget and (self.mlp or self.groups):
            raise CompressError(f"width.budget = {self.budget} says what neurons and groups cost together: leave mlp and groups out, or budget")

    @property
    def needs_text(self) -> bool:
        return not self.cut and (self.by not in ("magnitude", "order") or self.experts > 0)

    def measure(self, source: Checkpoint, enter, scratch=None) -> dict[str, Any]:
        """{"mlp": {block: kept neurons, as "0-99 103"}, "heads": {block: kept query heads}, "experts": {block: kept experts}, "neurons": {block: those of
        each kept expert, one behind the other}}; of a latency also "seconds": what was measured, predicted, and measured again."""
        self._check(source)
        if self.cut:
            return self._plan(self._named(source))
        wanted = self.mlp or self.groups or self.queries or self.budget
        found = scores(source, enter, self.by, bool(self.groups or self.queries or self.budget)) if wanted else {}
        inside = expert_neurons(source, enter, self.by) if self.neurons else None
        timed = self.budget > 0 and self.cost == "latency"
        costs = self._costs(source, enter(source, 2) if timed else None) if self.budget else None
        plan = self._plan(self.chosen(source, found, experts(source, enter) if self.experts else None, inside, costs))
        if timed and costs:
            smaller = self.apply(source, plan)
            gone = [{kind: n - after[kind] for kind, n in before.items()} for before, after in zip(_priced(source), _priced(smaller), strict=True)]
            whole, saved = sum(c[""] for c in costs.values()), sum(costs[i].get(kind, 0.0) * n for i, each in enumerate(gone) for kind, n in each.items())
            plan["seconds"] = {"blocks": list(costs.values()), "whole": whole, "predicted": whole - saved, "timed": clocked(smaller, enter(smaller, 2))}
        return plan

    def _costs(self, source: Checkpoint, stream: Stream | None) -> dict[int, dict[str, float]]:
        return {i: units(source, i, self.cost, stream) for i in range(source.num_blocks)}

    def guess(self, source: Checkpoint) -> dict[str, Any]:
        """The first units of every layer, as many as `measure` will keep of all together; a budget of seconds counts as one of parameters."""
        self._check(source)
        if self.cut:
            return self._plan(self._named(source))
        even = {i: {k: -torch.arange(n, dtype=torch.float64) / n for k, n in n_.items()} for i, n_ in enumerate(_units(source))}
        counts = {i: (e, n) for i, (e, n) in enumerate(_experts(source)) if e}
        return self._plan(self.chosen(source, even, {i: -torch.arange(e, dtype=torch.float64) for i, (e, _) in counts.items()},
                                      {i: -torch.arange(n, dtype=torch.float64).expand(e, n) for i, (e, n) in counts.items()}))  # fmt: skip

    def apply(self, source: Checkpoint, plan: dict[str, Any], scratch=None) -> Checkpoint:
        blocks: list[dict[str, Any]] = [{} for _ in range(source.num_blocks)]
        edits: dict[str, Edit] = {}
        arch = _arch(source)
        for i in range(source.num_blocks):
            prefix, block = source.block_name(i), source.model.get_submodule(source.block_name(i))
            mlp, attn = neurons(arch, block), heads(arch, block) if not arch.fixed_heads else None
            for coupled, kept in ((mlp, plan["mlp"].get(str(i))), (attn, plan["heads"].get(str(i)))):
                if coupled is None or kept is None:
                    continue
                keep = torch.tensor(numbers(kept), dtype=torch.long)
                blocks[i] |= {"mlp": len(keep)} if isinstance(coupled, Neurons) else {"heads": [len(keep), len(set((keep // _per(coupled)).tolist()))]}
                columns = keep if isinstance(coupled, Neurons) else coupled.columns(keep)
                edits |= picked(source.model, f"{prefix}.{coupled.reader}", columns=columns)
                for maker in coupled.makers:
                    edits |= picked(source.model, f"{prefix}.{maker}", rows=coupled.rows(shape(block.get_submodule(maker))[0], keep))
        view = narrower(source, blocks, edits) if edits else source
        view = _narrower_experts(view, plan["neurons"]) if plan.get("neurons") else view
        return _fewer_experts(view, plan["experts"]) if plan["experts"] else view

    # ---- which units stay

    def chosen(self, source: Checkpoint, found: dict[int, dict[str, Tensor]], routed: dict[int, Tensor] | None = None,
               inside: dict[int, Tensor] | None = None, costs: dict[int, dict[str, float]] | None = None) -> dict[str, dict[int, list[int]]]:  # fmt: skip
        """What stays of units with these scores: {"mlp", "heads", "experts", "neurons"} as in the plan, as numbers. costs: of every block's units, where a
        budget counts them otherwise than the model alone tells."""
        left = {i % source.num_blocks for i in self.skip}
        open_ = {i: s for i, s in found.items() if i not in left}
        plan: dict[str, dict[int, list[int]]] = {"mlp": {}, "heads": {}, "experts": {}, "neurons": {}}
        arch = _arch(source)
        mlp = {i: s["mlp"] for i, s in open_.items() if "mlp" in s}
        grouped = {i: s["heads"].view(_heads(arch, source, i).groups, -1) for i, s in open_.items() if "heads" in s and not arch.fixed_heads}  # [groups, per]
        stay: dict[int, list[int]] = {}
        if self.budget:
            plan["mlp"], stay = self._within(source, mlp, {i: s.sum(1) for i, s in grouped.items()}, costs or self._costs(source, None))
        elif self.mlp:
            plan["mlp"] = self._threshold(mlp, self.mlp, self.multiple)
        if self.groups or self.queries:
            stay = self._threshold({i: s.sum(1) for i, s in grouped.items()}, self.groups, 1)
        for i, s in grouped.items() if self.groups or self.queries or self.budget else ():
            per = s.shape[1]
            keep = per - round(self.queries * per)
            if keep < 1:
                raise CompressError(f"{source.name}: width.queries = {self.queries} leaves no query head in a group of {per}")
            best = s.topk(keep, dim=1).indices.sort(dim=1).values
            plan["heads"][i] = [g * per + h for g in stay[i] for h in best[g].tolist()]
        if self.experts and routed:
            plan["experts"] = self._threshold(routed, self.experts, 1, "layer")
        if self.neurons and inside:
            for i, s in inside.items():  # numbered through all experts; every expert keeps as many
                keep = max(1, round(s.shape[1] * (1 - self.neurons) / self.multiple)) * self.multiple
                plan["neurons"][i] = (s.topk(keep, dim=1).indices.sort(dim=1).values + torch.arange(len(s))[:, None] * s.shape[1]).flatten().tolist()
        return plan

    @staticmethod
    def _plan(chosen: dict[str, dict[int, list[int]]]) -> dict[str, Any]:
        return {kind: {str(i): spans(kept) for i, kept in found.items()} for kind, found in chosen.items()}

    def _named(self, source: Checkpoint) -> dict[str, dict[int, list[int]]]:
        """What is left of units without those of `cut`."""
        plan: dict[str, dict[int, list[int]]] = {"mlp": {}, "heads": {}, "experts": {}, "neurons": {}}
        units, arch = dict(enumerate(_units(source))), _arch(source)
        for entry in self.cut:
            where, _, which = entry.partition(" ")
            i, _, kind = where.partition(".")
            if not re.fullmatch(r"\d+\.(mlp|heads)( \d+(-\d+)?)+", entry) or not (count := units.get(int(i), {}).get(kind)):
                raise CompressError(f'{source.name}: width.cut: "{entry}" names no units; write e.g. "3.mlp 0-127" or "5.heads 2 3"')
            gone = set(numbers(which))
            kept = [n for n in range(count) if n not in gone]
            groups = _heads(arch, source, int(i)).groups if kind == "heads" else 1
            left = {sum(n // (count // groups) == g for n in kept) for g in range(groups)} - {0}
            if max(gone) >= count or not kept or (kind == "heads" and (len(left) > 1 or arch.fixed_heads)):
                raise CompressError(f'{source.name}: width.cut: "{entry}": of {count} some must stay, of query heads as many in every group that does')
            plan[kind][int(i)] = kept
        return plan

    def _threshold(self, units: dict[int, Tensor], share: float, multiple: int, across: str = "") -> dict[int, list[int]]:
        """Units that stay, layer by layer, in their order; every layer keeps `multiple` at least, and the sum is that of the share."""
        if (across or self.across) == "layer":
            return {i: _best({i: s}, dict.fromkeys(units, 1.0), {i: multiple}, max(multiple, round(len(s) * (1 - share) / multiple) * multiple))[i]
                    for i, s in units.items()}  # fmt: skip
        allowed = round(sum(map(len, units.values())) * (1 - share) / multiple) * multiple
        return _best(units, dict.fromkeys(units, 1.0), dict.fromkeys(units, multiple), allowed)

    def _within(self, source: Checkpoint, mlp: dict[int, Tensor], groups: dict[int, Tensor], cost: dict[int, dict[str, float]]
                ) -> tuple[dict[int, list[int]], dict[int, list[int]]]:  # fmt: skip
        """Neurons and key-value groups that stay, of all layers or of each, whose costs leave `budget` of what the blocks cost."""
        candidates: dict[Any, Tensor] = {(i, kind): s for kind, found in (("mlp", mlp), ("heads", groups)) for i, s in found.items()}
        price, steps = {key: cost[key[0]][key[1]] for key in candidates}, {key: self.multiple if key[1] == "mlp" else 1 for key in candidates}
        open_, whole = sum(price[key] * len(s) for key, s in candidates.items()), sum(c[""] for c in cost.values())
        allowed = open_ - self.budget * whole
        if allowed < (least := sum(price[key] * step for key, step in steps.items())):
            raise CompressError(f"{source.name}: width.budget = {self.budget} of the {self.cost}: at most {(open_ - least) / whole:.2f} can be cut")
        if self.across == "layer":  # as many of each kind in every layer: what the mean layer would keep
            layers = len({i for i, _ in candidates})
            ranked: dict[Any, list[Tensor]] = {}
            for (_, kind), s in candidates.items():
                ranked.setdefault(kind, []).append(_standard(s).sort(descending=True).values)
            if odd := [kind for kind, found in ranked.items() if len({len(s) for s in found}) > 1]:
                raise CompressError(f"{source.name}: width.across = layer: its layers differ in {odd[0]}; use across: model")
            mean = {kind: torch.stack(found).mean(0) for kind, found in ranked.items()}
            paid = {kind: sum(p for (_, k), p in price.items() if k == kind) / layers for kind in mean}
            kept = _best(mean, paid, {kind: self.multiple if kind == "mlp" else 1 for kind in mean}, allowed / layers)
            stay = {key: _first(s, len(kept[key[1]])) for key, s in candidates.items()}
        else:
            stay = _best(candidates, price, steps, allowed)
        return {i: stay[i, "mlp"] for i in mlp}, {i: stay[i, "heads"] for i in groups}

    def _check(self, source: Checkpoint) -> None:
        arch = _arch(source)
        if (self.groups or self.queries) and arch.fixed_heads:
            raise CompressError(f"{source.name}: width: no head of {source.config.model_type} can be cut: {arch.fixed_heads}; cut neurons (mlp: …)")
        if (self.experts or self.neurons) and not any(e for e, _ in _experts(source)):
            raise CompressError(f"{source.name}: width.{'experts' if self.experts else 'neurons'} = {self.experts or self.neurons}: "
                                f"{source.config.model_type} has no routed experts; cut neurons (mlp: …)")  # fmt: skip
        if self.neurons and self.by not in ("flap", "activation", "magnitude"):
            raise CompressError(f"width.neurons: those of experts are scored by flap, activation or magnitude, not by {self.by}")
        if odd := [i for i in self.skip if not -source.num_blocks <= i < source.num_blocks]:
            raise CompressError(f"{source.name}: width.skip: {odd[0]} is no block of 0 … {source.num_blocks - 1}, nor one counted from the end")
        units = _units(source)
        if self.mlp and not any("mlp" in u for u in units):
            raise CompressError(f"{source.name}: width.mlp = {self.mlp}: no block of {source.config.model_type} has a dense MLP; cut experts (experts: …)")
        if self.groups and all(u.get("heads", 0) and _heads(arch, source, i).groups == 1 for i, u in enumerate(units)):
            raise CompressError(f"{source.name}: width.groups = {self.groups}: all query heads share one key-value group; cut query heads (queries: …)")


def _best(units: dict[Any, Tensor], price: dict[Any, float], steps: dict[Any, int], allowed: float) -> dict[Any, list[int]]:
    """The units of highest standardised score whose prices add up to what is allowed, in their order; of each kind as many as its step at least.

    The best of a kind are taken together, a step at a time, in the order of their mean score.
    """
    chunks = []
    for k, (key, s) in enumerate(units.items()):
        ranked = _standard(s).sort(descending=True, stable=True).values[: len(s) // steps[key] * steps[key]].view(-1, steps[key]).mean(1)
        chunks += [(-float(v), k, n, key) for n, v in enumerate(ranked)][1:]
    keep, spent = dict(steps), sum(price[key] * n for key, n in steps.items())
    closed = set()  # a kind whose next step costs too much
    for _, _, _, key in sorted(chunks, key=lambda c: c[:3]):
        if key not in closed and spent + price[key] * steps[key] <= allowed * (1 + 1e-12):
            keep[key], spent = keep[key] + steps[key], spent + price[key] * steps[key]
        else:
            closed.add(key)
    return {key: _first(s, keep[key]) for key, s in units.items()}


def _standard(s: Tensor) -> Tensor:
    return (s - s.mean()) / s.std().clamp(min=1e-30) if len(s) > 1 else s * 0


def _first(s: Tensor, count: int) -> list[int]:
    """The places of the highest scores, ascending."""
    return s.sort(descending=True, stable=True).indices[:count].sort().values.tolist()


def _arch(source: Checkpoint) -> Arch:
    arch = table_entry(source.model)
    if arch is None:
        raise CompressError(f"{source.name}: width needs the sites of {source.config.model_type} in the table of compress/arch.py: watching a model does "
                            "not tell which rows make a neuron or a head")  # fmt: skip
    return arch


def _heads(arch: Arch, source: Checkpoint, i: int) -> Heads:
    found = heads(arch, source.model.get_submodule(source.block_name(i)))
    assert found is not None
    return found


def _per(coupled: Heads) -> int:
    return coupled.heads // coupled.groups


def _units(source: Checkpoint) -> list[dict[str, int]]:
    """How many neurons and query heads every block has."""
    arch, found = _arch(source), []
    for i in range(source.num_blocks):
        block = source.model.get_submodule(source.block_name(i))
        mlp, attn = neurons(arch, block), heads(arch, block)
        found.append(({"mlp": mlp.width} if mlp else {}) | ({"heads": attn.heads} if attn else {}))
    return found


def _priced(source: Checkpoint) -> list[dict[str, int]]:
    """How many neurons and key-value groups every block has: what a budget counts."""
    return [{kind: _heads(_arch(source), source, i).groups if kind == "heads" else n for kind, n in each.items()} for i, each in enumerate(_units(source))]


# ---- experts

UP, DOWN = "experts.gate_up_proj", "experts.down_proj"  # [experts, 2·neurons, width] and [experts, width, neurons]

def _stacks(source: Checkpoint, i: int) -> dict[str, int]:
    """Tensors of block i with an entry an expert, by their names in the block, and how many experts that is."""
    state = source.model.get_submodule(source.block_name(i)).state_dict()
    count = next((len(t) for n, t in state.items() if t.dim() == 3 and ".experts." in f".{n}"), 0)
    routed = [n for n, t in state.items() if ".experts." in f".{n}" or n.endswith(("gate.weight", "gate.e_score_correction_bias"))]
    return {n: count for n in routed if count and len(state[n]) == count}


def _experts(source: Checkpoint) -> list[tuple[int, int]]:
    """How many experts every block has, and neurons in each."""
    found = []
    for i in range(source.num_blocks):
        state = source.model.get_submodule(source.block_name(i)).state_dict()
        down = next((t for n, t in state.items() if n.endswith(DOWN)), None)
        found.append((max(_stacks(source, i).values(), default=0), 0 if down is None else down.shape[2]))
    return found


def _narrower_experts(source: Checkpoint, kept: dict[str, str]) -> Checkpoint:
    """Every expert keeps as many neurons as the first plan entry says; the configuration's one width for all becomes that."""
    edits: dict[str, Edit] = {}
    counts, known = _experts(source), source.config.to_dict()
    for i, text in kept.items():
        experts, width = counts[int(i)]
        keep = torch.tensor(numbers(text)).view(experts, -1) % width  # [experts, kept]
        name = source.block_name(int(i)) + "."
        stem = next(n for n in source.model.get_submodule(name[:-1]).state_dict() if n.endswith(DOWN)).removesuffix(DOWN)
        edits[name + stem + DOWN] = partial(_gather, keep=keep, axis=2)
        edits[name + stem + UP] = partial(_gather, keep=torch.cat([keep, keep + width], 1), axis=1)
    option = "moe_intermediate_size" if "moe_intermediate_size" in known else "intermediate_size"
    return Smaller(source, changes={option: keep.shape[1]}, edits=edits)


def _gather(t: Tensor, keep: Tensor, axis: int) -> Tensor:
    """The entries keep[e] of t[e] along an axis."""
    return torch.stack([each.index_select(axis - 1, k) for each, k in zip(t, keep, strict=True)])


def _fewer_experts(source: Checkpoint, kept: dict[str, str]) -> Checkpoint:
    known, count = source.config.to_dict(), len(numbers(next(iter(kept.values()))))
    name = next((n for n in ("num_local_experts", "num_experts", "n_routed_experts") if n in known), None)
    if name is None:
        raise CompressError(f"{source.name}: width.experts: the configuration of {source.config.model_type} does not say how many experts there are")
    if (top := known.get("num_experts_per_tok", 1)) > count:
        raise CompressError(f"{source.name}: width.experts leaves {count} experts, and {top} are used for every token; cut fewer")
    edits: dict[str, Edit] = {f"{source.block_name(int(i))}.{local}": partial(torch.Tensor.index_select, dim=0, index=torch.tensor(numbers(keep)))
                              for i, keep in kept.items() for local in _stacks(source, int(i))}  # fmt: skip
    return Smaller(source, changes={name: count}, edits=edits)
