"""Importance: what the loss of a neuron or a head would cost, one number a unit. x_j is what it gives, W_:j the columns that read it, m_j = 1 a factor on x_j.

    order        the first ones, of a model whose neurons were put in order (nest.py)
    magnitude    ‖W_:j‖ and the rows that make it, no text                                              the baseline
    activation   √E[x_j²] · ‖W_:j‖                                                                      Wanda for structures
    flap         Var(x_j) · ‖W_:j‖²: what stays after a constant made up for the mean                   FLAP, arXiv 2312.11983
    taylor       Σ |∂L/∂w · w| over all weights of the unit, L the model's own loss on the text         LLM-Pruner, arXiv 2305.11627
    fisher       Σ_windows (∂L/∂m_j)²                                                                   Kwon et al., arXiv 2204.09656
    trajectory   ½ ∂²/∂m_j² of Σ_l ‖M_l(m) − M_l(1)‖² + c·KL, M_l cosines of all pairs of tokens        OPTIN, arXiv 2403.17921

A head's score is the sum over its channels. Those with moments of x need one pass forward, block by block; the last three one forward and one backward
(backward.py), where OPTIN masks one unit after the other and needs a forward pass for each: at m = 1 its measure and its gradient are zero, so what a mask
costs is the second derivative, 2 Σ (∂M/∂m_j)² for a sum of squares. Random signs v find it with one gradient for all units, E (∂ v·M/∂m_j)² = Σ (∂M/∂m_j)²,
and tokens drawn from the model do so for the KL. c weighs the KL a tenth of the trajectory, to a power of ten, as the paper's code does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from ..arch import table_entry
from ..checkpoint import Checkpoint
from ..experts import UnfusedExperts
from ..linear import get_weight
from ..skeleton import Heads, Neurons, heads, neurons
from ..stream import Stream
from .backward import backward, likelihood, trajectory

By = Literal["flap", "activation", "magnitude", "taylor", "fisher", "trajectory", "order"]


def coupled(source: Checkpoint, block: nn.Module) -> dict[str, Neurons | Heads]:
    arch = table_entry(source.model)
    assert arch is not None
    found = {"mlp": neurons(arch, block), "heads": heads(arch, block)}
    return {kind: c for kind, c in found.items() if c is not None}


def scores(source: Checkpoint, enter, by: By, with_heads: bool) -> dict[int, dict[str, Tensor]]:
    """{block: {"mlp": [neurons], "heads": [query heads]}}, fp64; the larger, the more a unit matters."""
    if by in ("taylor", "fisher", "trajectory"):
        return _by_gradient(source, enter(source, 0), by)
    stream = None if by in ("magnitude", "order") else enter(source, 0)
    found: dict[int, dict[str, Tensor]] = {}
    for i in range(source.num_blocks):
        block = source.load_block(i, stream.device if stream else "cpu")
        parts = coupled(source, block)
        moments = {} if stream is None else _moments(stream, block, [c.reader for c in parts.values()])
        found[i] = {}
        for kind, c in parts.items():
            W = get_weight(block.get_submodule(c.reader), block.originals.get(f"{c.reader}.weight")).double()
            column = W.square().sum(0)
            if by == "order":
                score = -torch.arange(len(column), dtype=torch.float64)
            elif by == "magnitude":
                score = column.sqrt() if isinstance(c, Heads) else (column + _rows(block, c)).sqrt()
            else:
                mean, square = moments[c.reader]
                score = (square * column).sqrt() if by == "activation" else (square - mean.square()).clamp(min=0) * column
            found[i][kind] = _by_head(c, score)
        if stream is not None:
            stream.at += 1
    return found


def _by_head(c: Neurons | Heads, score: Tensor) -> Tensor:
    """[channels] → [units], on the CPU."""
    return (score.view(c.heads, c.dim).sum(1) if isinstance(c, Heads) else score).double().cpu()


def _rows(block: nn.Module, c: Neurons) -> Tensor:
    """Σ w² over the rows that make each neuron."""
    return sum((get_weight(block.get_submodule(m)).double().square().sum(1).view(-1, c.width).sum(0) for m in c.makers), torch.zeros(()))


@torch.no_grad()
def _moments(stream: Stream, block: nn.Module, paths: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """E[x] and E[x²] of what the linears read, while the stream goes through the block."""
    totals: dict[str, list] = {path: [torch.zeros(()), torch.zeros(()), 0] for path in paths}
    valid: Tensor | None = None

    def see(path: str) -> Callable:
        def hook(module, args):
            x = args[0].flatten(0, -2).double()
            x = x if valid is None or len(x) != len(valid) else x[valid]  # an expert's tokens do not tell which are padding
            totals[path] = [a + b for a, b in zip(totals[path], (x.sum(0), x.square().sum(0), len(x)), strict=True)]

        return hook

    handles = [block.get_submodule(path).register_forward_pre_hook(see(path)) for path in paths]
    for rows, call in zip(stream.batches(), stream.calls[stream.at], strict=True):
        valid = None if stream.mask is None else stream.mask[rows].flatten().to(stream.device)
        stream.hidden[rows] = stream.forward(block, rows, call)
    for handle in handles:
        handle.remove()
    return {path: (s / max(n, 1), q / max(n, 1)) for path, (s, q, n) in totals.items()}


# ---- by gradient


def _by_gradient(source: Checkpoint, stream: Stream, by: By) -> dict[int, dict[str, Tensor]]:
    found: dict[int, dict[str, Tensor]] = {}
    losses = [trajectory(stream), likelihood(stream, sampled=True)] if by == "trajectory" else [likelihood(stream)]
    readers = lambda block: {kind: c.reader for kind, c in coupled(source, block).items()}
    made = lambda block: [p for c in coupled(source, block).values() for p in (c.reader, *c.makers)] if by == "taylor" else []
    shares: list[dict[int, dict[str, Tensor]]] = [{} for _ in losses]
    for i, block, gates, weights in backward(source, stream, losses, readers, made):
        parts = coupled(source, block)
        if by == "taylor":
            each = {p: (g * block.get_submodule(p).weight.double()).abs() for p, g in weights.items()}
            each = {p: t if isinstance(block.get_submodule(p), nn.Linear) else t.T for p, t in each.items()}
            found[i] = {kind: gathered(c, {p: each[p] for p in (c.reader, *c.makers)}) for kind, c in parts.items()}
        for share, gate in zip(shares, gates, strict=True):
            share[i] = {kind: _gate(c, gate[kind]).square().sum(0) for kind, c in parts.items()}
    if by == "taylor":
        return found
    if by == "trajectory":
        T, KL = (float(sum(s.sum() for kinds in share.values() for s in kinds.values())) for share in shares)
        c = 10.0 ** round(math.log10(max(T, 1e-300) / max(10 * KL, 1e-300)))
        return {i: {kind: s + c * shares[1][i][kind] for kind, s in kinds.items()} for i, kinds in shares[0].items()}
    return shares[0]


def _gate(c: Neurons | Heads, gate: Tensor) -> Tensor:
    """[windows, channels] → [windows, units]: a factor on a head is one on all its channels."""
    return gate.view(len(gate), c.heads, c.dim).sum(2) if isinstance(c, Heads) else gate


def gathered(c: Neurons | Heads, each: dict[str, Tensor]) -> Tensor:
    """What one number [out, in] for every weight of the reader and the makers adds up to over each unit, fp64 on the CPU."""
    each = {path: t.double().cpu() for path, t in each.items()}
    columns = each[c.reader].sum(0)
    if isinstance(c, Neurons):
        return columns + sum((each[m].sum(1).view(-1, c.width).sum(0) for m in c.makers), torch.zeros(()))
    return _by_head(c, columns) + _made_by_head(c, {m: each[m].sum(1) for m in c.makers})


def _made_by_head(c: Heads, rows: dict[str, Tensor]) -> Tensor:
    """What the rows that make each query head add up to; keys and values are shared out among the heads of their group."""
    total = torch.zeros(c.heads, dtype=torch.float64)
    for score in rows.values():
        own = [c.rows(len(score), torch.tensor([head])) for head in range(c.heads)]
        shared = score / torch.bincount(torch.cat(own), minlength=len(score))
        total += torch.stack([shared[mine].sum() for mine in own])
    return total


# ---- experts


@torch.no_grad()
def experts(source: Checkpoint, enter) -> dict[int, Tensor]:
    """{block: [experts]}: Σ over tokens of the routing weight times the norm of the expert's output (REAP, arXiv 2510.13999), blocks with experts only."""
    stream, found = enter(source, 0), {}
    for i in range(source.num_blocks):
        block = source.load_block(i, stream.device)
        holder = next((m for m in block.modules() if isinstance(m, UnfusedExperts)), None)
        if holder is None:
            stream.advance(block)
            continue
        total = torch.zeros(len(holder), dtype=torch.float64)

        def see(module, args, total=total):
            x, index, weights = args
            for e in index.unique().tolist():
                k, token = torch.where((index == e).T)
                total[e] += float((module[e](x[token]).float().norm(dim=-1) * weights[token, k].float()).sum(dtype=torch.float64))

        handle = holder.register_forward_pre_hook(see)
        stream.advance(block)
        handle.remove()
        found[i] = total
    return found


@torch.no_grad()
def expert_neurons(source: Checkpoint, enter, by: By) -> dict[int, Tensor]:
    """{block: [experts, neurons]} by flap, activation or magnitude, blocks with experts only; an expert counts only the tokens that it is given."""
    stream, found = None if by == "magnitude" else enter(source, 0), {}
    for i in range(source.num_blocks):
        block = source.load_block(i, stream.device if stream else "cpu")
        path = next((n for n, m in block.named_modules() if isinstance(m, UnfusedExperts)), None)
        if path is None:
            if stream is not None:
                stream.advance(block)
            continue
        readers = [f"{path}.{e}.down_proj" for e in range(len(block.get_submodule(path)))]
        moments = {} if stream is None else _moments(stream, block, readers)
        each = []
        for reader in readers:
            column = get_weight(block.get_submodule(reader)).double().square().sum(0)
            if by == "magnitude":
                maker = get_weight(block.get_submodule(reader.replace("down_proj", "gate_up_proj"))).double().square().sum(1)
                each.append((column + maker.view(2, -1).sum(0)).sqrt())
            else:
                mean, square = moments[reader]
                each.append((square * column).sqrt() if by == "activation" else (square - mean.square()).clamp(min=0) * column)
        found[i] = torch.stack(each).cpu()
        if stream is not None:
            stream.at += 1
    return found
