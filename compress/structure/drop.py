"""Drop: leave out whole blocks, or the attention or the MLP of some; what is left is an ordinary model of the same class.

    top, bottom      the last or the first K;   alternate: every other one from the end;   symmetric: the middle       Sajjad et al., arXiv 2004.03844
    contribution     the K of lowest block influence  BI_l = 1 − E cos(x_l, x_{l+1})                                   ShortGPT, arXiv 2403.03853
    angular          the K in a row with the smallest angle between what goes in and what comes out, last token        Gromov et al., arXiv 2403.17887
    blocks           those that are given
    greedy           K times: leave out the one that costs the least KL(original ‖ rest)                               after SLEB, arXiv 2402.09025

Influence looks at one block and its own input; greedy asks the end of the model, and asks again after every removal. A round sends the search's windows
through the blocks once, each block read once: the candidates branch off where they leave something out and travel along as states of their own, so
that the way to the branch is never computed twice. K rounds over L blocks cost K·L²/2 block passes of a few windows and L states in memory.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..arch import table_entry
from ..checkpoint import Checkpoint
from ..errors import CompressError, at_least
from ..eval.compare import divergence
from ..skeleton import KEY
from ..stream import Stream
from .smaller import Smaller, blocks_of

By = Literal["top", "bottom", "alternate", "symmetric", "contribution", "angular", "greedy"]


@dataclass(frozen=True)
class Drop:
    """Leave out whole blocks, or the attention or the MLP of some blocks."""

    count: float = 0.25  # how many, or (below 1) which share of all, rounded to the nearest
    by: By = "greedy"  # how they are chosen
    what: Literal["block", "attention", "mlp"] = "block"  # a block, or one sublayer (such a model loads through this package)
    blocks: tuple[int, ...] = ()  # these and no others, whatever `count` and `by` say
    samples: int = 32  # calibration windows that greedy looks at; 0: all

    def __post_init__(self):
        at_least(self, count=0, samples=0)

    @property
    def needs_text(self) -> bool:
        return not self.blocks and self.by in ("contribution", "angular", "greedy")

    def measure(self, source: Checkpoint, enter, scratch=None) -> dict[str, Any]:
        """{"left_out": blocks, in the order in which they were chosen, "score": …}. `enter(source, samples)` gives a Stream in front of block 0."""
        there, n = self._there(source), self._count(source)
        left_out: list[int]
        score: list[float]
        if self.blocks:
            left_out, score = list(self.blocks), []
        elif self.by == "greedy":
            child = "" if self.what == "block" else sublayer(source, 0, self.what)
            left_out, score = greedy(source, enter(source, self.samples), n, child, there)
        elif self.by in ("contribution", "angular"):
            if self.what != "block":
                raise CompressError(f"drop: by {self.by} looks at whole blocks; use by: greedy to leave out single {self.what}s")
            left_out, score = (influence if self.by == "contribution" else angular)(source, enter(source, 0), n)
        else:
            L = len(there)
            middle = (L - n) // 2
            places = {"top": range(L - n, L), "bottom": range(n), "symmetric": range(middle, middle + n),
                      "alternate": [*range(L - 2, -1, -2), *range(L - 1, -1, -2)][:n]}[self.by]  # fmt: skip
            left_out, score = [there[k] for k in places], []
        return {"left_out": left_out, "score": score}

    def guess(self, source: Checkpoint) -> dict[str, Any]:
        """As many blocks as `measure` will choose, for a plan without text."""
        there, n = self._there(source), self._count(source)
        return {"left_out": list(self.blocks or there[len(there) - n :]), "score": []}

    def apply(self, source: Checkpoint, plan: dict[str, Any], scratch=None) -> Checkpoint:
        """Raises CompressError where the class of the model cannot express what is left."""
        if not plan["left_out"]:
            return source
        if self.what == "block":
            return fewer(source, [i for i in range(source.num_blocks) if i not in plan["left_out"]])
        blocks = blocks_of(source)
        for i in plan["left_out"]:
            blocks[i]["without"] = sorted({*blocks[i].get("without", ()), sublayer(source, i, self.what)})
        return Smaller(source, changes={KEY: blocks})

    def _there(self, source: Checkpoint) -> list[int]:
        """The blocks that still have what is to go."""
        if self.what == "block":
            return list(range(source.num_blocks))
        return [i for i, fields in enumerate(blocks_of(source)) if sublayer(source, i, self.what) not in fields.get("without", ())]

    def _count(self, source: Checkpoint) -> int:
        there = self._there(source)
        if odd := [i for i in self.blocks if not 0 <= i < source.num_blocks]:
            raise CompressError(f"{source.name}: drop.blocks: {odd[0]} is no block of 0 … {source.num_blocks - 1}")
        if odd := [i for i in self.blocks if i not in there]:
            raise CompressError(f"{source.name}: drop.blocks: block {odd[0]} has no {self.what} left")
        n = len(set(self.blocks)) or how_many(source, "drop", self.count, len(there), self.what)
        if not 0 <= n < len(there):
            raise CompressError(f"{source.name}: drop: {n} of {len(there)} {self.what}s cannot be left out; use a count from 0 to {len(there) - 1}")
        return n


def how_many(source: Checkpoint, step: str, count: float, there: int, what: str) -> int:
    """A count, or a share of what is there, rounded to the nearest. Raises CompressError for a share that comes to none, and for parts of one."""
    n = round(count * there) if count < 1 else int(count)
    if 0 < count < 1 and n == 0:
        raise CompressError(f"{source.name}: {step}.count = {count} of {there} {what}s comes to none; use a larger share, or count: 1")
    if count > 1 and n != count:
        raise CompressError(f"{source.name}: {step}.count = {count}: a whole number of {what}s, or a share below 1")
    return n


# ---- the smaller model


def fewer(source: Checkpoint, kept: list[int]) -> Smaller:
    """The model of these blocks. Lists with an entry a block and numbers of blocks are rewritten; what is left must be the blocks that were there."""
    config, L = source.config.to_dict(), source.num_blocks
    raw = source.config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    if raw not in config:
        raise CompressError(f"{source.name}: drop: the configuration of {source.config.model_type} has no {raw} of its own; drop blocks of a plain text model")
    changes: dict[str, Any] = {raw: len(kept)}
    for name, value in config.items():
        if isinstance(value, list) and len(value) == L and ("layer" in name or name == KEY):
            changes[name] = [value[k] for k in kept]
        elif name in ("max_window_layers", "first_k_dense_replace") and isinstance(value, int):  # so many of the first blocks
            changes[name] = sum(k < value for k in kept)
    if "mlp_only_layers" in config:
        changes |= {"mlp_only_layers": [j for j, k in enumerate(kept) if not any("expert" in n for n, _ in _block(source, k).named_parameters())],
                    "decoder_sparse_step": 1}  # fmt: skip
    view = Smaller(source, kept=kept, changes=changes)
    for j, k in enumerate(kept):
        if (a := _nature(_block(view, j))) != (b := _nature(_block(source, k))):
            odd = next(key for key in {**a, **b} if a.get(key) != b.get(key))
            raise CompressError(f"{source.name}: drop: as block {j} of a smaller {source.config.model_type}, block {k} would have {odd} = {a.get(odd)} "
                                f"instead of {b.get(odd)}; choose other blocks")  # fmt: skip
    return view


def _block(source: Checkpoint, i: int) -> nn.Module:
    return source.model.get_submodule(source.block_name(i))


def _nature(block: nn.Module) -> dict[str, Any]:
    """What a block is: the shapes of its tensors and the plain attributes of its modules, its number apart."""
    found: dict[str, Any] = {name: tuple(t.shape) for name, t in block.state_dict().items()}
    for path, module in block.named_modules():
        found |= {f"{path}.{k}".lstrip("."): v for k, v in vars(module).items() if isinstance(v, int | float | str | None) and k != "layer_idx"}
    return found


def sublayer(source: Checkpoint, i: int, what: str) -> str:
    """The child of block i that is its attention or its MLP. Raises CompressError where the block does more than add its output to the stream."""
    block, arch = _block(source, i), table_entry(source.model)
    site = {"attention": "attn.output", "mlp": "mlp.output"}[what]
    reader = next((s.linears[0] for s in arch.sites if s.name == site), "") if arch else ""
    child = reader.partition(".")[0]
    module = dict(block.named_children()).get(child)
    if module is None or "." not in reader:
        raise CompressError(f"{source.name}: {source.config.model_type} has no {what} as a module of its own; leave out whole blocks")
    if "residual" in inspect.signature(module.forward).parameters:
        raise CompressError(f"{source.name}: the {what} of {source.config.model_type} adds to the stream itself; leave out whole blocks")
    return child


# ---- how to choose


def influence(source: Checkpoint, stream: Stream, count: int) -> tuple[list[int], list[float]]:
    """The `count` blocks of lowest 1 − E cos(x_l, x_{l+1}), and that of every block."""
    score = []
    for i in range(source.num_blocks):
        block, total, tokens = source.load_block(i, stream.device), 0.0, 0
        for rows, call in zip(stream.batches(), stream.calls[i], strict=True):
            x, y = stream.hidden[rows], stream.forward(block, rows, call).to(stream.hidden.device)
            cos = nn.functional.cosine_similarity(x.float(), y.float(), dim=-1).flatten()
            stream.hidden[rows] = y
            cos = cos if stream.mask is None else cos[stream.mask[rows].flatten()]
            total, tokens = total + float(cos.sum(dtype=torch.float64)), tokens + len(cos)
        score.append(1 - total / tokens)
        stream.at += 1
    return sorted(range(len(score)), key=lambda i: score[i])[:count], score


def angular(source: Checkpoint, stream: Stream, count: int) -> tuple[list[int], list[float]]:
    """The `count` blocks in a row for which arccos(cos(x_l, x_{l+count}))/π is smallest at the last token, and the angle at every l."""
    last = torch.full((len(stream.tokens),), stream.tokens.shape[1] - 1) if stream.mask is None else stream.mask.long().cumsum(1).argmax(1)
    ends = []
    for i in range(source.num_blocks + 1):
        ends.append(stream.hidden[torch.arange(len(last)), last].float())
        if i < source.num_blocks:
            stream.advance(source.load_block(i, stream.device))
    cos = [nn.functional.cosine_similarity(ends[i], ends[i + count], dim=-1).clamp(-1, 1) for i in range(len(ends) - count)]
    score = [float((c.acos() / torch.pi).mean()) for c in cos]
    first = min(range(len(score)), key=lambda i: score[i])
    return list(range(first, first + count)), score


def greedy(source: Checkpoint, stream: Stream, count: int, child: str, there: list[int]) -> tuple[list[int], list[float]]:
    """One after the other, the block (or its `child`) of those `there` whose absence costs the least, and the KL that was reached with each."""
    left_out: list[int] = []
    score: list[float] = []
    tail, whole = stream.tail(), None
    while len(left_out) < count:
        states = without(source, stream, dict.fromkeys(left_out, child), {i: {i: child} for i in there if i not in left_out})
        base = states.pop(None)
        whole = base if whole is None else whole
        cost = divergences(stream, tail, whole, states)
        best = min(cost, key=lambda i: (cost[i], i))
        left_out.append(best)
        score.append(cost[best])
    return left_out, score


def without(source: Checkpoint, stream: Stream, base: dict[int, str], more: dict[Any, dict[int, str]], joining: dict[Any, Tensor] | None = None
            ) -> dict[Any, Tensor]:  # fmt: skip
    """Hidden states behind the last block, {None: where `base` is absent, key: where base and more[key] are}, from one pass over the blocks.

    What is absent: {block: the child that adds nothing, or "" for the block as a whole}. A key branches off at the first block that it lacks.
    joining: {(…, e): the stream in front of block e} of other models, which travel along from there.
    """
    states: dict[Any, Tensor] = {None: stream.hidden}
    for i in range(source.num_blocks):
        states |= {key: h for key, h in (joining or {}).items() if key[-1] == i}
        block = None if base.get(i) == "" else source.load_block(i, stream.device)
        states = {key: _through(stream, i, block, h, (base | more.get(key, {})).get(i)) for key, h in
                  (states | {key: states[None] for key, absent in more.items() if min(absent) == i}).items()}  # fmt: skip
    return states | {key: h for key, h in (joining or {}).items() if key[-1] == source.num_blocks}


def _through(stream: Stream, i: int, block: nn.Module | None, hidden: Tensor, absent: str | None) -> Tensor:
    """Hidden states behind block i, in a tensor of their own; `absent` as in `without`, None where nothing is."""
    if block is None or absent == "":
        return hidden
    branch, out = copy.copy(stream), torch.empty_like(hidden)
    branch.hidden = hidden
    silent = lambda module, args, y: (torch.zeros_like(y[0]), *y[1:]) if isinstance(y, tuple) else torch.zeros_like(y)
    handle = block.get_submodule(absent).register_forward_hook(silent) if absent else None
    for rows, call in zip(stream.batches(), stream.calls[i], strict=True):
        out[rows] = branch.forward(block, rows, call)
    if handle is not None:
        handle.remove()
    return out


@torch.no_grad()
def divergences(stream: Stream, tail, whole: Tensor, states: dict[Any, Tensor]) -> dict[Any, float]:
    """Mean KL(whole ‖ rest) a token, in nats, of each of the states; what the whole model says is worked out once a batch."""
    total, tokens = dict.fromkeys(states, 0.0), 0
    log_p = lambda h, rows: tail(h[rows].to(stream.device)).flatten(0, 1).float().log_softmax(-1)
    for rows in stream.batches():
        p = log_p(whole, rows)
        valid = None if stream.mask is None else stream.mask[rows].flatten().to(p.device)
        tokens += len(p) if valid is None else int(valid.sum())
        for key, h in states.items():
            total[key] += float(divergence(p, log_p(h, rows), valid).sum(dtype=torch.float64))
    return {key: t / tokens for key, t in total.items()}
