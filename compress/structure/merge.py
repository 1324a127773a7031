"""Merge: a block takes over what the blocks behind it did, as far as its last linear can.

    W ← W + D (H + λI)⁻¹,   H = E[a aᵀ],   D = E[(x_e − x_{b+1}) aᵀ]        a: what block b's last linear reads; x_i: the stream in front of block i

Two convolutions without an activation between them are one (LayerMerge, arXiv 2406.12837); two blocks are not, but what blocks b + 1 … e − 1 add to the stream
has a part that is linear in the neurons of block b, and that costs nothing to keep: least squares finds it. Where all of it is, nothing is lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..arch import table_entry
from ..calibration.hidden import allocate
from ..calibration.statistics import Stats
from ..checkpoint import Checkpoint
from ..stream import Stream
from .scratch import note

DAMP = 0.001  # λ relative to the mean of diag(H)


def last_writer(source: Checkpoint, block: nn.Module, stream: Stream) -> str | None:
    """The linear whose output is the last that block adds to the stream; None where it goes through something else first. stream: in front of the block."""
    arch, modules = table_entry(source.model), dict(block.named_modules())
    paths = [p for s in arch.sites if s.name == "mlp.output" for p in s.linears if p in modules] if arch else []
    return paths[-1] if paths and stream._reader(block, paths[-1]) == "" else None


@torch.no_grad()
def merges(source: Checkpoint, stream: Stream, judges: int, span: int
           ) -> tuple[dict[str, Tensor], dict[tuple[int, int], Tensor], dict[int, str], list[dict[str, Any]]]:  # fmt: skip
    """({"b-e": the new weight of block b's last linear}, {(b, e): the first `judges` windows in front of block e with it}, {b: that weight's name}, notes)
    for blocks b + 1 … e − 1, of which there are up to `span`.

    The first `judges` windows are not solved on: with fewer tokens than neurons least squares leaves nothing of what it has seen and knows nothing of the
    rest. One pass through the blocks; the inputs of `span` linears are kept, on disk past a limit. stream: all windows in front of block 0; it is spent.
    """
    weights, states, names, notes = dict[str, Tensor](), dict[tuple[int, int], Tensor](), dict[int, str](), list[dict[str, Any]]()
    open_: dict[int, tuple[Tensor, Tensor, Tensor, bool, Tensor]] = {}  # block → what its last linear reads, the stream behind it, its weight, …, (H + λI)⁻¹
    tokens = stream.tokens[judges:].numel() if stream.mask is None else int(stream.mask[judges:].sum())
    for i in range(source.num_blocks):
        block = source.load_block(i, stream.device)
        path, read = last_writer(source, block, stream) if i + 1 < source.num_blocks else None, list[Tensor]()
        if path:
            linear, places = block.get_submodule(path), iter(list(stream.batches()))
            linear.register_forward_pre_hook(lambda module, args, read=read, places=places: _keep(read, next(places), args[0], stream))
        stream.advance(block)
        for b, (a, x, W, transposed, inverted) in open_.items():
            change = _cross(a, stream.hidden, x, stream, judges) @ inverted
            moved = a[:judges].float().to(change.device) @ change.T
            states[b, i + 1] = (x[:judges].float() + moved.to(x.device)).to(x.dtype)
            weights[f"{b}-{i + 1}"] = (change.T if transposed else change) + W
        open_ = {b: kept for b, kept in open_.items() if b > i - span}
        if path:
            n = read[0].shape[-1]
            few = f"{tokens} tokens beside the {judges} windows that judge, {2 * n} or more are needed for {n} neurons"
            inverse = few if tokens < 2 * n else _inverse(read[0], stream, judges)
            if isinstance(inverse, str):
                notes.append(note("not merged", source.block_name(i), inverse))
                continue
            behind = allocate(tuple(stream.hidden.shape), stream.hidden.dtype, stream.folder).copy_(stream.hidden)
            open_[i] = read[0], behind, linear.weight.detach().float(), isinstance(linear, Conv1D), inverse
            names[i] = f"{source.block_name(i)}.{path}.weight"
        elif i + 1 < source.num_blocks:
            notes.append(note("not merged", source.block_name(i), "no linear that is known adds what it gives to the stream at the block's end"))
    return weights, states, names, notes


def _keep(read: list[Tensor], rows: slice, x: Tensor, stream: Stream) -> None:
    if not read:
        read.append(allocate((len(stream.tokens), *x.shape[1:]), x.dtype, stream.folder))
    read[0][rows] = x


def _others(stream: Stream, judges: int) -> Iterator[tuple[slice, Tensor | slice]]:
    """The windows that do not judge, batch by batch, and which of their tokens are real."""
    for start in range(judges, len(stream.tokens), stream.batch):
        rows = slice(start, start + stream.batch)
        yield rows, slice(None) if stream.mask is None else stream.mask[rows].flatten()


def _inverse(a: Tensor, stream: Stream, judges: int) -> Tensor | str:
    """(H + λI)⁻¹, or why there is none."""
    stats = Stats.zeros(a.shape[-1], torch.device(stream.device))
    for rows, valid in _others(stream, judges):
        stats.add(a[rows].flatten(0, 1)[valid].to(stream.device))
    if stats.dropped:
        return f"{stats.dropped} tokens are NaN or Inf"
    factor = stats.finish().factor(DAMP, False)
    return "what its last linear reads has no second moments that could be inverted" if factor.failed else factor.U.T @ factor.U


def _cross(a: Tensor, there: Tensor, here: Tensor, stream: Stream, judges: int) -> Tensor:
    """E[(there − here) aᵀ] [out, in] fp32."""
    D, count = torch.zeros(here.shape[-1], a.shape[-1], device=stream.device), 0
    for rows, valid in _others(stream, judges):
        x, lacks = (t.flatten(0, 1)[valid].float().to(stream.device) for t in (a[rows], there[rows].float() - here[rows].float()))
        D, count = D.addmm_(lacks.T, x), count + len(x)
    return D / count
