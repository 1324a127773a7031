"""Cost: what attention and MLP of a block take, in the measure that a budget is given in.

    parameters   numbers                     bytes    as they are stored
    flops        of one token: 2 a weight of a linear, and 4·dim a query head for each of the 1024 tokens it looks back on
    latency      measured seconds of a forward pass on this machine: the block's, less the block's without that sublayer

A unit (a neuron, a key-value group) costs its share of the sublayer that it is part of: exact for the first three, as far as a machine is even for the last.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..arch import table_entry
from ..checkpoint import Checkpoint
from ..errors import CompressError
from ..kernels.tune import race
from ..skeleton import Heads, Neurons, heads, neurons
from ..stream import StandIn, Stream
from .drop import sublayer

Cost = Literal["parameters", "flops", "bytes", "latency"]
SECONDS = 0.1  # of a race for each run in it, at least five turns
CONTEXT = 1024  # tokens that attention looks back on, where FLOPs are counted


def count(source: Checkpoint, i: int, modules: list[nn.Module], cost: Cost) -> float:
    """Of all that these modules of block i hold, the scores of attention apart; `latency` counts as parameters do."""
    names = {id(p): name for name, p in source.model.get_submodule(source.block_name(i)).named_parameters()}
    found = {id(p): p for m in modules for p in m.parameters()}
    if cost == "flops":
        return 2.0 * sum(p.numel() for p in found.values() if p.dim() > 1)
    size = lambda key: source.dtype_of(f"{source.block_name(i)}.{names[key]}").itemsize if cost == "bytes" else 1
    return float(sum(p.numel() * size(key) for key, p in found.items()))


def scores(source: Checkpoint, i: int, cost: Cost) -> float:
    """FLOPs that attention of block i spends on queries times keys and on weights times values."""
    arch = table_entry(source.model)
    attention = arch and heads(arch, source.model.get_submodule(source.block_name(i)))
    return 4.0 * CONTEXT * attention.heads * attention.dim if attention and cost == "flops" else 0.0


def units(source: Checkpoint, i: int, cost: Cost, stream: Stream | None = None) -> dict[str, float]:
    """{"mlp": of a neuron, "heads": of a key-value group, "": of the block as a whole}. stream: in front of block i, for `latency`; it stays there."""
    arch, block = table_entry(source.model), source.model.get_submodule(source.block_name(i))
    assert arch is not None
    parts = {"mlp": neurons(arch, block), "attention": heads(arch, block)}
    timed = None
    if cost == "latency" and stream is not None:
        try:
            children = {what: sublayer(source, i, what) for what, c in parts.items() if c is not None and (what == "mlp" or not arch.fixed_heads)}
        except CompressError as error:
            raise CompressError(f"{str(error).partition(';')[0]}: what it takes cannot be timed apart; use cost: flops, bytes or parameters") from error
        times = seconds(stream, i, source.load_block(i, stream.device), children.values())
        timed = {what: max(0.0, times[""] - times[child]) for what, child in children.items()}
    found = {"": count(source, i, [block], cost) + scores(source, i, cost) if timed is None else times[""]}

    def of(what: str) -> float:
        if timed is not None:
            return timed[what]
        c = parts[what]
        assert c is not None
        return count(source, i, [block.get_submodule(path) for path in (c.reader, *c.makers)], cost) + (scores(source, i, cost) if what == "attention" else 0)

    if isinstance(c := parts["mlp"], Neurons):
        found["mlp"] = of("mlp") / c.width
    if isinstance(c := parts["attention"], Heads) and not arch.fixed_heads:
        found["heads"] = of("attention") / c.groups
    return found


def sublayers(source: Checkpoint, i: int, cost: Cost, stream: Stream, children: dict[str, str]) -> dict[str, float]:
    """{child: what it costs} for {"attention": child, "mlp": child} of block i; "" is what belongs to neither. stream: in front of block i; it stays there."""
    if cost == "latency":
        times = seconds(stream, i, source.load_block(i, stream.device), children.values())
        whole = times[""]
        found = {child: max(0.0, whole - times[child]) for child in children.values()}
    else:
        block = source.model.get_submodule(source.block_name(i))
        whole = count(source, i, [block], cost) + scores(source, i, cost)
        found = {child: count(source, i, [block.get_submodule(child)], cost) + (scores(source, i, cost) if what == "attention" else 0)
                 for what, child in children.items()}  # fmt: skip
    return found | {"": max(0.0, whole - sum(found.values()))}


def clocked(source: Checkpoint, stream: Stream) -> float:
    """Seconds of the first batch through every block, one after the other. stream: of `source`, in front of block 0; it stays there."""
    return sum(seconds(stream, i, source.load_block(i, stream.device), ())[""] for i in range(source.num_blocks))


@torch.no_grad()
def seconds(stream: Stream, i: int, block: nn.Module, children: Iterable[str]) -> dict[str, float]:
    """Seconds of the first batch through block i, {"": whole, child: without it}, in turns (kernels/tune.py): what else the machine does slows all alike."""
    rows, call, known = next(stream.batches()), stream.calls[i][0], dict[str, Any]()
    runs = {"": partial(stream.forward, block, rows, call)}
    nothing = lambda child: lambda module, args, y: known.update({child: tree_map(lambda t: t * 0 if isinstance(t, Tensor) else t, y)})
    handles = [block.get_submodule(child).register_forward_hook(nothing(child)) for child in children]
    runs[""]()
    for child, handle in zip(children, handles, strict=True):
        handle.remove()
        less = copy.copy(block)
        less._modules = block._modules | {child: StandIn(block.get_submodule(child), lambda args, kwargs, child=child: known[child])}
        runs[child] = partial(stream.forward, less, rows, call)
    return {child: 1e-6 * us for child, us in race(runs, torch.device(stream.device), SECONDS).items()}
