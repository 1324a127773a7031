"""Width: cut neurons out of MLPs, key-value groups (or single query heads) out of attention, experts out of mixtures.

What makes a neuron or a head, and what reads it, goes with it: rows of q, k, v, gate, up, columns of o and down (skeleton.py finds them). The score of a unit
says what its loss would cost (importance.py); scores are standardised a layer, (s − mean)/std, where one threshold cuts all layers (`across: model`), as
FLAP does (An et al., arXiv 2312.11983), or each layer loses the same share (`across: layer`), which plain Hugging Face configurations can say.

Nothing makes up for what is cut here: a step `refit` behind it does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..arch import Arch, table_entry
from ..checkpoint import Checkpoint
from ..errors import CompressError
from ..skeleton import Heads, Neurons, heads, neurons, shape
from .importance import By, experts, scores
from .smaller import Edit, Smaller, narrower, numbers, picked, spans


@dataclass(frozen=True)
class Width:
    """Cut neurons out of MLPs, heads out of attention, experts out of mixtures."""

    mlp: float = 0.0  # share of all MLP neurons to cut
    groups: float = 0.0  # share of all key-value groups to cut, each with its query heads
    queries: float = 0.0  # share of the query heads of every group to cut
    experts: float = 0.0  # share of the experts of every layer to cut
    by: By = "flap"  # how units are scored (importance.py)
    across: Literal["model", "layer"] = "model"  # one threshold for all layers, or the same share of each (plain Hugging Face)
    multiple: int = 8  # MLP widths are multiples of it
    skip: tuple[int, ...] = ()  # blocks that keep their widths; -1: the last

    def __post_init__(self):
        for name in ("mlp", "groups", "queries", "experts"):
            if not 0 <= getattr(self, name) < 1:
                raise CompressError(f"width.{name} = {getattr(self, name)}: a share to cut, from 0 to below 1")

    @property
    def needs_text(self) -> bool:
        return self.by not in ("magnitude", "order") or self.experts > 0

    def measure(self, source: Checkpoint, enter, scratch=None) -> dict[str, Any]:
        """{"mlp": {block: kept neurons, as "0-99 103"}, "heads": {block: kept query heads}, "experts": {block: kept experts}}."""
        self._check(source)
        found = scores(source, enter, self.by, self.groups > 0 or self.queries > 0) if self.mlp or self.groups or self.queries else {}
        return self._cut(source, found, experts(source, enter) if self.experts else None)

    def guess(self, source: Checkpoint) -> dict[str, Any]:
        """The first units of every layer, as many as `measure` will keep of all together."""
        self._check(source)
        even = {i: {k: -torch.arange(n, dtype=torch.float64) / n for k, n in units.items()} for i, units in enumerate(_units(source))}
        return self._cut(source, even, {i: -torch.arange(e, dtype=torch.float64) for i, e in enumerate(_experts(source)) if e})

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
        return _fewer_experts(view, plan["experts"]) if plan["experts"] else view

    # ---- which units stay

    def _cut(self, source: Checkpoint, found: dict[int, dict[str, Tensor]], routed: dict[int, Tensor] | None) -> dict[str, Any]:
        left = {i % source.num_blocks for i in self.skip}
        open_ = {i: s for i, s in found.items() if i not in left}
        plan: dict[str, Any] = {"mlp": {}, "heads": {}, "experts": {}}
        if self.mlp:
            plan["mlp"] = self._threshold({i: s["mlp"] for i, s in open_.items() if "mlp" in s}, self.mlp, self.multiple)
        if self.groups or self.queries:
            arch = _arch(source)
            group = {i: s["heads"].view(_heads(arch, source, i).groups, -1) for i, s in open_.items() if "heads" in s}  # [groups, heads of a group]
            stay = self._threshold({i: s.sum(1) for i, s in group.items()}, self.groups, 1)
            for i, s in group.items():
                per = s.shape[1]
                keep = per - round(self.queries * per)
                if keep < 1:
                    raise CompressError(f"{source.name}: width.queries = {self.queries} leaves no query head in a group of {per}")
                best = s.topk(keep, dim=1).indices.sort(dim=1).values
                plan["heads"][i] = [g * per + h for g in stay[i] for h in best[g].tolist()]
        if self.experts and routed:
            plan["experts"] = self._threshold(routed, self.experts, 1, "layer")
        return {kind: {str(i): spans(kept) for i, kept in found.items()} for kind, found in plan.items()}

    def _threshold(self, units: dict[int, Tensor], share: float, multiple: int, across: str = "") -> dict[int, list[int]]:
        """Units that stay, layer by layer, in their order; every layer keeps `multiple` at least, and the sum is that of the share."""
        if (across or self.across) == "layer":
            keep = {i: max(multiple, round(len(s) * (1 - share) / multiple) * multiple) for i, s in units.items()}
        else:
            z = {i: (s - s.mean()) / s.std().clamp(min=1e-30) if len(s) > 1 else s * 0 for i, s in units.items()}
            chunks = []  # the best units of a layer are taken together, `multiple` at a time, in the order of their mean score
            for i, s in z.items():
                ranked = s.sort(descending=True, stable=True).values[: len(s) // multiple * multiple].view(-1, multiple).mean(1)
                chunks += [(-float(v), i, k) for k, v in enumerate(ranked)][1:]
            total = round(sum(map(len, units.values())) * (1 - share) / multiple) - len(units)
            keep = dict.fromkeys(units, multiple)
            for _, i, _ in sorted(chunks)[: max(0, total)]:
                keep[i] += multiple
        return {i: s.sort(descending=True, stable=True).indices[: keep[i]].sort().values.tolist() for i, s in units.items()}

    def _check(self, source: Checkpoint) -> None:
        arch = _arch(source)
        if (self.groups or self.queries) and arch.fixed_heads:
            raise CompressError(f"{source.name}: width: no head of {source.config.model_type} can be cut: {arch.fixed_heads}; cut neurons (mlp: …)")
        if self.experts and not any(_experts(source)):
            raise CompressError(f"{source.name}: width.experts = {self.experts}: {source.config.model_type} has no routed experts; cut neurons (mlp: …)")
        units = _units(source)
        if self.mlp and not any("mlp" in u for u in units):
            raise CompressError(f"{source.name}: width.mlp = {self.mlp}: no block of {source.config.model_type} has a dense MLP; cut experts (experts: …)")
        if self.groups and all(u.get("heads", 0) and _heads(arch, source, i).groups == 1 for i, u in enumerate(units)):
            raise CompressError(f"{source.name}: width.groups = {self.groups}: all query heads share one key-value group; cut query heads (queries: …)")


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


# ---- experts


def _stacks(source: Checkpoint, i: int) -> dict[str, int]:
    """Tensors of block i with an entry an expert, by their names in the block, and how many experts that is."""
    state = source.model.get_submodule(source.block_name(i)).state_dict()
    count = next((len(t) for n, t in state.items() if t.dim() == 3 and ".experts." in f".{n}"), 0)
    routed = [n for n, t in state.items() if ".experts." in f".{n}" or n.endswith(("gate.weight", "gate.e_score_correction_bias"))]
    return {n: count for n in routed if count and len(state[n]) == count}


def _experts(source: Checkpoint) -> list[int]:
    return [max(_stacks(source, i).values(), default=0) for i in range(source.num_blocks)]


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
