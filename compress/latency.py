"""Latency: how long each part of a model takes for one token on this machine, so that a budget can be one of time.

    token = Σ_blocks [ around the sublayers + Σ_sublayers ( around the linears + Σ_linears t(format, shape) ) ] + embedding, norm and head

t is the median time of one row through kernels.dispatch, by the route that is taken there, weights out of cache as between two decoding steps. It
does not depend on the numbers, so a format is timed once a shape, filled with zeros, before anything is solved. What lies around the linears (norms,
attention of one token, Python) is what a sublayer or a block takes beyond them, measured on one block of each kind; it goes only when the sublayer
goes. Of routed experts a token reads only those that it is sent to.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from .artifact import write_json
from .checkpoint import Checkpoint
from .errors import CompressError
from .formats import Dense, Format, build
from .kernels import dispatch, tune
from .stream import Stream
from .structure.drop import sublayer

SECONDS = 0.1  # of a race, at least five turns


class Clock:
    """clock(format on meta) → nanoseconds of one row; `file` keeps them by machine, format, shape and dtype."""

    def __init__(self, file: Path, dtype: torch.dtype, device: str):
        self.file, self.dtype, self.device = file, dtype, torch.device(device)
        self.machine = f"{tune.machine(self.device, torch.get_num_threads())} | {str(dtype)[6:]} | "
        self.known: dict[str, dict[str, int]] = json.loads(file.read_text()) if file.is_file() else {}

    @torch.no_grad()
    def __call__(self, format: Format) -> int:
        m, n = format.shape
        return self.remember(f"{format.describe()} {m}x{n}", lambda: {"": self._run(format)})[""]

    def dense(self, shape: tuple[int, int]) -> int:
        return self(Dense(torch.empty(shape, dtype=self.dtype, device="meta")))

    def remember(self, what: str, runs: Callable[[], dict[str, Callable]]) -> dict[str, int]:
        """Nanoseconds of what `runs()` returns, {name: function}, measured in turns; or as they were."""
        names = f"{self.machine}{what}"
        if names not in self.known:
            self.known[names] = {name: round(1e3 * us) for name, us in tune.race(runs(), self.device, SECONDS).items()}
            write_json(self.file, self.known)
        return self.known[names]

    def _run(self, format: Format) -> Callable:
        full = lambda t: torch.full(t.shape, 1 if t.is_floating_point() else 0, dtype=t.dtype, device=self.device)
        real = build(format.meta(), {name: full(t) for name, t in format.tensors().items()})
        return partial(dispatch.matmul, torch.ones(1, format.shape[1], dtype=self.dtype, device=self.device), real, None, {})


@torch.no_grad()
def surroundings(name: str, dtype: torch.dtype, clock: Clock, trust_remote_code: bool = False) -> tuple[list[dict[str, int]], int]:
    """Nanoseconds that are no linear's: of every block {"": around its sublayers, child: around the child's linears}, and outside the blocks.

    One block of each kind is loaded. A model whose sublayers the table does not know has all of it around them."""
    source = Checkpoint(name, dtype=dtype, trust_remote_code=trust_remote_code)
    stream = Stream(source, torch.zeros(1, 1, dtype=torch.long), device=clock.device)
    blocks, seen = list[dict[str, int]](), dict[str, dict[str, int]]()
    for i in range(source.num_blocks):
        skeleton = source.model.get_submodule(source.block_name(i))
        kind = json.dumps({n: list(t.shape) for n, t in skeleton.state_dict().items()})
        if kind not in seen:
            seen[kind] = _around(source, stream, i, clock)
        blocks.append(seen[kind])
    tail = stream.tail()
    outside = clock.remember("outside the blocks", lambda: {"": partial(tail, stream.hidden.to(clock.device))})
    return blocks, outside[""]


def _around(source: Checkpoint, stream: Stream, i: int, clock: Clock) -> dict[str, int]:
    block, (args, kwargs), hidden = source.load_block(i, clock.device), stream.calls[i][0], stream.hidden.to(clock.device)
    children, given, share = children_of(source, i), {}, routed(source)
    linears = {path: m for path, m in block.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    keep = lambda child: lambda module, args, kwargs: given.update({child: (module, args, dict(kwargs))})
    handles = [block.get_submodule(child).register_forward_pre_hook(keep(child), with_kwargs=True) for child in children]
    block(hidden, *args, **kwargs)
    for handle in handles:
        handle.remove()
    runs = {"": partial(block, hidden, *args, **kwargs)} | {child: partial(module, *a, **k) for child, (module, a, k) in given.items()}
    ns = clock.remember(f"block {i}", lambda: runs)
    inside = {child: sum(clock.dense(_shape(m)) * (share if ".experts." in f".{p}" else 1) for p, m in linears.items() if p.startswith(f"{child}."))
              for child in children}  # fmt: skip
    loose = sum(clock.dense(_shape(m)) for p, m in linears.items() if not any(p.startswith(f"{c}.") for c in children))
    return {"": max(0, round(ns[""] - loose - sum(ns[c] for c in children)))} | {c: max(0, round(ns[c] - inside[c])) for c in children}


def _shape(linear: nn.Module) -> tuple[int, int]:
    m, n = linear.weight.shape
    return (m, n) if isinstance(linear, nn.Linear) else (n, m)


def timed(clock: Clock, count: Callable, share: float) -> Callable:
    """`count` (allocate.bytes_of) with nanoseconds of a token as the cost; share: of the experts' time that a token pays."""

    def cost(step: dict | None, path: str, shape: tuple[int, int]) -> tuple[int, int, Format]:
        _, nbytes, format = count(step, path, shape)
        return round(clock(format) * (share if ".experts." in path else 1)), nbytes, format

    return cost


def children_of(source: Checkpoint, i: int) -> list[str]:
    """The children of block i that are its attention and its MLP; none where they are not modules of their own that add to the stream."""
    try:
        return [sublayer(source, i, what) for what in ("attention", "mlp")]
    except CompressError:
        return []


def routed(source: Checkpoint) -> float:
    """The share of the experts that a token is sent to."""
    known = source.config.get_text_config().to_dict()
    count = next((known[n] for n in ("num_local_experts", "num_experts", "n_routed_experts") if known.get(n)), 0)
    return known.get("num_experts_per_tok", count) / count if count else 1.0


def parse_latency(text: str | float) -> tuple[float, bool]:
    """(number, is it a share of the original's): `0.5x` and 0.5 are shares, `8ms` is a time. Raises CompressError on anything else."""
    given = str(text).strip().lower()
    try:
        value, share = float(given.removesuffix("ms").removesuffix("x")), not given.endswith("ms")
    except ValueError:
        value, share = 0.0, True
    if value <= 0 or (share and value > 1):
        raise CompressError(f"latency {text!r}: give a share of the original's time a token, e.g. 0.5x, or a time, e.g. 8ms")
    return value, share
