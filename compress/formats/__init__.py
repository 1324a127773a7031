"""What a compressed weight is made of: leaves that hold tensors, and five combinators.

    W  =  leaf  |  term + term + ...  |  factor @ factor @ ...  |  inner @ Tᵀ  |  inner · diag(t)  |  [first, second] by columns

A method returns one of these; the artifact stores its tensors and its `meta()`; `build` puts it together again. Kernels look only at
the Format, so a new method needs no new layer class and a new leaf needs one file here.
"""

from collections.abc import Mapping

from torch import Tensor

from ..errors import CompressError
from .base import Format
from .columns import Columns
from .combine import Product, Scaled, Sum, Transformed
from .dense import Dense
from .int_group import IntGroup
from .lut import Lut
from .masked import Masked
from .sparse24 import Sparse24
from .trellis import Trellis

__all__ = ["Columns", "Dense", "Format", "IntGroup", "Lut", "Masked", "Product", "Scaled", "Sparse24", "Sum", "Transformed", "Trellis", "build"]

FORMATS: dict[str, type[Format]] = {f.__name__: f for f in (Dense, IntGroup, Lut, Masked, Sparse24, Trellis, Sum, Product, Transformed, Scaled, Columns)}


def build(meta: Mapping, tensors: Mapping[str, Tensor]) -> Format:
    """Rebuild a Format from its `meta()` and its `tensors()`, as a manifest and a shard hold them."""
    name = meta.get("format")
    if name not in FORMATS:
        raise CompressError(f"unknown format {name!r} in the manifest; this version reads {', '.join(FORMATS)}: upgrade compress")
    return FORMATS[name].from_tensors(meta, tensors)
