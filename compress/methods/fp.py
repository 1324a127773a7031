"""Rounding to 8- and 4-bit floats: FP8 E4M3, MXFP4 and NVFP4 weights, each to the nearest of its block, no calibration.

    fp8     s = amax / 448                                    for a row, the matrix or a square of 128×128
    mxfp4   k = ⌊log₂ amax⌋ − 2 + {−1, 0, 1}, the best        for 32 columns: the standard's exponent clips what is above 6·2^k
    nvfp4   s = E4M3(G · amax / 6) or E4M3(G · amax / 4)      for 16 columns, whichever errs less: E2M1 has a gap between 4 and 6

Micikevicius et al. (arXiv 2209.05433), OCP Microscaling 1.0, four-over-six (arXiv 2512.02010). NVIDIA sets G from the largest weight; here it is 1024
unless a weight is above 1.5: a power of two loses nothing, and q, k and v, which servers multiply as one matrix, come to share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..calibration.statistics import Stats
from ..formats.float_block import BLOCK, E2M1, SQUARE, FloatBlock
from ..formats.int_group import check_group_size
from .options import IntOptions

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of E4M3


@dataclass(frozen=True)
class FP:
    type: Literal["fp8", "mxfp4", "nvfp4"] = "fp8"  # 8 bits E4M3; 4 bits E2M1 with a power of two for 32 columns, or with an E4M3 scale for 16
    scale: Literal["channel", "tensor", "block"] = "channel"  # what shares a scale of fp8: a row, the matrix, a square of 128×128
    search: bool = True  # 4 bits: try the scales beside the usual one

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, weight: Tensor, stats: Stats | None, *, stored: torch.dtype, where: str = "weight") -> FloatBlock:
        """weight [out, in] fp32 → FloatBlock. Raises CompressError where in is no multiple of the block of a 4-bit format."""
        out, n = weight.shape
        if self.type == "fp8":
            return self._fp8(weight, IntOptions.scale_dtype(stored))
        W = weight.view(out, -1, check_group_size(n, BLOCK[self.type], where))
        amax = W.abs().amax(-1)
        G: Tensor | None = None
        if self.type == "mxfp4":
            k = torch.floor(torch.log2(amax.clamp(min=2.0**-120))) - 2
            candidates = [(k + d + 127).clamp(0, 254).to(torch.uint8) for d in ((0, -1, 1) if self.search else (0,))]
        else:
            G = torch.exp2(torch.floor(torch.log2(256 * 6 / amax.max().clamp(min=1e-38)))).clamp(max=1024).reshape(1)
            candidates = [(G * amax / top).clamp(max=LARGEST).to(E4M3).view(torch.uint8) for top in ((6, 4) if self.search else (6,))]
        best, codes, error = candidates[0], torch.zeros_like(W, dtype=torch.uint8), torch.full_like(amax, torch.inf)
        for scales in candidates:
            f = FloatBlock(weight, scales, G, self.type).factors()[..., None]
            q = nearest(W / torch.where(f > 0, f, 1.0))
            e = (torch.tensor(E2M1, device=W.device)[(q & 7).int()] * f - W.abs()).square_().sum(-1)
            better = e < error
            best, error, codes = torch.where(better, scales, best), torch.where(better, e, error), torch.where(better[..., None], q, codes)
        codes = codes.view(out, -1, 2)
        return FloatBlock(codes[..., 0] | codes[..., 1] << 4, best, G, self.type)

    def _fp8(self, W: Tensor, dtype: torch.dtype) -> FloatBlock:
        out, n = W.shape
        rows, columns = {"channel": (1, n), "tensor": (out, n), "block": (SQUARE, SQUARE)}[self.scale]
        padded = torch.nn.functional.pad(W, (0, -n % columns, 0, -out % rows))
        amax = padded.abs().view(len(padded) // rows, rows, -1, columns).amax((1, 3))
        scales = (amax / LARGEST).to(dtype)
        scales = torch.where(scales > 0, scales, 1.0)
        spread = scales.float().repeat_interleave(rows, 0)[:out].repeat_interleave(columns, 1)[:, :n]
        return FloatBlock((W / spread).clamp(-LARGEST, LARGEST).to(E4M3).view(torch.uint8), scales, None, "fp8")

    def planned(self, shape: tuple[int, int], stored: torch.dtype, where: str) -> FloatBlock:
        """The format this gives for a weight of that shape, on meta. Raises CompressError where it cannot be done."""
        (out, n), empty = shape, lambda *size, dtype=torch.uint8: torch.empty(size, dtype=dtype, device="meta")
        if self.type == "fp8":
            size = {"channel": (out, 1), "tensor": (1, 1), "block": (-(-out // SQUARE), -(-n // SQUARE))}[self.scale]
            return FloatBlock(empty(out, n), empty(*size, dtype=IntOptions.scale_dtype(stored)), None, "fp8")
        blocks = n // check_group_size(n, BLOCK[self.type], where)
        return FloatBlock(empty(out, n // 2), empty(out, blocks), empty(1, dtype=torch.float32) if self.type == "nvfp4" else None, self.type)


def nearest(x: Tensor) -> Tensor:
    """uint8 E2M1 codes of the nearest values, ties to the even code; what is beyond 6 becomes 6."""
    levels = torch.tensor(E2M1, device=x.device)
    middle = (levels[1:] + levels[:-1]) / 2
    middle[1::2] = torch.nextafter(middle[1::2], torch.zeros_like(middle[1::2]))  # a tie above an odd code goes up
    return torch.bucketize(x.abs(), middle, out_int32=True).to(torch.uint8) | torch.signbit(x).to(torch.uint8) << 3
