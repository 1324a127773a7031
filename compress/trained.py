"""Trained: a linear whose integer weight learns. Codes and scales are what will be stored, at every step. Smooth: one of any other format.

    ŵ = s·(⌊p⌉ − z)          p lies in the cell of its code; a code changes when its p leaves the cell

Rounding passes gradients straight through. p starts where the original weight lies within the cell of its present code, so that the codes which were
nearly another are the first to change.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .formats import Format, IntGroup, build

EDGE = 0.45  # how near to its cell's border a p may start; the cell ends at 0.5


class Straight(torch.autograd.Function):
    """A rounding whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None


class Trained(nn.Module):
    """In the place of a linear: `weight` what its second-order solver found, W [out, in] what it was, bias or None."""

    def __init__(self, weight: IntGroup, W: Tensor, bias: Tensor | None):
        super().__init__()
        self.start, self.bias = weight, bias
        zero, codes = weight.zero_points()[..., None], weight.unpack().float()  # [out, groups, 1], [out, in]
        shape = (*zero.shape[:2], -1)
        self.zero, self.base = zero, weight.scales.float()[..., None]
        inside = (W.view(shape) / self.base + zero - codes.view(shape)).clamp_(-EDGE, EDGE)
        self.p = nn.Parameter(codes.view(shape) + inside)  # [out, groups, group_size]
        self.log_s = nn.Parameter(torch.zeros_like(self.base))  # [out, groups, 1]

    def smooth(self) -> list[nn.Parameter]:
        """What Adam moves; codes go their own way."""
        return [self.log_s]

    def codes(self) -> Tensor:
        return self.p.detach().round().clamp_(0, self.start.levels - 1)

    def scale(self) -> Tensor:
        s = self.base * self.log_s.exp()
        return Straight.apply(s, s.detach().to(self.start.scales.dtype).float())

    def forward(self, x: Tensor) -> Tensor:
        W = ((Straight.apply(self.p, self.codes()) - self.zero) * self.scale()).flatten(1)
        return F.linear(x, W.to(x.dtype), self.bias)

    @torch.no_grad()
    def weight(self) -> IntGroup:
        """What has been learned, ready to be stored."""
        zeros = None if self.start.zeros is None else self.zero[..., 0].to(torch.uint8)
        return IntGroup.pack(self.codes().flatten(1).to(torch.uint8), self.scale()[..., 0].to(self.start.scales.dtype), zeros,
                             self.start.bits_per_code, self.start.levels)  # fmt: skip


class Smooth(nn.Module):
    """In the place of a linear of any other format: codes stay, and its floating-point tensors (scales, tables, low-rank factors) learn.

    A step is relative to the rms of the tensor's row, as Trained's is to its scale, and what is multiplied is what will be stored."""

    def __init__(self, weight: Format, bias: Tensor | None):
        super().__init__()
        self.start, self.bias = weight, bias
        floats = {name: t.float() for name, t in weight.tensors().items() if t.is_floating_point()}
        self.size = {name: t.square().mean(-1, keepdim=True).sqrt() for name, t in floats.items()}
        self.steps = nn.ParameterDict({name: torch.zeros_like(t) for name, t in floats.items()})

    def smooth(self) -> list[nn.Parameter]:
        return list(self.steps.values())

    def format(self) -> Format:
        tensors = self.start.tensors()
        for name, step in self.steps.items():
            exact, dtype = tensors[name].float() + step * self.size[name], tensors[name].dtype
            tensors[name] = Straight.apply(exact, exact.detach().to(dtype).float())
        return build(self.start.meta(), tensors)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.format().dequantize().to(x.dtype), self.bias)

    @torch.no_grad()
    def weight(self) -> Format:
        """What has been learned, ready to be stored."""
        stored = self.start.tensors()
        return build(self.start.meta(), {name: t.to(stored[name].dtype) for name, t in self.format().tensors().items()})


def learner(weight: Format, W: Tensor, bias: Tensor | None) -> Trained | Smooth:
    """The module that learns in the place of a linear with that weight; W [out, in] is what it was."""
    return Trained(weight, W, bias) if isinstance(weight, IntGroup) else Smooth(weight, bias)


def place(parent: nn.Module, modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Put modules at their paths below `parent`."""
    for path, module in modules:
        above, _, leaf = path.rpartition(".")
        setattr(parent.get_submodule(above), leaf, module)
