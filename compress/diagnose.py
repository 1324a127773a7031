"""Diagnose: where a model will be hurt, before anything is compressed, and what to try against it.

    kurtosis   κ = E[(x−μ)⁴] / σ⁴ of what each linear reads: 3 for a Gaussian, thousands where a few channels carry the outliers
    max-norm   max |x| over a window, averaged over windows (κ and max-norm: Quantizable Transformers, arXiv 2306.12929)
    excess     mean over tokens of relu(E[x⁴]/std⁴ − 3) of the residual stream behind a block (Outlier-Safe Pre-Training, arXiv 2506.19697)
    massive    tokens whose largest value is over 1000 times the median one (Massive Activations, arXiv 2402.17762)
    influence  1 − E[cos(in, out)] of a block: near 0, the block hardly turns the residual stream (ShortGPT, arXiv 2403.03853)
    damage     KL of the whole model with one group of linears at 4, 3 or 2 bits (allocate.py); two widths are measured, the third follows the errors

Cost: two forward passes over the windows a block at a time, GPTQ at three widths, and two trials a group with the model in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .allocate import Group, Menu, Watch, front_of, probe, survey
from .checkpoint import Checkpoint
from .eval.outliers import Outliers
from .judge import Judge
from .linear import get_weight
from .preflight import linears
from .stream import Stream
from .walk import sites_of

MASSIVE = 1000.0  # times the median |x| of the residual stream


@dataclass(frozen=True)
class SiteFigures:
    """What the linears of one site read, and their weights."""

    name: str
    linears: tuple[str, ...]
    kurtosis: float
    max_norm: float
    loudest: float  # largest over median of the channels' largest |x|
    dead: int  # channels that were 0 on every token
    weight_kurtosis: float  # the largest of its linears


@dataclass(frozen=True)
class BlockFigures:
    """The residual stream behind a block."""

    name: str
    excess: float
    max_norm: float
    massive: int  # tokens
    massive_at: tuple[int, ...]  # their first few positions in the window
    influence: float


@dataclass
class Diagnosis:
    model: str
    tokens: int
    sites: list[SiteFigures]
    blocks: list[BlockFigures]
    sensitivity: list[dict[str, Any]]  # name, parameters, damage {bits: KL alone}
    total: dict[int, float]  # bits → sum over the groups
    advice: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def outliers(source: Checkpoint, stream: Stream, watch: Watch) -> Iterator[tuple[BlockFigures, list[SiteFigures]]]:
    """Block by block: the residual stream behind it and what its sites read. `stream` stands in front of block 0 and is used up."""
    for i in watch(range(source.num_blocks), "looking for outliers, block"):
        block, name = source.load_block(i, stream.device), source.block_name(i)
        sites = sites_of(source, block, stream)
        seen = {site.name: Outliers() for site in sites}
        look = lambda site, module, args: seen[site].add(args[0])  # noqa: B023  the hooks go before `seen` does
        handles = [block.get_submodule(s.linears[0]).register_forward_pre_hook(partial(look, s.name)) for s in sites]
        before = stream.hidden.clone()
        stream.advance(block)
        for handle in handles:
            handle.remove()
        figures = []
        for site in sites:
            weights = [Outliers() for _ in site.linears]
            for w, path in zip(weights, site.linears, strict=True):
                w.add(get_weight(block.get_submodule(path)))
            inputs, channel = seen[site.name].figures(), seen[site.name].channel
            live = channel[channel > 0]
            figures.append(SiteFigures(f"{name}.{site.name}", site.linears, inputs["kurtosis"], inputs["max_norm"],
                                       float(live.max() / live.median()) if len(live) else 0.0, len(channel) - len(live),
                                       max(w.figures()["kurtosis"] for w in weights)))  # fmt: skip
        yield _behind(name, before, stream.hidden), figures
        del before


def _behind(name: str, before: Tensor, after: Tensor) -> BlockFigures:
    """Figures of [windows, seqlen, width] in front of and behind a block, a window at a time."""
    excess, norm, cosine, massive, at = 0.0, 0.0, 0.0, 0, set[int]()
    for h, x in zip(before.float(), after.float(), strict=True):
        excess += float((x.pow(4).mean(-1) / x.std(-1).pow(4).clamp(min=1e-30) - 3).relu().mean())
        norm += float(x.abs().max())
        cosine += float(torch.cosine_similarity(h, x, dim=-1).mean())
        found = (x.abs().amax(-1) > MASSIVE * x.abs().median()).nonzero()[:, 0].tolist()
        massive, at = massive + len(found), at | set(found)
    n = len(after)
    return BlockFigures(name, excess / n, norm / n, massive, tuple(sorted(at)[:4]), 1 - cosine / n)


def diagnose(source: Checkpoint, tokens: Tensor, mask: Tensor | None, *, windows: int, batch: int, device: str, folder: Path, watch: Watch) -> Diagnosis:
    """All of it; `folder` takes the weights that are tried. tokens [n, seqlen]; `windows` of them judge."""
    stream = lambda: Stream(source, tokens, mask, batch=batch, device=device, folder=folder)
    looked = list(outliers(source, stream(), watch))
    widths = [n for _, _, (_, n) in linears(source)]
    group_size = next((g for g in (128, 64, 32) if all(n % g == 0 for n in widths)), -1)
    menu = Menu(tuple({"method": "gptq", "bits": b, "group_size": group_size} for b in (2, 3, 4)), fused=True)
    groups = survey(source, menu, stream(), folder, watch)
    exact = Checkpoint(source.name, dtype=torch.float32, trust_remote_code=source.trust_remote_code)
    judge = Judge(exact, tokens[:windows], None if mask is None else mask[:windows], batch=batch, device=device, folder=folder)
    probe(groups, judge, folder / "kl.json", watch)
    sizes = {g.name: sum(judge.originals[p][0].numel() for p in g.linears) for g in groups}
    rows = [{"name": g.name, "parameters": sizes[g.name], "damage": {c.step["bits"]: c.damage for c in g.choices if c.step}} for g in groups]
    total = {b: sum(r["damage"].get(b, math.nan) for r in rows) for b in (4, 3, 2)}
    return Diagnosis(source.name, tokens.numel(), [s for _, sites in looked for s in sites], [b for b, _ in looked], rows, total,
                     list(_advice([b for b, _ in looked], [s for _, sites in looked for s in sites], rows, total, groups)))  # fmt: skip


def _advice(blocks: list[BlockFigures], sites: list[SiteFigures], rows: list[dict], total: dict[int, float], groups: list[Group]) -> Iterator[str]:
    parameters, front = sum(r["parameters"] for r in rows), front_of(groups)
    for b in (3, 2):
        spent = sum(c.nbytes for g in groups for c in g.choices if c.step and c.step["bits"] == b)
        mixed = float(front.damage[front.within(spent)])
        if math.isfinite(total[b]) and mixed < 0.9 * total[b]:
            yield (f"compress auto --bits {8 * spent / parameters:.2f}: mixing 2, 3 and 4 bits instead of {b} for all takes the predicted KL from "
                   f"{total[b]:.4f} to {mixed:.4f} at the same bytes")  # fmt: skip
    worst = sorted((r for r in rows if 3 in r["damage"]), key=lambda r: -r["damage"][3])
    half, share = [], 0.0
    for r in worst:
        if share >= 0.5 * total[3]:
            break
        half.append(r)
        share += r["damage"][3]
    if half and len(half) < 0.35 * len(rows):
        yield (f"{len(half)} of {len(rows)} groups with {sum(r['parameters'] for r in half) / parameters:.0%} of the weights do half of the damage at 3 bits "
               f"({', '.join(r['name'] for r in half[:4])}{', …' if len(half) > 4 else ''}): give them 4 bits, or leave them out with `ignore`")  # fmt: skip
    if massive := [b for b in blocks if b.massive]:
        at = ", ".join(map(str, massive[0].massive_at))
        yield (f"massive tokens from {massive[0].name} on (positions {at}, max-norm {massive[0].max_norm:.0f}): calibrate with the beginning-of-sequence token "
               "that the model is used with, and do not quantize activations per tensor")  # fmt: skip
    if loud := [s for s in sites if s.loudest > 20 or s.kurtosis > 100]:
        s = max(loud, key=lambda s: s.kurtosis)
        yield (f"{len(loud)} of {len(sites)} sites read loud channels ({s.name}: kurtosis {s.kurtosis:.0f}, loudest channel {s.loudest:.0f} times the median): "
               "use methods that see the Hessian (gptq, trellis); before plain rounding, blocks: [awq] or views: [fold_norms, rotate]")  # fmt: skip
    if heavy := [s for s in sites if s.weight_kurtosis > 10]:
        yield (f"{len(heavy)} sites have heavy-tailed weights (kurtosis up to {max(s.weight_kurtosis for s in heavy):.0f}, {heavy[0].name}): smaller groups, "
               "lnq, or trellis, whose rotation makes them Gaussian")  # fmt: skip
    if dead := sum(s.dead for s in sites):
        yield f"{dead} input channels were 0 on every token: their weights cost bytes and do nothing on text like this"
    if idle := sorted((b for b in blocks if b.influence < 0.05), key=lambda b: b.influence):
        yield f"{', '.join(b.name for b in idle[:4])} hardly turn the residual stream (influence {idle[0].influence:.3f}): the first to try to drop"
