"""Importance: what the loss of a neuron or a head would cost, one number a unit. x_j is what it gives, W_:j the columns that read it.

    order        the first ones, of a model whose neurons were put in order (nest.py)
    magnitude    ‖W_:j‖ and the rows that make it, no text                                              the baseline
    activation   √E[x_j²] · ‖W_:j‖                                                                      Wanda for structures
    flap         Var(x_j) · ‖W_:j‖²: what stays after a constant made up for the mean                   FLAP, arXiv 2312.11983
    taylor       Σ |∂L/∂w · w| over all weights of the unit, L the model's own loss on the text         LLM-Pruner, arXiv 2305.11627
    fisher       Σ_windows (∂L/∂m_j)², m_j = 1 a factor on x_j                                          Kwon et al., arXiv 2204.09656

A head's score is the sum over its channels. Those with moments of x need one pass forward, block by block; the last two one forward and one backward, with the
states between blocks kept (on disk past a limit) and the gradients of one block at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from ..arch import table_entry
from ..calibration import hidden
from ..checkpoint import Checkpoint
from ..experts import UnfusedExperts
from ..linear import get_weight
from ..skeleton import Heads, Neurons, heads, neurons
from ..stream import Stream

By = Literal["flap", "activation", "magnitude", "taylor", "fisher", "order"]


def coupled(source: Checkpoint, block: nn.Module) -> dict[str, Neurons | Heads]:
    arch = table_entry(source.model)
    assert arch is not None
    found = {"mlp": neurons(arch, block), "heads": heads(arch, block)}
    return {kind: c for kind, c in found.items() if c is not None}


def scores(source: Checkpoint, enter, by: By, with_heads: bool) -> dict[int, dict[str, Tensor]]:
    """{block: {"mlp": [neurons], "heads": [query heads]}}, fp64; the larger, the more a unit matters."""
    if by in ("taylor", "fisher"):
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
    totals: dict[str, list] = {path: [0, 0, 0] for path in paths}
    valid: Tensor | None = None

    def see(path: str) -> Callable:
        def hook(module, args):
            x = args[0].flatten(0, -2).double()
            x = x if valid is None else x[valid]
            totals[path] = [a + b for a, b in zip(totals[path], (x.sum(0), x.square().sum(0), len(x)), strict=True)]

        return hook

    handles = [block.get_submodule(path).register_forward_pre_hook(see(path)) for path in paths]
    for rows, call in zip(stream.batches(), stream.calls[stream.at], strict=True):
        valid = None if stream.mask is None else stream.mask[rows].flatten().to(stream.device)
        stream.hidden[rows] = stream.forward(block, rows, call)
    for handle in handles:
        handle.remove()
    return {path: (s / n, q / n) for path, (s, q, n) in totals.items()}


# ---- by gradient


def _by_gradient(source: Checkpoint, stream: Stream, by: By) -> dict[int, dict[str, Tensor]]:
    calls, states = [list(c) for c in stream.calls], []
    for i in range(source.num_blocks):
        states.append(hidden.allocate(tuple(stream.hidden.shape), stream.hidden.dtype, stream.folder).copy_(stream.hidden))
        stream.advance(source.load_block(i, stream.device))
    gradient = _loss_gradient(stream)
    found: dict[int, dict[str, Tensor]] = {}
    for i in reversed(range(source.num_blocks)):
        block = source.load_block(i, stream.device)
        parts = coupled(source, block)
        gates: dict[str, Tensor] = {}
        seen: dict[str, Tensor] = {}
        linears = [p for c in parts.values() for p in (c.reader, *c.makers)] if by == "taylor" else []
        for path in linears:
            block.get_submodule(path).weight.requires_grad_(True)
        handles = [block.get_submodule(c.reader).register_forward_pre_hook(partial(_keep, seen, kind)) for kind, c in parts.items()]
        for rows, (args, kwargs) in zip(stream.batches(), calls[i], strict=True):
            with torch.enable_grad():
                h = states[i][rows].to(stream.device, copy=True).requires_grad_()
                out = block(h, *args, **kwargs)
                (out[0] if isinstance(out, tuple) else out).backward(gradient[rows].to(stream.device))
            gradient[rows] = h.grad
            for kind, x in seen.items():
                per_window = (x * x.grad).detach().double().view(len(h), -1, x.shape[-1]).sum(1)  # ∂L/∂m of every window
                gates[kind] = gates.get(kind, torch.zeros(())) + per_window.square().sum(0)
        for handle in handles:
            handle.remove()
        states.pop()
        found[i] = {}
        for kind, c in parts.items():
            score = gates[kind]
            if by == "taylor":
                g = {p: (block.get_submodule(p).weight.grad.double() * block.get_submodule(p).weight.double()).abs() for p in (c.reader, *c.makers)}
                oriented = {p: t if isinstance(block.get_submodule(p), nn.Linear) else t.T for p, t in g.items()}
                score = oriented[c.reader].sum(0)
                if isinstance(c, Neurons):
                    score = score + sum(oriented[m].sum(1).view(-1, c.width).sum(0) for m in c.makers)
            found[i][kind] = _by_head(c, score.detach())
            if by == "taylor" and isinstance(c, Heads):
                found[i][kind] = found[i][kind] + _made_by_head(c, {m: oriented[m].sum(1).cpu() for m in c.makers})
        block.requires_grad_(False)
    return found


def _keep(seen: dict[str, Tensor], kind: str, module: nn.Module, args: tuple) -> None:
    args[0].retain_grad()
    seen[kind] = args[0]


def _made_by_head(c: Heads, rows: dict[str, Tensor]) -> Tensor:
    """What the rows that make each query head add up to; keys and values are shared out among the heads of their group."""
    total = torch.zeros(c.heads, dtype=torch.float64)
    for score in rows.values():
        own = [c.rows(len(score), torch.tensor([head])) for head in range(c.heads)]
        shared = score / torch.bincount(torch.cat(own), minlength=len(score))
        total += torch.stack([shared[mine].sum() for mine in own])
    return total


def _loss_gradient(stream: Stream) -> Tensor:
    """∂L/∂h behind the last block, L the summed cross-entropy of the text's next tokens."""
    gradient = hidden.allocate(tuple(stream.hidden.shape), stream.hidden.dtype, stream.folder)
    tail = stream.tail()
    for rows in stream.batches():
        with torch.enable_grad():
            h = stream.hidden[rows].to(stream.device, copy=True).requires_grad_()
            log_p = tail(h).float().log_softmax(-1)[:, :-1]
            loss = -log_p.gather(-1, stream.tokens[rows][:, 1:, None].to(h.device))[..., 0]
            if stream.mask is not None:
                loss = loss * stream.mask[rows][:, 1:].to(h.device)
            gradient[rows] = torch.autograd.grad(loss.sum(), h)[0]
    return gradient


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
