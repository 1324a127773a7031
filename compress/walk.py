"""The one loop: for each block { load → statistics per site → method → Format → write, one rename → advance }.

Peak memory is one block, the hidden states of the calibration windows and the Hessians of one stage, never the model. A block whose shard is
complete is not computed again: its compressed weights are read back and the tokens are sent through them, so a resumed run continues from
exactly the states it would have had.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import chain, groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .arch import Site
from .artifact import LayerRecord, Writer
from .calibration.guidance import Guidance
from .calibration.hidden import release
from .calibration.statistics import Stats
from .checkpoint import Checkpoint
from .errors import CompressError
from .experts import spelled, unspelled
from .formats import Format, build, join_rows, split_rows
from .linear import get_weight, in_features, set_weight
from .stream import Stream, sites_of
from .tune import tune_block

if TYPE_CHECKING:
    from .recipe import Recipe

STATS_LIMIT = 2 << 30  # bytes of Hessians gathered in one pass; more experts take more passes
KEEP_LIMIT = 256 << 20  # bytes of down_proj's input kept so that the last pass need not run gate and up again
RELEASE = 8 << 20  # weights of a block from which on freed memory is given back: below, asking takes longer than it is worth
OUTER_LIMIT = 1 << 30  # bytes of one shard of outer tensors


@dataclass(frozen=True)
class Done:
    """One layer finished (or read back, when a run was resumed), for the screen and the log."""

    block: int
    name: str
    record: LayerRecord
    seconds: float
    resumed: bool


def walk(source: Checkpoint, recipe: Recipe, writer: Writer, stream: Stream | None, original: Stream | None,
         guidance: list[dict[str, Guidance]] | None, probe: Stream, headers: dict[str, dict],
         spelling: Mapping[str, tuple[str, ...]]) -> Iterator[Done]:  # fmt: skip
    """Compress every block of `source` into `writer`, yielding each layer as it is done; `headers` receives the record of every shard.

    `stream` carries the calibration tokens through the compressed blocks, None when no method needs statistics; `original` the same tokens through
    the blocks as they were, None when nothing compares the two; `guidance` says what each token and output counts (calibration/guidance.py), None when
    all count alike; `probe` carries a few tokens whose logits `verify` will compare; `spelling` says which tensors go by other names on disk (experts.py).
    """
    for i in range(source.num_blocks):
        shard, name = f"block-{i:05d}", source.block_name(i)
        block = source.load_block(i, probe.device)
        _release(block)
        header = writer.header(shard)
        if header is not None:
            twin = block if original is None else _twin(block)
            tensors = unspelled(writer.read(shard), spelling)
            restore(block, name, header, tensors)
            for layer, record in header["layers"].items():
                yield Done(i, layer, LayerRecord.model_validate(record), 0.0, True)
            del tensors
            if original is not None:
                original.advance(twin)
        else:
            layers: dict[str, LayerRecord] = {}
            formats: dict[str, Format] = {}
            fallbacks: list[dict] = []
            sites = sites_of(source, block, stream or probe)
            plan = {path: (step.method, step.build()) for site in sites for path in site.linears if (step := recipe.step_for(f"{name}.{path}")) is not None}
            if stream is not None:
                _prepare(recipe, block, sites, {path: method for path, (_, method) in plan.items()}, stream)
            twin = block if original is None else _twin(block)
            pair, counts = None if original is None else (original, twin), {} if guidance is None else guidance[i]
            for done, weight in _compress_block(source, recipe, block, name, sites, plan, stream, pair, counts, fallbacks):
                layers[done.name], formats[done.name.removeprefix(name + ".")] = done.record, weight
                yield done
            if original is not None:
                original.advance(twin)
            training: dict[str, list[float]] = {}
            if recipe.tune is not None and stream is not None and original is not None:
                stream.thaw()
                formats, *training[name] = tune_block(recipe.tune, block, twin, stream, original.hidden, formats)
                if training[name][1] >= training[name][0]:
                    fallbacks.append({"what": "tuning undone", "where": name, "count": 1, "detail": f"held-out error {training[name][0]:.3e} did not fall"})
            header = writer.commit(shard, spelled(block_tensors(block, name, formats, layers), spelling), layers, fallbacks, training)
        headers[shard] = header
        if stream is not None and i + 1 < source.num_blocks:
            stream.advance(block)
        probe.advance(block)
        del block, twin


def _compress_block(source: Checkpoint, recipe: Recipe, block: nn.Module, name: str, sites: tuple[Site, ...], plan: dict[str, tuple], stream: Stream | None,
                    original: tuple[Stream, nn.Module] | None, guidance: dict[str, Guidance], fallbacks: list[dict]
                    ) -> Iterator[tuple[Done, Format]]:  # fmt: skip
    at = int(name.rpartition(".")[2])
    waiting = set(plan)
    for stage in stages(block, [s for s in sites if any(p in plan for p in s.linears)], recipe.true_sequential):
        stats: dict[str, Stats] = {}
        started = time.perf_counter()
        done = {p for s in stage for p in s.linears}
        waiting -= done
        final = {p.partition(".")[0] for p in done if "." in p} - {p.partition(".")[0] for p in waiting}
        if not waiting and stream is not None and stream.nbytes(in_features(block.get_submodule(stage[-1].linears[-1]))) > KEEP_LIMIT:
            final = set()  # only one pass is left: not worth keeping the widest input of the block
        readers: dict[str, list[str]] = {}  # linears that share their statistics: those of a site, but each for itself where tokens are weighed
        for site in stage:
            for path in (p for p in site.linears if p in plan):
                readers.setdefault(path if "guidance" in plan[path][1].needs else site.name, []).append(path)
        if stream is not None:
            weighed = {key: guidance[key].of(getattr(plan[key][1], "output_groups", 1))
                       for key in readers if key in guidance and key in plan and "guidance" in plan[key][1].needs}  # fmt: skip
            stats = stream.collect(block, {key: paths[0] for key, paths in readers.items()}, keep=bool(final), original=original, weights=weighed)
            _release(block)
        shared = (time.perf_counter() - started) / sum(map(len, readers.values()))
        for key, paths in readers.items():
            seen, others = stats.pop(key, None), [stats.pop(k) for k in list(stats) if k.startswith(f"{key}#")]  # of further groups of outputs
            if seen is not None and not seen.count:
                if seen.dropped:
                    raise CompressError(f"{name}.{key}: all {seen.dropped} calibration tokens are NaN or Inf in {str(source.dtype)[6:]}; "
                                        "use --dtype float32 or bfloat16")  # fmt: skip
                seen = None
            for bundle in bundles(paths, {path: plan[path][1] for path in paths}):
                started = time.perf_counter()
                (method_name, method), where, first = plan[bundle[0]], f"{name}.{'+'.join(bundle)}", f"{name}.{bundle[0]}"
                Ws = [get_weight(block.get_submodule(path), block.originals.get(f"{path}.weight")) for path in bundle]
                if seen is None:
                    seen = Stats(torch.eye(Ws[0].shape[1], device=Ws[0].device))
                    if stream is not None:
                        seen.note("no calibration tokens, rounded to nearest", "none was routed here")
                elif "guidance" in method.needs and key not in guidance:
                    seen.note("tokens not weighed", "no gradient reaches it, or it sees routed tokens")
                stored, sizes = block.stored[f"{bundle[0]}.weight"], [len(W) for W in Ws]
                corrects = getattr(method, "bias_correction", False) and seen.count > 0 and all(block.get_submodule(p).bias is not None for p in bundle)
                used = seen.centred() if corrects else seen
                used.gradient = torch.cat([guidance[p].outputs for p in bundle]).to(Ws[0].device) if all(p in guidance for p in bundle) else None
                W = Ws[0] if len(Ws) == 1 else torch.cat(Ws)
                weight = method(W, used, stored=stored, where=where) if not others else _by_rows(method, W, [used, *others], stored, where)
                for f in chain.from_iterable(s.fallbacks for s in others):
                    seen.note(f["what"], f["detail"])
                del W
                if not all(torch.isfinite(t).all() for t in weight.tensors().values() if t.is_floating_point()):
                    raise CompressError(f"{where}: {method_name} produced NaN or Inf; the weights span ±{max(W.abs().max() for W in Ws):.3g}")
                planned = method.planned((sum(sizes), Ws[0].shape[1]), stored, where)
                finished = []
                for path, part, (own, nbytes), (_, planned_bytes) in zip(bundle, *pieces(weight, sizes), pieces(planned, sizes)[1], strict=True):
                    W, W_hat = Ws.pop(0), part.dequantize()
                    record = LayerRecord(
                        method=method_name, options=_options(method), format=part.meta(), describe=part.describe(), tensors=own,
                        shared={t: f"{first}.{t}" for t in part.tensors() if t not in own}, bits=8 * nbytes / W.numel(), bytes=nbytes,
                        planned_bytes=planned_bytes, parameters=W.numel(), error=used.error(W, W_hat), tokens=seen.count,
                        error_norm="identity" if not seen.count else "guided" if "guidance" in method.needs else "hessian")  # fmt: skip
                    if corrects:
                        _move_bias(block, path, seen.bias(W, W_hat))
                    set_weight(block.get_submodule(path), W_hat)
                    finished.append((path, record, part))
                    del W, W_hat
                del used
                _release(block)
                seconds = shared + (time.perf_counter() - started) / len(bundle)
                for path, record, part in finished:
                    yield Done(at, f"{name}.{path}", record, seconds, False), part
            if seen is not None:
                if seen.dropped:
                    seen.note("tokens dropped", f"{seen.dropped} of {seen.dropped + seen.count} rows of the input were NaN or Inf")
                fallbacks.extend({"what": f["what"], "where": f"{name}.{key}", "count": 1, "detail": f["detail"]} for f in seen.fallbacks)
            del seen
        if stream is not None:
            for child in final:  # nothing in it is left to compress, so later passes need not compute it again
                last = stage[-1].linears[-1] if len(final) == 1 else None
                stream.freeze(block, child, last)
                if original is not None:
                    original[0].freeze(original[1], child, last)


def _by_rows(method, W: Tensor, stats: list[Stats], stored: torch.dtype, where: str) -> Format:
    """Equal parts of the outputs, each solved with statistics of its own."""
    starts = torch.arange(len(W)).tensor_split(len(stats))
    parts = [(slice(int(at[0]), int(at[-1]) + 1), s) for at, s in zip(starts, stats, strict=True)]
    whole = join_rows([method(W[at], s.rows(at), stored=stored, where=where) for at, s in parts])
    assert whole is not None  # integers of one width and group size
    return whole


def _twin(block: nn.Module) -> nn.Module:
    """The block as it is now, its tensors shared: compressing replaces a weight and never writes into it."""
    return copy.deepcopy(block, {id(t): t for t in (*block.parameters(), *block.buffers(), *block.originals.values())})


def _prepare(recipe: Recipe, block: nn.Module, sites: tuple[Site, ...], methods: dict, stream: Stream) -> None:
    """Block steps: exact edits of the resident block, before anything in it is rounded."""
    for change in recipe.changes():
        for stage in stages(block, change.sites(block, sites, methods), False):
            found = stream.collect(block, {s.name: s.linears[0] for s in stage})
            for site in stage:
                if site.name in found and found[site.name].count:  # an expert may have seen no token
                    change(block, site, found[site.name], methods)


def _move_bias(block: nn.Module, path: str, shift: Tensor) -> None:
    """Add to a bias, once, in the dtype it is stored in; the block holds what will be read back."""
    name, old = f"{path}.bias", block.get_submodule(path).bias
    moved = (block.originals.pop(name, old).float() + shift).to(block.stored[name])
    block.get_submodule(path).bias = nn.Parameter(moved.to(old.dtype), requires_grad=False)


def _release(block: nn.Module) -> None:
    if sum(p.numel() for p in block.parameters()) > RELEASE:
        release()


def stages(block: nn.Module, sites: list[Site], true_sequential: bool) -> Iterator[list[Site]]:
    """Sites whose statistics are gathered in one pass: one site each, all experts of a kind together, as many as fit in STATS_LIMIT."""
    kind = (lambda s: re.sub(r"\d+", "*", s.name)) if true_sequential else (lambda s: None)
    for _, group in groupby(sites, key=kind):
        stage: list[Site] = []
        size = 0
        for site in group:
            need = 4 * in_features(block.get_submodule(site.linears[0])) ** 2
            if stage and size + need > STATS_LIMIT:
                yield stage
                stage, size = [], 0
            stage.append(site)
            size += need
        if stage:
            yield stage


def bundles(paths: Iterable[str], methods: dict) -> list[list[str]]:
    """Linears of one site that are solved as one weight, their rows one below the other: all of a `joint` method, else each for itself."""
    found: dict[object, list[str]] = {}
    for path in paths:
        found.setdefault(methods[path] if getattr(methods[path], "joint", False) else path, []).append(path)
    return list(found.values())


def pieces(weight: Format, sizes: list[int]) -> tuple[list[Format], list[tuple[list[str], int]]]:
    """The parts of a weight that was solved as one, and which tensors (and bytes) each stores: what all hold, the first stores for all."""
    parts = [weight] if len(sizes) == 1 else split_rows(weight, sizes)
    first = {id(t) for t in parts[0].tensors().values()}
    own = [{name: t for name, t in part.tensors().items() if part is parts[0] or id(t) not in first} for part in parts]
    return parts, [(list(o), sum(t.nbytes for t in o.values())) for o in own]


def _options(method) -> dict:
    return {f.name: getattr(method, f.name) for f in fields(method)}


def restore(block: nn.Module, name: str, header: dict, tensors: dict[str, Tensor]) -> None:
    """Put what a finished shard holds back into a block."""
    rest, device = dict(tensors), next(block.parameters()).device
    for layer, record in header["layers"].items():
        places = LayerRecord.model_validate(record).places(layer)
        weight = build(record["format"], {t: tensors[place].to(device) for t, place in places.items()})
        set_weight(block.get_submodule(layer.removeprefix(name + ".")), weight.dequantize())
        for place in places.values():
            rest.pop(place, None)
    now = block.state_dict()
    block.load_state_dict({local: t.to(device, now[local].dtype) for n, t in rest.items() if (local := n.removeprefix(name + ".")) in now},
                          strict=False, assign=True)  # fmt: skip
    block.requires_grad_(False)


def block_tensors(block: nn.Module, name: str, formats: dict[str, Format], layers: dict[str, LayerRecord]) -> dict[str, Tensor]:
    """What a block's shard holds: Format tensors for the compressed linears, everything else in the dtype it was stored in."""
    tensors = {f"{name}.{path}.{key}": t for path, weight in formats.items() for key, t in weight.tensors().items() if key in layers[f"{name}.{path}"].tensors}
    for local, value in block.state_dict().items():
        path, _, leaf = local.rpartition(".")
        if leaf == "weight" and path in formats:
            continue
        tensors[f"{name}.{local}"] = block.originals.get(local, value).to(block.stored[local])
    return tensors


def copy_outer(source: Checkpoint, writer: Writer, headers: dict[str, dict]) -> None:
    """Embeddings, final norm, head and whatever the model class does not know (multi-token prediction), unchanged, in shards of bounded size."""
    pieces: list[tuple[str, int]] = [(g.target, source.nbytes([g])) for g in source.outer_groups()]
    groups = {g.target: g for g in source.outer_groups()}
    pieces += [(key, source.entries[key].nbytes) for key in source.unknown]
    shards: list[list[str]] = [[]]
    size = 0
    for name, nbytes in pieces:
        if shards[-1] and size + nbytes > OUTER_LIMIT:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    for k, names in enumerate(shards):
        shard = f"outer-{k:05d}"
        header = writer.header(shard)
        if header is None:
            tensors: dict[str, Tensor] = {}
            for name in names:
                read = source.read(groups[name]) if name in groups else {name: source.read_stored(name)}
                tensors |= {n: t.to(source.stored(groups[name])) for n, t in read.items()} if name in groups else read
            kept = [{"what": "kept as it is", "where": name, "count": 1, "detail": "the model class does not know this tensor"}
                    for name in names if name not in groups and not source.ignorable(name)]  # fmt: skip
            header = writer.commit(shard, tensors, {}, kept)
        headers[shard] = header
