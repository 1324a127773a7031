"""Nest: put the neurons of every MLP in the order of their importance; the first n of them are then a submodel of that width.

After MatFormer (Devvrit et al., arXiv 2310.07707), without its training: rows of gate and up and columns of down change places together, which changes
nothing in what the model computes. One checkpoint then holds all its narrower versions: `compress extract MODEL --width 0.5` cuts the rest off, and
`narrowed` (`compress.load(MODEL, width=0.5)`) takes the first rows and columns as views, so that all widths share one copy in memory. Only MLPs are nested,
so that they share one KV cache, too.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..arch import table_entry
from ..checkpoint import Checkpoint
from ..errors import CompressError
from ..linear import CompressedLinear
from ..skeleton import neurons, shape, tell_shape
from .importance import By, scores
from .smaller import WIDTHS, Edit, Smaller, picked
from .width import Width


@dataclass(frozen=True)
class Nest:
    """Put the neurons of every MLP in the order of their importance, so that any first part of them is a submodel (compress extract)."""

    by: By = "activation"  # how neurons are scored (importance.py)

    @property
    def needs_text(self) -> bool:
        return self.by not in ("magnitude", "order")

    def measure(self, source: Checkpoint, enter, scratch) -> dict[str, Any]:
        """{"ordered": blocks}; the orders lie in the scratch. Raises CompressError for a model outside the table, or without dense MLPs."""
        if table_entry(source.model) is None:
            raise CompressError(f"{source.name}: nest needs the sites of {source.config.model_type} in the table of compress/arch.py")
        found = {str(i): s["mlp"].argsort(descending=True, stable=True) for i, s in scores(source, enter, self.by, False).items() if "mlp" in s}
        if not found:
            raise CompressError(f"{source.name}: nest: no block of {source.config.model_type} has a dense MLP")
        scratch.tensors("nest", lambda: found)
        return {"ordered": [int(i) for i in found]}

    def guess(self, source: Checkpoint) -> dict[str, Any]:
        return {"ordered": []}

    def apply(self, source: Checkpoint, plan: dict[str, Any], scratch=None) -> Checkpoint:
        edits: dict[str, Edit] = {}
        arch = table_entry(source.model)
        for i in plan["ordered"]:
            prefix, block = source.block_name(i), source.model.get_submodule(source.block_name(i))
            mlp = neurons(arch, block) if arch else None
            if mlp is not None:
                order: Tensor = scratch.read("nest", str(i))
                edits |= picked(source.model, f"{prefix}.{mlp.reader}", columns=order)
                for maker in mlp.makers:
                    edits |= picked(source.model, f"{prefix}.{maker}", rows=mlp.rows(shape(block.get_submodule(maker))[0], order))
        return Smaller(source, edits=edits)


def narrowed(model: nn.Module, share: float) -> nn.Module:
    """A second model with the first `share` of the neurons of every MLP, as many as `compress extract` leaves. Nothing is copied: what it multiplies by are
    views of the first one's parameters.

    Raises CompressError where rows of one matrix are no view (gate and up in one) or weights are compressed.
    """
    arch = table_entry(model)
    small = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    kept = set()
    for block in small.get_submodule(arch.blocks) if arch else ():
        if odd := [path for path, m in block.named_modules() if isinstance(m, CompressedLinear)]:
            raise CompressError(f"{odd[0]} is compressed, and its first neurons are no view of it; load it whole, or compress what `compress extract` makes")
        if arch is None or (mlp := neurons(arch, block)) is None:
            continue
        n = len(Width(mlp=1 - share, across="layer")._threshold({0: torch.arange(mlp.width).double()}, 1 - share, Width.multiple)[0])
        for path in mlp.makers:
            maker = block.get_submodule(path)
            if shape(maker)[0] != mlp.width:
                raise CompressError(f"{path} holds gate and up in one matrix, of which the first neurons are no view; use `compress extract`")
            maker.weight = _view(maker.weight[:, :n] if isinstance(maker, Conv1D) else maker.weight[:n])
            maker.bias = None if maker.bias is None else _view(maker.bias[:n])
            tell_shape(maker)
        reader = block.get_submodule(mlp.reader)
        reader.weight = _view(reader.weight[:n] if isinstance(reader, Conv1D) else reader.weight[:, :n])
        tell_shape(reader)
        kept.add(n)
    if not kept:
        raise CompressError(f"{type(model).__name__}: no block has a dense MLP that compress/arch.py knows")
    small.config = copy.deepcopy(model.config)
    known, raw = small.config.to_dict(), small.config.attribute_map
    for name in {raw.get(w, w) for w in WIDTHS} & known.keys() if len(kept) == 1 else ():
        setattr(small.config, name, n)
    return small


def _view(t: Tensor) -> nn.Parameter:
    return nn.Parameter(t.detach(), requires_grad=False)
