"""What a compressed weight is made of: leaves that hold tensors, and five combinators.

    W  =  leaf  |  term + term + ...  |  factor @ factor @ ...  |  inner @ Tᵀ  |  inner · diag(t)  |  [first, second] by columns

A method returns one of these; the artifact stores its tensors and its `meta()`; `build` puts it together again. Kernels look only at
the Format, so a new method needs no new layer class and a new leaf needs one file here.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import CompressError
from .base import Format
from .columns import Columns
from .combine import Product, Scaled, Sum, Transformed
from .dense import Dense
from .float_block import FloatBlock
from .int_group import IntGroup
from .lut import Lut
from .masked import Masked
from .sparse24 import Sparse24
from .trellis import Trellis

__all__ = [
    "Columns", "Dense", "FloatBlock", "Format", "IntGroup", "Lut", "Masked", "Product", "Scaled", "Sparse24", "Sum", "Transformed", "Trellis", "build",
    "join_rows", "split_rows",
]  # fmt: skip

FORMATS: dict[str, type[Format]] = {f.__name__: f for f in (Dense, IntGroup, Lut, FloatBlock, Masked, Sparse24, Trellis, Sum, Product, Transformed, Scaled,
                                                            Columns)}  # fmt: skip


def split_rows(weight: Format, sizes: Sequence[int]) -> list[Format]:
    """Row blocks of a weight that was solved as one: of a product the left factor is cut, and all parts hold the same right one."""
    if isinstance(weight, Product):
        return [Product((left, *weight.factors[1:])) for left in split_rows(weight.factors[0], sizes)]
    if isinstance(weight, FloatBlock) and weight.block[0] == 1:
        return [FloatBlock(codes, scales, weight.divisor, weight.name)
                for codes, scales in zip(weight.codes.split(list(sizes)), weight.scales.split(list(sizes)), strict=True)]  # fmt: skip
    if not isinstance(weight, IntGroup) or (weight.zeros is not None and weight.zeros.is_floating_point()):
        return [Dense(W) for W in (weight.weight if isinstance(weight, Dense) else weight.dequantize()).split(list(sizes))]
    if weight.codes.is_meta:
        return [IntGroup.planned((m, weight.shape[1]), weight.bits_per_code, weight.group_size, weight.zeros is None, weight.scales.dtype, weight.levels)
                for m in sizes]  # fmt: skip
    zeros = [None] * len(sizes) if weight.zeros is None else weight.zero_points().to(torch.uint8).split(list(sizes))
    return [IntGroup.pack(codes, scales, z, weight.bits_per_code, weight.levels)
            for codes, scales, z in zip(weight.unpack().split(list(sizes)), weight.scales.split(list(sizes)), zeros, strict=True)]  # fmt: skip


def join_rows(parts: Sequence[Format], where: str = "weight") -> Format:
    """Rows of one weight below those of the other, the inverse of `split_rows`. Raises CompressError where one format cannot hold them all."""
    if len({p.describe() for p in parts}) > 1:
        raise CompressError(f"{where}: its parts differ: {' and '.join(p.describe() for p in parts)}")
    first, joined = parts[0], {name: torch.cat([p.tensors()[name] for p in parts]) for name in parts[0].tensors()}
    if isinstance(first, IntGroup):
        zeros = None if first.zeros is None else torch.cat([p.zero_points() for p in parts if isinstance(p, IntGroup)]).to(torch.uint8)
        codes = torch.cat([p.unpack() for p in parts if isinstance(p, IntGroup)])  # zero points are packed across rows
        return IntGroup.pack(codes, joined["scales"], zeros, first.bits_per_code, first.levels)
    if isinstance(first, Lut):
        return Lut(joined["codes"], first.table, joined["scales"], (len(joined["codes"]), first.shape[1]), first.name)
    divisors = {float(p.divisor) for p in parts if isinstance(p, FloatBlock) and p.divisor is not None}
    if not isinstance(first, FloatBlock) or first.block[0] > 1 or len(divisors) > 1:
        raise CompressError(f"{where}: its parts have scales that one {first.describe()} cannot hold")
    return FloatBlock(joined["codes"], joined["scales"], first.divisor, first.name)


def build(meta: Mapping, tensors: Mapping[str, Tensor]) -> Format:
    """Rebuild a Format from its `meta()` and its `tensors()`, as a manifest and a shard hold them."""
    name = meta.get("format")
    if name not in FORMATS:
        raise CompressError(f"unknown format {name!r} in the manifest; this version reads {', '.join(FORMATS)}: upgrade compress")
    return FORMATS[name].from_tensors(meta, tensors)
