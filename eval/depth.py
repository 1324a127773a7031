"""Depth: where in the model the damage happens. Blocks are compressed one after the other and the others left as they were:

    KL(k) = mean over tokens of KL(original ‖ model whose first k blocks are compressed),      k = 0 … blocks

KL(0) is what the views alone change (0 where they are exact), KL(blocks) that of the whole artifact, and a steep step names the block to give more bits.
Streamed: one original and one compressed block are in memory, and a hidden state for each k; a state forks off the compressed stream behind block k and
goes on through original blocks. That is POINTS × blocks / 2 block passes over a few windows, so at most POINTS values of k are taken.

The same pass sees every activation of the original model once: the input of each site and the residual stream between blocks (outliers.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from compress.calibration.data import CalibrationSet
from compress.checkpoint import Checkpoint
from compress.eval.compare import compare
from compress.eval.outliers import MASSIVE, MEDIANS, Outliers
from compress.stream import Stream
from compress.walk import sites_of

POINTS = 16  # values of k at which the KL is measured, the last one included
LISTED = 8  # tokens with the largest activations that are named


def points(blocks: int) -> list[int]:
    """At most POINTS numbers of compressed blocks, evenly spread, the last one `blocks`."""
    n = min(blocks, POINTS)
    return sorted({round(blocks * (i + 1) / n) for i in range(n)})


@torch.no_grad()
def measure(original: Checkpoint, viewed: Checkpoint, artifact: Checkpoint, data: CalibrationSet, *, batch: int, device: str = "cpu",
            watch: Callable[[range], Iterator[int]] = iter) -> dict:  # type: ignore[assignment]
    """{"kl": [{"blocks", "mean", "stderr"}], "hidden": [relative error of the stream behind each block], "outliers": {...}}, JSON.

    `viewed` is the original as the recipe's views make it: it and the artifact have the same blocks in the same basis. `watch` may show progress.
    """
    enter = partial(Stream, tokens=data.tokens, mask=data.mask, batch=batch, device=device)
    stream, front = enter(viewed), enter(artifact)
    reference = stream if original is viewed else enter(original)
    wanted, states, hidden = points(viewed.num_blocks), {0: stream.hidden}, []
    residual, sites = [Outliers()], []
    _see(residual[0], stream)
    for i in watch(range(viewed.num_blocks)):
        block = viewed.load_block(i, device)
        for state in list(states.values())[1:]:
            stream.hidden = state
            for rows, call in zip(stream.batches(), stream.calls[i], strict=True):
                state[rows] = stream.forward(block, rows, call)
        stream.hidden = states[0]
        sites.append(_advance(viewed, stream, block))
        residual.append(Outliers())
        _see(residual[-1], stream)
        if reference is not stream:
            reference.advance(original.load_block(i, device))
        front.advance(artifact.load_block(i, device))
        hidden.append(float((front.hidden.double() - states[0].double()).square().sum() / states[0].double().square().sum()))
        if i + 1 in wanted[:-1]:
            states[i + 1] = front.hidden.clone()
    curve, tail, last = [], stream.tail(), front.tail()
    truth = tail if reference is stream else reference.tail()
    for k, state, behind in [*((k, s, tail) for k, s in states.items()), (viewed.num_blocks, front.hidden, last)]:
        logits = lambda state, behind: (behind(state[rows].to(stream.device)) for rows in stream.batches())
        if k == 0 and reference is stream:
            kl = {"mean": 0.0, "stderr": 0.0}
        else:
            kl = compare(logits(state, behind), logits(reference.hidden, truth), data)["kl"]
        curve.append({"blocks": k} | kl)
    return {"kl": curve, "hidden": hidden, "outliers": {"residual": [r.figures() for r in residual], "sites": sites,
                                                        "largest": _largest(residual, data)}}  # fmt: skip


def _see(outliers: Outliers, stream: Stream) -> None:
    for rows in stream.batches():
        outliers.add(stream.hidden[rows])


def _advance(source: Checkpoint, stream: Stream, block: nn.Module) -> dict[str, dict]:
    """Send the stream through the block and look at what each site reads."""
    found: dict[str, Outliers] = {}
    look = lambda name: lambda module, args: found.setdefault(name, Outliers()).add(args[0])
    handles = [block.get_submodule(site.linears[0]).register_forward_pre_hook(look(site.name))
               for site in sites_of(source, block, stream) if ".experts." not in f".{site.linears[0]}"]  # fmt: skip
    stream.advance(block)
    for handle in handles:
        handle.remove()
    return {name: o.figures() for name, o in found.items()}


def _largest(residual: list[Outliers], data: CalibrationSet) -> list[dict]:
    """Tokens with the largest activation on the residual stream, the block behind which it is largest, and whether it is massive."""
    peaks = torch.stack([r.tokens() for r in residual])  # [blocks + 1, windows, seqlen]
    if data.mask is not None:
        peaks = peaks.masked_fill(~data.mask, 0)
    top, where = peaks.max(0)
    listed: list[dict] = []
    for flat in top.flatten().argsort(descending=True, stable=True)[:LISTED].tolist():
        window, position = divmod(flat, top.shape[1])
        value, at = top[window, position].item(), int(where[window, position])
        ratio = value / max(residual[at].median, 1e-30)
        listed.append({"window": window, "position": position, "token": int(data.tokens[window, position]), "behind_block": at - 1, "value": value,
                       "medians": ratio, "massive": value > MASSIVE and ratio > MEDIANS})  # fmt: skip
    return listed


