"""Nest: put the neurons of every MLP in the order of their importance; the first n of them are then a submodel of that width.

After MatFormer (Devvrit et al., arXiv 2310.07707), without its training: rows of gate and up and columns of down change places together, which changes
nothing in what the model computes. One checkpoint then holds all its narrower versions: `compress extract MODEL --width 0.5` cuts the rest off, and a
loader that takes the first rows and columns as views needs no second copy. Only MLPs are nested, so that all widths share one KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..arch import table_entry
from ..checkpoint import Checkpoint
from ..errors import CompressError
from ..skeleton import neurons, shape
from .importance import By, scores
from .smaller import Edit, Smaller, picked


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
