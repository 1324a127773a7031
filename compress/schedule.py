"""Schedule: how much each layer gives up, so that all together give up what the recipe says and the model loses least.

    minimise Σ_l D_l(s_l)  with  Σ_l size_l · s_l  fixed;   at the optimum one more number costs the same in every layer

s is a layer's share of zeros, or of parameters that go away. What the next number costs is known in closed form: a weight a_i w_ij² / [H_d⁻¹]_jj, the
saliency of optimal brain surgery; a rank a singular value of √a W chol(H_d), squared, over the m + n numbers it stores. Layers are made comparable by
a: the squared gradient of the model's loss at each output, or one over what the layer puts out. One threshold for all layers is then a global mask (or
a global cut of singular values), held within `spread` of the uniform share, beyond which the closed forms are no longer true. `outliers` is OWL (Yin et
al., arXiv 2310.05175): layers with more weights of 5 times the mean score |w|·‖x‖ keep more. Integers give up bits (precision.py).
`energy` asks for quality in the place of a budget: each layer has the rank that keeps so much of its output. Measured on the original model, on a few
windows, before anything is compressed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .calibration.guidance import Guidance
from .calibration.statistics import Stats
from .checkpoint import Checkpoint
from .errors import CompressError
from .linear import get_weight
from .precision import Ladder, ladder, mixed
from .precision import chosen as chosen_bits
from .stream import Stream, sites_of
from .walk import bundles, stages

if TYPE_CHECKING:
    from .recipe import Recipe, Step

STEPS = 33  # points at which a layer's price is asked, from the smallest share to the largest
LOUD = 5.0  # OWL's M: an outlier is this many times the mean


@dataclass(frozen=True)
class Schedule:
    """Options of `schedule:` in a recipe."""

    by: Literal["gradient", "error", "outliers"] = "gradient"  # what makes layers comparable: the loss's gradient, relative errors, or OWL's outliers
    spread: float = 0.2  # the most by which a layer's share of zeros, or of parameters gone, may differ from the recipe's
    bits: int = 1  # for integers: layers may have so many bits fewer than the recipe says, or one more than so many more; 0: all alike
    energy: float = 0.0  # svd only, in the place of a budget: the share of its output that every layer keeps, which sets its rank; 0: by budget

    def __post_init__(self):
        if not 0 <= self.spread < 1 or not 0 <= self.energy < 1:
            raise CompressError(f"spread {self.spread} and energy {self.energy} must lie from 0 to below 1; 0.2 and 0 are usual")
        if not 0 <= self.bits <= 6:
            raise CompressError(f"bits {self.bits}: layers may differ by 0 to 6 bits; 1 is usual")


@dataclass(frozen=True, eq=False)
class Layer:
    """Linears that are solved as one, what they may give up and what that costs."""

    names: tuple[str, ...]
    step: Step
    cost: Callable[[float], float]  # bytes, by what it gives up
    share: float  # by the recipe
    prices: Tensor  # [STEPS], of one number more when giving up `shares`
    outliers: float
    energy: float  # the share that may go for Schedule.energy of the output to stay, 0 where that takes more numbers than the weight has


def share_of(step: Step, where: str) -> tuple[str, float]:
    """The option that says what a layer gives up, and its value. Raises CompressError where the method has none."""
    method = step.build()
    if getattr(method, "pattern", "none") != "none" or getattr(method, "rank", 0):
        raise CompressError(f"{where}: a pattern or a rank is the same in every layer; a schedule needs sparsity or ratio in its place")
    for option in ("sparsity", "ratio"):
        if hasattr(method, option):
            return option, getattr(method, option)
    raise CompressError(f"{where}: {step.method} has neither sparsity, ratio nor whole bits for a schedule to set; leave the schedule out, "
                        "or use admm, svd or gptq")  # fmt: skip


def scheduled(recipe: Recipe, source: Checkpoint, stream: Stream, guidance: list[dict[str, Guidance]] | None, note: Callable[[str, str, str], None]) -> Recipe:
    """The recipe with a step of its own for every layer. `stream` stands in front of block 0 and is used up."""
    assert recipe.schedule is not None
    layers, ladders = list[Layer](), list[Ladder]()
    for i in range(source.num_blocks):
        block, name = source.load_block(i, stream.device), source.block_name(i)
        sites = sites_of(source, block, stream)
        stats = {k: s for stage in stages(block, list(sites), False) for k, s in stream.collect(block, {s.name: s.linears[0] for s in stage}).items()}
        for site in sites:
            steps = {path: step for path in site.linears if (step := recipe.step_for(f"{name}.{path}")) is not None}
            for paths in _together(steps):
                if site.name not in stats or (guidance is not None and any(path not in guidance[i] for path in paths)):
                    note("not scheduled", f"{name}.{site.name}", "no token or no gradient was seen here: it gives up what the recipe says")
                    continue
                names, step, stored = tuple(f"{name}.{path}" for path in paths), steps[paths[0]], block.stored[f"{paths[0]}.weight"]
                parts = [get_weight(block.get_submodule(path), block.originals.get(f"{path}.weight")) for path in paths]
                gradient = [guidance[i][path].outputs.to(parts[0])[:, None] for path in paths] if guidance and recipe.schedule.by == "gradient" else None
                if mixed(step):
                    counts = gradient or [1 / _energy(W, stats[site.name].hessian) for W in parts]
                    ladders.append(ladder(names, step, recipe.schedule.bits, parts, stored, stats[site.name], counts))
                else:
                    a = torch.cat(gradient) if gradient else None
                    layers.append(_layer(recipe.schedule, names, step, stored, torch.cat(parts), stats[site.name], a))
        stream.advance(block)
    chosen = {layer: layer.energy for layer in layers} if recipe.schedule.energy else _shares(recipe.schedule, layers) if layers else {}
    own: list[Step] = chosen_bits(ladders) if ladders else []
    for layer, share in chosen.items():
        option, _ = share_of(layer.step, layer.names[0])
        if recipe.schedule.energy and not share:
            note("kept dense", "+".join(layer.names), f"{recipe.schedule.energy:g} of its output takes a rank above break-even")
        own.append(layer.step.model_copy(update={"match": list(layer.names), option: share}))
    return recipe.model_copy(update={"steps": (*own, *recipe.steps)})


def _together(steps: dict[str, Step]) -> list[list[str]]:
    """Linears of one site that are scheduled as one: factored jointly, or integers by one step."""
    found: dict[int, list[str]] = {}
    for path, step in steps.items():
        if mixed(step):
            found.setdefault(id(step), []).append(path)
    others = {path: step for path, step in steps.items() if not mixed(step)}
    return [*found.values(), *bundles(others, {path: step.build() for path, step in others.items()})]


def _range(schedule: Schedule, share: float) -> Tensor:
    return torch.linspace(max(0.0, share - schedule.spread), min(0.99, share + schedule.spread), STEPS, dtype=torch.float64)


def _energy(W: Tensor, H: Tensor) -> Tensor:
    """tr W H Wᵀ, by which errors of different layers compare where no gradient does it."""
    return ((W @ H) * W).sum().clamp(min=1e-30)


def _layer(schedule: Schedule, names: tuple[str, ...], step: Step, stored: torch.dtype, W: Tensor, stats: Stats, a: Tensor | None) -> Layer:
    (option, share), (m, n) = share_of(step, names[0]), W.shape
    shares = _range(schedule, share)
    factor = stats.factor(0.01, False)
    Hd = torch.eye(n, dtype=W.dtype, device=W.device) if factor.failed else stats.hessian + stats.ridge(factor).diag()
    if a is None:
        a = 1 / _energy(W, Hd).expand(m, 1)
    score, energy = W.abs() * Hd.diagonal().sqrt(), 0.0
    if option == "sparsity":
        gains = (a * W.square() / factor.U.square().sum(0)).flatten().sort().values
        prices = gains[(shares * (len(gains) - 1)).long()]
    else:
        even = m * n / (m + n)
        K = (a.sqrt() * W @ torch.linalg.cholesky(Hd)).double()
        spectrum = torch.linalg.eigvalsh(K @ K.T if m <= n else K.T @ K).flip(0).clamp(min=0)
        prices = spectrum[((1 - shares) * even).long().clamp(0, len(spectrum) - 1)] / (m + n)
        rank = int((spectrum.cumsum(0) / spectrum.sum() < schedule.energy).sum()) + 1
        energy = max(0.0, 1 - rank / even)
    method = step.build()
    cost = lambda s: replace(method, **{option: s}).planned((m, n), stored, names[0]).nbytes()
    return Layer(names, step, cost, share, prices.double().clamp(min=1e-300).log(), float((score > LOUD * score.mean()).float().mean()), energy)


def _shares(schedule: Schedule, layers: list[Layer]) -> dict[Layer, float]:
    """What each layer gives up; all together cost no more bytes than with the recipe's own shares."""
    wanted = sum(layer.cost(layer.share) for layer in layers)
    at = {layer: _range(schedule, layer.share).tolist() for layer in layers}
    level = {layer: layer.outliers for layer in layers}
    low, high = (-1.0, 1.0) if schedule.by == "outliers" else (min(float(x.prices[0]) for x in layers), max(float(x.prices[-1]) for x in layers))
    widest = max(abs(o - sum(level.values()) / len(level)) for o in level.values()) or 1.0

    def given(layer: Layer, threshold: float) -> float:
        s = at[layer]
        if schedule.by == "outliers":  # as OWL scales them: the layer furthest from the mean differs by the spread
            return min(max(layer.share - schedule.spread * (level[layer] - sum(level.values()) / len(level)) / widest + threshold, s[0]), s[-1])
        k = int(torch.searchsorted(layer.prices, threshold))
        if k in (0, STEPS):
            return s[0] if k == 0 else s[-1]
        part = (threshold - float(layer.prices[k - 1])) / max(float(layer.prices[k] - layer.prices[k - 1]), 1e-12)
        return s[k - 1] + (s[k] - s[k - 1]) * part

    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(layer.cost(given(layer, middle)) for layer in layers) > wanted else (low, middle)
    return {layer: given(layer, high) for layer in layers}
