"""Trained: a linear whose integer weight learns. Codes and scales are what will be stored, at every step.

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

FREE = ("Masked", "Sparse24", "Product", "Sum")  # formats of floats that `Values` trains; Dense is a weight that nothing was done to
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

    def forward(self, x: Tensor) -> Tensor:
        W = ((Straight.apply(self.p, self.codes()) - self.zero) * self.scale()).flatten(1)
        return F.linear(x, W.to(x.dtype), self.bias)

    @torch.no_grad()
    def weight(self) -> IntGroup:
        """What has been learned, ready to be stored."""
        zeros = None if self.start.zeros is None else self.zero[..., 0].to(torch.uint8)
        return IntGroup.pack(self.codes().flatten(1).to(torch.uint8), self.scale()[..., 0].to(self.start.scales.dtype), zeros,
                             self.start.bits_per_code, self.start.levels)  # fmt: skip


class Values(nn.Module):
    """In the place of a linear whose stored numbers are floats: factors of a product, kept values of a mask, which stays as it is.

    `known` holds the parameter of every tensor seen, so that linears that share a factor train one."""

    def __init__(self, weight: Format, bias: Tensor | None, known: dict[int, nn.Parameter]):
        super().__init__()
        self.start, self.bias = weight, bias
        self.free = nn.ParameterDict({name: known.setdefault(id(t), nn.Parameter(t.float())) for name, t in weight.tensors().items() if t.is_floating_point()})

    def tensors(self) -> dict[str, Tensor]:
        """As they would be stored; gradients pass through the rounding."""
        stored = self.start.tensors()
        return stored | {name: Straight.apply(p, p.detach().to(stored[name].dtype).float()) for name, p in self.free.items()}

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, build(self.start.meta(), self.tensors()).dequantize().to(x.dtype), self.bias)

    @torch.no_grad()
    def weight(self) -> Format:
        """What has been learned, ready to be stored."""
        stored = self.start.tensors()
        return build(self.start.meta(), stored | {name: p.detach().to(stored[name].dtype) for name, p in self.free.items()})


def floats(weight: Format) -> bool:
    """Are all the numbers of this format floats (and masks)? Then its values can learn; integers have scales, which `Trained` knows."""
    meta = weight.meta()
    return meta["format"] in FREE and not any(leaf in str(meta) for leaf in ("IntGroup", "Lut", "Trellis"))


def place(parent: nn.Module, modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Put modules at their paths below `parent`."""
    for path, module in modules:
        above, _, leaf = path.rpartition(".")
        setattr(parent.get_submodule(above), leaf, module)
