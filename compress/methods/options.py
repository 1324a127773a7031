"""The options that every integer quantizer shares, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import CompressError
from ..formats.int_group import IntGroup, check_group_size
from .grid import Clip, Sym


@dataclass(frozen=True)
class IntOptions:
    bits: Literal[1, 2, 3, 4, 5, 6, 7, 8, "ternary"] = 4  # bits of a code
    group_size: int = 128  # input columns that share a scale; -1: one scale a row
    sym: Sym = False  # False: a zero point a group; True: zero in the middle; "full": the scale takes the sign of the largest weight
    clip: Clip = "hessian"  # how the span of a group is shrunk: "none", "mse" (|.|^2.4), "hessian" (by what an error in each column costs) or "asymmetric"

    def __post_init__(self):
        if self.bits in (1, "ternary") and not self.sym:
            raise CompressError(f"bits {self.bits} has too few levels for a zero point; set sym to true")
        if self.clip == "asymmetric" and self.sym:
            raise CompressError("clip asymmetric moves the zero point, which sym fixes; set sym to false or clip to hessian")

    @property
    def levels(self) -> int:
        return 3 if self.bits == "ternary" else 2**self.bits

    @property
    def code_bits(self) -> int:
        return 2 if self.bits == "ternary" else self.bits

    @staticmethod
    def scale_dtype(stored: torch.dtype) -> torch.dtype:
        """Scales are kept in the model's own 16-bit type, which is what consumers load; bf16 where the model is wider."""
        return stored if stored in (torch.float16, torch.bfloat16) else torch.bfloat16

    def planned(self, shape: tuple[int, int], stored: torch.dtype, where: str) -> IntGroup:
        """The format this gives for a weight of that shape, on meta. Raises CompressError where it cannot be done."""
        size = check_group_size(shape[1], self.group_size, where)
        return IntGroup.planned(shape, self.code_bits, size, bool(self.sym), self.scale_dtype(stored), self.levels)
