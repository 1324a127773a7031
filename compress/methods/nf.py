"""NF4 and FP4: 4-bit codes into a fixed table of 16 values, scaled by the largest weight of every block; no calibration.

    s = max |w| over the block;   q = nearest level of w · (1/s), decided by the midpoints between levels, ties to the lower one

NF4's levels are quantiles of a normal distribution, so that normal weights use all codes equally often (QLoRA, Dettmers et al., arXiv
2305.14314); FP4's are a sign, two exponent bits and one of mantissa. Codes and scales are bitsandbytes' own, whose blocks run through the
weight row by row: the same blocks as ours where rows are multiples of group_size. It keeps s in fp32; we keep it in the dtype of the
checkpoint, which loses nothing, because s is one of its weights: 4.25 bits instead of 4.5, and the same values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..calibration.statistics import Stats
from ..formats import Lut
from ..formats.int_group import check_group_size

TABLES = {  # the values that bitsandbytes 0.50 stores, by code
    "nf4": (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
            -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
            0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    "fp4": (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
            -0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204, -0.25),
}  # fmt: skip


@dataclass(frozen=True)
class NF:
    type: Literal["nf4", "fp4"] = "nf4"  # levels at the quantiles of a normal distribution, or 4-bit floats
    group_size: int = 64  # input columns that share a scale; -1: one scale a row

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, weight: Tensor, stats: Stats | None, *, stored: torch.dtype, where: str = "weight") -> Lut:
        """weight [out, in] fp32 → Lut with one table [1, 16] fp32. Raises CompressError where in is no multiple of group_size."""
        size = check_group_size(weight.shape[1], self.group_size, where)
        table = torch.tensor(TABLES[self.type], device=weight.device)
        groups = weight.reshape(len(weight), -1, size)
        scales = groups.abs().amax(-1).to(self.scale_dtype(stored))
        levels, code = table.sort(stable=True)
        x = groups * (1 / scales.float().clamp(min=1e-38))[..., None]  # times the reciprocal, as bitsandbytes: division would round differently
        nearest = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2, out_int32=True)
        return Lut.pack(code.to(torch.uint8)[nearest].view(weight.shape), table[None], scales, self.type)

    @staticmethod
    def scale_dtype(stored: torch.dtype) -> torch.dtype:
        return stored if stored in (torch.float16, torch.bfloat16) else torch.float32

    def planned(self, shape: tuple[int, int], stored: torch.dtype, where: str) -> Lut:
        """The format this gives for a weight of that shape, on meta. Raises CompressError where it cannot be done."""
        size = check_group_size(shape[1], self.group_size, where)
        empty = lambda *shape, dtype: torch.empty(shape, dtype=dtype, device="meta")
        return Lut.pack(empty(*shape, dtype=torch.uint8), empty(1, 16, dtype=torch.float32),
                        empty(shape[0], shape[1] // size, dtype=self.scale_dtype(stored)), self.type)  # fmt: skip
