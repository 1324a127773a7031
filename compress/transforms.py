"""Transforms: which exact rewriting of this model makes this recipe's rounding cheapest? Asked of the model itself, on two of its blocks.

    error(T) = Σ_{b ∈ {first, middle}} ‖f̂_b(x) − f_b(x)‖² / ‖f_b(x)‖²          f_b a block of the model rewritten by T, f̂_b the same compressed

Rotations, scales and folded norms help where outliers cost a plain grid its resolution, and cost a little where a second-order solver has already
dealt with them; no rule by architecture tells which (QuaRot and AWQ disagree from model to model). The relative error of a block's output does not change
under any of the exact rewritings, so it compares them all; doing nothing is one of the candidates and wins ties.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from .calibration.data import CalibrationSet
from .checkpoint import Checkpoint
from .errors import CompressError
from .recipe import Recipe
from .stream import Stream, sites_of
from .walk import _compress_block, _prepare, _twin

CANDIDATES: dict[str, dict[str, list]] = {"none": {}, "fold_norms": {"views": ["fold_norms"]}, "rotate": {"views": ["rotate"]}, "awq": {"blocks": ["awq"]},
                                          "smooth": {"blocks": ["smooth"]}}  # fmt: skip
WINDOWS = 32  # of the calibration text that judge


def choose(source: Checkpoint, recipe: Recipe, data: CalibrationSet, *, batch: int, device: str, tell: Callable[[str, float | str], None]) -> Recipe:
    """The recipe with the views and block steps of the best candidate in place of `transforms: auto`; `tell` hears each one's error, or why it is out."""
    errors: dict[str, float] = {}
    mask = None if data.mask is None else data.mask[:WINDOWS]
    enter = partial(Stream, tokens=data.tokens[:WINDOWS], mask=mask, batch=batch, device=device)
    for name, changes in CANDIDATES.items():
        trial = recipe.model_copy(update={"transforms": None} | {key: tuple(value) for key, value in changes.items()})
        try:
            errors[name] = _error(trial.viewed(source), trial, enter)
            tell(name, errors[name])
        except CompressError as error:
            tell(name, str(error))
    best = min(errors, key=lambda name: (errors[name], name != "none"))
    return recipe.model_copy(update={"transforms": None} | {key: tuple(value) for key, value in CANDIDATES[best].items()})


@torch.no_grad()
def _error(source: Checkpoint, recipe: Recipe, enter: Callable[[Checkpoint], Stream]) -> float:
    stream, total = enter(source), 0.0
    for i in range(source.num_blocks // 2 + 1):
        block, name = source.load_block(i, stream.device), source.block_name(i)
        if i in (0, source.num_blocks // 2):
            sites = sites_of(source, block, stream)
            plan = {path: (step.method, step.build()) for site in sites for path in site.linears if (step := recipe.step_for(f"{name}.{path}")) is not None}
            twin, original = _twin(block), stream.fork()
            _prepare(recipe, block, sites, {path: method for path, (_, method) in plan.items()}, stream)
            for _ in _compress_block(source, recipe, block, name, sites, plan, stream, (original, _twin(block)), {}, []):
                pass
            off = size = 0.0
            stream.thaw()
            original.thaw()
            for rows, call in zip(stream.batches(), stream.calls[i], strict=True):
                wanted = original.forward(twin, rows, call).float()
                off += float((stream.forward(block, rows, call).float() - wanted).square().sum(dtype=torch.float64))
                size += float(wanted.square().sum(dtype=torch.float64))
            total += off / size
            block = twin
        stream.advance(block)
    return total
