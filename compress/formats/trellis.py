"""Trellis: the K bits of a weight choose one of 2^K values, and which values those are is up to the bits of the weights before it.

    Ŵ = diag(±1) · H_m · V · diag(s),      V_ij = LUT_K[state_ij],      state = the last L bits of the stream up to and with this weight's K

Column j of V is one bit stream per `length` rows, at its own rate K_j (mean: `bits`); streams bite their tails (the state before the first weight
is the end of the stream), so a weight costs K_j bits. Neighbours share L − K bits of state: a codebook of 2^L values at the price of K bits, whose
error on a Gaussian at 2 bits is .073 for L = 12; the bound is .0625, a uniform grid has .119. The paper is QTIP, arXiv 2406.11235. What we do differently:
a rate and a scale per column (3 and 8 bits, the scale in steps of 2^(1/16)), the transform on the output side only, and a LUT that is a permutation of the
quantiles of N(0, 1) in which the 2^K continuations of any state fall into 2^K different bands: 1 (L = 12) to 6 % (L = 8) less error than random values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .. import hadamard
from ..errors import CompressError
from . import packing
from .base import Format

RATES = range(7)  # bits a weight that a column can have; 3 bits say which
GAIN = (0.0, 0.87, 1.02, 1.03, 1.03, 1.03, 1.03)  # rms of the LUT by rate: what a stream of unit variance is coded best with, measured


def digits(K: int, L: int, length: int) -> int:
    """Weights whose bits make up a state: as many as fit L bits and the stream."""
    return max(1, min(L // K, length))


def stream_length(rows: int, length: int) -> int:
    """Weights of one stream: the largest divisor of the rows up to `length`, or all rows where that would be less than half of it."""
    best = max(d for d in range(1, min(rows, length) + 1) if rows % d == 0)
    return best if 2 * best >= length else rows


@cache
def lut(K: int, n: int) -> Tensor:
    """fp32 [2^(K·n)], entries exact in fp16: the value of every state, oldest digit most significant. Integer hash and quantiles only."""
    state = torch.arange(1 << K * n)
    past, new = state >> K, state & ((1 << K) - 1)
    band = new ^ (hadamard.mix(past + 0x9E3779B1 * K) & ((1 << K) - 1))  # the continuations of one past take different bands, in an order of its own
    rank = hadamard.mix(past + (band << 20) + 1)  # within a band, pasts take its quantiles in an order of the band's own
    rank = torch.stack([rank[band == b].argsort().argsort() for b in range(1 << K)])
    place = torch.empty_like(state)
    for b in range(1 << K):
        place[band == b] = (b << K * (n - 1)) + rank[b]
    values = torch.special.ndtri((place.double() + 0.5) / len(state))
    return (values * (GAIN[K] / values.square().mean().sqrt())).half().float()


def states(codes: Tensor, K: int, n: int) -> Tensor:
    """int64 state of every weight from its stream's codes [..., length], each a digit of K bits; streams bite their tails."""
    state = torch.zeros_like(codes, dtype=torch.int64)
    for i in range(n - 1, -1, -1):
        state = (state << K) | codes.roll(i, -1)
    return state


def step_sizes(scale: Tensor, exponents: Tensor) -> Tensor:
    """fp32 [n, 1]: what a column's LUT values are multiplied by, in steps of 4.4 %."""
    return (scale * torch.exp2(exponents.float() / 16 - 8))[:, None]


@dataclass(frozen=True, eq=False)
class Trellis(Format):
    codes: Tensor  # uint8 [total rate · ceil(out / 8)]: columns of rate 1, then of rate 2, …; a column is a bit stream padded to 8 weights
    rates: Tensor  # uint8 [ceil(3·in / 8)], K_j packed in 3 bits
    exponents: Tensor  # uint8 [in]: s_j = scale · 2^(exponent / 16 − 8)
    scale: Tensor  # fp32 [1]
    shape: tuple[int, int]
    total: int  # Σ_j K_j
    L: int
    length: int  # weights of a stream, a divisor of out
    seed: int  # of the signs

    @classmethod
    def pack(cls, codes: Tensor, rates: Tensor, exponents: Tensor, scale: Tensor, L: int, length: int, seed: int) -> Trellis:
        """codes uint8 [in, out] (a column a row), rates and exponents uint8 [in], scale fp32 [1] → the packed format."""
        n, m = codes.shape
        padded = torch.nn.functional.pad(codes, (0, -m % 8))
        streams = [packing.pack_bytes(padded[rates == K], K).flatten() for K in RATES[1:] if (rates == K).any()]
        packed = torch.cat(streams or [padded.new_empty(0)])
        return cls(packed, packing.pack_bytes(rates[None], 3)[0], exponents, scale, (m, n), int(rates.sum()), L, length, seed)

    @classmethod
    def planned(cls, shape: tuple[int, int], bits: float, L: int, length: int, seed: int) -> Trellis:
        """The same format with tensors on meta."""
        m, n = shape
        empty = lambda size, dtype=torch.uint8: torch.empty(size, dtype=dtype, device="meta")
        total = int(bits * n)
        return cls(empty(total * -(-m // 8)), empty(-(-3 * n // 8)), empty(n), empty(1, torch.float32), shape, total, L, stream_length(m, length), seed)

    def values(self) -> Tensor:
        """fp32 [in, out]: V · diag(s), transposed, before the transform is undone."""
        m, n = self.shape
        rates = packing.unpack_bytes(self.rates[None], n, 3)[0]
        V = torch.zeros(n, m, device=self.codes.device)
        start, width = 0, -(-m // 8)
        if (need := int(rates.sum()) * width) != len(self.codes):
            raise CompressError(f"Trellis: the rates of the columns ask for {need} bytes of codes, {len(self.codes)} are stored; the file is damaged")
        for K in RATES[1:]:
            columns = (rates == K).nonzero()[:, 0]
            if not len(columns):
                continue
            stop = start + len(columns) * K * width
            codes = packing.unpack_bytes(self.codes[start:stop].view(len(columns), K * width), m, K)
            k = digits(K, self.L, self.length)
            V[columns] = lut(K, k).to(V.device)[states(codes.view(-1, self.length), K, k)].view(-1, m)
            start = stop
        return V * step_sizes(self.scale, self.exponents)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        signs = hadamard.signs(self.shape[0], self.seed, self.codes.device)
        return hadamard.transform(self.values(), signs, inverse=True).T.contiguous().to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "rates": self.rates, "exponents": self.exponents, "scale": self.scale}

    def meta(self) -> dict:
        return {"format": "Trellis", "shape": list(self.shape), "total": self.total, "L": self.L, "length": self.length, "seed": self.seed}

    @classmethod
    def from_tensors(cls, meta, tensors) -> Trellis:
        return cls(tensors["codes"], tensors["rates"], tensors["exponents"], tensors["scale"], tuple(meta["shape"]), meta["total"],
                   meta["L"], meta["length"], meta["seed"])  # fmt: skip

    def describe(self) -> str:
        return f"trellis{self.total / self.shape[1]:.3g} L{self.L}"
