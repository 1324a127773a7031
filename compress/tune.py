"""Tune: train the rounding and the scales of a finished block, so that its output comes nearest to the original block's.

    ŵ = s·(⌊p⌉ − z),   minimise Σ_t ‖f̂(x_t) − f(x̃_t)‖²          x the input behind compressed blocks, x̃ the original's

The layer-wise solvers see one linear at a time; here the layers of a block make up for one another, through the nonlinearities between them. Codes
move by signed gradient steps whose lengths add up to half a cell (SignSGD as in AutoRound, arXiv 2309.05516: this after `rtn` is its recipe); scales
follow by Adam, as in EfficientQAT's block phase (arXiv 2407.11062). What does not improve held-out windows is undone: after `gptq` with propagated
targets the codes are better than these steps can find, and only the scales are worth training (`rounding: false`). Factors of a product and kept
values of a mask learn too, which is PELA's feature distillation (arXiv 2310.10700), a block at a time, and with `masks` the mask itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import CompressError
from .formats import Format, IntGroup
from .linear import get_weight, set_weight
from .stream import Stream
from .trained import Trained, Values, floats, place


@dataclass(frozen=True)
class Tune:
    """Options of the block tuner, `tune:` in a recipe."""

    steps: int = 100  # gradient steps a block, each on one batch of calibration windows
    rounding: bool = True  # move codes, each at most to a neighbour or two
    scale_lr: float = 1e-3  # Adam's step on the logarithm of the scales; 0 leaves them
    value_lr: float = 3e-3  # Adam's step on other formats' floats (factors, values, scales, tables), relative to the rms of the tensor; 0 leaves them
    masks: bool = False  # zeros move too: masks are chosen anew at every step, gradients pass straight through them
    perturbation: float | None = None  # PELA: entries that are further than this from the original weight's are drawn back, hinge² a linear; None: no penalty
    held_out: float = 0.1  # share of the windows that only judges

    def __post_init__(self):
        if self.steps < 0 or not 0 <= self.held_out < 1 or min(self.scale_lr, self.value_lr, self.perturbation or 0) < 0:
            raise CompressError(f"tune: steps {self.steps}, scale_lr {self.scale_lr}, value_lr {self.value_lr}, perturbation {self.perturbation} "
                                f"must be at least 0, held_out {self.held_out} in 0 ... 1")  # fmt: skip


def tune_block(options: Tune, block: nn.Module, twin: nn.Module, stream: Stream, target: Tensor, formats: dict[str, Format]
               ) -> tuple[dict[str, Format], float, float]:  # fmt: skip
    """Better formats for the linears of `block`, and the held-out error before and after, relative to the target's variance.

    stream stands in front of the block, target [n, seqlen, width] is what the original model has behind it; twin is the block as it was.
    The block is left with the weights that are returned. Codes of an IntGroup move; of other formats, what is no code and no mask.
    """
    trained = {path: Trained(f, get_weight(twin.get_submodule(path)), getattr(block.get_submodule(path), "bias", None))
               for path, f in formats.items() if isinstance(f, IntGroup)}  # fmt: skip
    known: dict[int, nn.Parameter] = {}
    values = {path: Values(f, getattr(block.get_submodule(path), "bias", None), known, options.masks)
              for path, f in formats.items() if options.value_lr and floats(f)}  # fmt: skip
    batches, calls = list(stream.batches()), stream.calls[stream.at]
    judges = max(1, round(options.held_out * len(batches))) if options.held_out else 0
    if len(batches) <= judges:
        raise CompressError(f"tune: {len(stream.tokens)} windows make {len(batches)} batches, too few to train on some and judge on others; "
                            "use more --samples or tune.held_out=0")  # fmt: skip
    training, judging = range(len(batches) - judges), range(len(batches) - judges, len(batches)) if judges else range(len(batches))

    def loss(b: int) -> Tensor:
        rows, (args, kwargs) = batches[b], calls[b]
        out = block(stream.hidden[rows].to(stream.device, copy=True), *args, **kwargs)
        wanted = target[rows].to(stream.device).float()
        error = ((out[0] if isinstance(out, tuple) else out).float() - wanted).square().mean(-1)
        if stream.mask is not None:
            error = error * stream.mask[rows].to(error)
        return error.mean()

    near = {} if options.perturbation is None else {path: get_weight(twin.get_submodule(path)) for path in values}

    def penalty() -> Tensor | float:
        """Σ_W max(0, ‖Ŵ−W‖_∞ − ε)²: with a hinge, since the published (‖Ŵ−W‖_∞ − ε)² would also push apart what is near."""
        return sum(((v.matrix() - near[path]).abs().max() - options.perturbation).clamp(min=0).square() for path, v in values.items())

    def judged() -> float:
        with torch.no_grad():
            return sum(float(loss(b)) for b in judging) / sum(float(target[batches[b]].float().var()) for b in judging)

    before = judged()
    originals = {path: block.get_submodule(path) for path in (*trained, *values)}
    place(block, (*trained.items(), *values.items()))
    rounding = [t.p for t in trained.values()]
    groups = [{"params": [t.log_s for t in trained.values()], "lr": options.scale_lr}] if trained else []
    groups += [{"params": [p], "lr": options.value_lr * float(p.detach().square().mean().sqrt())} for p in known.values()]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.95))
    first = [g["lr"] for g in adam.param_groups]
    order = torch.Generator().manual_seed(stream.at)
    picks: list[int] = []
    for step in range(options.steps):
        picks = picks or [training[k] for k in torch.randperm(len(training), generator=order).tolist()]
        with torch.enable_grad():
            (loss(picks.pop()) + (penalty() if options.perturbation is not None else 0)).backward()
        left = 1 - step / options.steps
        if options.rounding:
            for p in rounding:
                p.data.add_(p.grad.sign_(), alpha=-left / options.steps)
        for group, lr in zip(adam.param_groups, first, strict=True):
            group["lr"] = lr * left
        adam.step()
        adam.zero_grad(set_to_none=True)
        for p in rounding:
            p.grad = None
    made: dict[str, Format] = {path: t.weight() for path, t in trained.items()}
    made |= {path: t.weight() for path, t in values.items()}
    place(block, originals.items())
    kept = {path: module.weight for path, module in originals.items()}
    for path, f in made.items():
        set_weight(originals[path], f.dequantize())
    after = judged()
    if after >= before:
        for path, module in originals.items():
            module.weight = kept[path]
        return formats, before, before
    return formats | made, before, after
