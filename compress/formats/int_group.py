"""IntGroup: integer codes on a uniform grid, one scale (and zero point) a group of input columns.

    Ŵ[i, j] = (q[i, j] − z[i, g]) · s[i, g],   g = j // group_size

The workhorse of weight quantization: 1 to 8 bits or ternary, symmetric or asymmetric, grouped or per channel (group_size = in). Codes are
packed densely, so 3 bits cost 3 bits; zero points cost `bits` each, or 16 where a method fits them as
fractions of a step (HQQ); scales keep the 16 bits they were rounded to BEFORE the codes were
chosen, so nothing is ever rounded twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CompressError
from . import packing
from .base import Format

SLICE = 2**19  # weights that are dequantized at a time


def symmetric_zero(bits: int, levels: int) -> float:
    """The implied zero point of a symmetric grid: −2^(b−1) … 2^(b−1)−1, ±½ for one bit, −1 0 1 for ternary."""
    return 1.0 if levels == 3 else 0.5 if bits == 1 else float(2 ** (bits - 1))


def check_group_size(in_features: int, group_size: int, where: str) -> int:
    """The columns of a group; −1 means one group a row. Raises CompressError naming sizes that divide."""
    if group_size == -1:
        return in_features
    if group_size <= 0 or in_features % group_size:
        fits = [g for g in (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256) if in_features % g == 0] or [in_features]
        raise CompressError(f"{where}: in_features {in_features} is not a multiple of group_size {group_size}; "
                            f"use {', '.join(map(str, fits))} or -1 (one group a row)")  # fmt: skip
    return group_size


@dataclass(frozen=True, eq=False)
class IntGroup(Format):
    codes: Tensor  # int32 [out, ceil(in·bits/32)]; ternary: uint8 [out, ceil(in/5)]
    scales: Tensor  # [out, groups] bf16, fp16 or fp32
    zeros: Tensor | None  # uint8 [ceil(out·groups·bits/8)], the packed zero points, or float [out, groups]; None: symmetric
    shape: tuple[int, int]
    bits_per_code: int
    group_size: int
    levels: int  # 2**bits, or 3

    @classmethod
    def pack(cls, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, levels: int | None = None) -> IntGroup:
        """codes uint8 [out, in], scales [out, groups], zeros uint8 or float [out, groups] or None → the packed format."""
        (out, n), groups = codes.shape, scales.shape[1]
        levels = levels or 2**bits
        packed = packing.pack_trits(codes) if levels == 3 else packing.pack_rows(codes, bits)
        if zeros is not None and not zeros.is_floating_point():
            zeros = packing.pack_bytes(zeros.reshape(1, -1), bits)[0]
        return cls(packed, scales, zeros, (out, n), bits, n // groups, levels)

    @classmethod
    def planned(cls, shape: tuple[int, int], bits: int, group_size: int, sym: bool, scale_dtype: torch.dtype, levels: int | None = None) -> IntGroup:
        """The same format with tensors on meta: what `plan` weighs before a byte is read."""
        out, n = shape
        levels = levels or 2**bits
        empty = lambda *size, dtype: torch.empty(size, dtype=dtype, device="meta")
        codes = empty(out, -(-n // 5), dtype=torch.uint8) if levels == 3 else empty(out, packing.packed_words(n, bits), dtype=torch.int32)
        zeros = None if sym else empty(-(-out * (n // group_size) * bits // 8), dtype=torch.uint8)
        return cls(codes, empty(out, n // group_size, dtype=scale_dtype), zeros, shape, bits, group_size, levels)

    @property
    def groups(self) -> int:
        return self.shape[1] // self.group_size

    def unpack(self, rows: slice = slice(None)) -> Tensor:
        """uint8 codes [out, in], or some rows of them."""
        codes, n = self.codes[rows], self.shape[1]
        return packing.unpack_trits(codes, n) if self.levels == 3 else packing.unpack_rows(codes, n, self.bits_per_code)

    def zero_points(self) -> Tensor:
        """fp32 [out, groups]."""
        if self.zeros is None:
            zero = symmetric_zero(self.bits_per_code, self.levels)
            return torch.full((self.shape[0], self.groups), zero, device=self.scales.device)
        if self.zeros.is_floating_point():
            return self.zeros.float()
        count = self.shape[0] * self.groups
        return packing.unpack_bytes(self.zeros[None], count, self.bits_per_code).view(self.shape[0], self.groups).float()

    def slices(self) -> list[slice]:
        """Rows that are dequantized at a time: on CPU so few that what is between codes and result stays in the cache."""
        out, n = self.shape
        rows = max(1, SLICE // n) if self.codes.device.type == "cpu" and not torch.compiler.is_compiling() else out
        return [slice(i, i + rows) for i in range(0, out, rows)]

    def dequantize_slices(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """The weight slice by slice, each element rounded once from fp32."""
        zeros = self.zero_points()[:, :, None]
        for at in self.slices():
            q = self.unpack(at).view(-1, self.groups, self.group_size).float()
            yield at, q.sub_(zeros[at]).mul_(self.scales[at].float()[:, :, None]).view(-1, self.shape[1]).to(dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        if len(self.slices()) == 1:
            return next(self.dequantize_slices(dtype))[1]
        W = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        for at, part in self.dequantize_slices(dtype):
            W[at] = part
        return W

    def tensors(self) -> dict[str, Tensor]:
        kept = {"codes": self.codes, "scales": self.scales}
        return kept if self.zeros is None else kept | {"zeros": self.zeros}

    def meta(self) -> dict:
        return {"format": "IntGroup", "shape": list(self.shape), "bits": self.bits_per_code,
                "group_size": self.group_size, "levels": self.levels}  # fmt: skip

    @classmethod
    def from_tensors(cls, meta, tensors) -> IntGroup:
        return cls(tensors["codes"], tensors["scales"], tensors.get("zeros"), tuple(meta["shape"]), meta["bits"],
                   meta["group_size"], meta["levels"])  # fmt: skip

    def describe(self) -> str:
        size = "channel" if self.group_size == self.shape[1] else f"g{self.group_size}"
        zero = "sym" if self.zeros is None else "float zero" if self.zeros.is_floating_point() else "asym"
        return f"{'ternary' if self.levels == 3 else f'int{self.bits_per_code}'} {size} {zero}"
