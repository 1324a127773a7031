"""Tune: train the rounding and the scales of a finished block, so that its output comes nearest to the original block's.

    ŵ = s·(⌊p⌉ − z),   minimise Σ_t s_t ‖f̂(x_t) − f(x̃_t)‖²          x the input behind compressed blocks, x̃ the original's

The layer-wise solvers see one linear at a time; here the layers of a block make up for one another, through the nonlinearities between them. Codes
start where the second-order solver left them, with p inside their cell where the original weight lies, and move by signed gradient steps whose
lengths add up to half a cell (SignSGD as in AutoRound, arXiv 2309.05516, which starts from plain rounding); scales follow by Adam, as in
EfficientQAT's block phase (arXiv 2407.11062). Rounding passes gradients straight through. What does not improve held-out windows is undone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import CompressError
from .formats import Format, IntGroup
from .linear import get_weight, set_weight
from .stream import Stream


FORCE = False
START = 0.25
RATE = 0.5


@dataclass(frozen=True)
class Tune:
    """Options of the block tuner, `tune:` in a recipe."""

    steps: int = 100  # gradient steps a block, each on one batch of calibration windows
    rounding: bool = True  # move codes, each at most to a neighbour or two
    scale_lr: float = 1e-3  # Adam's step on the logarithm of the scales; 0 leaves them
    held_out: float = 0.1  # share of the windows that only judges

    def __post_init__(self):
        if self.steps < 0 or not 0 <= self.held_out < 1 or self.scale_lr < 0:
            raise CompressError(f"tune: steps {self.steps} and scale_lr {self.scale_lr} must be at least 0, held_out {self.held_out} in 0 ... 1")


class Straight(torch.autograd.Function):
    """A rounding whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None


class Trained(nn.Module):
    """A linear whose integer weight is being trained."""

    def __init__(self, weight: IntGroup, W: Tensor, bias: Tensor | None):
        super().__init__()
        self.start, self.bias = weight, bias
        codes, self.zero = weight.unpack().float(), weight.zero_points()[..., None]  # [out, in], [out, groups, 1]
        grouped = (*self.zero.shape[:2], -1)
        self.base = weight.scales.float()[..., None]
        inside = (W.view(grouped) / self.base + self.zero - codes.view(grouped)).clamp_(-START, START)
        self.p = nn.Parameter(codes.view(grouped) + inside)  # [out, groups, group_size]
        self.log_s = nn.Parameter(torch.zeros_like(self.base))

    def codes(self) -> Tensor:
        return self.p.detach().round().clamp_(0, self.start.levels - 1)

    def scale(self) -> Tensor:
        s = self.base * self.log_s.exp()
        return Straight.apply(s, s.detach().to(self.start.scales.dtype).float())  # trained as it will be stored

    def forward(self, x: Tensor) -> Tensor:
        q = Straight.apply(self.p, self.codes())
        W = ((q - self.zero) * self.scale()).flatten(1)
        return F.linear(x, W.to(x.dtype), self.bias)

    @torch.no_grad()
    def weight(self) -> IntGroup:
        codes = self.codes().flatten(1).to(torch.uint8)
        zeros = None if self.start.zeros is None else self.zero[..., 0].to(torch.uint8)
        return IntGroup.pack(codes, self.scale()[..., 0].to(self.start.scales.dtype), zeros, self.start.bits_per_code, self.start.levels)


def tune_block(options: Tune, block: nn.Module, twin: nn.Module, stream: Stream, target: Tensor, formats: dict[str, Format],
               weight: Tensor | None = None) -> tuple[dict[str, Format], float, float]:  # fmt: skip
    """Better formats for the linears of `block`, and the held-out error before and after, relative to the target's variance.

    stream stands in front of the block, target [n, seqlen, width] is what the original model has behind it; twin is the block as it was; weight [tokens]
    says what each token counts. The block is left with the weights that are returned. Only IntGroup weights are trained.
    """
    trained = {path: Trained(f, get_weight(twin.get_submodule(path)), getattr(block.get_submodule(path), "bias", None))
               for path, f in formats.items() if isinstance(f, IntGroup)}  # fmt: skip
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
        if weight is not None:
            error = error * weight.view(len(stream.tokens), -1)[rows].to(error)
        return error.mean()

    def judged() -> float:
        with torch.no_grad():
            return sum(float(loss(b)) for b in judging) / sum(float(target[batches[b]].float().var()) for b in judging)

    before = judged()
    originals = {path: block.get_submodule(path) for path in trained}
    _place(block, trained)
    rounding = [t.p for t in trained.values()]
    adam = torch.optim.Adam([t.log_s for t in trained.values()], lr=options.scale_lr, betas=(0.9, 0.95))
    order = torch.Generator().manual_seed(stream.at)
    picks: list[int] = []
    for step in range(options.steps):
        picks = picks or [training[k] for k in torch.randperm(len(training), generator=order).tolist()]
        with torch.enable_grad():
            loss(picks.pop()).backward()
        left = 1 - step / options.steps
        if options.rounding:
            for p in rounding:
                p.data.add_(p.grad.sign_(), alpha=-2 * RATE * left / options.steps)
        adam.param_groups[0]["lr"] = options.scale_lr * left
        adam.step()
        for p in (*rounding, *adam.param_groups[0]["params"]):
            p.grad = None
    made = {path: t.weight() for path, t in trained.items()}
    _place(block, originals)
    kept = {path: module.weight for path, module in originals.items()}
    for path, f in made.items():
        set_weight(originals[path], f.dequantize())
    after = judged()
    if after >= before and not FORCE:
        for path, module in originals.items():
            module.weight = kept[path]
        return formats, before, before
    return formats | made, before, after


def _place(block: nn.Module, modules: dict[str, nn.Module]) -> None:
    for path, module in modules.items():
        parent, _, leaf = path.rpartition(".")
        setattr(block.get_submodule(parent), leaf, module)
