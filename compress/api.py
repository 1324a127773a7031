"""The verbs, for notebooks and scripts: plan, run, evaluate, inspect, verify, load, export. The command line calls these and prints what they return."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from . import artifact, importing, plots, preflight, progress, transforms, verification
from . import distill as _distill
from . import recipe as _recipe
from .artifact import MANIFEST, PARTIAL, PROBE, Manifest, Writer, read_manifest
from .calibration.data import CalibrationSet, load_calibration
from .calibration.guidance import guide
from .checkpoint import Checkpoint, dominant_dtype, read_headers, resolve
from .errors import CompressError
from .eval import cache as _cache
from .eval import compare as _compare
from .eval import context as _context
from .eval import depth as _depth
from .eval import drift as _drift
from .eval import tasks as _tasks
from .export import Exported
from .export import write as _export
from .linear import CompressedLinear
from .preflight import SCHEDULE_WINDOWS, Plan
from .report import Page, make_page
from .schedule import scheduled
from .stream import Stream
from .verification import Verification
from .version import __version__
from .walk import Done, copy_outer, restore, walk

BATCH_TOKENS = 4096  # tokens of one forward during calibration: fixed, because the order of summation is part of the result
EVAL_TOKENS = 2048  # tokens of one forward during evaluation: two sets of logits of that many rows are in memory
PROBE_TOKENS, PROBE_KEPT = 32, 8
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
        return (f"{self.path}: {t['source_bytes'] / 1e6:.1f} MB → {t['bytes'] / 1e6:.1f} MB, {t['linear_bits']:.2f} bits per compressed weight "
                f"({t['model_bits']:.2f} over the whole model), {self.seconds:.1f} s, {sum(f.count for f in self.fallbacks)} fallbacks")  # fmt: skip


def plan(model: str, recipe: str | dict | _recipe.Recipe = "w4-gptq", *, settings: list[str] | dict | None = None, samples: int = 128,
         seqlen: int = 512, dtype: str = "auto", trust_remote_code: bool = False) -> Plan:  # fmt: skip
    """What `run` would make and cost: bytes (exact), RAM and time (estimates), layer by layer. Reads headers only."""
    chosen = _recipe.load(recipe).with_options(settings or [])
    source = chosen.viewed(Checkpoint(model, dtype=_dtype(dtype, model, "cpu"), trust_remote_code=trust_remote_code))
    return preflight.make(source, chosen, samples=samples, seqlen=seqlen)


def run(model: str, recipe: str | Path | dict | _recipe.Recipe = "w4-gptq", calibration: str | CalibrationSet = "stdlib", output: str | Path = "out", *,
        settings: list[str] | dict | None = None, samples: int = 128, seqlen: int = 512, seed: int = 0, pack: bool = True,
        chat_template: bool = False, device: str = "auto", dtype: str = "auto", strict: bool = False, overwrite: bool = False,
        trust_remote_code: bool = False, show: bool = True) -> Report:  # fmt: skip
    """Compress a checkpoint into an artifact folder.

    model: folder or hub id. recipe: name, YAML path, dict or Recipe; settings: {"gptq.bits": 3} or ["gptq.bits=3"] on top of it.
    calibration: a SPEC (see calibration/data.py) or a CalibrationSet; read only where a method needs statistics. device: auto, cpu, cuda.
    dtype: what the blocks compute in (auto: the checkpoint's own where the device is fast at it, else float32). strict: any fallback raises.
    An interrupted run is continued by the same call; a folder that holds another run is refused unless overwrite=True.
    Raises CompressError, one line with a way out, on bad input.
    """
    started = time.perf_counter()
    chosen = _recipe.load(recipe).with_options(settings or [])
    device = _device(device)
    source = chosen.viewed(Checkpoint(model, dtype=_dtype(dtype, model, device), trust_remote_code=trust_remote_code))
    planned = preflight.make(source, chosen, samples=samples, seqlen=seqlen, timed=False)  # refuses bad group sizes before anything is written
    fallbacks = [{"what": "pattern matches nothing", "where": p, "count": 1, "detail": "no linear of this model has such a path"}
                 for p in preflight.unmatched(chosen, planned.layers)] + source.notes  # fmt: skip
    needs = frozenset[str]().union(*(step.build().needs for layer in planned.layers if (step := chosen.step_for(layer.name)) is not None))
    data = None
    if chosen.schedule:
        needs |= {"hessian"} | ({"gradient"} if chosen.schedule.by == "gradient" else set())
    if needs or chosen.tune or chosen.distill or chosen.transforms:
        data = calibration if isinstance(calibration, CalibrationSet) else load_calibration(
            calibration, source.tokenizer(), samples=samples, seqlen=seqlen, seed=seed, pack=pack, chat_template=chat_template,
            model=_whole(source) if calibration == "self" else None)  # fmt: skip
        if chosen.generated:
            data = data.with_generated(load_calibration("self", source.tokenizer(), samples=chosen.generated, seqlen=data.tokens.shape[1], seed=seed,
                                                        model=_whole(source)))  # fmt: skip
        fallbacks += data.fallbacks
        _fits(data, source.config, _vocabulary(source), model)
    batch = max(1, BATCH_TOKENS // (data.tokens.shape[1] if data else seqlen))
    if chosen.transforms and data:
        tell = lambda name, found: progress.line(f"transform {name}: " + (found if isinstance(found, str) else f"error {found:.3e}"), show)
        chosen = transforms.choose(source, chosen, data, batch=batch, device=device, tell=tell)
        source = chosen.viewed(source)
        fallbacks += [note for note in source.notes if note not in fallbacks]
    _strict(strict, fallbacks)
    identity = {"source": source.digest(), "recipe": chosen.identity(),
                "calibration": data and data.record | {"sha256": _digest(data)}, "seed": seed,
                "dtype": str(source.dtype)[6:], "device": torch.device(device).type, "batch_tokens": BATCH_TOKENS, "compress": __version__}  # fmt: skip
    folder = Path(output)
    writer = Writer(folder, identity, overwrite=overwrite)
    try:
        if writer.complete:
            manifest = read_manifest(folder)
            _strict(strict, [f.model_dump() for f in manifest.fallbacks])
            return Report(str(folder), manifest, time.perf_counter() - started, len(manifest.layers), _peak_rss())
        _room(folder, planned.disk)
        generator = torch.Generator().manual_seed(seed)
        probe = Stream(source, torch.randint(_vocabulary(source), (1, PROBE_TOKENS), generator=generator), device=device)
        enter = partial(Stream, source, tokens=data.tokens, mask=data.mask, batch=batch, device=device, folder=folder.parent) if data else None
        stream = enter() if enter else None
        original = enter() if enter and ("cross" in needs or chosen.tune or chosen.distill) else None
        guidance = None
        if enter and data:
            few = partial(enter, tokens=data.tokens[:SCHEDULE_WINDOWS], mask=None if data.mask is None else data.mask[:SCHEDULE_WINDOWS])
            if needs & {"guidance", "gradient"}:
                guidance = guide(enter() if "guidance" in needs else few(), seed)
            if chosen.schedule:
                told = lambda what, where, detail: fallbacks.append({"what": what, "where": where, "count": 1, "detail": detail})
                chosen = scheduled(chosen, source, few(), guidance, told)
                planned = preflight.make(source, chosen, samples=samples, seqlen=seqlen, timed=False)
        headers: dict[str, dict] = {}
        copy_outer(source, writer, headers)
        resumed = 0
        compressed = [layer for layer in planned.layers if layer.method]
        with progress.Layers(len(compressed), show) as screen, _log(folder, source.path) as log:
            for done in walk(source, chosen, writer, stream, original, guidance, probe, headers):
                resumed += done.resumed
                screen.layer(done)
                log(done)
                if strict:
                    _strict(strict, [f for h in headers.values() for f in h["fallbacks"]])
        if chosen.distill and data and original:
            teacher = original.tail()
            _distill.finish(chosen.distill, writer, headers, lambda: _whole(source, device, source.dtype), source.blocks_path, data.tokens, data.mask,
                            lambda rows: teacher(original.hidden[rows].to(device)), seed=seed, watch=lambda todo: progress.steps(todo, "distilling", show))
            probe = Stream(source, probe.tokens, device=device)
            for i in range(source.num_blocks):
                block, shard = source.load_block(i, device), f"block-{i:05d}"
                restore(block, source.block_name(i), headers[shard], writer.read(shard))
                probe.advance(block)
        headers[PROBE.removesuffix(".safetensors")] = writer.commit(PROBE.removesuffix(".safetensors"), {
            "tokens": probe.tokens, "logits": next(probe.logits())[:, -PROBE_KEPT:].float()}, {}, fallbacks)  # fmt: skip
        _strict(strict, [f for h in headers.values() for f in h["fallbacks"]])
        manifest = writer.finish(headers, source.path, source.changes, source.blocks_path, _totals(headers, source, planned), __version__)
    finally:
        writer.close()
    return Report(str(folder), manifest, time.perf_counter() - started, resumed, _peak_rss())


def load(path: str, *, dtype: torch.dtype | str | None = None, device: str = "cpu", policy: Literal["auto", "dense"] = "auto",
         memory: Literal["keep", "bounded"] = "keep", trust_remote_code: bool = False) -> nn.Module:  # fmt: skip
    """A Hugging Face model from an artifact (or a plain checkpoint), ready for generate().

    policy "auto" multiplies by the fastest kernel measured on this machine, "dense" by the dequantized weight in a fixed order.
    memory "keep" lets a layer keep a dense copy where that is fastest, "bounded" never does.
    """
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
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            module.policy, module.memory = policy, memory
    return model


def evaluate(path: str, reference: str | None = None, data: str | CalibrationSet = "stdlib", *, samples: int | None = None, seqlen: int | None = 512,
             seed: int = 0, device: str = "auto", dtype: str = "float32", speed: bool = False, tasks: Sequence[str] = (),
             limit: int | None = None, drift: int = 0, lengths: Sequence[int] = (), stream: bool = False, fresh: bool = False, show: bool = True,
             trust_remote_code: bool = False) -> dict[str, Any]:  # fmt: skip
    """Perplexity (token and word), KL(reference ‖ compressed), top-1 agreement, each with a standard error; size; speed where asked.

    Both models see the same windows in the same pass, in `dtype` arithmetic with dequantized weights. samples=None: all of the text.
    tasks: lm-eval's names or .yaml files, the first `limit` questions of each. drift: continue that many prompts greedily with both models and count tokens
    until they part (eval/drift.py). lengths: perplexity and KL by the length of the context (eval/context.py).
    stream: both models block by block, one block of each in memory instead of the whole; not for speed, tasks, drift and lengths, which run the model.
    The keys are those of eval/compare.py plus bits_per_weight, bytes, setup and, where asked, speed, tasks, drift, context (reference.speed, .tasks).
    Figures of an artifact are kept by content in OUT.eval.json beside it (eval/cache.py); fresh=True measures again. Speed is always measured.
    """
    device = _device(device)
    torch_dtype = None if dtype == "auto" else _named(dtype)
    folder = resolve(path)
    source = resolve(reference) if reference else None
    if drift and not source:
        raise CompressError("drift compares two models: give --reference")
    if stream and (speed or tasks or drift or lengths):
        raise CompressError("block by block there is no model to run: --stream goes with --no-speed and without tasks, drift (--prompts 0) and lengths")

    @cache
    def model(which: Path) -> nn.Module:
        return load(str(which), dtype=torch_dtype, device=device, policy="dense", trust_remote_code=trust_remote_code)

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

    tell = partial(progress.line, show=show)

    def kept(what: str, make: Callable[[], Any], **more) -> Any:
        if not Path(path).is_dir():  # a download cache is no place for results
            return make()
        return _cache.cached(folder, key | {"what": what} | more, lambda: {"value": make()}, fresh=fresh, tell=tell)["value"]

    result: dict[str, Any] = dict(kept("figures", figures))
    result |= {"bits_per_weight": dict(zip(("linear", "model"), _bits(folder), strict=True)), "bytes": weight_bytes(folder),
               "fallbacks": text.fallbacks, "data": text.record,
               "setup": {"dtype": dtype, "device": device, "torch": torch.__version__, "compress": __version__, "machine": platform.machine()}}  # fmt: skip
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

        result["speed"] = _speed.measure(str(folder), device=device)  # in the model's own dtype, as it would be served
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


def export(path: str, to: str, output: str | Path, *, base_model: str | None = None, evaluation: str | Path | dict | None = None,
           trust_remote_code: bool = False) -> Exported:  # fmt: skip
    """Write an artifact in the layout of another program (compress/export/), exact codes and scales, with a model card.

    base_model: the original's hub id, for the card. evaluation: what `compress eval --json` wrote, for its table.
    Raises CompressError naming every layer that the format cannot express, and what could be, before anything is written.
    """
    try:
        table = json.loads(Path(evaluation).read_text()) if isinstance(evaluation, str | Path) else evaluation
        if table is not None:
            table["perplexity"]["token"], table["windows"], table["tokens"], table["data"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CompressError(f"{evaluation}: not what `compress eval --json` writes ({error})") from error
    return _export(resolve(path), to, Path(output), base_model=base_model, evaluation=table, trust_remote_code=trust_remote_code)


# ---- small print


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


def _named(dtype: str) -> torch.dtype:
    if dtype not in DTYPES:
        raise CompressError(f"unknown dtype {dtype!r}{_recipe.nearest(dtype, DTYPES)}")
    return DTYPES[dtype]


def _dtype(dtype: str, model: str, device: str) -> torch.dtype | None:
    """auto: the checkpoint's own precision where the device computes in it at speed, else float32."""
    if dtype != "auto":
        return _named(dtype)
    stored = dominant_dtype(read_headers(resolve(model)))
    if torch.device(device).type != "cpu":
        return stored
    fast_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return stored if stored == torch.bfloat16 and fast_bf16 else torch.float32


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


def _strict(strict: bool, fallbacks: list[dict]) -> None:
    if strict and fallbacks:
        first = fallbacks[0]
        raise CompressError(f"--strict: {first['what']} at {first['where']} ({first['detail']})"
                            + (f" and {len(fallbacks) - 1} more" if len(fallbacks) > 1 else "") + "; finished blocks are kept: "
                            "run again without --strict to accept it")  # fmt: skip


def _room(folder: Path, need: int) -> None:
    have = shutil.disk_usage(folder).free + sum(f.stat().st_size for f in folder.iterdir() if f.is_file())
    if have < need:
        raise CompressError(f"{folder}: the artifact takes {need / 1e9:.2f} GB, {have / 1e9:.2f} GB are free; make room or choose another -o")


def _totals(headers: dict[str, dict], source: Checkpoint, planned: Plan) -> dict[str, float]:
    layers = [r for h in headers.values() for r in h["layers"].values()]
    stored = sum(torch.Size(t["shape"]).numel() * getattr(torch, t["dtype"]).itemsize
                 for h in headers.values() for t in h["tensors"].values() if t["shard"] != PROBE)  # fmt: skip
    linear_parameters, linear_bytes = sum(r["parameters"] for r in layers), sum(r["bytes"] for r in layers)
    return {"parameters": planned.parameters, "linear_parameters": linear_parameters, "bytes": stored, "linear_bytes": linear_bytes,
            "source_bytes": planned.bytes_before, "linear_bits": 8 * linear_bytes / linear_parameters if layers else 0.0,
            "model_bits": 8 * stored / planned.parameters, "planned_bytes": planned.bytes_after}  # fmt: skip


def weight_bytes(folder: Path) -> int:
    """Bytes of all weight tensors of a model folder."""
    if (folder / MANIFEST).is_file():
        return int(read_manifest(folder).totals["bytes"])
    return sum(e.nbytes for e in read_headers(folder).values())


def _bits(folder: Path) -> tuple[float, float]:
    """Bits per weight of the linears and of the whole model."""
    if (folder / MANIFEST).is_file():
        totals = read_manifest(folder).totals
        return totals["linear_bits"], totals["model_bits"]
    entries = read_headers(folder).values()
    bits = 8 * sum(e.nbytes for e in entries) / sum(torch.Size(e.shape).numel() for e in entries)
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
