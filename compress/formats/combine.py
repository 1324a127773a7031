"""The algebra over leaves: Sum, Product, Transformed, Scaled. A method that mixes ideas returns one of these, not a layer class of its own.

    Sum(A, B)         A + B            quantized + low-rank correction, sparse + low rank
    Product(A, B)     A · B            low rank (two Dense), dense × sparse, quantized factors
    Transformed(A, T) A · Tᵀ           y = (x·T) Aᵀ: an online Hadamard or Kronecker transform of the input
    Scaled(A, t)      A · diag(t)      y = (x·t) Aᵀ: one factor an input column, the diagonal transform
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Format


def nested(prefix: str | int, part: Format) -> dict[str, Tensor]:
    """The tensors of a Format that lies within another, under `prefix_`; `rebuild` is the inverse."""
    return {f"{prefix}_{name}": t for name, t in part.tensors().items()}


def rebuild(prefix: str | int, meta, tensors) -> Format:
    from . import build

    return build(meta, {name.removeprefix(f"{prefix}_"): t for name, t in tensors.items() if name.startswith(f"{prefix}_")})


def _tensors(parts: tuple[Format, ...]) -> dict[str, Tensor]:
    return {name: t for i, part in enumerate(parts) for name, t in nested(i, part).items()}


def _parts(metas: list, tensors) -> tuple[Format, ...]:
    return tuple(rebuild(i, meta, tensors) for i, meta in enumerate(metas))


@dataclass(frozen=True, eq=False)
class Sum(Format):
    terms: tuple[Format, ...]

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.terms[0].shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        total = self.terms[0].dequantize().clone()
        for term in self.terms[1:]:
            total += term.dequantize()
        return total.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return _tensors(self.terms)

    def meta(self) -> dict:
        return {"format": "Sum", "terms": [t.meta() for t in self.terms]}

    @classmethod
    def from_tensors(cls, meta, tensors) -> Sum:
        return cls(_parts(meta["terms"], tensors))

    def describe(self) -> str:
        return " + ".join(t.describe() for t in self.terms)


@dataclass(frozen=True, eq=False)
class Product(Format):
    factors: tuple[Format, ...]  # [out, r₁], [r₁, r₂], … [rₖ, in]

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.factors[0].shape[0], self.factors[-1].shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        product = self.factors[0].dequantize()
        for factor in self.factors[1:]:
            product = product @ factor.dequantize()
        return product.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return _tensors(self.factors)

    def meta(self) -> dict:
        return {"format": "Product", "factors": [f.meta() for f in self.factors]}

    @classmethod
    def from_tensors(cls, meta, tensors) -> Product:
        return cls(_parts(meta["factors"], tensors))

    def describe(self) -> str:
        return f"rank {self.factors[0].shape[1]} ({' × '.join(f.describe() for f in self.factors)})"


@dataclass(frozen=True, eq=False)
class Transformed(Format):
    inner: Format  # [out, in] in the transformed basis
    transform: Format  # T [in, in]: the input is multiplied by T from the right before the inner weight sees it

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.inner.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.inner.dequantize() @ self.transform.dequantize().T).to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return _tensors((self.inner, self.transform))

    def meta(self) -> dict:
        return {"format": "Transformed", "parts": [self.inner.meta(), self.transform.meta()]}

    @classmethod
    def from_tensors(cls, meta, tensors) -> Transformed:
        return cls(*_parts(meta["parts"], tensors))

    def describe(self) -> str:
        return f"{self.inner.describe()} ∘ T"


@dataclass(frozen=True, eq=False)
class Scaled(Format):
    inner: Format  # [out, in], what is left of the matrix when its columns are divided by t
    columns: Tensor  # t [in], any float dtype

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.inner.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.inner.dequantize() * self.columns.float()).to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return _tensors((self.inner,)) | {"columns": self.columns}

    def meta(self) -> dict:
        return {"format": "Scaled", "inner": self.inner.meta()}

    @classmethod
    def from_tensors(cls, meta, tensors) -> Scaled:
        return cls(_parts([meta["inner"]], tensors)[0], tensors["columns"])

    def describe(self) -> str:
        return f"{self.inner.describe()} · t"
