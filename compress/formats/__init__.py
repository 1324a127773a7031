"""What a compressed weight is made of: leaves that hold tensors, and five combinators.

    W  =  leaf  |  term + term + ...  |  factor @ factor @ ...  |  inner @ Tᵀ  |  inner · diag(t)  |  [first, second] by columns

A method returns one of these; the artifact stores its tensors and its `meta()`; `build` puts it together again. Kernels look only at
the Format, so a new method needs no new layer class and a new leaf needs one file here.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import CompressError
from . import packing
from .base import Format
from .columns import Columns
from .combine import Product, Scaled, Sum, Transformed
from .dense import Dense
from .float_block import FloatBlock
from .int_group import IntGroup
from .kronecker import Kronecker
from .lut import Lut
from .masked import Masked
from .sparse24 import Sparse24
from .trellis import Trellis

__all__ = [
    "Columns", "Dense", "FloatBlock", "Format", "IntGroup", "Kronecker", "Lut", "Masked", "Product", "Scaled", "Sparse24", "Sum", "Transformed", "Trellis",
    "build", "split_rows",
]  # fmt: skip

FORMATS: dict[str, type[Format]] = {f.__name__: f for f in (Dense, IntGroup, Lut, FloatBlock, Masked, Sparse24, Trellis, Sum, Product, Transformed, Scaled,
                                                            Columns, Kronecker)}  # fmt: skip


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


def join_rows(weights: Sequence[Format]) -> Format | None:
    """The inverse of `split_rows`: one weight of all their rows, the same numbers to the bit, or None where no format holds them together."""
    first, kind = weights[0], type(weights[0])
    described = [w.meta() | {"shape": w.shape[1]} | {name: t.dtype for name, t in w.tensors().items()} for w in weights]
    if kind not in (Dense, FloatBlock, IntGroup, Lut) or any(d != described[0] for d in described):
        return None
    joined = {name: torch.cat([w.tensors()[name] for w in weights]) for name in first.tensors()}
    alike = lambda name: all(torch.equal(w.tensors()[name], first.tensors()[name]) for w in weights)
    if isinstance(first, FloatBlock):
        if first.scales.shape != (first.shape[0], first.shape[1] // first.block[1]) or (first.divisor is not None and not alike("divisor")):
            return None
        joined |= {} if first.divisor is None else {"divisor": first.divisor}
    if isinstance(first, Lut) and first.scales is not None:
        if len(first.table) > 1 or not alike("table"):
            return None
        joined |= {"table": first.table}
    if isinstance(first, IntGroup) and first.zeros is not None and not first.zeros.is_floating_point():  # one stream of bits over all rows
        zeros = torch.cat([w.zero_points().to(torch.uint8).flatten() for w in weights])  # type: ignore[attr-defined]
        joined |= {"zeros": packing.pack_bytes(zeros[None], first.bits_per_code)[0]}
    rows = sum(w.shape[0] for w in weights)
    return kind.from_tensors(first.meta() | {"shape": [rows, first.shape[1]]}, joined)


def build(meta: Mapping, tensors: Mapping[str, Tensor]) -> Format:
    """Rebuild a Format from its `meta()` and its `tensors()`, as a manifest and a shard hold them."""
    name = meta.get("format")
    if name not in FORMATS:
        raise CompressError(f"unknown format {name!r} in the manifest; this version reads {', '.join(FORMATS)}: upgrade compress")
    return FORMATS[name].from_tensors(meta, tensors)
