"""Adapters: how a stored weight learns. Every leaf of its format does what it can, and a format comes out again.

    Dense                      W + (α/r)·B A            merged at the end: not a byte more than before
    Masked, Sparse24 of Dense  W + M ⊙ (α/r)·B A        merged on the mask M: no gradient and no value off it, zeros stay exactly zero
    Product, Sum, Scaled, …    what lies inside, by these rules
    anything else, quantized   Ŵ + (α/r)·B A            kept as a term of its own, Sum(Ŵ, Product(Dense, Dense)); scales of integers learn beside it

With `train: weights` every number of the weight learns instead:

    Dense, Masked, Sparse24    W = M ⊙ 2ᵉP             P for as long as it lies on the mask; masked full tuning, and a factor where W is one
    integer groups             s·(⌊p⌉ − z)             scales s, and codes by straight-through rounding where the original says which were nearly
                                                       another: not a byte more (trained.py)

B [out, r] begins at zero, so before the first step nothing has changed; A [r, in] is random (LoRA, arXiv 2106.09685). The third rule on a 4-bit weight is
QLoRA (arXiv 2305.14314), the second is SPP (arXiv 2405.16057), the last on a 2:4 mask (`merge: false`) SLoPe (arXiv 2405.16325). With `train: scales` the
scales of integer groups learn in the place of adapters, their codes fixed (trained.py).
What learns is kept in fp32, whatever the model computes in: bf16 would lose small steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..formats import Dense, Format, IntGroup, Masked, Product, Scaled, Sparse24, Sum, Transformed
from ..trained import Trained
from .options import Heal

Leaf = Callable[[Format], nn.Module | None]


class _Bounded(torch.autograd.Function):
    """x·Ŵᵀ with Ŵ dequantized again on the way back: only the compressed tensors stay in memory."""

    @staticmethod
    def forward(ctx, x: Tensor, stored: Format) -> Tensor:
        ctx.stored = stored
        return F.linear(x, stored.dequantize(x.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient @ ctx.stored.dequantize(gradient.dtype), None


class Frozen(nn.Module):
    """A weight that does not learn. With dtype None no dense copy of it is kept."""

    def __init__(self, stored: Format, dtype: torch.dtype | None):
        super().__init__()
        self.stored, self.W = stored, None if dtype is None else stored.dequantize(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _Bounded.apply(x, self.stored) if self.W is None else F.linear(x, self.W)

    def weight(self) -> Format:
        return self.stored


class LowRank(nn.Module):
    """(α/r)·B A, or that product alone as a term [out, in] of rank r."""

    def __init__(self, shape: tuple[int, int], rank: int, alpha: float, kept_as: torch.dtype, generator: torch.Generator, device: torch.device):
        super().__init__()
        rank = min(rank, *shape)
        self.scale, self.kept_as = alpha / rank, kept_as
        self.A = nn.Parameter((torch.randn(rank, shape[1], generator=generator) * shape[1] ** -0.5).to(device))
        self.B = nn.Parameter(torch.zeros(shape[0], rank, device=device))

    def matrix(self) -> Tensor:
        return self.scale * (self.B @ self.A)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.A.to(x.dtype)), (self.scale * self.B).to(x.dtype))

    @torch.no_grad()
    def weight(self) -> Product:
        return Product((Dense((self.scale * self.B).to(self.kept_as)), Dense(self.A.to(self.kept_as))))


class Merged(nn.Module):
    """Dense, or dense values on a mask, with a low-rank change that becomes part of it."""

    def __init__(self, frozen: Frozen, change: LowRank):
        super().__init__()
        self.frozen, self.change = frozen, change
        self.keep = None if isinstance(frozen.stored, Dense) else frozen.stored.keep()  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if self.keep is None:
            return self.frozen(x) + self.change(x)
        W = self.frozen.stored.dequantize(x.dtype) if self.frozen.W is None else self.frozen.W
        return F.linear(x, W + (self.change.matrix() * self.keep).to(x.dtype))

    @torch.no_grad()
    def weight(self) -> Format:
        return with_values(self.frozen.stored, self.frozen.stored.dequantize() + self.change.matrix())


class Extended(nn.Module):
    """A weight, frozen or with scales that learn, and a low-rank term that stays one."""

    def __init__(self, base: nn.Module, term: LowRank):
        super().__init__()
        self.base, self.term = base, term

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.term(x)

    def weight(self) -> Sum:
        return _beside(self.base.weight(), self.term.weight())  # type: ignore[operator]


class OnMask(nn.Module):
    """Integer values on a mask: their scales learn, or all of them."""

    def __init__(self, stored: Masked | Sparse24, values: Trained):
        super().__init__()
        self.stored, self.values, self.keep = stored, values, stored.keep()

    def forward(self, x: Tensor) -> Tensor:
        values = self.values.matrix()
        return F.linear(x, torch.zeros(self.keep.shape, device=values.device).masked_scatter(self.keep, values).to(x.dtype))

    def weight(self) -> Format:
        return replace(self.stored, values=self.values.weight())


class Whole(nn.Module):
    """Dense, or dense values on a mask, all of which learn: W = M ⊙ 2ᵉP with 2ᵉ near the root mean square of W, so that a step is as large in every layer."""

    def __init__(self, stored: Format):
        super().__init__()
        W = stored.dequantize()
        self.stored, self.keep = stored, None if isinstance(stored, Dense) else stored.keep()  # type: ignore[attr-defined]
        rms = W.square().mean().sqrt() if self.keep is None else W[self.keep].square().mean().sqrt()
        self.scale = float(torch.exp2(rms.clamp(min=1e-20).log2().round()))  # a power of two: nothing is rounded before the first step
        self.P = nn.Parameter(W / self.scale)

    def matrix(self) -> Tensor:
        W = self.scale * self.P
        return W if self.keep is None else W * self.keep

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix().to(x.dtype))

    @torch.no_grad()
    def weight(self) -> Format:
        return with_values(self.stored, self.matrix())


class Combined(nn.Module):
    """A combinator some of whose parts learn."""

    def __init__(self, stored: Format, parts: list[nn.Module]):
        super().__init__()
        self.stored, self.parts = stored, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.stored, Sum):
            return torch.stack([part(x) for part in self.parts]).sum(0)
        if isinstance(self.stored, Scaled):
            x = (x * self.stored.columns).to(x.dtype)
        elif isinstance(self.stored, Transformed):
            x = x @ self.stored.transform.dequantize(x.dtype)
        for part in reversed(self.parts):
            x = part(x)
        return x

    def weight(self) -> Format:
        parts = tuple(part.weight() for part in self.parts)  # type: ignore[operator]
        if isinstance(self.stored, Sum | Product):
            return type(self.stored)(parts)
        assert isinstance(self.stored, Scaled | Transformed)
        return replace(self.stored, inner=parts[0])


def with_values(stored: Format, W: Tensor) -> Format:
    """W [out, in] fp32 in the form of `stored`, Dense or dense values on a mask: what lies off the mask is left out, the rest rounded once."""
    if isinstance(stored, Dense):
        return Dense(W.to(stored.weight.dtype))
    assert isinstance(stored, Masked | Sparse24)
    values = W[stored.keep()].view(stored.values.shape)
    return replace(stored, values=with_values(stored.values, values))


def learner(stored: Format, options: Heal, *, dtype: torch.dtype, kept_as: torch.dtype, generator: torch.Generator, known: dict[tuple, nn.Module],
            original: Tensor | None = None) -> nn.Module:  # fmt: skip
    """The module that stands for `stored` while it learns: called with x [..., in] it gives x·Ŵᵀ, and its `weight()` what has been learned.

    known: what stands for parts seen before, by their tensors: linears that share a factor share what it learns. original: the weight it was made of;
    without it codes start in the middle of their cells. dtype: of x; kept_as: of a low-rank term that stays one. Without a part that learns
    (`train: scales`) it is a Frozen.
    """
    device = next(iter(stored.tensors().values())).device
    frozen = lambda f: Frozen(f, None if options.bounded else dtype)
    change = lambda f: LowRank(f.shape, options.rank, options.alpha, kept_as, generator, device)

    def low_rank(f: Format) -> nn.Module | None:
        return Merged(frozen(f), change(f)) if _dense(f) else None

    def whole(f: Format) -> nn.Module | None:
        return Whole(f) if _dense(f) else _integers(f, f.dequantize() if f is not stored or original is None else original)

    def once(leaf: Leaf) -> Leaf:
        def taken(f: Format) -> nn.Module | None:
            key = tuple(id(t) for t in f.tensors().values())
            if key not in known and (made := leaf(f)) is not None:
                known[key] = made
            return known.get(key)

        return taken

    if options.train != "lora":
        leaf = whole if options.train == "weights" else _integers
        return _inside(stored, once(leaf), frozen) or frozen(stored)
    if options.merge and (made := _inside(stored, once(low_rank), frozen)) is not None:
        return made
    return Extended((not options.bounded and _inside(stored, once(_integers), frozen)) or frozen(stored), change(stored))


def planned(stored: Format, options: Heal, kept_as: torch.dtype) -> Format:
    """What `stored` [out, in] will have become, on meta: the same, or with a low-rank term beside it where nothing in it takes an adapter up."""
    if options.train != "lora" or (options.merge and _takes(stored)):
        return stored
    (m, n), factor = stored.shape, lambda *shape: Dense(torch.empty(shape, dtype=kept_as, device="meta"))
    rank = min(options.rank, m, n)
    return _beside(stored, Product((factor(m, rank), factor(rank, n))))


def _beside(stored: Format, term: Product) -> Sum:
    return Sum((*(stored.terms if isinstance(stored, Sum) else (stored,)), term))


def _takes(f: Format) -> bool:
    return _dense(f) or any(_takes(part) for part in _parts(f))


def _parts(f: Format) -> tuple[Format, ...]:
    return f.terms if isinstance(f, Sum) else f.factors if isinstance(f, Product) else (f.inner,) if isinstance(f, Scaled | Transformed) else ()


def _dense(f: Format) -> bool:
    return isinstance(f.values if isinstance(f, Masked | Sparse24) else f, Dense)


def integral(f: Format) -> bool:
    """Does it hold integer groups, itself or on a mask or in a part?"""
    return isinstance(f.values if isinstance(f, Masked | Sparse24) else f, IntGroup) or any(map(integral, _parts(f)))


def _integers(f: Format, original: Tensor | None = None) -> nn.Module | None:
    """Integer groups, also on a mask, whose scales learn; with the original weight [out, in] their codes as well."""
    if isinstance(f, Masked | Sparse24) and isinstance(f.values, IntGroup):
        return OnMask(f, _integers(f.values, None if original is None else original[f.keep()].view(f.values.shape)))  # type: ignore[arg-type]
    if not isinstance(f, IntGroup):
        return None
    trained = Trained(f, f.dequantize() if original is None else original.float(), None)
    trained.p.requires_grad_(original is not None)
    return trained


def _inside(f: Format, leaf: Leaf, frozen: Leaf) -> nn.Module | None:
    """`f` with every part that `leaf` takes in its place, or None where it takes none."""
    if (taken := leaf(f)) is not None:
        return taken
    parts = _parts(f)
    made = [_inside(part, leaf, frozen) for part in parts]
    if all(m is None for m in made):
        return None
    return Combined(f, [frozen(part) if m is None else m for part, m in zip(parts, made, strict=True)])  # type: ignore[misc]
