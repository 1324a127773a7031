"""Smaller: a checkpoint of fewer blocks or narrower layers, read through the one it was made from.

Nothing is copied. A tensor of block j is that of block kept[j] of the source, with the rows and columns cut out when it is read; configuration and
skeleton are the smaller model's. Views, the walk, statistics and the writer see an ordinary Checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..arch import table_entry
from ..checkpoint import Checkpoint, Group
from ..errors import CompressError
from ..skeleton import KEY, heads

Edit = Callable[[Tensor], Tensor]
WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")  # what configurations call the neurons of an MLP


class Smaller(Checkpoint):
    """`source` with the blocks `kept`, the configuration values `changes` and tensors (by their new names) edited as they are read."""

    def __init__(self, source: Checkpoint, *, kept: Iterable[int] | None = None, changes: dict[str, Any] | None = None,
                 edits: dict[str, Edit] | None = None):  # fmt: skip
        self.__dict__.update({k: v for k, v in source.__dict__.items() if k not in ("model", "groups", "unknown")})
        self.source, self.edits, self.notes = source, dict(edits or {}), list(source.notes)
        self.kept = list(range(source.num_blocks)) if kept is None else list(kept)
        self.root: Checkpoint = getattr(source, "root", source)  # the model that all structure was taken out of
        self.origin: list[int] = [getattr(source, "origin", range(source.num_blocks))[k] for k in self.kept]  # block j is the root's origin[j]
        self.basis: Callable[[], Tensor] | None = getattr(source, "basis", None)  # [root's width, width] where the stream was turned and sliced
        self.changes = source.changes | (changes or {})
        try:
            self.config = type(source.config).from_dict(source.config.to_dict() | (changes or {}))
        except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
            raise CompressError(f"{source.name}: {source.config.model_type} cannot be made smaller so: {' '.join(str(error).split())[:160]}") from error

    @cached_property
    def groups(self) -> dict[str, Group]:
        theirs, state, found = self.source.groups, self.model.state_dict(), {}
        for name in state:  # the skeleton says what there is; a bias that a step adds is in no file, and is stored like its weight
            old = theirs.get(self.before(name)) or (theirs.get(self.before(name.replace(".bias", ".weight"))) if name in self.edits else None)
            if old is not None:
                found[name] = Group(name, old.sources, old.converter)
        self.unknown: list[str] = []
        if self.source.unknown:
            self.notes = [*self.notes, {"what": "left out", "where": self.source.unknown[0], "count": len(self.source.unknown),
                                        "detail": "the model class does not know these tensors, and they belong to the whole model"}]  # fmt: skip
        return self._headed(found)

    def before(self, name: str) -> str:
        """The name that a tensor has in `source`."""
        prefix = self.blocks_path + "."
        if not name.startswith(prefix):
            return name
        i, _, rest = name.removeprefix(prefix).partition(".")
        return f"{prefix}{self.kept[int(i)]}.{rest}"

    def read(self, group: Group) -> dict[str, Tensor]:
        old = self.before(group.target)
        if old not in self.source.groups and old.endswith(".bias"):
            made = {group.target: torch.zeros(self.model.state_dict()[group.target].shape)}
        else:
            leaf = group.target if old == group.target else group.target.removeprefix(self.blocks_path + ".").partition(".")[2]
            theirs, ours = old.removesuffix(leaf), group.target.removesuffix(leaf)
            made = self.source.read(self.source.groups.get(old) or Group(old, group.sources, group.converter))
            made = {ours + name.removeprefix(theirs): t for name, t in made.items()}
        return {name: self.edits[name](t) if name in self.edits else t for name, t in made.items()}

    def nbytes(self, groups: list[Group]) -> int:
        ours, theirs, total = self.model.state_dict(), self.source.model.state_dict(), 0
        for g in groups:
            old = self.before(g.target)
            same = old in theirs and theirs[old].shape == ours[g.target].shape
            total += self.source.nbytes([self.source.groups.get(old, g)]) if same else ours[g.target].numel() * self.stored(g).itemsize
        return total

    def parameters(self) -> int:
        return sum(self.nbytes([g]) // self.stored(g).itemsize for g in self.groups.values())


def blocks_of(source: Checkpoint) -> list[dict[str, Any]]:
    """What config.json says of each block in `compress_blocks` (skeleton.py)."""
    return copy.deepcopy(getattr(source.config, KEY, None)) or [{} for _ in range(source.num_blocks)]


def narrower(source: Checkpoint, blocks: list[dict[str, Any]], edits: dict[str, Edit]) -> Smaller:
    """`source` with the shapes of skeleton.py in its blocks. Where all are alike and the class has options for it, its plain configuration says so."""
    merged = [old | new for old, new in zip(blocks_of(source), blocks, strict=True)]
    view = Smaller(source, changes={KEY: merged}, edits=edits)
    said = {key: [fields[key] for fields in merged if key in fields] for key in {k for fields in merged for k in fields}}
    if not said.keys() <= {"mlp", "heads"} or any(value != values[0] for values in said.values() for value in values):
        return view
    known, changes = source.config.to_dict(), {}
    raw = lambda *names: next((n for n in (source.config.attribute_map.get(n, n) for n in names) if n in known), "")
    if "mlp" in said:
        changes[raw(*WIDTHS)] = said["mlp"][0]
    if "heads" in said:
        i = next(i for i, fields in enumerate(merged) if "heads" in fields)
        arch = table_entry(source.model)
        found = arch and heads(arch, source.model.get_submodule(source.block_name(i)))
        changes |= dict(zip((raw("num_attention_heads"), raw("num_key_value_heads", "num_kv_heads")), said["heads"][0], strict=True))
        changes["head_dim"] = found and found.dim
    try:
        plain = Smaller(source, changes={k: v for k, v in changes.items() if k} | ({KEY: None} if hasattr(source.config, KEY) else {}), edits=edits)
        alike = {n: t.shape for n, t in plain.model.state_dict().items()} == {n: t.shape for n, t in view.model.state_dict().items()}
    except (CompressError, ValueError):
        return view
    return plain if alike else view


def picked(model: nn.Module, path: str, rows: Tensor | None = None, columns: Tensor | None = None) -> dict[str, Edit]:
    """Edits that keep `rows` or `columns` of the linear at `path` of the source's skeleton: its weight, and its bias."""
    linear = model.get_submodule(path)
    transposed, edits = isinstance(linear, Conv1D), {}
    keep, axis = (rows, int(transposed)) if rows is not None else (columns, 1 - int(transposed))
    edits[f"{path}.weight"] = lambda t: t.index_select(axis, keep)
    if rows is not None and linear.bias is not None:
        edits[f"{path}.bias"] = lambda t: t.index_select(0, rows)
    return edits


def spans(numbers: Iterable[int]) -> str:
    """Ascending numbers as a plan holds them: [0, 1, 2, 5] → "0-2 5"."""
    found: list[list[int]] = []
    for n in numbers:
        if found and n == found[-1][1] + 1:
            found[-1][1] = n
        else:
            found.append([n, n])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def numbers(text: str) -> list[int]:
    """The way back from `spans`."""
    return [n for a, _, b in (part.partition("-") for part in text.split()) for n in range(int(a), int(b or a) + 1)]
