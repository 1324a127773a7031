"""Trained: a linear whose integer weight learns. Codes and scales are what will be stored, at every step.

    ŵ = s·(⌊p⌉ − z)          p lies in the cell of its code; a code changes when its p leaves the cell

Rounding passes gradients straight through. p starts where the original weight lies within the cell of its present code, so that the codes which were
nearly another are the first to change.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .formats import Dense, Format, IntGroup, build
from .shadow import cast, masked, stored, thin

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

    def codes(self) -> Tensor:
        return self.p.detach().round().clamp_(0, self.start.levels - 1)

    def scale(self) -> Tensor:
        s = self.base * self.log_s.exp()
        return Straight.apply(s, s.detach().to(self.start.scales.dtype).float())

    def matrix(self) -> Tensor:
        """fp32 [out, in], with a gradient."""
        return ((Straight.apply(self.p, self.codes()) - self.zero) * self.scale()).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix().to(x.dtype), self.bias)

    @torch.no_grad()
    def weight(self) -> IntGroup:
        """What has been learned, ready to be stored."""
        zeros = self.start.zeros if self.start.zeros is None or self.start.zeros.is_floating_point() else self.zero[..., 0].to(torch.uint8)
        return IntGroup.pack(self.codes().flatten(1).to(torch.uint8), self.scale()[..., 0].to(self.start.scales.dtype), zeros,
                             self.start.bits_per_code, self.start.levels)  # fmt: skip


class Values(nn.Module):
    """In the place of a linear of any other format: its floats learn (factors, kept values, scales, tables), codes and masks stay as they are.

    `known` holds the parameter of every tensor seen, so that linears that share a factor train one. With `moving` masks learn too (shadow.py)."""

    def __init__(self, weight: Format, bias: Tensor | None, known: dict[int, nn.Parameter], moving: bool = False):
        super().__init__()
        self.mask = weight if moving and masked(weight) else None
        self.start, self.bias = weight if self.mask is None else cast(weight), bias
        weight = self.start
        self.free = nn.ParameterDict({name: known.setdefault(id(t), nn.Parameter(t.float())) for name, t in weight.tensors().items() if t.is_floating_point()})

    def tensors(self) -> dict[str, Tensor]:
        """As they would be stored; gradients pass through the rounding."""
        before = self.start.tensors()
        return before | {name: Straight.apply(p, p.detach().to(before[name].dtype).float()) for name, p in self.free.items()}

    def matrix(self) -> Tensor:
        """fp32 [out, in], with a gradient."""
        weight = build(self.start.meta(), self.tensors())
        return (weight if self.mask is None else thin(weight, self.mask)).dequantize()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix().to(x.dtype), self.bias)

    @torch.no_grad()
    def weight(self) -> Format:
        """What has been learned, ready to be stored."""
        before = self.start.tensors()
        learned = build(self.start.meta(), before | {name: p.detach().to(before[name].dtype) for name, p in self.free.items()})
        return learned if self.mask is None else stored(learned, self.mask)


def floats(weight: Format) -> bool:
    """Is it for `Values` to train? An IntGroup is `Trained`; Dense is a weight that nothing was done to."""
    return not isinstance(weight, (IntGroup, Dense)) and any(t.is_floating_point() for t in weight.tensors().values())


def vectors(model: nn.Module, blocks: str, linears: Container[str]) -> dict[str, nn.Parameter]:
    """The vectors of the blocks by name, biases of the compressed linears apart: weights and biases of norms, and whatever else is one number a channel."""
    return {name: p for name, p in model.named_parameters()
            if name.startswith(blocks + ".") and p.dim() == 1 and name.rpartition(".")[0] not in linears}  # fmt: skip


def place(parent: nn.Module, modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Put modules at their paths below `parent`."""
    for path, module in modules:
        above, _, leaf = path.rpartition(".")
        setattr(parent.get_submodule(above), leaf, module)
