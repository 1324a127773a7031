"""Merge: a block takes over what the blocks behind it did, as far as its last linear can.

    W ← W + D (H + λI)⁻¹,   H = E[a aᵀ],   D = E[(x_e − x_{b+1}) aᵀ]        a: what block b's last linear reads; x_i: the stream in front of block i

Two convolutions without an activation between them are one (LayerMerge, arXiv 2406.12837); two blocks are not, but what blocks b + 1 … e − 1 add to the stream
has a part that is linear in the neurons of block b, and that costs nothing to keep: least squares finds it. Where all of it is, nothing is lost.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..arch import table_entry
from ..calibration.statistics import Stats
from ..checkpoint import Checkpoint
from ..stream import Stream

DAMP = 0.001  # λ relative to the mean of diag(H)


def last_writer(source: Checkpoint, block: nn.Module, stream: Stream) -> str | None:
    """The linear whose output is the last that block adds to the stream; None where it goes through something else first. stream: in front of the block."""
    arch, modules = table_entry(source.model), dict(block.named_modules())
    paths = [p for s in arch.sites if s.name == "mlp.output" for p in s.linears if p in modules] if arch else []
    return paths[-1] if paths and stream._reader(block, paths[-1]) == "" else None


@torch.no_grad()
def merges(source: Checkpoint, stream: Stream, span: int) -> tuple[dict[str, Tensor], dict[tuple[int, int], Tensor], dict[int, str]]:
    """({"b-e": the new weight of block b's last linear}, {(b, e): the stream in front of block e with it}, {b: that weight's name}) for blocks b + 1 … e − 1,
    of which there are up to `span`.

    One pass through the blocks; the inputs of `span` linears are in memory. stream: in front of block 0; it stays there.
    """
    walking, L = copy.copy(stream), source.num_blocks
    walking.hidden, walking.calls = stream.hidden.clone(), list(stream.calls)
    weights, states, names = dict[str, Tensor](), dict[tuple[int, int], Tensor](), dict[int, str]()
    open_: dict[int, tuple[Tensor, Tensor, Tensor, bool]] = {}  # block → what its last linear reads, the stream behind it, its weight
    for i in range(L):
        block = source.load_block(i, stream.device)
        path, read = last_writer(source, block, walking), list[Tensor]()
        if path:
            linear, names[i] = block.get_submodule(path), f"{source.block_name(i)}.{path}.weight"
            linear.register_forward_pre_hook(lambda module, args, read=read: read.append(args[0].to(stream.hidden.device)))
        walking.advance(block)
        for b, (a, x, W, transposed) in open_.items():
            change = _solved(a, walking.hidden - x, stream)
            if change is not None:
                states[b, i + 1] = (x.float() + (a.float().to(change.device) @ change.T).to(x.device)).to(x.dtype)
                weights[f"{b}-{i + 1}"] = (change.T if transposed else change) + W
        open_ = {b: kept for b, kept in open_.items() if b > i - span}
        if path:
            open_[i] = torch.cat(read), walking.hidden.clone(), linear.weight.detach().float(), isinstance(linear, Conv1D)
    return weights, states, names


def _solved(a: Tensor, lacks: Tensor, stream: Stream) -> Tensor | None:
    """D (H + λI)⁻¹ of a [n, t, in] and what the stream lacks [n, t, out]; None where it cannot be solved."""
    stats = Stats.zeros(a.shape[-1], torch.device(stream.device))
    for rows in stream.batches():
        valid = slice(None) if stream.mask is None else stream.mask[rows].flatten().to(a.device)
        stats.add(a[rows].flatten(0, 1)[valid].to(stream.device), missing=lacks[rows].float().flatten(0, 1)[valid].to(stream.device))
    factor = stats.finish().factor(DAMP, False)
    return None if factor.failed or stats.missing is None else stats.missing @ factor.U.T @ factor.U
