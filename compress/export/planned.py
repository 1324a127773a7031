"""Planned: which consumers could load what a recipe would make, before it is made. The exports' own judgement, asked about formats without codes."""

from __future__ import annotations

from functools import cached_property
from types import SimpleNamespace

import torch
from torch import nn

from ..checkpoint import Checkpoint
from ..errors import CompressError
from ..formats import Format, build
from . import EXPORTS, _grouped, can_export
from .base import Source
from .gguf import _type


class Planned(Source):
    """A checkpoint that is taken for the artifact to come: layer → format, scales and zero points as if they were 1 and 0."""

    def __init__(self, source: Checkpoint, formats: dict[str, Format]):
        source.groups  # noqa: B018  worked out by the checkpoint's rules, which the copy then keeps
        self.__dict__ |= source.__dict__
        self.notes = []
        plain = lambda t, v: torch.full((), float(t == "scales"), dtype=v.dtype).expand(v.shape) if t in ("scales", "zeros") else v
        self.formats = {name: build(f.meta(), {t: plain(t, v) for t, v in f.tensors().items()}) for name, f in formats.items()}

    @cached_property
    def layers(self) -> dict:  # type: ignore[override]
        return {name: SimpleNamespace(format=f.meta()) for name, f in self.formats.items()}

    def peek(self, layer: str) -> Format:
        return self.formats[layer]

    @property
    def kept(self) -> list[str]:  # type: ignore[override]
        found = [name for name, m in self.model.named_modules() if isinstance(m, nn.Linear) and name not in self.formats]
        return sorted({module for name in found for module in (name, *self.modules(name))})


def consumers(source: Checkpoint, formats: dict[str, Format]) -> dict[str, str]:
    """Name of every export → why it will refuse the artifact, or keep layers as floats; "" where it will hold it."""
    planned, found = Planned(source, formats), {}
    for to in EXPORTS:
        try:
            found[to] = "; ".join(_grouped(can_export(planned, to)))
        except CompressError as error:  # the whole model
            found[to] = str(error)
        if to == "gguf" and not found[to] and (floats := sum(_type(f) is None for f in planned.formats.values())):
            found[to] = f"{floats} of {len(formats)} layers would be stored as floats; nearest recipe {{bits: 4, group_size: 32, sym: true}}"
    return found
