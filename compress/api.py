"""The verbs, for notebooks and scripts: plan, run, heal, evaluate, inspect, verify, load, export. The command line calls these and prints what they return."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import yaml
from accelerate import PartialState
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig, PreTrainedConfig

from . import allocate, artifact, importing, linear, plots, preflight, progress, transforms, verification
from . import distill as _distill
from . import recipe as _recipe
from .allocate import Allocation
from .artifact import MANIFEST, PARTIAL, PROBE, PROBE_KEPT, PROBE_TOKENS, Manifest, Writer, fingerprint, read_manifest, strictly, write_json
from .calibration.data import CalibrationSet, load_calibration
from .calibration.guidance import guide
from .checkpoint import Checkpoint, dominant_dtype, read_headers, resolve
from .diagnose import Diagnosis
from .diagnose import diagnose as _diagnose
from .errors import CompressError
from .eval import cache as _cache
from .eval import compare as _compare
from .eval import context as _context
from .eval import depth as _depth
from .eval import drift as _drift
from .eval import tasks as _tasks
from .experts import fused_experts, spelling
from .export import Exported, as_floats, can_export
from .export import write as _export
from .formats import Format
from .heal import heal as _heal
from .healing.options import Heal
from .hf import empty
from .judge import Judge
from .kernels import dispatch, native
from .kernels.activations import LARGEST
from .kernels.dispatch import How, Memory
from .latency import Clock, parse_latency, routed, surroundings, timed
from .linear import CompressedLinear
from .omit import offered, priced
from .preflight import EVAL_TOKENS, SCHEDULE_WINDOWS, Plan
from .report import Page, make_page
from .restorative import restored
from .schedule import scheduled
from .skeleton import KEY
from .stream import Stream
from .structure.nest import narrowed
from .structure.scratch import Scratch, brief
from .verification import ArtifactCheckpoint, Verification
from .version import __version__
from .walk import Done, copy_outer, restore, walk

BATCH_TOKENS = 4096  # tokens of one forward during calibration: fixed, because the order of summation is part of the result
DRIFT_PROMPT, DRIFT_TOKENS = 32, 64  # tokens of a prompt and of its continuation
DEPTH_WINDOWS = 8  # windows for the KL block by block, which takes many passes
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Report:
    """What a run made. `manifest` is compress.json; everything else is about this run on this machine."""

    path: str
    manifest: Manifest
    seconds: float
    resumed_layers: int
    peak_rss: int  # bytes, this process

    @property
    def fallbacks(self) -> list[artifact.Fallback]:
        return self.manifest.fallbacks

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "seconds": self.seconds, "resumed_layers": self.resumed_layers, "peak_rss": self.peak_rss,
                "totals": self.manifest.totals, "fallbacks": [f.model_dump() for f in self.fallbacks]}  # fmt: skip

    def __str__(self) -> str:
        t = self.manifest.totals
        if not self.manifest.layers:
            return (f"{self.path}: {t['source_bytes'] / 1e6:.1f} MB → {t['bytes'] / 1e6:.1f} MB, {t['parameters'] / 1e6:.2f} M parameters"
                    f"{', a plain Hugging Face model' if self.manifest.plain else ''}, {self.seconds:.1f} s, {sum(f.count for f in self.fallbacks)} fallbacks")
        return (f"{self.path}: {t['source_bytes'] / 1e6:.1f} MB → {t['bytes'] / 1e6:.1f} MB, {t['linear_bits']:.2f} bits per compressed weight "
                f"({t['model_bits']:.2f} over the whole model), {self.seconds:.1f} s, {sum(f.count for f in self.fallbacks)} fallbacks")  # fmt: skip


def plan(model: str, recipe: str | dict | _recipe.Recipe = "w4-gptq", *, settings: list[str] | dict | None = None, samples: int = 128,
         seqlen: int = 512, dtype: str = "auto", uniform: bool = False, probe: bool = False, trust_remote_code: bool = False) -> Plan:  # fmt: skip
    """What `run` would make and cost: bytes (exact), RAM and time (estimates), layer by layer, and who could load it. Reads headers only;
    probe=True also solves one real layer with each of the recipe's methods, for a better time."""
    chosen = _evenly(uniform, _recipe.load(recipe).with_options(settings or []))
    source = Checkpoint(model, trust_remote_code=trust_remote_code, headers_only=not probe)
    source.dtype = _computed(dtype, source.stored_dtype, "cpu")
    source = chosen.viewed(_uniform(uniform, chosen.guessed(source)))
    return preflight.make(source, chosen, samples=samples, seqlen=seqlen, batch=max(1, BATCH_TOKENS // seqlen), probe=probe)


def run(model: str, recipe: str | Path | dict | _recipe.Recipe = "w4-gptq", calibration: str | CalibrationSet = "stdlib", output: str | Path = "out", *,
        settings: list[str] | dict | None = None, samples: int = 128, seqlen: int = 512, seed: int = 0, pack: bool = True,
        chat_template: bool = False, device: str = "auto", dtype: str = "auto", strict: bool = False, overwrite: bool = False,
        uniform: bool = False, trust_remote_code: bool = False, show: bool = True) -> Report:  # fmt: skip
    """Compress a checkpoint into an artifact folder.

    model: folder or hub id. recipe: name, YAML path, dict or Recipe; settings: {"gptq.bits": 3} or ["gptq.bits=3"] on top of it.
    calibration: a SPEC (see calibration/data.py) or a CalibrationSet; read only where a method needs statistics. device: auto, cpu, cuda.
    dtype: what the blocks compute in (auto: the checkpoint's own where the device is fast at it, else float32). strict: any fallback raises.
    uniform: what structural steps leave must be a plain Hugging Face model, so layers lose the same share; refused where it cannot be one.
    An interrupted run is continued by the same call; a folder that holds another run is refused unless overwrite=True.
    A recipe with `heal:` makes the artifact in OUTPUT.unhealed and heals it into OUTPUT, on the same text; one with `restore:` makes OUTPUT.first and
    OUTPUT.restored on the way.
    Raises CompressError, one line with a way out, on bad input.
    """
    started = time.perf_counter()
    chosen = _evenly(uniform, _recipe.load(recipe).with_options(settings or []))
    alike: dict[str, Any] = dict(seed=seed, pack=pack, chat_template=chat_template, device=device, dtype=dtype, strict=strict, overwrite=overwrite,
                                 trust_remote_code=trust_remote_code, show=show)  # fmt: skip
    lacking = lambda step, out: run(model, chosen.model_copy(update={step: None}), calibration, out, samples=samples, seqlen=seqlen, uniform=uniform, **alike)
    if chosen.heal:
        return heal(lacking("heal", f"{Path(output)}.unhealed").path, model, calibration, output, options=chosen.heal, **alike)
    device, folder = _device(device), Path(output)
    whole = Checkpoint(model, dtype=_dtype(dtype, model, device), trust_remote_code=trust_remote_code)
    if chosen.restore:
        terms = replace(chosen.restore, train="lora", merge=False, scale_lr=0.0)
        won = heal(lacking("restore", f"{folder}.first").path, model, calibration, f"{folder}.restored", options=terms, **alike)
        whole = restored(whole, ArtifactCheckpoint(Path(won.path), won.manifest, trust_remote_code))
    source = chosen.viewed(_uniform(uniform, chosen.guessed(whole)))
    measure = partial(preflight.make, samples=samples, seqlen=seqlen, timed=False)
    planned = measure(source, chosen)  # refuses bad group sizes before anything is written
    needs = _needs(chosen, planned)
    data = _calibrated(chosen, source, needs, calibration, samples=samples, seqlen=seqlen, seed=seed, pack=pack, chat_template=chat_template)
    fallbacks = [_note("pattern matches nothing", p, "no linear of this model has such a path") for p in preflight.unmatched(chosen, planned.layers)]
    fallbacks += data.fallbacks if data else []
    batch = max(1, BATCH_TOKENS // (data.tokens.shape[1] if data else seqlen))
    if chosen.transforms and data:
        tell = lambda name, found: progress.line(f"transform {name}: " + (found if isinstance(found, str) else f"error {found:.3e}"), show)
        chosen = transforms.choose(source, chosen, data, batch=batch, device=device, tell=tell)
        source = chosen.viewed(source)
    strictly(strict, fallbacks + source.notes)
    identity = {"source": whole.digest(), "recipe": chosen.identity(),
                "calibration": data and data.record | {"sha256": _digest(data)}, "seed": seed,
                "dtype": str(source.dtype)[6:], "device": torch.device(device).type, "batch_tokens": BATCH_TOKENS, "compress": __version__}  # fmt: skip
    writer = Writer(folder, identity, overwrite=overwrite)
    try:
        if writer.complete:
            manifest = read_manifest(folder)
            strictly(strict, [f.model_dump() for f in manifest.fallbacks])
            return Report(str(folder), manifest, time.perf_counter() - started, len(manifest.layers), _peak_rss())
        _room(folder, planned.disk)
        scratch, structure = Scratch(folder, identity) if chosen.structure else None, list[dict[str, Any]]()
        if scratch:
            structure = _structure(chosen, whole, data, scratch, batch, device, show)
            fallbacks += [note for found in structure for note in found.pop("notes", [])]
            strictly(strict, fallbacks)
            source = chosen.viewed(_uniform(uniform, _smaller(chosen, whole, structure, scratch)))
            planned = measure(source, chosen)
        fallbacks += [note for note in source.notes if note not in fallbacks]
        probe = Stream(source, torch.randint(_vocabulary(source), (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(seed)), device=device)
        stream = original = guidance = None
        if data and (needs or chosen.tune or chosen.distill or chosen.blocks):  # else structural steps alone have read the text
            enter = partial(Stream, source, tokens=data.tokens, mask=data.mask, batch=batch, device=device, folder=folder.parent)
            stream = enter()
            original = enter() if "cross" in needs or chosen.tune or chosen.distill else None
            few = partial(enter, tokens=data.tokens[:SCHEDULE_WINDOWS], mask=None if data.mask is None else data.mask[:SCHEDULE_WINDOWS])
            if needs & {"guidance", "gradient"}:
                guidance = guide(enter() if "guidance" in needs else few(), seed)
            if chosen.schedule:
                chosen = scheduled(chosen, source, few(), guidance, lambda *told: fallbacks.append(_note(*told)))
                planned = measure(source, chosen)
        headers: dict[str, dict] = {}
        copy_outer(source, writer, headers)
        resumed = 0
        compressed = [layer for layer in planned.layers if layer.method]
        plain = bool(chosen.structure) and not compressed and not any(getattr(source.config, KEY, None) or ())
        names = spelling(source.model) if plain and fused_experts(source.model) else {}  # of a mixture as its checkpoints have it; else one by one
        with progress.Layers(len(compressed), show) as screen, _log(folder, source.path) as log:
            for done in walk(source, chosen, writer, stream, original, guidance, probe, headers, names):
                resumed += done.resumed
                screen.layer(done)
                log(done)
                if strict:
                    strictly(strict, [f for h in headers.values() for f in h["fallbacks"]])
        if chosen.distill and data and original:
            probe = _distilled(chosen.distill, writer, headers, source, data, original, probe, seed=seed, device=device, show=show)
        headers[PROBE.removesuffix(".safetensors")] = writer.commit(PROBE.removesuffix(".safetensors"), {
            "tokens": probe.tokens, "logits": next(probe.logits())[:, -PROBE_KEPT:].float()}, {}, fallbacks)  # fmt: skip
        strictly(strict, [f for h in headers.values() for f in h["fallbacks"]])
        sizes = artifact.totals(headers, planned.parameters, planned.bytes_before, planned.bytes_after)
        manifest = writer.finish(headers, source.path, source.changes, source.blocks_path, sizes, __version__, plain=plain, structure=structure)
        if scratch:
            scratch.remove()
    finally:
        writer.close()
    return Report(str(folder), manifest, time.perf_counter() - started, resumed, _peak_rss())


def _needs(chosen: _recipe.Recipe, planned: Plan) -> frozenset[str]:
    """The statistics that a recipe asks for on this model."""
    needs = frozenset[str]().union(*(step.build().needs for layer in planned.layers if (step := chosen.step_for(layer.name)) is not None))
    return needs | ({"hessian"} | ({"gradient"} if chosen.schedule.by == "gradient" else set()) if chosen.schedule else set())


def _calibrated(chosen: _recipe.Recipe, source: Checkpoint, needs: frozenset[str], calibration: str | CalibrationSet, *, samples: int, seqlen: int, seed: int,
                pack: bool, chat_template: bool) -> CalibrationSet | None:  # fmt: skip
    """The text that a run reads, None where nothing in the recipe asks for any."""
    if not (needs or chosen.tune or chosen.distill or chosen.blocks or chosen.transforms or any(step.needs_text for step in chosen.structural())):
        return None
    data = _text(calibration, source, samples=samples, seqlen=seqlen, seed=seed, pack=pack, chat_template=chat_template)
    if chosen.generated:
        data = data.with_generated(_text("self", source, samples=chosen.generated, seqlen=data.tokens.shape[1], seed=seed))
    _fits(data, source.config, _vocabulary(source), source.name)
    return data


def _distilled(options: _distill.Distill, writer: Writer, headers: dict[str, dict], source: Checkpoint, data: CalibrationSet, original: Stream, probe: Stream,
               *, seed: int, device: str, show: bool) -> Stream:  # fmt: skip
    """Train the finished blocks as one model against the states that `original` ends with; the probe, sent through what came of it."""
    teacher = original.tail()
    _distill.finish(options, writer, headers, lambda: _whole(source, device, source.dtype), source.blocks_path, data.tokens, data.mask,
                    lambda rows: teacher(original.hidden[rows].to(device)), seed=seed, watch=lambda todo: progress.steps(todo, "distilling", show))
    probe = Stream(source, probe.tokens, device=device)
    for i in range(source.num_blocks):
        block, shard = source.load_block(i, device), f"block-{i:05d}"
        restore(block, source.block_name(i), headers[shard], writer.read(shard))
        probe.advance(block)
    return probe


def _note(what: str, where: str, detail: str) -> dict[str, Any]:
    return {"what": what, "where": where, "count": 1, "detail": detail}


def heal(path: str, teacher: str, data: str | CalibrationSet = "stdlib", output: str | Path = "healed", *,
         options: Heal | list[str] | dict[str, Any] | None = None, cache: str | Path | None = None, seed: int = 0, pack: bool = True,
         chat_template: bool = False, device: str = "auto", dtype: str = "auto", strict: bool = False, overwrite: bool = False,
         trust_remote_code: bool = False, show: bool = True) -> Report:  # fmt: skip
    """Train an artifact, or a checkpoint with blocks or channels removed, towards the model that it was made of (compress/heal.py).

    teacher: the original; data: text to train on, a SPEC as for `run` or a CalibrationSet. options: {"steps": 1000} or ["rank=32"], the fields of Heal.
    cache: where the teacher's answers are kept (default OUTPUT.teacher, removed at the end). An interrupted call is continued by the same call. Never
    gives out a model that is worse on held-out windows: `report.manifest.training["healing"]` is their KL before and after, and a fallback tells where
    healing was undone. Raises CompressError, one line with a way out, on bad input.
    """
    started = time.perf_counter()
    chosen = options if isinstance(options, Heal) else _recipe.healing(options or {})
    device = _device(device)
    # the first process may take hours with the teacher, for which the others wait: NCCL would give up after ten minutes
    processes = PartialState(cpu=torch.device(device).type == "cpu", timeout=timedelta(days=1))
    device = f"cuda:{processes.local_process_index}" if device == "cuda" and processes.num_processes > 1 else device
    source, original = (_opened(m, dtype, device, trust_remote_code) for m in (path, teacher))
    if (a := _vocabulary(source)) != (b := _vocabulary(original)):
        raise CompressError(f"{path} has a vocabulary of {a}, {teacher} of {b}: not a compressed version of it")
    text = _text(data, original, samples=chosen.samples, seqlen=chosen.seqlen, seed=seed, pack=pack, chat_template=chat_template)
    _fits(text, source.config, a, path)
    asked = {"teacher": original.digest(), "data": text.record | {"sha256": _digest(text)}}
    _heal(chosen, source, original, text, Path(output), Path(cache) if cache else None, asked, processes, seed=seed, device=device, strict=strict,
          overwrite=overwrite, show=show)  # fmt: skip
    manifest = read_manifest(Path(output))
    return Report(str(output), manifest, time.perf_counter() - started, 0, _peak_rss())


def auto(model: str, calibration: str | CalibrationSet = "stdlib", output: str | Path = "out", *, size: str | int | None = None,
         bits: float | None = None, latency: str | float | None = None, omit: bool | None = None, consumer: str = "ours",
         menu: str | Path | list[dict] | None = None, samples: int = 128, seqlen: int = 512, seed: int = 0, windows: int = 8, rounds: int = 0,
         tries: int = 16, plan_only: bool = False, device: str = "auto", dtype: str = "auto", strict: bool = False, overwrite: bool = False,
         trust_remote_code: bool = False, show: bool = True) -> Allocation:  # fmt: skip
    """Spend a budget where it counts (allocate.py), then `run` the recipe that comes of it.

    size: bytes of the whole artifact ("4GB"), or bits: mean bits per weight of the linears, scales included, or latency: time of a decoded token on this
    machine, of the original's ("0.5x") or outright ("8ms", compress/latency.py); one of the three. omit: may blocks, sublayers and neurons be left out, too
    (compress/omit.py)? None: where the budget is a latency. consumer: what is to load the result (ours, vllm, gptq, awq, gguf); where it is another program,
    only whole blocks may go. menu: other choices than the consumer's own: a name of allocate.MENUS, a YAML file or a list of steps. windows: of the
    calibration text, on which divergences are measured; rounds and tries: of the search. Beside the output go OUT.plan.json, OUT.recipe.yaml,
    OUT.pareto.png and sensitivities-HASH/, which the next budget for the same model, menu and text finds again.
    Raises CompressError on bad input, and where the menu has nothing that small.
    """
    if sum(given is not None for given in (size, bits, latency)) != 1:
        raise CompressError("give a budget: size (bytes of the whole artifact, e.g. 4GB), bits (a weight, e.g. 3.5) or latency (of the original's, e.g. 0.5x), "
                            "one of the three")  # fmt: skip
    goal = None if latency is None else parse_latency(latency)
    device, folder = _device(device), Path(output)
    source = Checkpoint(model, dtype=_dtype(dtype, model, device), trust_remote_code=trust_remote_code)
    shapes = {name: shape for name, _, shape in preflight.linears(source)}
    parameters = sum(m * n for m, n in shapes.values())
    rest = sum(e.nbytes for e in source.entries.values()) - sum(m * n * source.dtype_of(f"{name}.weight").itemsize for name, (m, n) in shapes.items())
    budget = int(bits * parameters / 8) if bits is not None else allocate.parse_size(size or 0) - rest
    chosen = allocate.menu_for(consumer, menu, None if goal else 8 * budget / parameters)
    leaving = (goal is not None if omit is None else omit) and not chosen.uniform
    if not goal and not leaving and budget < (least := allocate.smallest(source, chosen, shapes)):
        raise CompressError(f"{model}: the menu's smallest choices take {8 * least / parameters:.2f} bits a weight, {(least + rest) / 1e6:.1f} MB with what is "
                            f"not compressed; the budget is {8 * budget / parameters:.2f} bits, {(budget + rest) / 1e6:.1f} MB")  # fmt: skip
    data = _text(calibration, source, samples=samples, seqlen=seqlen, seed=seed)
    _fits(data, source.config, _vocabulary(source), model)
    identity = {"source": source.digest(), "menu": [chosen.steps, chosen.fused, chosen.uniform], "calibration": _digest(data), "dtype": str(source.dtype)[6:],
                "device": torch.device(device).type, "batch_tokens": BATCH_TOKENS, "compress": __version__}  # fmt: skip
    cache = folder.absolute().parent / f"sensitivities-{fingerprint(identity)[:16]}"
    with artifact.writing(folder.absolute().parent):
        cache.mkdir(parents=True, exist_ok=True)
    batch, watch = max(1, BATCH_TOKENS // data.tokens.shape[1]), lambda todo, what: progress.steps(todo, what, show)
    enter = lambda: Stream(source, data.tokens, data.mask, batch=batch, device=device, folder=cache)
    groups = allocate.survey(source, chosen, enter(), cache, watch)
    count, around, fixed, token = allocate.bytes_of(source), [dict[str, int]()] * source.num_blocks, 0, 0
    if goal:
        clock = Clock(cache / "nanoseconds.json", source.stored_dtype, device)
        count, (around, fixed) = timed(clock, count, routed(source)), surroundings(model, source.stored_dtype, clock, trust_remote_code)
        fixed += 0 if leaving else sum(sum(block.values()) for block in around)
        token = fixed + sum(sum(block.values()) for block in around if leaving) + sum(count(None, path, shape)[0] for path, shape in shapes.items())
        budget = int(goal[0] * (token if goal[1] else 1e6))
        priced(groups, count, shapes)
    tree, plain = None, consumer != "ours"
    if leaving:
        tree = offered(source, groups, shapes, None if plain else enter(), cache, count, around, plain=plain, watch=watch)
    exact = Checkpoint(model, dtype=torch.float32, trust_remote_code=trust_remote_code)
    few = data.tokens[:windows], None if data.mask is None else data.mask[:windows]
    judge = Judge(exact, *few, batch=batch, device=device, folder=cache)
    found = allocate.allocate(source, chosen, groups, judge, budget, cache / f"kl-{windows}.json", consumer=consumer, rounds=rounds, tries=tries, omit=tree,
                              fixed=fixed, token=token, watch=watch)  # fmt: skip
    if chosen.export and (refused := preflight.make(found.recipe.guessed(source), found.recipe).consumers[chosen.export]):
        raise CompressError(f"{model}: {chosen.export}, which {consumer} reads, cannot hold it: {refused}")
    if not plan_only:
        found.report = run(model, found.recipe, data, output, samples=samples, seqlen=seqlen, seed=seed, device=device, dtype=dtype, strict=strict,
                           overwrite=overwrite, trust_remote_code=trust_remote_code, show=show)  # fmt: skip
        made = Stream(ArtifactCheckpoint(folder, found.report.manifest, trust_remote_code, dtype=torch.float32), *few, batch=batch, device=device, folder=cache)
        for i in range(made.source.num_blocks):
            made.advance(made.source.load_block(i, device))
        found.artifact_kl = judge.beside(made)
        if goal:
            from .eval import speed as _speed  # as in `evaluate`

            both = ("original", source.path), ("artifact", folder)
            found.speed = {name: _speed.measure(str(path), device=device)["decode_tokens_per_second"] for name, path in both}
    beside = lambda suffix: log_path(folder).with_name(f"{folder.resolve().name}.{suffix}")
    with artifact.writing(cache.parent):
        beside("recipe.yaml").write_text(yaml.safe_dump(found.recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False, width=150))
        allocate.draw(found, beside("pareto.png"))
    write_json(beside("plan.json"), found.to_json())
    return found


def diagnose(model: str, calibration: str | CalibrationSet = "stdlib", *, samples: int = 32, seqlen: int = 512, seed: int = 0, windows: int = 4,
             device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False, show: bool = True) -> Diagnosis:  # fmt: skip
    """Which layers are sensitive, which have outliers, and what to try (diagnose.py). windows: of the text, on which divergences are measured.

    Nothing is written. Raises CompressError on bad input.
    """
    device = _device(device)
    source = Checkpoint(model, dtype=_dtype(dtype, model, device), trust_remote_code=trust_remote_code)
    data = _text(calibration, source, samples=samples, seqlen=seqlen, seed=seed)
    _fits(data, source.config, _vocabulary(source), model)
    with tempfile.TemporaryDirectory() as folder:
        return _diagnose(source, data.tokens, data.mask, windows=windows, batch=max(1, BATCH_TOKENS // data.tokens.shape[1]), device=device,
                         folder=Path(folder), watch=lambda todo, what: progress.steps(todo, what, show))  # fmt: skip


def load(path: str, *, dtype: torch.dtype | str | None = None, device: str = "cpu", policy: Literal["auto", "dense"] = "auto",
         memory: Memory = "auto", activations: str | None = None, fuse: bool = False, compile: bool = False,
         rows: Sequence[int] = (1,), width: float | None = None, trust_remote_code: bool = False) -> nn.Module:  # fmt: skip
    """A Hugging Face model from an artifact (or a plain checkpoint), ready for generate().

    policy "auto" multiplies by the fastest kernel measured on this machine, "dense" by the dequantized weight in a fixed order.
    memory "keep" lets a layer keep dense and repacked copies wherever they are fastest, "bounded" no dense one; with "auto" dense copies stay only where no
    kernel multiplies by the codes, but is "keep" on a CPU without native code (kernels/native.py) whose free memory would hold the dense weights twice.
    activations int8, int4 or fp8: what compressed weights multiply is rounded to it, one scale a token (kernels/activations.py).
    fuse: q, k and v, and gate and up (then SiLU(gate) · up), are multiplied as one where their formats are of one kind (architectures of compress/arch.py).
    compile: generate() compiles its decoding step (torch.compile, fullgraph, static cache); `rows` are the batch sizes that will meet it.
    width: the first share of the neurons of every MLP, of a model that a step `nest` has put in order (structure/nest.py: `narrowed` makes several widths
    of one model share its memory).
    """
    if activations not in (None, *LARGEST):
        raise CompressError(f"activations {activations!r}: use {', '.join(LARGEST)}")
    folder = resolve(path)
    if any((folder / name).is_file() for name in (MANIFEST, PARTIAL)):
        read_manifest(folder)
    else:
        read_headers(folder)  # refuses pickles
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True,
                                                           trust_remote_code=trust_remote_code)  # fmt: skip
    except (OSError, ValueError, SafetensorError) as error:
        raise CompressError(f"{path}: transformers cannot load it: {str(error).splitlines()[0]}") from error
    if bad := sorted(info["missing_keys"]) + sorted(str(k[0]) for k in info["mismatched_keys"]):
        raise CompressError(f"{path}: {len(bad)} tensors are missing or of another shape, {bad[0]} first; `compress verify` tells more")
    model = model.to(_device(device)).eval()
    if width is not None:
        _in_order(folder, width)
        model = narrowed(model, width)
    layers = [module for module in model.modules() if isinstance(module, CompressedLinear)]
    dense = sum(m.in_features * m.out_features for m in layers) * model.dtype.itemsize
    if memory == "auto" and model.device.type == "cpu" and psutil.virtual_memory().available > 2 * dense and isinstance(native.library(), str):
        memory = "keep"
    for module in layers:
        module.how = How(policy, memory, activations)  # type: ignore[arg-type]
    if fuse:
        linear.fuse(model)
    if compile:
        linear.ready(model, rows, model.dtype)
        model.generation_config.cache_implementation = "static"
        model.generation_config.compile_config = compiled = CompileConfig(fullgraph=True, mode="default" if model.device.type == "cpu" else "reduce-overhead")
        compiled._compile_all_devices = True  # else generate() compiles for CUDA alone
    return model


def tune_kernels(path: str, rows: Sequence[int] = (1, 4, 16, 64, 256), *, dtype: str = "auto", device: str = "auto", memory: Memory = "auto",
                 activations: str | None = None, trust_remote_code: bool = False, show: bool = True) -> list[dict[str, Any]]:  # fmt: skip
    """Measure now what generate() would measure when it meets it, and every tiling of kernels that have several; tune.json remembers (kernels/tune.py).

    A record for every kind of layer, shape and number of rows: {"format", "shape", "layers", "rows", "route", "us": {route: microseconds}, "refused":
    {kernel: why not}}; `us` is empty where there was nothing to choose. Raises CompressError on bad input.
    """
    device = _device(device)
    model = load(path, dtype=None if dtype == "auto" else _named(dtype), device=device, memory=memory, activations=activations,
                 trust_remote_code=trust_remote_code)  # fmt: skip
    kinds: dict[tuple, list[CompressedLinear]] = {}
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            kinds.setdefault((module.format.describe(), module.format.shape), []).append(module)
    if not kinds:
        raise CompressError(f"{path}: no compressed layers, so there is no kernel to choose")
    found = []
    for (described, shape), layers in progress.steps(list(kinds.items()), "layer shapes", show):
        for m in rows:
            chosen = dispatch.tuned(layers[0].format, torch.zeros(m, shape[1], dtype=model.dtype, device=device), layers[0].how)
            found.append({"format": described, "shape": list(shape), "layers": len(layers), "rows": m} | chosen)
    return found


def evaluate(path: str, reference: str | None = None, data: str | CalibrationSet = "stdlib", *, samples: int | None = None, seqlen: int | None = 512,
             seed: int = 0, device: str = "auto", dtype: str = "float32", speed: bool = False, tasks: Sequence[str] = (),
             limit: int | None = None, drift: int = 0, lengths: Sequence[int] = (), activations: str | None = None, stream: bool = False,
             fresh: bool = False, show: bool = True, trust_remote_code: bool = False) -> dict[str, Any]:  # fmt: skip
    """Perplexity (token and word), KL(reference ‖ compressed), top-1 agreement, each with a standard error; size; speed where asked.

    Both models see the same windows in the same pass, in `dtype` arithmetic with dequantized weights. samples=None: all of the text.
    tasks: lm-eval's names or .yaml files, the first `limit` questions of each. drift: continue that many prompts greedily with both models and count tokens
    until they part (eval/drift.py). lengths: perplexity and KL by the length of the context (eval/context.py).
    activations: int8, int4 or fp8, as `load` rounds what compressed weights multiply.
    stream: both models block by block, one block of each in memory instead of the whole; not for the options above, which run the model.
    The keys are those of eval/compare.py plus bits_per_weight, bytes, setup and, where asked, speed, tasks, drift, context (reference.speed, .tasks).
    Figures of an artifact are kept by content in OUT.eval.json beside it (eval/cache.py); fresh=True measures again. Speed is always measured.
    """
    device = _device(device)
    torch_dtype = None if dtype == "auto" else _named(dtype)
    folder = resolve(path)
    source = resolve(reference) if reference else None
    if drift and not source:
        raise CompressError("drift compares two models: give --reference")
    if stream and (speed or tasks or drift or lengths or activations):
        raise CompressError("block by block there is no model to run: --stream goes with --no-speed and without tasks, drift (--prompts 0), lengths and "
                            "activations")  # fmt: skip

    @cache
    def model(which: Path) -> nn.Module:
        return load(str(which), dtype=torch_dtype, device=device, policy="dense", activations=activations, trust_remote_code=trust_remote_code)

    def windows(samples: int | None, seqlen: int) -> CalibrationSet:
        if isinstance(data, CalibrationSet):
            return data
        return load_calibration(data, _tokenizer(source or folder), samples=samples, seqlen=seqlen, seed=seed, split="evaluation",
                                model=load(str(source or folder), device=device) if data == "self" else None)  # fmt: skip

    def both() -> list[nn.Module]:
        models = [model(p) for p in (folder, source) if p is not None]
        if (a := models[0].get_input_embeddings().num_embeddings) != (b := models[-1].get_input_embeddings().num_embeddings):
            raise CompressError(f"{path} has a vocabulary of {a}, {reference} of {b}: not a compressed version of it")
        _fits(text, models[0].config, a, path)
        return models

    def streamed(which: Path) -> Iterator[Tensor]:
        if (which / MANIFEST).is_file():
            blocks: Checkpoint = verification.ArtifactCheckpoint(which, read_manifest(which), trust_remote_code, dtype=torch_dtype)
        else:
            blocks = Checkpoint(str(which), dtype=torch_dtype, trust_remote_code=trust_remote_code)
        _fits(text, blocks.config, _vocabulary(blocks), str(which))
        through = Stream(blocks, text.tokens, text.mask, batch=max(1, EVAL_TOKENS // text.tokens.shape[1]), device=device)
        for i in progress.steps(range(blocks.num_blocks), f"{which.name}, block", show):
            through.advance(blocks.load_block(i, device))
        yield from through.logits()

    def figures() -> dict:
        if stream:
            return _compare.compare(streamed(folder), streamed(source) if source else None, text)
        vocabulary = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).get_text_config().vocab_size
        n, itemsize = [_parameters(p) if p else 0 for p in (folder, source)], (torch_dtype or torch.float32).itemsize
        ram = preflight.held(n[0], n[1], weight_bytes(folder), vocabulary, itemsize)
        if ram > 0.8 * (have := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
            tell(f"{'both models take' if source else 'the model takes'} about {ram / 1e9:.1f} of {have / 1e9:.1f} GB; with --stream, a block at a time")
        models, batch = both(), max(1, EVAL_TOKENS // text.tokens.shape[1])
        streams = [progress.batches(_compare.logits_of(m, text, batch), len(text.tokens), show and m is models[0]) for m in models]
        return _compare.compare(streams[0], streams[1] if source else None, text)

    def continued() -> dict:
        real = text.tokens if text.mask is None else text.tokens[text.mask[:, : DRIFT_PROMPT + 1].all(1)]
        prompts = real[:drift, :DRIFT_PROMPT]
        written = [_drift.greedy(m, prompts.to(device), DRIFT_TOKENS).cpu() for m in both()]
        tokenizer = _tokenizer(source or folder)
        texts = [[tokenizer.decode(row) for row in rows.tolist()] if tokenizer else [""] * len(rows) for rows in (prompts, written[1], written[0])]
        return _drift.drift(*written) | {"examples": [dict(zip(("prompt", "original", "compressed"), row, strict=True)) for row in zip(*texts, strict=True)]}

    def by_length() -> list[dict]:
        long = windows(samples and max(2, samples * (seqlen or 512) // max(lengths)), max(lengths))
        models = both()
        _fits(long, models[0].config, models[0].get_input_embeddings().num_embeddings, path)
        return _context.by_length(models[0], models[1] if source else None, long.tokens.flatten(), lengths, tokens=EVAL_TOKENS)

    text = windows(samples, seqlen or 512)
    key = {"artifact": _cache.stamp(folder), "reference": source and _cache.stamp(source), "data": _digest(text), "words": text.words, "dtype": dtype,
           "device": torch.device(device).type, "torch": torch.__version__, "compress": __version__}  # fmt: skip
    key |= {"activations": activations} if activations else {}

    tell = partial(progress.line, show=show)

    def kept(what: str, make: Callable[[], Any], **more) -> Any:
        if not Path(path).is_dir():  # a download cache is no place for results
            return make()
        return _cache.cached(folder, key | {"what": what} | more, lambda: {"value": make()}, fresh=fresh, tell=tell)["value"]

    result: dict[str, Any] = dict(kept("figures", figures))
    result |= {"bits_per_weight": dict(zip(("linear", "model"), _bits(folder), strict=True)), "bytes": weight_bytes(folder),
               "fallbacks": text.fallbacks, "data": text.record,
               "setup": {"dtype": dtype, "activations": activations, "device": device, "torch": torch.__version__, "compress": __version__,
                         "machine": platform.machine()}}  # fmt: skip
    if source:
        result["reference"] |= {"bits_per_weight": dict(zip(("linear", "model"), _bits(source), strict=True)), "bytes": weight_bytes(source)}
    if lengths:
        result["context"] = kept("context", by_length, lengths=sorted(lengths), tokens=samples and samples * (seqlen or 512))
    if drift:
        result["drift"] = kept("drift", continued, prompts=drift, prompt=DRIFT_PROMPT, new=DRIFT_TOKENS)
    if tasks:
        named = [*tasks, limit, *(_cache.file_sha256(Path(t)) for t in tasks if Path(t).is_file())]
        found = kept("tasks", lambda: [_tasks.run(m, _tokenizer(source or folder), tasks, limit=limit) for m in both()], tasks=named)
        result["tasks"] = found[0]
        if source:
            result["reference"]["tasks"] = found[1]
    model.cache_clear()
    if speed:
        from .eval import speed as _speed  # imported when run, so that `python -m compress.eval.speed` is not imported twice

        result["speed"] = _speed.measure(str(folder), device=device, activations=activations)  # in the model's own dtype, as it would be served
        if source:
            result["reference"]["speed"] = _speed.measure(str(source), device=device)
    return result


def compare(paths: Sequence[str], reference: str, data: str | CalibrationSet = "stdlib", *, samples: int | None = None, seqlen: int | None = 512,
            seed: int = 0, device: str = "auto", dtype: str = "float32", picture: str | Path | None = None, stream: bool = False, fresh: bool = False,
            show: bool = True, trust_remote_code: bool = False) -> dict[str, Any]:  # fmt: skip
    """Several artifacts of one original on the same windows, best KL first.

    {"reference": path, "rows": [{"name", "path", "recipe"} and what `evaluate` gives]}

    picture: a .svg or .png of size against KL. Figures that are in an artifact's OUT.eval.json are not measured again.
    """
    if picture and Path(picture).suffix not in (".svg", ".png"):
        raise CompressError(f"{picture}: a picture is .svg or .png")
    if picture:
        artifact.room_for(Path(picture))
    rows: list[dict[str, Any]] = []
    for path in paths:
        found = evaluate(path, reference, data, samples=samples, seqlen=seqlen, seed=seed, device=device, dtype=dtype, stream=stream, fresh=fresh,
                         show=show, trust_remote_code=trust_remote_code)  # fmt: skip
        folder = resolve(path, weights=False)
        recipe = read_manifest(folder).run["recipe"]["name"] if (folder / MANIFEST).is_file() else None
        rows.append({"name": folder.resolve().name, "path": path, "recipe": recipe} | found)
    rows.sort(key=lambda r: r["kl"]["mean"])
    if picture:
        plots.save(plots.sizes(rows), Path(picture))
    return {"reference": reference, "rows": rows}


def report(path: str, reference: str | None = None, data: str | CalibrationSet = "stdlib", output: str | Path | None = None, *, samples: int | None = 32,
           seqlen: int | None = 512, seed: int = 0, device: str = "auto", dtype: str = "float32", prompts: int = 6, speed: bool = True,
           tasks: Sequence[str] = (), limit: int | None = None, lengths: Sequence[int] = (), stream: bool = False, fresh: bool = False, show: bool = True,
           trust_remote_code: bool = False) -> Page:  # fmt: skip
    """Everything there is to know about an artifact on one page: sizes, quality, where the damage is, outliers, calibration, fallbacks, texts, speed.

    Returns a Page, which shows itself in a notebook; `output` writes it as one self-contained .html and the same figures as .json beside it.
    prompts: texts that both models continue; tasks, limit, lengths, stream as for `evaluate`.
    reference: the original; None takes the one that OUT.log.jsonl names, if it is there and its SHA-256 are those of the manifest.
    """
    folder = resolve(path)
    manifest = read_manifest(folder)
    history = log_entries(folder)
    started: dict = next((e for e in reversed(history) if e.get("event") == "start"), {})
    if reference is None:
        named = started.get("model")
        if not (named and Path(named).is_dir() and Checkpoint(named, trust_remote_code=trust_remote_code).digest() == manifest.run["source"]):
            raise CompressError(f"{path}: the model that it was made from is not where it was; give --reference MODEL")
        reference = str(named)
    if output is not None and Path(output).suffix != ".html":
        raise CompressError(f"{output}: a report is a .html file; the .json is written beside it")
    if output is not None:
        artifact.room_for(Path(output))
    text = data if isinstance(data, CalibrationSet) else load_calibration(
        data, _tokenizer(resolve(reference)), samples=samples, seqlen=seqlen or 512, seed=seed, split="evaluation",
        model=load(reference, device=_device(device)) if data == "self" else None)  # fmt: skip
    found = evaluate(path, reference, text, seqlen=seqlen, device=device, dtype=dtype, speed=speed, drift=prompts, tasks=tasks, limit=limit,
                     lengths=lengths, stream=stream, fresh=fresh, show=show,
                     trust_remote_code=trust_remote_code)  # fmt: skip
    few = replace(text, tokens=text.tokens[:DEPTH_WINDOWS], mask=None if text.mask is None else text.mask[:DEPTH_WINDOWS])
    key = {"what": "depth", "artifact": _cache.stamp(folder), "reference": _cache.stamp(resolve(reference)), "data": _digest(few), "dtype": dtype,
           "device": _device(device), "torch": torch.__version__, "compress": __version__}  # fmt: skip

    def depth() -> dict:
        original = Checkpoint(reference, dtype=None if dtype == "auto" else _named(dtype), trust_remote_code=trust_remote_code)
        squeezed = verification.ArtifactCheckpoint(folder, manifest, trust_remote_code, dtype=original.dtype)
        viewed = _recipe.viewed_as(manifest.run["recipe"], original)
        if viewed.num_blocks != squeezed.num_blocks:
            return {}
        return _depth.measure(original, viewed, squeezed, few, batch=max(1, EVAL_TOKENS // few.tokens.shape[1]), device=_device(device),
                              watch=lambda todo: progress.steps(todo, "block by block", show))  # fmt: skip

    found_depth = _cache.cached(folder, key, depth, fresh=fresh, tell=partial(progress.line, show=show))
    page = make_page(folder, manifest, reference, history, found, found_depth, _tokenizer(resolve(reference)))
    if output is not None:
        page.save(Path(output))
    return page


def inspect(path: str) -> Manifest:
    """The manifest of an artifact: layers with format, bits, bytes and error; fallbacks; provenance."""
    return read_manifest(resolve(path, weights=False))


def loads_in(path: str) -> dict[str, list[str]]:
    """Consumer → why it cannot hold an artifact, empty where it can (`compress export --to` it). From the manifest alone."""
    return can_export(*_described(path))


def held_as_floats(path: str) -> dict[str, str]:
    """Consumer that can hold an artifact → which of its layers it would hold multiplied out, in words, "" for none. From the manifest alone."""
    return as_floats(*_described(path))


def _described(path: str) -> tuple[dict[str, Format], PreTrainedConfig]:
    folder = resolve(path, weights=False)
    manifest = read_manifest(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, KeyError) as error:
        raise CompressError(f"{path}: transformers cannot read its config.json ({str(error).splitlines()[0]})") from error
    return {name: empty(name, manifest) for name in manifest.layers}, config


def verify(path: str, *, trust_remote_code: bool = False) -> Verification:
    """Check an artifact in this process; `compress verify` is the same in a fresh one."""
    return verification.verify(resolve(path), trust_remote_code=trust_remote_code)


def import_checkpoint(model: str, output: str | Path, *, dtype: str = "auto", overwrite: bool = False, trust_remote_code: bool = False) -> Report:
    """An artifact from a checkpoint that GPTQ, AWQ or compressed-tensors quantized: the same codes and scales, nothing rounded again.

    It can be evaluated, verified, run and exported like one of `run`; its layers' errors are 0, for the original weights are not there to compare.
    """
    started = time.perf_counter()
    source = importing.Packed(model, dtype=_dtype(dtype, model, "cpu"), trust_remote_code=trust_remote_code)
    identity = {"source": source.digest(), "recipe": {"name": f"import-{source.method}", "steps": []}, "calibration": None, "seed": 0,
                "dtype": str(source.dtype)[6:], "device": "cpu", "batch_tokens": BATCH_TOKENS, "compress": __version__}  # fmt: skip
    writer = Writer(Path(output), identity, overwrite=overwrite)
    try:
        tokens = torch.randint(_vocabulary(source), (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
        manifest = read_manifest(Path(output)) if writer.complete else importing.write(source, writer, Stream(source, tokens), PROBE_KEPT)
    finally:
        writer.close()
    return Report(str(output), manifest, time.perf_counter() - started, 0, _peak_rss())


def extract(model: str, output: str | Path, *, width: float, dtype: str = "auto", overwrite: bool = False, trust_remote_code: bool = False) -> Report:
    """A submodel of a model whose neurons were put in order by a structural step `nest`: the first `width` of every MLP, as a plain Hugging Face folder.

    Raises CompressError where the neurons are in no order: the first of them would be any.
    """
    _in_order(resolve(model), width)
    recipe = {"name": f"extract-{width:g}", "structure": [{"width": {"mlp": 1 - width, "by": "order", "across": "layer"}}]}
    return run(model, recipe, output=output, dtype=dtype, overwrite=overwrite, trust_remote_code=trust_remote_code, show=False)


def export(path: str, to: str, output: str | Path, *, base_model: str | None = None, evaluation: str | Path | dict | None = None,
           push_to_hub: str | None = None, trust_remote_code: bool = False) -> Exported:  # fmt: skip
    """Write an artifact in the layout of another program (compress/export/), exact codes and scales, with a model card.

    base_model: the original's hub id, for the card. evaluation: what `compress eval --json` wrote, for its table. push_to_hub: a repository to upload to.
    Raises CompressError naming every layer that the format cannot express, and what could be, before anything is written.
    """
    try:
        table = json.loads(Path(evaluation).read_text()) if isinstance(evaluation, str | Path) else evaluation
        if table is not None:
            table["perplexity"]["token"], table["windows"], table["tokens"], table["data"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CompressError(f"{evaluation}: not what `compress eval --json` writes ({error})") from error
    return _export(resolve(path), to, Path(output), base_model=base_model, evaluation=table, push_to_hub=push_to_hub,
                   trust_remote_code=trust_remote_code)  # fmt: skip


# ---- small print


def _in_order(folder: Path, width: float) -> None:
    """Refuses a share that is none, and a model that no step `nest` has put in order. What was cut out of one that is still is in order."""
    if not 0 < width < 1:
        raise CompressError(f"width {width}: the share of the MLP neurons that stays, between 0 and 1")
    steps = read_manifest(folder).run["recipe"].get("structure", []) if (folder / MANIFEST).is_file() else []
    if not any(step["structure"] == "nest" or step.get("by") == "order" for step in steps):
        raise CompressError(f"{folder}: its neurons are in no order of importance; `compress run {folder} -r nested` makes a model whose are")


def _device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise CompressError(f"device {device!r}: use auto, cpu, cuda or cuda:N") from error
    if kind not in ("cpu", "cuda"):
        raise CompressError(f"device {device!r}: use auto, cpu, cuda or cuda:N")
    if kind == "cuda" and (torch.device(device).index or 0) >= (count := torch.cuda.device_count() if torch.cuda.is_available() else 0):
        raise CompressError(f"device {device!r}: {f'only {count} CUDA devices are' if count else 'no CUDA device is'} visible to torch {torch.__version__}; "
                            "use --device cpu")  # fmt: skip
    return device


def _structure(recipe: _recipe.Recipe, source: Checkpoint, data: CalibrationSet | None, scratch: Scratch, batch: int, device: str,
               show: bool) -> list[dict[str, Any]]:  # fmt: skip
    """The plan of every structural step, each measured on what the steps before it left."""

    def enter(model: Checkpoint, windows: int) -> Stream:
        assert data is not None
        rows = slice(windows or None)
        return Stream(model, data.tokens[rows], None if data.mask is None else data.mask[rows], batch=batch, device=device, folder=scratch.folder)

    plans: list[dict[str, Any]] = []
    for k, step in enumerate(recipe.structural()):
        smaller = _smaller(recipe, source, plans, scratch)
        plans.append(scratch.plan(f"plan-{k}", partial(step.measure, smaller, enter, scratch.of(k))))
        if show:
            progress.console.print(f"structure {k + 1}: {brief(type(step).__name__.lower(), plans[-1])}", highlight=False, markup=False, soft_wrap=True)
    return plans


def _smaller(recipe: _recipe.Recipe, source: Checkpoint, plans: list[dict[str, Any]], scratch: Scratch) -> Checkpoint:
    for k, (step, found) in enumerate(zip(recipe.structural(), plans, strict=False)):
        source = step.apply(source, found, scratch.of(k))
    return source


def _evenly(uniform: bool, recipe: _recipe.Recipe) -> _recipe.Recipe:
    """`uniform`: the width steps of a recipe take the same share of every layer, a programme leaves out blocks and no part of one."""
    has = lambda step: any(e == step or step in e for e in recipe.structure)
    wanted: dict[str, Any] = {"width.across": "layer"} if has("width") else {}
    wanted |= {"program.sublayers": False} if has("program") else {}
    return recipe.with_options(wanted) if uniform and wanted else recipe


def _uniform(uniform: bool, source: Checkpoint) -> Checkpoint:
    if uniform and any(fields := getattr(source.config, KEY, None) or ()):
        i = next(i for i, f in enumerate(fields) if f)
        raise CompressError(f"{source.name}: --uniform: a plain configuration of {source.config.model_type} cannot say {fields[i]} of block {i}; leave out "
                            "--uniform, or the step that does it")  # fmt: skip
    return source


def _named(dtype: str) -> torch.dtype:
    if dtype not in DTYPES:
        raise CompressError(f"unknown dtype {dtype!r}{_recipe.nearest(dtype, DTYPES)}")
    return DTYPES[dtype]


def _dtype(dtype: str, model: str, device: str) -> torch.dtype:
    return _named(dtype) if dtype != "auto" else _computed(dtype, dominant_dtype(read_headers(resolve(model))), device)


def _computed(dtype: str, stored: torch.dtype, device: str) -> torch.dtype:
    """auto: the checkpoint's own precision where the device computes in it at speed, else float32."""
    if dtype != "auto":
        return _named(dtype)
    if torch.device(device).type != "cpu":
        return stored
    fast_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return stored if stored == torch.bfloat16 and fast_bf16 else torch.float32


def _opened(model: str, dtype: str, device: str, trust_remote_code: bool) -> Checkpoint:
    """An artifact or a checkpoint."""
    folder, computed = resolve(model), _dtype(dtype, model, device)
    if not any((folder / name).is_file() for name in (MANIFEST, PARTIAL)):
        return Checkpoint(model, dtype=computed, trust_remote_code=trust_remote_code)
    source = verification.ArtifactCheckpoint(folder, read_manifest(folder), trust_remote_code)
    source.dtype = computed or source.stored_dtype
    return source


def _text(spec: str | CalibrationSet, source: Checkpoint, **options) -> CalibrationSet:
    """The calibration text that a SPEC names, in the tokens of `source`, which also writes it where the SPEC is "self"."""
    if isinstance(spec, CalibrationSet):
        return spec
    return load_calibration(spec, source.tokenizer(), model=_whole(source) if spec == "self" else None, **options)


def _whole(source: Checkpoint, device: str = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
    return load(str(source.path), dtype=dtype, device=device, trust_remote_code=source.trust_remote_code)


def _vocabulary(source: Checkpoint) -> int:
    return source.model.get_input_embeddings().num_embeddings


def _fits(data: CalibrationSet, config, vocabulary: int, model: str) -> None:
    """Windows no longer than the model has positions for, tokens that it has embeddings for."""
    seqlen, limit = data.tokens.shape[1], getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit and seqlen > limit:
        raise CompressError(f"{model}: windows of {seqlen} tokens, but the model has {limit} positions; use --seqlen {limit} or less")
    if (top := int(data.tokens.max())) >= vocabulary:
        raise CompressError(f"{model}: the text holds token {top}, but the model has {vocabulary} embeddings: its tokenizer is another model's")


def _digest(data: CalibrationSet) -> str:
    """SHA-256 of the tokens and the mask themselves, whatever a set made by hand says of itself."""
    return hashlib.sha256("".join(artifact.sha256(t) for t in (data.tokens, data.mask) if t is not None).encode()).hexdigest()


def _tokenizer(folder: Path):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError):
        return None


def _room(folder: Path, need: int) -> None:
    have = shutil.disk_usage(folder).free + sum(f.stat().st_size for f in folder.iterdir() if f.is_file())
    if have < need:
        raise CompressError(f"{folder}: the artifact takes {need / 1e9:.2f} GB, {have / 1e9:.2f} GB are free; make room or choose another -o")


def weight_bytes(folder: Path) -> int:
    """Bytes of all weight tensors of a model folder."""
    if (folder / MANIFEST).is_file():
        return int(read_manifest(folder).totals["bytes"])
    return sum(e.nbytes for e in read_headers(folder).values())


def _parameters(folder: Path) -> int:
    if (folder / MANIFEST).is_file():
        return int(read_manifest(folder).totals["parameters"])
    return sum(torch.Size(e.shape).numel() for e in read_headers(folder).values())


def _bits(folder: Path) -> tuple[float, float]:
    """Bits per weight of the linears and of the whole model."""
    if (folder / MANIFEST).is_file():
        totals = read_manifest(folder).totals
        return totals["linear_bits"], totals["model_bits"]
    entries = read_headers(folder).values()
    bits = 8 * sum(e.nbytes for e in entries) / _parameters(folder)
    return bits, bits


def _peak_rss() -> int:
    """Bytes. Linux's VmHWM, for ru_maxrss also knows what the process that started this one had."""
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.M)):
        return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _log:
    """Seconds a layer, appended to OUT.log.jsonl beside the artifact: the artifact itself holds nothing that differs between two runs."""

    def __init__(self, folder: Path, model: Path):
        self.path, self.model = log_path(folder), str(model.resolve())

    def __enter__(self):
        with artifact.writing(self.path.parent):
            self.file = open(self.path, "a", encoding="utf-8")
        self._write({"event": "start", "time": time.time(), "command": sys.argv, "model": self.model, "machine": platform.platform(), "cpus": os.cpu_count(),
                     "torch": torch.__version__, "compress": __version__})  # fmt: skip
        return self

    def _write(self, entry: dict) -> None:
        with artifact.writing(self.path.parent):
            self.file.write(json.dumps(entry) + "\n")
            self.file.flush()

    def __call__(self, done: Done) -> None:
        if not done.resumed:
            self._write({"event": "layer", "name": done.name, "seconds": round(done.seconds, 4), "error": done.record.error})

    def __exit__(self, kind, *_):
        with suppress(CompressError, OSError):  # whatever ended the run says more than a log that could not be written
            self._write({"event": "end", "time": time.time(), "peak_rss": _peak_rss(), "error": kind.__name__ if kind else None})
            self.file.close()


def log_path(folder: Path) -> Path:
    folder = folder.resolve()  # the name of `.`
    return folder.parent / f"{folder.name}.log.jsonl"


def log_entries(folder: Path) -> list[dict]:
    """What OUT.log.jsonl beside an artifact says, in order; empty where it was not kept. Lines torn by a kill are left out."""
    entries = []
    for line in log_path(folder).read_text().splitlines() if log_path(folder).is_file() else ():
        with suppress(ValueError):
            if isinstance(entry := json.loads(line), dict):
                entries.append(entry)
    return entries


def seconds_by_layer(folder: Path) -> dict[str, float]:
    """Seconds that each layer took, from the log beside an artifact; empty where the log was not kept."""
    return {str(e["name"]): float(e["seconds"]) for e in log_entries(folder) if e.get("event") == "layer" and "name" in e and "seconds" in e}
