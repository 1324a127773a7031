"""Teacher: what the original says of every training token, asked once, block by block, and kept on disk.

    for each block { load → all windows through it → keep hidden states where a loss wants them };   head → what it reads, the k likeliest tokens, their log p

So teacher and student are never in memory together, and an epoch costs no forward of the teacher: k = 64 takes 384 bytes a token, what the head reads
2·width. The folder is a Writer's like that of an artifact: a shard a batch of windows, committed by one rename, hashed, refused where it belongs to
another teacher or other data.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from safetensors import safe_open
from torch import Tensor

from ..arch import table_entry
from ..artifact import Writer
from ..calibration.data import CalibrationSet
from ..calibration.hidden import allocate
from ..checkpoint import Checkpoint
from ..errors import CompressError
from ..skeleton import heads, shape
from ..stream import Stream
from ..walk import sites_of
from .losses import LEAST, likeliest

SIGNATURE = 4096  # numbers of a tensor by which a block is known again


@dataclass(frozen=True)
class Lessons:
    """Which windows lie in which file: `batch` windows a shard, in order."""

    folder: str
    windows: int
    batch: int

    @cached_property
    def shards(self) -> list[str]:
        return [f"teacher-{i:05d}" for i in range(-(-self.windows // self.batch))]

    def __call__(self, rows: list[int], device: torch.device | str) -> dict[str, Tensor]:
        """ids and log_p [b, t, k], and whatever else was kept, for these windows."""
        read: dict[str, list[Tensor]] = {}
        for row in rows:
            with safe_open(f"{self.folder}/{self.shards[row // self.batch]}.safetensors", framework="pt") as f:
                for key in f.keys():  # noqa: SIM118
                    read.setdefault(key, []).append(f.get_slice(key)[row % self.batch : row % self.batch + 1])
        return {key: torch.cat(pieces).to(device) for key, pieces in read.items()}


def remember(teacher: Checkpoint, writer: Writer, lessons: Lessons, data: CalibrationSet, *, top_k: int, layers: list[int], states: bool,
             relation: bool, device: str) -> None:  # fmt: skip
    """Fill the writer's folder. `layers`: blocks whose output is kept; states: also what the head reads; relation: also what the last block's attention
    makes of its input."""
    missing = {shard for shard in lessons.shards if writer.header(shard) is None}
    if not missing:
        return
    stream = Stream(teacher, data.tokens, data.mask, batch=lessons.batch, device=device, folder=writer.folder.parent)
    kept: dict[str, Tensor] = {}
    heard: dict[str, list[Tensor]] = {}
    for i in range(teacher.num_blocks):
        block = teacher.load_block(i, device)
        if relation and i == teacher.num_blocks - 1:
            for path in attending(teacher, i) or sites_of(teacher, block, stream)[0].linears:
                for part, rows in parts(teacher, i, path).items():
                    hear = lambda module, args, y, key=f"relation.{path}{part}", rows=rows: heard.setdefault(key, []).append(y[..., rows].cpu())
                    block.get_submodule(path).register_forward_hook(hear)
        stream.advance(block)
        if i in layers:
            kept[f"hidden.{i}"] = allocate(tuple(stream.hidden.shape), stream.hidden.dtype, writer.folder.parent).copy_(stream.hidden)
    kept |= {key: torch.cat(pieces) for key, pieces in heard.items()}
    read: dict[str, Tensor] = {}
    tail = stream.tail(read)
    for shard, rows in zip(lessons.shards, stream.batches(), strict=True):
        if shard in missing:
            with torch.no_grad():
                ids, log_p = likeliest(tail(stream.hidden[rows].to(device)), top_k)
            here = {"ids": ids, "log_p": log_p} | ({"state": read["state"].contiguous()} if states else {})
            writer.commit(shard, here | {key: t[rows].contiguous() for key, t in kept.items()}, {}, [])


def attending(source: Checkpoint, i: int) -> tuple[str, ...]:
    """The linears of block i that make queries, keys and values, three or one; none where the table does not know them."""
    arch = table_entry(source.model)
    found = arch and heads(arch, source.model.get_submodule(source.block_name(i)))
    return found.makers if found else ()


def parts(source: Checkpoint, i: int, path: str) -> dict[str, Tensor | slice]:
    """{"": all}, or of a linear that makes all in one {":queries", ":keys", ":values"}: which of its outputs. A head of MiniLM's must not lie across two."""
    arch = table_entry(source.model)
    found = arch and heads(arch, block := source.model.get_submodule(source.block_name(i)))
    if not found or path not in found.makers:
        return {"": slice(None)}
    return {part and f":{part}": rows for part, rows in found.parts(shape(block.get_submodule(path))[0]).items()}


def matched(student: Checkpoint, teacher: Checkpoint, tokens: Tensor, device: str) -> list[int]:
    """For each block of the student the block of the teacher whose output it should reproduce.

    Block by block where there are as many; else the increasing assignment, the last to the last, with the least sum of relative distances between
    the hidden states [n, t, width] of `tokens` (a dynamic programme): whichever blocks were dropped, it finds those that are left.
    """
    depth, all_of = student.num_blocks, teacher.num_blocks
    if depth == all_of:
        return list(range(depth))
    if depth > all_of:
        raise CompressError(f"{student.name} has {depth} blocks, its teacher {teacher.name} only {all_of}; give the model that it was made of")
    comparable(student, teacher)
    ours, theirs = _states(student, tokens, device), _states(teacher, tokens, device)
    cost = torch.tensor([[float((a - b).square().mean() / b.square().mean()) for b in theirs] for a in ours], dtype=torch.float64)
    return _increasing(cost, all_of - 1)


def descent(student: Checkpoint, teacher: Checkpoint, device: str) -> list[int]:
    """For each block of the student the block of the teacher that it was made of: the increasing assignment with the least distance between weights.

    Of every tensor whose shape is still the same the first numbers are compared. Raises CompressError where no shape is.
    """
    depth, all_of = student.num_blocks, teacher.num_blocks
    if depth == all_of:
        return list(range(depth))
    ours, theirs = ([{n: t.flatten()[:SIGNATURE].double() for n, t in c.load_block(i, device).state_dict().items()} for i in range(c.num_blocks)]
                    for c in (student, teacher))  # fmt: skip
    shapes = [{n: t.shape for n, t in c.model.get_submodule(c.block_name(0)).state_dict().items()} for c in (student, teacher)]
    alike = [n for n in shapes[0] if shapes[0][n] == shapes[1].get(n) and all(n in block for block in ours)]  # norms, where linears are codes
    if depth > all_of or not alike:
        raise CompressError(f"{student.name}: its {depth} blocks cannot be told to be any of the {all_of} of {teacher.name}; leave refit out, train no codes")
    cost = torch.tensor([[sum(float((a[n] - b[n]).norm() / b[n].norm().clamp(min=LEAST)) for n in alike) for b in theirs] for a in ours], dtype=torch.float64)
    return _increasing(cost, None)


def _increasing(cost: Tensor, end: int | None) -> list[int]:
    """The increasing assignment of rows to columns of cost [n, m ≥ n] with the least sum, the last row to column `end` if there is one."""
    best, came = cost[0].clone(), []
    for row in cost[1:]:
        before, at = best.cummin(0)  # the best end at a column up to this one
        came.append(torch.cat([at[:1], at[:-1]]))
        best = row + torch.cat([torch.full((1,), torch.inf, dtype=torch.float64), before[:-1]])
    ends = [int(best.argmin()) if end is None else end]
    for at in reversed(came):
        ends.append(int(at[ends[-1]]))
    return ends[::-1]


def comparable(student: Checkpoint, teacher: Checkpoint) -> None:
    """Refuse to compare hidden states of two widths."""
    a, b = (m.config.get_text_config().hidden_size for m in (student, teacher))
    if a != b:
        raise CompressError(f"{student.name} is {a} wide, {teacher.name} {b}: hidden states cannot be compared; use relation")


def _states(source: Checkpoint, tokens: Tensor, device: str) -> list[Tensor]:
    stream, states = Stream(source, tokens, device=device), []
    for i in range(source.num_blocks):
        stream.advance(source.load_block(i, device))
        states.append(stream.hidden.float().clone())
    return states
