"""Refit: what a smaller model still multiplies by, solved again so that its residual stream comes nearest to the whole model's.

    Ŵ = W + D (H + λI)⁻¹,   H = E[a aᵀ],   D = E[(t − s) aᵀ]        a: the input of a linear in the smaller model, with all that came before it refitted

s is what the linear has a part in: the stream where the next one reads it, and behind a block the stream itself. t is the whole model's stream in that
place; where blocks were left out behind this one, the stream behind them, so that the last one before a gap makes up for it. Without anything before it
changed, and W the columns K that were kept, this is the exact least-squares refit of a pruned layer's consumer, W H_{:,K}(H_KK + λI)⁻¹, with λ pulling
towards W_K instead of towards 0. With `bias` only the constant is solved, E[t − s]: FLAP's compensation (arXiv 2312.11983).

Both models travel side by side, one block of each in memory; a site costs a pass through each. Linears whose output goes through a norm or a gate, and
those that do not write to the stream (`linears: all`), are held to their own outputs instead; so is an expert that lost neurons, on the tokens that the
smaller model gives it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..arch import table_entry
from ..calibration.hidden import release
from ..calibration.statistics import Stats
from ..checkpoint import Checkpoint
from ..errors import CompressError
from ..experts import UnfusedExperts
from ..linear import get_weight, in_features
from ..skeleton import KEY
from ..stream import Reached, Stream, sites_of
from .scratch import note
from .smaller import Edit, Smaller, blocks_of

SINGULAR = "what it reads has no second moments that could be inverted"


Solved = Callable[[], tuple[dict[str, Tensor], list[dict[str, Any]]]]  # what makes the new tensors of a block, and notes


@dataclass(frozen=True)
class Beside:
    """The whole model that a smaller one is held to."""

    whole: Checkpoint
    origin: list[int]  # block j of the smaller model stands for the blocks from origin[j] up to the next one's
    basis: Tensor | None  # fp32 [whole's width, width] where the stream was turned and sliced


@dataclass(frozen=True)
class Refit:
    """Solve the linears of a smaller model again, so that its residual stream comes nearest to the whole model's."""

    what: Literal["weights", "bias"] = "weights"  # least squares of whole matrices, or only constants (as FLAP does)
    linears: Literal["writers", "all"] = "writers"  # those that add to the stream, or all
    damp: float = 0.001  # λ relative to the mean of diag(H); pulls towards the weight as it was
    needs_text = True

    def guess(self, source: Checkpoint) -> dict[str, Any]:
        """The tensors that `measure` adds to the model: a weight takes the place of another, a bias may be new."""
        if self.what == "weights":
            return {"tensors": {}}
        return {"tensors": {f"{source.block_name(i)}.{path}.bias": "" for i in range(source.num_blocks) for path in _writers(source, i)}}

    def measure(self, source: Checkpoint, enter, scratch) -> dict[str, Any]:
        """{"tensors": {name: file of the scratch}, "notes"}. Raises CompressError where nothing was made smaller before, or nothing could be solved."""
        if not isinstance(source, Smaller):
            raise CompressError(f"{source.name}: refit: nothing was left out that could be made up for; put it behind a step that does")
        beside = Beside(source.root, source.origin, None if source.basis is None else source.basis().float())

        def kept(name: str, make: Solved) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
            notes: list[dict[str, Any]] = []

            def tensors() -> dict[str, Tensor]:
                made, told = make()
                notes.extend(scratch.plan(f"{name}.notes", lambda: told))
                return made

            return scratch.tensors(name, tensors), notes or scratch.plan(f"{name}.notes", list)

        tensors, notes = self.travel(source, beside, enter(source, 0), enter(source.root, 0), kept)
        if not tensors:
            told = f"{notes[0]['where']}: {notes[0]['detail']}" if notes else "it has no linear that writes to the stream"
            raise CompressError(f"{source.name}: refit: nothing could be solved ({told}); leave refit out")
        return {"tensors": tensors, "notes": notes}

    def travel(self, source: Checkpoint, beside: Beside, small: Stream, whole: Stream, kept: Callable[[str, Solved], tuple[dict[str, Tensor], list]]
               ) -> tuple[dict[str, str], list[dict[str, Any]]]:  # fmt: skip
        """{tensor: the name it is kept under}, and notes. `kept(name, make)` gives what `make` makes of a block, or made before."""
        tensors, notes = dict[str, str](), list[dict[str, Any]]()
        for j in range(source.num_blocks):
            while whole.at < beside.origin[j]:
                whole.advance(beside.whole.load_block(whole.at, whole.device))
            block, until = source.load_block(j, small.device), beside.origin[j + 1] if j + 1 < source.num_blocks else beside.whole.num_blocks
            made, told = kept(f"refit-{j:05d}", partial(self._block, source, beside, block, small, whole, until))
            notes += told
            prefix = source.block_name(j) + "."
            for name, t in made.items():
                for part, each in unfused(name.removeprefix(prefix), t).items():
                    _put(block, part, each)
            tensors |= dict.fromkeys(made, f"refit-{j:05d}")
            small.advance(block)
            del block
            release()
        return tensors, notes

    def apply(self, source: Checkpoint, plan: dict[str, Any], scratch=None) -> Checkpoint:
        names, blocks, prefix = source.model.state_dict(), blocks_of(source), source.blocks_path + "."
        for name in (n for n in plan["tensors"] if n not in names):  # a bias that the class does not have
            i, _, local = name.removeprefix(prefix).partition(".")
            blocks[int(i)].setdefault("bias", []).append(local.removesuffix(".bias"))
        edits: dict[str, Edit] = {name: partial(instead, scratch, file, name) for name, file in plan["tensors"].items()}
        return Smaller(source, changes={KEY: blocks} if any("bias" in b for b in blocks) else {}, edits=edits)

    def _block(self, source: Checkpoint, beside: Beside, block: nn.Module, small: Stream, whole: Stream, until: int
               ) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:  # fmt: skip
        """The new tensors of one block, and notes. `whole` moves on to block `until`, whose input is what this block's output is held to."""
        theirs, last, notes = beside.whole.load_block(whole.at, whole.device), [], list[dict[str, Any]]()
        tell = lambda path, detail, what="not refitted": notes.append(note(what, f"{source.block_name(small.at)}.{path}", detail))
        made: dict[str, Tensor] = {}
        sites = sites_of(source, block, small)
        named = any(s.name.endswith(".output") for s in sites)  # the table knows which linears write; those of a model that was watched are all tried
        for site in sites:
            if named and self.linears == "writers" and not site.name.endswith(".output"):
                continue
            for path in site.linears:
                if ".experts." in f".{path}":
                    continue
                place = small._reader(block, path)
                if place == "":
                    last.append(path)
                elif place is not None or named or self.linears == "all":
                    ours, other = (partial(_seen, b, path, place, stream) for b, stream in ((block, small), (theirs, whole)))
                    made |= self._solve(block, path, ours, lambda i, rows, other=other: other(i, rows)[1], small, None if place is None else beside.basis,
                                        partial(tell, path))  # fmt: skip
        made |= self._experts(block, theirs, small, tell) if self.what == "weights" else {}
        whole.advance(theirs)
        while whole.at < until:
            whole.advance(beside.whole.load_block(whole.at, whole.device))
        for path in last:
            made |= self._solve(block, path, partial(_seen, block, path, "", small), lambda i, rows: whole.hidden[rows], small, beside.basis,
                                partial(tell, path))  # fmt: skip
        return {f"{source.block_name(small.at)}.{local}": t for local, t in made.items()}, notes

    @torch.no_grad()
    def _experts(self, block: nn.Module, theirs: nn.Module, stream: Stream, tell: Callable) -> dict[str, Tensor]:
        """{name: [experts, width, neurons]} of experts that lost neurons, and put into the block; nothing where none did, or where experts are gone."""
        path = next((name for name, m in block.named_modules() if isinstance(m, UnfusedExperts)), None)
        if path is None:
            return {}
        ours, others = block.get_submodule(path), theirs.get_submodule(path)
        readers = [e.down_proj for e in ours]
        (m, n), (rows, columns) = readers[0].weight.shape, others[0].down_proj.weight.shape
        if n == columns:
            return {}
        if m != rows or len(ours) != len(others):
            tell(path, f"{len(ours)} experts of {m} channels cannot be compared with {len(others)} of {rows}")
            return {}
        stats = [Stats.zeros(in_features(r), stream.device) for r in readers]

        def see(module, args):
            x, index, _ = args
            for e in index.unique().tolist():
                here = x[torch.where((index == e).T)[1]]
                gate, up = ours[e].gate_up_proj(here).chunk(2, -1)
                a = ours[e].act_fn(gate) * up
                stats[e].add(a, missing=others[e](here).float() - readers[e](a).float())

        handle = ours.register_forward_pre_hook(see)
        for rows, call in zip(stream.batches(), stream.calls[stream.at], strict=True):
            stream.forward(block, rows, call)
        handle.remove()
        for e, (s, reader) in enumerate(zip(stats, readers, strict=True)):
            factor = s.finish().factor(self.damp, False) if s.count else None
            if factor is None or factor.failed or s.missing is None:
                tell(f"{path}.{e}.down_proj", f"{s.count} tokens were routed to it" if factor is None else SINGULAR)
            else:
                W = get_weight(reader, block.originals.get(f"{path}.{e}.down_proj.weight"))
                _put(block, f"{path}.{e}.down_proj.weight", W + s.missing @ factor.U.T @ factor.U)
        stored = block.stored[f"{path}.0.down_proj.weight"]
        return {f"{path}.down_proj": torch.stack([r.weight for r in readers]).to(stored)}

    def _solve(self, block: nn.Module, path: str, seen: Callable, wanted: Callable, stream: Stream, basis: Tensor | None, tell: Callable
               ) -> dict[str, Tensor]:  # fmt: skip
        """The new weight or bias of one linear, put into the block; nothing, with a note, where the whole model's has other outputs or none is found."""
        linear = block.get_submodule(path)
        W = get_weight(linear, block.originals.get(f"{path}.weight"))
        if linear.bias is not None:  # it is the weight of an input that is always 1
            W = torch.cat([W, linear.bias.float()[:, None]], 1)
        stats, total, count = Stats.zeros(W.shape[1], W.device), torch.zeros(len(W), dtype=torch.float64, device=W.device), 0
        for i, rows in enumerate(stream.batches()):
            (a, s), t = seen(i, rows), wanted(i, rows).to(stream.device)
            if basis is not None and (t.shape[-1], s.shape[-1]) == tuple(basis.shape):
                t = t.float() @ basis.to(t.device)
            if s.numel() != t.numel():
                tell(f"it is part of {s.shape[-1]} channels, in the whole model of {t.shape[-1]}")
                return {}
            a, d = a.flatten(0, -2), (t.float() - s.float().view(t.shape)).flatten(0, -2)
            if stream.mask is not None:
                a, d = (x[stream.mask[rows].flatten().to(x.device)] for x in (a, d))
            if self.what == "weights":
                stats.add(a if linear.bias is None else torch.cat([a, torch.ones_like(a[:, :1])], 1), missing=d)
            else:
                total, count = total + d.sum(0, dtype=torch.float64), count + len(d)
        if self.what == "bias":
            made = {f"{path}.bias": (total / count).float() + (0 if linear.bias is None else linear.bias.float())}
        else:
            factor, D = stats.finish().factor(self.damp, False), stats.missing
            if stats.dropped:
                tell(f"{stats.dropped} of {stats.dropped + stats.count} rows of the input were NaN or Inf", "tokens dropped")
            if factor.failed or D is None:
                tell(SINGULAR)
                return {}
            for f in stats.fallbacks:
                tell(f["detail"], f["what"])
            W, n = W + D @ factor.U.T @ factor.U, in_features(linear)
            made = {f"{path}.weight": W[:, :n].T if isinstance(linear, Conv1D) else W[:, :n]} | ({f"{path}.bias": W[:, n]} if W.shape[1] > n else {})
        for local, t in made.items():
            _put(block, local, t)
        return made


def unfused(name: str, t: Tensor) -> dict[str, Tensor]:
    """A tensor, or one for every expert that it holds."""
    return {name: t} if t.dim() < 3 else {name.replace(".down_proj", f".{e}.down_proj.weight"): w for e, w in enumerate(t)}


def instead(scratch, file: str, name: str, t: Tensor) -> Tensor:
    """An edit: the tensor that lies in the scratch, in the place of t."""
    return scratch.read(file, name)


def _writers(source: Checkpoint, i: int) -> list[str]:
    """The linears of block i that end a sublayer. Raises CompressError where the table does not know the architecture."""
    arch, block = table_entry(source.model), source.model.get_submodule(source.block_name(i))
    if arch is None:
        raise CompressError(f"{source.name}: refit: {{what: bias}} needs the sites of {source.config.model_type} in the table of compress/arch.py")
    modules = dict(block.named_modules())
    return [p for s in arch.sites if s.name in ("attn.output", "mlp.output") for p in s.linears if p in modules]


def _put(block: nn.Module, local: str, t: Tensor) -> None:
    """A tensor as it will be stored."""
    path, _, leaf = local.rpartition(".")
    module = block.get_submodule(path)
    stored = block.stored.get(local, block.stored[f"{path}.weight"])
    setattr(module, leaf, nn.Parameter(t.to(stored).to(module.weight.device, module.weight.dtype), requires_grad=False))


@torch.no_grad()
def _seen(block: nn.Module, path: str, place: str | None, stream: Stream, i: int, rows: slice) -> tuple[Tensor, Tensor]:
    """What linear `path` reads, and what its output is part of: the input of module `place`, the block's output (""), or only itself (None)."""
    seen: dict[str, Tensor] = {}

    def read(module, args):
        seen["a"] = args[0]

    def write(module, args, y):
        seen["s"] = y
        raise Reached

    def arrive(module, args):
        if "a" in seen:
            seen["s"] = args[0]
            raise Reached

    linear = block.get_submodule(path)
    handles = [linear.register_forward_pre_hook(read)]
    if place is None:
        handles.append(linear.register_forward_hook(write))
    elif place:
        handles.append(block.get_submodule(place).register_forward_pre_hook(arrive))
    try:
        with suppress(Reached):
            seen["s"] = stream.forward(block, rows, stream.calls[stream.at][i])
    finally:
        for handle in handles:
            handle.remove()
    return seen["a"], seen["s"]
