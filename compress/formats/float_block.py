"""FloatBlock: 8- and 4-bit floats, one scale a block; what tensor cores multiply by themselves.

    fp8      Ŵ = e · s       e in E4M3 (4 exponent bits, 3 of mantissa, to ±448), s a float a row, a matrix or a square of 128×128
    mxfp4    Ŵ = e · 2^k     e in E2M1 (0 ½ 1 1½ 2 3 4 6 and their negatives), k a byte for 32 columns: 4.25 bits (OCP Microscaling 1.0)
    nvfp4    Ŵ = e · s / G   e in E2M1, s in E4M3 for 16 columns, G one fp32 number for the matrix: 4.5 bits

Floats spend their codes evenly over magnitudes, integers evenly over values: better on heavy tails, no better on weights that are nearly normal
(algorithms.md §35). Bytes are stored as uint8, so that nothing on the way has to know the dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Format

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the lower three bits of a code; the fourth is the sign
SQUARE = 128
BLOCK = {"mxfp4": 32, "nvfp4": 16}  # columns that share a scale


def _e2m1(device: torch.device) -> Tensor:
    """The values of the 16 codes, as E4M3 has them: nothing comes from the host, so that a CUDA graph can be captured around it."""
    code = torch.arange(16, dtype=torch.uint8, device=device)
    size, sign = code & 7, (code & 8) << 4
    return (sign | torch.where(size > 1, 48 + 4 * size, 48 * size)).view(torch.float8_e4m3fn).float()


@dataclass(frozen=True, eq=False)
class FloatBlock(Format):
    codes: Tensor  # uint8: E4M3 bytes [out, in], or [out, in/2] with two E2M1 codes a byte, the first in its lower half
    scales: Tensor  # fp8: float [out, 1], [1, 1] or [ceil(out/128), ceil(in/128)]; mxfp4: uint8 k + 127, nvfp4: uint8 E4M3 bytes [out, in/block]
    divisor: Tensor | None  # nvfp4: G, fp32 [1]
    name: str

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.codes.shape[0], self.codes.shape[1] * (1 if self.name == "fp8" else 2)

    @property
    def block(self) -> tuple[int, int]:
        """(rows, columns) that share a scale."""
        if self.name in BLOCK:
            return 1, BLOCK[self.name]
        (out, n), (rows, columns) = self.shape, self.scales.shape
        return (1, n) if (rows, columns) == (out, 1) else (out, n) if (rows, columns) == (1, 1) else (SQUARE, SQUARE)

    def unpack(self) -> Tensor:
        """uint8 codes [out, in]."""
        return self.codes if self.name == "fp8" else torch.stack([self.codes & 15, self.codes >> 4], -1).view(self.shape)

    def factors(self) -> Tensor:
        """fp32, what a code of each block is multiplied by, in the shape of `scales`."""
        if self.name == "mxfp4":
            return torch.exp2(self.scales.float() - 127)
        if self.divisor is None:
            return self.scales.float()
        return self.scales.view(torch.float8_e4m3fn).float() / self.divisor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        q, (rows, columns), (out, n) = self.unpack(), self.block, self.shape
        values = q.view(torch.float8_e4m3fn).float() if self.name == "fp8" else _e2m1(q.device).index_select(0, q.flatten().int()).view(out, n)
        return (values * self.factors().repeat_interleave(rows, 0)[:out].repeat_interleave(columns, 1)[:, :n]).to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        kept = {"codes": self.codes, "scales": self.scales}
        return kept if self.divisor is None else kept | {"divisor": self.divisor}

    def meta(self) -> dict:
        return {"format": "FloatBlock", "name": self.name}

    @classmethod
    def from_tensors(cls, meta, tensors) -> FloatBlock:
        return cls(tensors["codes"], tensors["scales"], tensors.get("divisor"), meta["name"])

    def describe(self) -> str:
        rows, columns = self.block
        return self.name if self.name in BLOCK else f"fp8 {'channel' if rows == 1 else 'tensor' if (rows, columns) == self.shape else '128×128'}"
