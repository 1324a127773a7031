"""Stream: tokens on their way through a model, one resident block at a time.

The model's own forward prepares every block's arguments: it runs once per batch with stand-ins in the place of the blocks, which record what
each block is given (masks and position embeddings differ between layer types) and pass the hidden state on. After the last block it runs
once more to turn hidden states into logits. Between the two, only one block is in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from .arch import Arch, Site, infer_sites, routers, table_entry
from .calibration import hidden
from .calibration.statistics import Stats
from .checkpoint import Checkpoint
from .errors import CompressError
from .experts import fused_experts

RELEASE = 1 << 20  # bytes of a batch of hidden states from which on freed memory is given back between the batches of routed experts


class Reached(Exception):
    """Raised by a hook when the forward has gone as far as it needs to."""


class StandIn(nn.Module):
    """In the place of a block: `act(args, kwargs)` decides what comes out. Everything else is asked of the block itself."""

    def __init__(self, block: nn.Module, act: Callable):
        super().__init__()
        self.__dict__["original"], self.__dict__["act"] = block, act

    def __getattr__(self, name: str):
        return getattr(self.__dict__["original"], name)

    def forward(self, *args, **kwargs):
        return self.act(args, kwargs)


@dataclass
class Kept:
    """What spares a finished part of a block from being computed again, for every window.

    Its output; or, where its last linear makes its output (attention ends in o_proj), the input of that linear, which is known before the linear
    is compressed: then attention itself runs once a block and not once more for every later site.
    """

    store: Tensor | None = None
    ends_in: nn.Linear | None = None  # store holds this module's inputs
    spec: TreeSpec | None = None
    leaves: list = field(default_factory=list)
    at: int | None = None  # which leaf is the tensor
    rows: set[int] = field(default_factory=set)
    refused: bool = False  # more than one tensor, or not one row a window: computed again at every pass

    def put(self, rows: slice, tensor: Tensor, windows: int, folder: Path | None) -> None:
        if self.store is None:
            self.store = hidden.allocate((windows, *tensor.shape[1:]), tensor.dtype, folder)
        self.store[rows] = tensor
        self.rows.add(rows.start)

    def shape_of(self, out) -> bool:
        """Remember the structure of an output that holds exactly one tensor."""
        leaves, self.spec = tree_flatten(out)
        self.leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.at = next((i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)), None)
        return sum(isinstance(leaf, Tensor) for leaf in leaves) == 1

    def output(self, tensor: Tensor):
        return tree_unflatten([tensor if i == self.at else leaf for i, leaf in enumerate(self.leaves)], self.spec)


class Stream:
    """Hidden states [n, seqlen, width] of `tokens` [n, seqlen] in front of block `at`."""

    def __init__(self, source: Checkpoint, tokens: Tensor, mask: Tensor | None = None, *, batch: int = 8,
                 device: torch.device | str = "cpu", folder: Path | None = None):  # fmt: skip
        self.source, self.tokens, self.mask, self.batch, self.device = source, tokens, mask, batch, torch.device(device)
        self.at, self.is_tuple = 0, False
        self.calls: list[list[tuple]] = [[] for _ in range(source.num_blocks)]  # [block][batch] → (args, kwargs) without the hidden state
        self._seen: list[Tensor] = []
        self._frozen: dict[str, Kept] = {}
        self._inputs = Kept()  # of the module that the last single-site pass stopped at
        self.folder = folder
        self.routed = bool(fused_experts(source.model))
        if self.routed:
            hidden.few_kernels()
        self.hidden = self._enter()

    def batches(self) -> Iterator[slice]:
        for start in range(0, len(self.tokens), self.batch):
            yield slice(start, start + self.batch)

    def release(self) -> None:
        """Behind a batch that went through routed experts: no two got as many tokens, and glibc finds no use for the holes that their pieces leave."""
        if self.routed and self.hidden[: self.batch].nbytes > RELEASE:
            hidden.release()

    def fork(self) -> Stream:
        """The same windows in the same place, for another version of the block: nothing is shared that a pass writes. Good until either advances."""
        other = copy.copy(self)
        other._frozen, other._inputs = {}, Kept()
        return other

    def nbytes(self, width: int) -> int:
        """Bytes of a tensor [windows, seqlen, width] in the dtype that blocks compute in."""
        return self.tokens.numel() * width * self.source.dtype.itemsize

    # ---- in front of the blocks

    @torch.no_grad()
    def _enter(self) -> Tensor:
        outer = self.source.load_outer(self.device, head=False)
        base = getattr(outer, outer.base_model_prefix, outer)
        blocks = outer.get_submodule(self.source.blocks_path)
        originals, states = list(blocks), None
        kind = type(base).__name__  # `act` must not hold `base`: the cycle would keep the embedding alive
        self.is_tuple = self._returns_tuple(base, blocks)
        for rows in self.batches():
            first: list[Tensor] = []

            def act(i, args, kwargs, first=first):
                state, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), args)
                if i == 0:
                    first.append(state)
                elif state is not first[0]:
                    raise CompressError(f"{kind} changes the hidden state between blocks {i - 1} and {i}, outside of any block: it cannot be "
                                        "taken block by block; add what it does there to compress/stream.py")  # fmt: skip
                self.calls[i].append(tree_map(self._intern, (args, kwargs)))
                return (state,) if self.is_tuple else state

            for i, block in enumerate(originals):
                blocks[i] = StandIn(block, lambda args, kwargs, i=i: act(i, args, dict(kwargs)))
            mask = None if self.mask is None else self.mask[rows].to(self.device).long()
            base(input_ids=self.tokens[rows].to(self.device), attention_mask=mask, use_cache=False)
            if states is None:
                states = hidden.allocate((len(self.tokens), *first[0].shape[1:]), first[0].dtype, self.folder)
            states[rows] = first[0]
        return states

    def _returns_tuple(self, base: nn.Module, blocks: nn.ModuleList) -> bool:
        """Does a block return (hidden, …) or the hidden state? Asked of block 0 with the first window; some models take out[0] unseen."""
        real, kind = self.source.load_block(0, self.device), []

        def act(args, kwargs):
            kind.append(isinstance(real(*args, **kwargs), tuple))
            raise Reached

        original, blocks[0] = blocks[0], StandIn(blocks[0], act)
        with suppress(Reached):
            base(input_ids=self.tokens[:1].to(self.device), use_cache=False)
        blocks[0] = original
        return kind[0]

    def _intern(self, value):
        """Equal tensors are kept once: without padding every batch and most blocks share theirs."""
        if not isinstance(value, Tensor):
            return value
        for seen in self._seen:
            if seen.dtype == value.dtype and seen.shape == value.shape and torch.equal(seen, value):
                return seen
        self._seen.append(value.clone())
        return self._seen[-1]

    # ---- through a block

    @torch.no_grad()
    def forward(self, block: nn.Module, rows: slice, call: tuple) -> Tensor:
        args, kwargs = call
        originals = {name: block.get_submodule(name) for name in self._frozen}
        for name, child in originals.items():
            setattr(block, name, StandIn(child, partial(self._replay, name, child, rows)))
        try:
            out = block(self.hidden[rows].to(self.device, copy=True), *args, **kwargs)
        finally:
            for name, child in originals.items():
                setattr(block, name, child)
        return out[0] if isinstance(out, tuple) else out

    def freeze(self, block: nn.Module, name: str, last: str | None = None) -> None:
        """Child `name` of the current block is final: later passes do not compute it again. `last` is the linear whose inputs were kept, if any."""
        kept, self._inputs = self._inputs, Kept()
        if last is None or not self._ends_in(block, name, last, kept):
            kept = Kept()
        self._frozen[name] = kept

    def thaw(self) -> None:
        """Forget what was frozen: the block is about to change as a whole."""
        self._frozen.clear()

    def _ends_in(self, block: nn.Module, name: str, last: str, kept: Kept) -> bool:
        """Does child `name` give out what its linear `last` makes of the inputs kept? Tried on the first batch, to the bit."""
        if kept.store is None or len(kept.rows) < len(self.calls[self.at]):
            return False
        rows, out, kept.ends_in = next(self.batches()), [], block.get_submodule(last)
        handle = block.get_submodule(name).register_forward_hook(lambda module, args, result: out.append(result))
        self.forward(block, rows, self.calls[self.at][0])
        handle.remove()
        return kept.shape_of(out[0]) and torch.equal(tree_flatten(out[0])[0][kept.at], kept.ends_in(kept.store[rows].to(self.device)))

    def _replay(self, name: str, child: nn.Module, rows: slice, args: tuple, kwargs: dict):
        kept = self._frozen[name]
        if kept.store is not None and rows.start in kept.rows:
            tensor = kept.store[rows].to(self.device, copy=True)
            return kept.output(kept.ends_in(tensor) if kept.ends_in is not None else tensor)
        out = child(*args, **kwargs)
        kept.refused = kept.refused or not kept.shape_of(out) or len(tree_flatten(out)[0][kept.at]) != len(self.tokens[rows])
        if not kept.refused:
            kept.put(rows, tree_flatten(out)[0][kept.at], len(self.tokens), self.folder)
        return out

    def advance(self, block: nn.Module) -> None:
        """Replace the hidden states by the block's outputs."""
        for rows, call in zip(self.batches(), self.calls[self.at], strict=True):
            self.hidden[rows] = self.forward(block, rows, call)
            self.release()
        self.calls[self.at] = []
        self._frozen.clear()
        self.at += 1

    def collect(self, block: nn.Module, sites: dict[str, str], *, keep: bool = False, original: tuple[Stream, nn.Module] | None = None,
                weights: dict[str, Tensor] | None = None) -> dict[str, Stats]:  # fmt: skip
        """Second moments of the inputs of several modules in one pass: {name: module path in the block} → {name: Stats}.

        `keep` remembers the input of a single site for `freeze`. `original`, another stream of the same tokens and the block as it was, adds the
        cross moments with the inputs that the original model has there. `weights` {name: [tokens] or [k, tokens]} says what each token counts; in
        k ways, it gives k statistics: name, name#1, name#2, …
        """
        stats: dict[str, Stats] = {}
        self._inputs = Kept()
        reader = None
        routed = any(".experts." in f".{path}" for path in sites.values())
        if original is not None:
            original[0]._inputs = Kept()
            if len(sites) == 1:
                reader = original[0]._reader(original[1], *sites.values())
        for i, rows in enumerate(self.batches()):
            theirs: dict[str, tuple[Tensor, Tensor | None]] = {}
            if original is not None:
                original[0]._visit(original[1], sites, reader, i, rows, keep, lambda name, *seen, theirs=theirs: theirs.update({name: seen}))
            valid = None if self.mask is None else self.mask[rows].to(self.device).flatten()

            def add(name, x, residual, rows=rows, theirs=theirs, valid=valid):
                x = x.reshape(-1, x.shape[-1])
                ways = [None] if weights is None or name not in weights else weights[name].view(-1, *self.tokens.shape)[:, rows].to(x.device)
                keys = [f"{name}#{k}" if k else name for k in range(len(ways))]
                for key in keys:
                    if key not in stats:
                        stats[key] = Stats.zeros(x.shape[-1], x.device)
                if len(x) != self.tokens[rows].numel():  # an expert's tokens: they do not tell where they came from
                    if valid is not None:
                        stats[name].note("padding not excluded", "the tokens of a routed expert do not tell which are padding")
                    return stats[name].add(x)
                other, wanted = theirs.get(name, (None, None))
                missing = None if residual is None else wanted.float() - residual.float()
                for key, weight in zip(keys, ways, strict=True):
                    pieces = [None if t is None else t.reshape(len(x), -1) for t in (x, other, missing, weight)]
                    stats[key].add(*(t if t is None or valid is None else t[valid] for t in pieces))

            self._visit(block, sites, reader, i, rows, keep, add)
            if routed:
                self.release()
        return {name: s.finish() for name, s in stats.items()}

    def _visit(self, block: nn.Module, sites: dict[str, str], reader: str | None, i: int, rows: slice, keep: bool,
               act: Callable[[str, Tensor, Tensor | None], None]) -> None:  # fmt: skip
        """Send batch i through the block and show `act` the input of every site; once all have been seen the forward stops.

        Where the one site's linear adds to the residual stream (see `_reader`), act is also shown that stream without what the linear adds.
        """
        waiting, handles = set(sites), []

        def pre(name, module, args):
            if keep and len(sites) == 1 and len(args[0]) == len(self.tokens[rows]):
                self._inputs.put(rows, args[0], len(self.tokens), self.folder)
            if reader is None:
                act(name, args[0], None)
                waiting.discard(name)
                if not waiting:
                    raise Reached

        def silence(name, module, args, y):
            if reader:
                handles.append(block.get_submodule(reader).register_forward_pre_hook(lambda module, seen: finish(name, args[0], seen[0])))
            else:
                held.append((name, args[0]))
            return torch.zeros_like(y)

        def finish(name, x, residual):
            act(name, x, residual)
            raise Reached

        held: list[tuple[str, Tensor]] = []
        for name, path in sites.items():
            handles.append(block.get_submodule(path).register_forward_pre_hook(partial(pre, name)))
            if reader is not None:
                handles.append(block.get_submodule(path).register_forward_hook(partial(silence, name)))
        try:
            with suppress(Reached):
                out = self.forward(block, rows, self.calls[self.at][i])
                for name, x in held:
                    act(name, x, out)
        finally:
            for handle in handles:
                handle.remove()

    def _reader(self, block: nn.Module, path: str) -> str | None:
        """What reads the residual stream once linear `path` has added to it: a module of the block, or "" for what follows the block.

        None where the output goes through something else first (a norm, a gate, routing). Found on the first batch, by leaving the output out.
        """
        rows, call = next(self.batches()), self.calls[self.at][0]
        written: list[Tensor] = []

        def watch(silent: bool) -> dict[str, Tensor]:
            seen: dict[str, Tensor] = {}
            started: list[bool] = []

            def write(module, args, y):
                started.append(True)
                written[:] = [y]
                return torch.zeros_like(y) if silent else None

            def see(name, module, args):
                if started and args and isinstance(args[0], Tensor) and args[0].numel() == self.hidden[rows].numel():
                    seen.setdefault(name, args[0])

            handles = [module.register_forward_pre_hook(partial(see, name)) for name, module in block.named_modules() if name]
            handles.append(block.get_submodule(path).register_forward_hook(write))
            seen[""] = self.forward(block, rows, call)
            for handle in handles:
                handle.remove()
            return seen

        without, with_it = watch(True), watch(False)
        y = written[0].float().flatten()
        for name in [*(n for n in with_it if n), ""]:
            if name not in without or not without[name].any() or y.numel() != without[name].numel():
                continue  # zeros: what comes here is the output itself, added to nothing yet
            if ((with_it[name].float() - without[name].float()).flatten() - y).norm() < 0.1 * y.norm():
                return name
        return None

    # ---- behind the blocks

    def tail(self, read: dict[str, Tensor] | None = None) -> Callable[[Tensor], Tensor]:
        """What the model does behind its last block (final norm, head, soft-capping): hidden states [b, seqlen, width] → logits [b, seqlen, vocab].

        read: is given what the head read, as "state", by every call.
        """
        outer = self.source.load_outer(self.device, embeddings=False)
        blocks = outer.get_submodule(self.source.blocks_path)
        last, width = len(blocks) - 1, outer.get_input_embeddings().weight.shape[1]
        state: list[Tensor] = []

        def act(i, args, kwargs):
            out = state[0] if i == last else args[0] if args else kwargs["hidden_states"]
            return (out,) if self.is_tuple else out

        for i, block in enumerate(list(blocks)):
            blocks[i] = StandIn(block, lambda args, kwargs, i=i: act(i, args, kwargs))

        if read is not None:
            outer.get_output_embeddings().register_forward_pre_hook(lambda module, args: read.update(state=args[0]))

        def run(hidden: Tensor) -> Tensor:
            state[:] = [hidden]
            zeros = torch.zeros(*hidden.shape[:2], width, dtype=self.source.dtype, device=self.device)
            return outer(inputs_embeds=zeros, use_cache=False).logits

        return run

    @torch.no_grad()
    def logits(self) -> Iterator[Tensor]:
        """Logits [b, seqlen, vocab] batch by batch."""
        tail = self.tail()
        for rows in self.batches():
            yield tail(self.hidden[rows].to(self.device))


def sites_of(source: Checkpoint, block: nn.Module, stream: Stream) -> tuple[Site, ...]:
    """The sites of a block: from the table, or by watching its linears while a few tokens pass."""
    arch = table_entry(source.model)
    if arch is None:
        watched = infer_sites(block, lambda: stream.forward(block, next(stream.batches()), stream.calls[stream.at][0]))
        arch = Arch(source.blocks_path, watched, skip=routers(block))
    return arch.sites_of(block)
