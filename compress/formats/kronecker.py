"""Kronecker: a transform of n = a·b channels by two small matrices, Hadamard's among them; what `Transformed` multiplies inputs by.

    T = diag(d) · (A ⊗ B), or (A ⊗ B) · diag(d) where the diagonal is behind;      x·T = vec(Aᵀ · X · B),   X [a, b] the n channels of x·d

A dense T costs n² numbers and multiply-adds a token, this a² + b² numbers and n·(a + b). Learned factors are FlatQuant's (arXiv 2410.09426), Hadamard
factors with random signs QuaRot's (arXiv 2404.00456); A = I makes T block-diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import hadamard
from .base import Format


@dataclass(frozen=True, eq=False)
class Kronecker(Format):
    left: Tensor  # A [a, a], any float dtype
    right: Tensor  # B [b, b]
    diagonal: Tensor  # d [a·b]
    behind: bool = False

    @classmethod
    def hadamard(cls, n: int, seed: int = 0) -> Kronecker:
        """hadamard.transform with random signs."""
        A, B = hadamard.pair(n)
        return cls(A.float(), B.float(), hadamard.signs(n, seed))

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return len(self.diagonal), len(self.diagonal)

    @property
    def T(self) -> Kronecker:
        return Kronecker(self.left.T.contiguous(), self.right.T.contiguous(), self.diagonal, not self.behind)

    def apply(self, x: Tensor) -> Tensor:
        """x [..., a·b] → x · T in x's dtype."""
        d = self.diagonal.to(x.dtype)
        X = (x if self.behind else x * d).unflatten(-1, (len(self.left), len(self.right)))
        y = (self.left.to(x.dtype).T @ X @ self.right.to(x.dtype)).flatten(-2)
        return y * d if self.behind else y

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        d, T = self.diagonal.float(), torch.kron(self.left.float(), self.right.float())
        return (T * d if self.behind else d[:, None] * T).to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right, "diagonal": self.diagonal}

    def meta(self) -> dict:
        return {"format": "Kronecker", "behind": self.behind}

    @classmethod
    def from_tensors(cls, meta, tensors) -> Kronecker:
        return cls(tensors["left"], tensors["right"], tensors["diagonal"], meta["behind"])

    def describe(self) -> str:
        return f"kron {len(self.left)}×{len(self.right)}"
