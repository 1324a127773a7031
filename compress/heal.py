"""Heal: give a compressed model back what it has lost, by training a few numbers of it against the original on text.

    minimise  mean_t [ KL(p_original ‖ p) + λ ‖h − h_original‖²/‖h_original‖² + λ_r KL(relations) ]     over all weights, low-rank adapters or scales; and norms

h is what the head reads. A KL tells how wrong a token's prediction is in the few directions that it depends on; the state tells it in all of them, without
the noise of which token came: with it 60 steps win back half as much again on a model that lost a fifth of its neurons.

Calibration solves each layer once for a few windows; here the layers answer to each other, over as many tokens as one likes. With `refit` the writers to the
residual stream of a plain model are first solved again on all of these, in closed form, which training then begins from. What an adapter becomes at
the end depends on the format (healing/adapters.py): merged where it costs nothing, kept as a low-rank term over integers. The original is read
once, block by block (healing/teacher.py), so only the compressed model, the adapters and Adam's two moments of them are in memory while training.

Windows that are never trained on judge. Where they see no gain, training goes back to the best state they have seen and its steps are halved: noise is in
proportion to them, and what is to be won may be less than it. At the end that state, rounded as it will be stored, is judged once more, and undone where it
is no better than the model was before. Everything that training has come to lies in one shard, written anew every few steps by one rename: killed anywhere,
the same command goes on from there to the same bytes. Under `accelerate launch` or `torchrun` the windows of a step are shared out.
"""

from __future__ import annotations

import math
import shutil
import time
from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from torch import Tensor

from . import progress
from .artifact import MANIFEST, PROBE, PROBE_KEPT, PROBE_TOKENS, LayerRecord, Writer, file_sha256, strictly, totals
from .calibration.data import CalibrationSet
from .checkpoint import Checkpoint
from .errors import CompressError
from .experts import fused_experts, spelled, spelling
from .formats import Dense, Format, Sum
from .healing.adapters import Frozen
from .healing.losses import distance, divergence, relation, translation
from .healing.options import Heal
from .healing.student import Student, shard_of
from .healing.teacher import Lessons, comparable, descent, matched, remember
from .stream import Stream
from .structure.refit import Beside, Refit, Solved, unfused
from .verification import ArtifactCheckpoint
from .version import __version__
from .walk import copy_outer

STATE = "healing"  # the shard of everything that training has come to; removed when the artifact is complete
TEACHER_TOKENS = 2048  # of one forward of the teacher: its logits are in memory
LONGEST = 1.0  # norm of all gradients together that a step follows: one odd batch does not undo what was learned


def heal(options: Heal, source: Checkpoint, teacher: Checkpoint, data: CalibrationSet, folder: Path, cache: Path | None, asked: dict[str, Any],
         processes: PartialState, *, seed: int, device: str, strict: bool, overwrite: bool, show: bool) -> None:  # fmt: skip
    """Train, and write the healed artifact into `folder`; the teacher's answers lie in `cache`, or beside it until it is complete.

    source: an ArtifactCheckpoint, or a plain Checkpoint all of whose linears learn. asked: what identifies teacher and data. The first of the processes
    writes. Raises CompressError where there are too few windows for the batch, a folder belongs to another run, or the loss is no longer finite.
    """
    run, answers = _identity(options, source, asked, device, seed)
    windows = len(data.tokens)
    judges = max(1, round(options.held_out * windows))
    if options.batch % processes.num_processes or windows - judges < options.batch:
        raise CompressError(f"heal: a batch of {options.batch} windows, {processes.num_processes} processes, {windows} windows of which {judges} only judge: "
                            "the batch must be a multiple of the processes and no more than the others; use more --samples or --set batch=N")  # fmt: skip
    book = cache or folder.resolve().with_name(f"{folder.resolve().name}.teacher")
    with ExitStack() as stack:
        writer = stack.enter_context(closing(Writer(folder, run, overwrite=overwrite))) if processes.is_main_process else None
        complete = [bool(writer and writer.complete)]
        broadcast_object_list(complete)
        if not complete[0]:
            pairs = _pairs(options, source, teacher, data.tokens[:1], device) if options.hidden else []
            lessons = Lessons(str(book), windows, max(1, TEACHER_TOKENS // data.tokens.shape[1]))
            if writer:
                with closing(Writer(book, answers, overwrite=overwrite)) as notebook:
                    remember(teacher, notebook, lessons, data, top_k=options.top_k, layers=[t for _, t in pairs], states=options.states > 0,
                             relation=options.relation > 0, device=device)  # fmt: skip
            processes.wait_for_everyone()
            hear = [key.removeprefix("relation.") for key in lessons([0], "cpu") if key.startswith("relation.")]
            made = partial(Student, options, source, device, seed, hear, teacher)
            student, solved, notes = made(), dict[str, Tensor](), list[dict]()
            start = _judged(options, student, lessons, data, judges, processes)
            if options.refit:
                del student  # one at a time
                solved, told = _refitted(source, teacher, data, windows - judges, lessons.batch, folder, writer, processes, device)
                student = made(solved)
                then = _judged(options, student, lessons, data, judges, processes)
                progress.line(f"healing: refit on {windows - judges} windows, held-out KL {start:.5f} → {then:.5f}", show=show and processes.is_main_process)
                notes += told if then < start else []
                if then >= start:
                    del student
                    student, solved = made(), {}
                    notes.append({"what": "refit undone", "where": "model", "count": 1, "detail": f"held-out KL {start:.3e} would have been {then:.3e}"})
            turn = translation(student.head, teacher.load_outer(device, embeddings=False).get_output_embeddings().weight) if options.states else None
            formats, training, more = _train(options, student, lessons, data, pairs, turn, judges, folder, writer, processes, seed=seed, show=show)
            training["healing"][0] = start
            if writer:
                strictly(strict, data.fallbacks + notes + more)
                _write(source, student, formats, solved, writer, training, data.fallbacks + notes + more, data, seed)
        if writer:
            for shard in (STATE, *(f"refit-{i:05d}" for i in range(source.num_blocks))):
                writer.remove(shard)
            if not cache and book.is_dir():
                shutil.rmtree(book)
        processes.wait_for_everyone()


def _identity(options: Heal, source: Checkpoint, asked: dict[str, Any], device: str, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What identifies this run, and the teacher's answers that it needs."""
    made = source.manifest if isinstance(source, ArtifactCheckpoint) else None
    run: dict[str, Any] = made.run if made else {"source": source.digest(), "recipe": {"name": "plain", "steps": []}, "calibration": None, "seed": seed}
    name = run["recipe"]["name"].removesuffix("-heal")
    here = {"dtype": str(source.dtype)[6:], "device": torch.device(device).type, "compress": __version__}
    how = {key: value for key, value in asdict(options).items() if key not in ("checkpointing", "bounded")}  # these two change no result
    of = file_sha256(source.path / MANIFEST) if made else None
    answers = asked | here | {key: how[key] for key in ("top_k", "hidden", "relation", "layers")}
    answers |= {"states": options.states > 0, "of": of if options.hidden else None}
    recipe = run["recipe"] | {"name": f"{name}-heal"}
    return run | here | {"recipe": recipe, "heal": asked | {"options": how, "seed": seed, "of": of}}, answers


def _pairs(options: Heal, source: Checkpoint, teacher: Checkpoint, tokens: Tensor, device: str) -> list[tuple[int, int]]:
    """Blocks of the student whose output is compared, each with its block of the teacher."""
    comparable(source, teacher)
    match = matched(source, teacher, tokens, device)
    count = min(options.layers, len(match))
    return [(s, match[s]) for s in (round((k + 1) * len(match) / count) - 1 for k in range(count))]


def _real(data: CalibrationSet, rows: list[int]) -> int:
    return data.tokens[rows].numel() if data.mask is None else int(data.mask[rows].sum())


@torch.no_grad()
def _judged(options: Heal, student: Student, lessons: Lessons, data: CalibrationSet, judges: int, processes: PartialState) -> float:
    """The divergence alone, a token of the last windows, all processes together."""
    held = list(range(len(data.tokens) - judges, len(data.tokens)))
    mine, total = held[processes.process_index :: processes.num_processes], torch.zeros(1, dtype=torch.float64, device=student.device)
    for i in range(0, len(mine), options.micro):
        rows = mine[i : i + options.micro]
        lesson, mask = lessons(rows, student.device), None if data.mask is None else data.mask[rows]
        each = divergence(lesson["ids"], lesson["log_p"], student.logits(data.tokens[rows], mask))
        total += (each if mask is None else each[mask.to(each.device)]).sum()
    return float(_together(total, processes)) / _real(data, held)


def _together(values: Tensor, processes: PartialState) -> Tensor:
    if processes.num_processes > 1:
        torch.distributed.all_reduce(values)
    return values


def _refitted(source: Checkpoint, teacher: Checkpoint, data: CalibrationSet, windows: int, batch: int, folder: Path, writer: Writer | None,
              processes: PartialState, device: str) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:  # fmt: skip
    """Tensors of a plain model, and notes, solved so that its residual stream comes nearest to the teacher's (structure/refit.py) on the first `windows`.

    The recipe that made it did so on the windows that it chose with; these are as many as train. Block by block they lie in shards beside the state.
    """
    if isinstance(source, ArtifactCheckpoint) and not source.manifest.plain:
        raise CompressError(f"{source.name}: heal.refit solves the dense weights of a plain model, and these are stored in other formats; leave it out")
    shards = [f"refit-{i:05d}" for i in range(source.num_blocks)]
    if writer and not all(map(writer.header, shards)):
        plain = Checkpoint(str(source.path), dtype=source.dtype, trust_remote_code=source.trust_remote_code)
        ours, theirs = (c.load_outer(device, head=False).get_input_embeddings().weight.double() for c in (plain, teacher))
        basis = None if ours.shape == theirs.shape and torch.equal(ours, theirs) else torch.linalg.solve(theirs.T @ theirs, theirs.T @ ours).float()

        def kept(shard: str, make: Solved) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
            if (header := writer.header(shard)) is None:
                tensors, notes = make()
                header = writer.commit(shard, tensors, {}, notes)
            return writer.read(shard), header["fallbacks"]

        mask = None if data.mask is None else data.mask[:windows]
        small, whole = (Stream(c, data.tokens[:windows], mask, batch=batch, device=device, folder=folder.parent) for c in (plain, teacher))
        Refit().travel(plain, Beside(teacher, descent(plain, teacher, device), basis), small, whole, kept)
    processes.wait_for_everyone()
    solved: dict[str, Tensor] = {}
    for shard in shards:
        with safe_open(folder / f"{shard}.safetensors", framework="pt") as f:
            for name in f.keys():  # noqa: SIM118
                t = f.get_tensor(name).clone()
                solved |= {name: t} | unfused(name, t)
    return solved, [note for shard in shards for note in writer.header(shard)["fallbacks"]] if writer else []  # type: ignore[index]


def _train(options: Heal, student: Student, lessons: Lessons, data: CalibrationSet, pairs: list[tuple[int, int]], turn: Tensor | None, judges: int,
           folder: Path, writer: Writer | None, processes: PartialState, *, seed: int, show: bool
           ) -> tuple[dict[str, Format], dict[str, list[float]], list[dict]]:  # fmt: skip
    """The loop. Leaves the best student, finished; returns its formats (none where healing was undone), the curves, and what did not go as asked."""
    rank, world, windows = processes.process_index, processes.num_processes, len(data.tokens)
    say = partial(progress.line, show=show and processes.is_main_process)
    judged = partial(_judged, options, student, lessons, data, judges, processes)

    def loss(rows: list[int]) -> Tensor:
        """The sum over the real tokens of these windows."""
        lesson, mask = lessons(rows, student.device), None if data.mask is None else data.mask[rows]
        each = options.kl * divergence(lesson["ids"], lesson["log_p"], student.logits(data.tokens[rows], mask))  # [b, t]
        if turn is not None:
            each = each + options.states * distance(student.read["state"], lesson["state"].float() @ turn)
        for s, t in pairs:
            each = each + options.hidden / len(pairs) * distance(student.seen[s], lesson[f"hidden.{t}"])
        for path, y in student.heard.items():
            x = lesson[f"relation.{path}"]
            each = each + options.relation / len(student.heard) * relation(y, x, math.gcd(options.heads, x.shape[-1], y.shape[-1]))
        return (each if mask is None else each[mask.to(each.device)]).sum()

    speed = {"A": options.lr, "B": options.lr, "P": options.weight_lr, "p": options.weight_lr}  # by what an adapter calls it; all else is a scale or a norm
    groups: dict[float, list[Tensor]] = {}
    for name, p in student.masters.items():
        groups.setdefault(speed.get(name.rpartition(".")[2] if name in student.adapters else "", options.scale_lr), []).append(p)
    adam = torch.optim.Adam([{"params": ps, "peak": rate} for rate, ps in groups.items()], betas=(0.9, 0.95))
    state = _resume(student, adam, folder, writer, processes)
    losses, looks, best = state or ([], [judged()], _copy(student.masters))
    say(f"healing: held-out KL {looks[0]:.5f}" + (f", resumed at {min(looks):.5f} after {len(losses)} steps" if losses else ""))
    began, done = time.perf_counter(), len(losses)
    for step in range(done, options.steps):
        rows = _windows(step, options.batch, windows - judges, seed)
        mine, value = rows[rank::world], torch.zeros(1, device=student.device)
        with torch.enable_grad():
            for i in range(0, len(mine), options.micro):
                part = loss(mine[i : i + options.micro]) / _real(data, rows)
                part.backward()
                value += part.detach()
        gradients = student.gradients()
        flat = _together(torch.cat([value, *(g.flatten() for g in gradients)]), processes)
        if not torch.isfinite(flat).all():
            raise CompressError(f"heal: the loss or a gradient is not finite at step {step + 1}; try --set lr={options.lr / 4:g} or --dtype float32")
        flat[1:] *= LONGEST / max(float(flat[1:].norm()), LONGEST)
        for p, g in zip(student.masters.values(), flat[1:].split([g.numel() for g in gradients]), strict=True):
            p.grad = g.view(p.shape)
        for group in adam.param_groups:
            group["lr"] = group["peak"] * _rate(step, options) * 0.5 ** sum(looks[k] >= min(looks[:k]) for k in range(1, len(looks)))
        adam.step()
        adam.zero_grad(set_to_none=True)
        student.follow()
        losses.append(float(flat[0]))
        if (step + 1) % options.every == 0 or step + 1 == options.steps:
            looks.append(judged())
            if better := looks[-1] < min(looks[:-1]):
                best = _copy(student.masters)
            else:
                _back(student, best)
            if writer:
                _save(student, adam, best, losses, looks, writer)
            left = (time.perf_counter() - began) / (step + 1 - done) * (options.steps - step - 1)
            recent = losses[-options.every :]
            gain = "" if better else f", back to {min(looks):.5f}"
            say(f"healing {step + 1}/{options.steps}: loss {sum(recent) / len(recent):.5f}, held-out KL {looks[-1]:.5f}{gain}, left {left:.0f} s")
    _back(student, best)
    idle = [path for path, inner in student.learners.items() if isinstance(inner, Frozen)]
    notes = [{"what": "scales not trained", "where": idle[0], "count": len(idle), "detail": "its format has none that can learn"}] if idle else []
    formats = student.finish(True)
    after = judged()
    if min(looks) == looks[0] or after >= looks[0]:
        student.finish(False)
        notes.append({"what": "healing undone", "where": "model", "count": 1, "detail": f"held-out KL {looks[0]:.3e} did not fall"})
        formats, after = {}, looks[0]
    return formats, {"healing": [looks[0], after], "healing loss": losses, "healing held-out": looks}, notes


def _windows(step: int, batch: int, windows: int, seed: int) -> list[int]:
    """The windows of a step: an order drawn anew for each pass over them, known from the step alone."""
    places = range(step * batch, (step + 1) * batch)
    orders = {e: torch.randperm(windows, generator=torch.Generator().manual_seed(seed * 100003 + e)) for e in {i // windows for i in places}}
    return [int(orders[i // windows][i % windows]) for i in places]


def _rate(step: int, options: Heal) -> float:
    """Up in a line, down along a cosine."""
    if step < options.warmup:
        return (step + 1) / options.warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - options.warmup) / max(1, options.steps - options.warmup))


def _copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in tensors.items()}


@torch.no_grad()
def _back(student: Student, best: dict[str, Tensor]) -> None:
    for name, value in best.items():
        student.masters[name].copy_(value)
    student.follow()


def _save(student: Student, adam: torch.optim.Adam, best: dict[str, Tensor], losses: list[float], looks: list[float], writer: Writer) -> None:
    """Everything that the rest of the training depends on, by one rename."""
    moments = {f"{key}|{name}": adam.state[p][f"exp_avg{key}"] for name, p in student.masters.items() for key in ("", "_sq")}
    now = {f"now|{name}": p for name, p in student.masters.items()} | {f"best|{name}": p for name, p in best.items()}
    writer.commit(STATE, now | moments, {}, [], {"losses": losses, "looks": looks})


def _resume(student: Student, adam: torch.optim.Adam, folder: Path, writer: Writer | None, processes: PartialState
            ) -> tuple[list[float], list[float], dict[str, Tensor]] | None:  # fmt: skip
    """Losses, looks and the best state of the training that was interrupted here, if one was; student and adam go on from it."""
    found: list[dict | None] = [writer.header(STATE) if writer else None]
    broadcast_object_list(found)
    if (header := found[0]) is None:
        return None
    with torch.no_grad(), safe_open(folder / f"{STATE}.safetensors", framework="pt") as f:
        for name, p in student.masters.items():
            p.copy_(f.get_tensor(f"now|{name}"))
            moments = {f"exp_avg{key}": f.get_tensor(f"{key}|{name}").clone().to(p.device) for key in ("", "_sq")}
            adam.state[p] = {"step": torch.tensor(float(len(header["training"]["losses"])))} | moments
        best = {name: f.get_tensor(f"best|{name}").clone().to(p.device) for name, p in student.masters.items()}
    student.follow()
    processes.wait_for_everyone()  # nobody writes the next state while somebody reads this one
    return header["training"]["losses"], header["training"]["looks"], best


def _write(source: Checkpoint, student: Student, formats: dict[str, Format], solved: dict[str, Tensor], writer: Writer, training: dict[str, list[float]],
           notes: list[dict], data: CalibrationSet, seed: int) -> None:  # fmt: skip
    """The healed blocks, what lies outside as it is, and the manifest. Linears of a plain checkpoint that are dense again are stored as plain weights."""
    headers: dict[str, dict] = {}
    manifest = source.manifest if isinstance(source, ArtifactCheckpoint) else None
    notes = [f.model_dump() for f in manifest.fallbacks] + notes if manifest else notes
    training = (manifest.training if manifest else {}) | training
    head = f"{student.learned_head}.weight"
    new = {head: formats[student.learned_head].weight} if formats and student.learned_head else {}  # type: ignore[attr-defined]
    if manifest is None:
        source.edits |= {name: partial(lambda W, t: W, W) for name, W in new.items()}
        copy_outer(source, writer, headers)
    else:
        outer: dict[str, dict[str, Tensor]] = {}
        for name, record in manifest.tensors.items():
            if record.shard.startswith("outer-"):
                outer.setdefault(Path(record.shard).stem, {})[name] = new.get(name, source.read_stored(name))
        headers |= {shard: writer.commit(shard, tensors, {}, []) for shard, tensors in outer.items()}
    seen = data.tokens.numel() if data.mask is None else int(data.mask.sum())
    plain = manifest is not None and manifest.plain and all(isinstance(f, Dense) for f in formats.values())  # transformers will still load it
    names = spelling(source.model) if plain and fused_experts(source.model) else {}
    for i in range(source.num_blocks):
        tensors, layers, before = shard_of(source, i, solved)
        for path, old in before.items() if formats else ():
            weight = formats[path]
            if path not in layers and isinstance(weight, Dense):
                tensors[f"{path}.weight"] = weight.weight.T.contiguous() if path in student.transposed else weight.weight
                continue
            for t in layers[path].tensors if path in layers else ["weight"]:
                del tensors[f"{path}.{t}"]
            layers[path] = _record(layers.get(path), old, weight, seen)
            tensors |= {f"{path}.{t}": value for t, value in weight.tensors().items() if t in layers[path].tensors}
        if formats:
            tensors |= {name: student.masters[name].to(t.dtype) for name, t in tensors.items() if name in student.first}
        headers[f"block-{i:05d}"] = writer.commit(f"block-{i:05d}", spelled(tensors, names), layers, notes if i == 0 else [], training if i == 0 else {})
    stem, vocabulary = PROBE.removesuffix(".safetensors"), student.model.get_input_embeddings().num_embeddings
    tokens = torch.randint(vocabulary, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        headers[stem] = writer.commit(stem, {"tokens": tokens, "logits": student.logits(tokens)[:, -PROBE_KEPT:].float()}, {}, [])
    stored = source.entries.values()
    parameters = int(manifest.totals["parameters"]) if manifest else sum(torch.Size(e.shape).numel() for e in stored)
    before_bytes = int(manifest.totals["source_bytes"]) if manifest else sum(e.nbytes for e in stored)
    writer.finish(headers, source.path, source.changes, source.blocks_path, totals(headers, parameters, before_bytes), __version__,
                  plain=plain, structure=manifest.structure if manifest else None)  # fmt: skip


def _record(old: LayerRecord | None, before: Format, weight: Format, tokens: int) -> LayerRecord:
    """Made as before, and healed. Its error is how far healing moved it: to be near the original weight is no longer the goal.

    Tensors that another layer stores for both stay there; they and their owner's moved one level down where a term was added to what was no sum.
    """
    W, healed, tensors = before.dequantize(), weight.dequantize(), weight.tensors()
    down = "0_" if isinstance(weight, Sum) and not isinstance(before, Sum) else ""
    shared = {down + t: f"{place.rpartition('.')[0]}.{down}{place.rpartition('.')[2]}" for t, place in (old.shared if old else {}).items()}
    nbytes = sum(t.numel() * t.element_size() for key, t in tensors.items() if key not in shared)
    return LayerRecord(method=f"{old.method} + heal" if old else "heal", options=old.options if old else {}, format=weight.meta(), describe=weight.describe(),
                       tensors=[t for t in tensors if t not in shared], shared=shared, bits=8 * nbytes / W.numel(), bytes=nbytes, planned_bytes=nbytes,
                       parameters=W.numel(), error=((healed - W).square().sum() / W.square().sum()).item(), error_norm="healing", tokens=tokens)  # fmt: skip
