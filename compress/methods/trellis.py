"""Trellis: vector-quantization quality at 1 to 5 bits. Every column of W becomes a few bit streams, found by a Viterbi search inside the column sweep
of GPTQ, and each column gets the rate that its price of an error asks for.

    V = Wᵀ diag(±1) H_m       columns of W, now Gaussian whatever they were; the error tr[(Ŵ−W) H (Ŵ−W)ᵀ] does not notice
    K_j:  minimise Σ_j σ_j² d(K_j) / U_jj²  over rates with mean `bits`;   σ_j² = mean V_j²,   d(K) = 1.15 · 4^−K, the distortion of the code
    sweep, columns by rising K:   q = Π_K(V_j),   e = (V_j − q) / U_jj,   V_{i>j} −= U_ji · e

The code is QTIP's bitshift trellis (arXiv 2406.11235), the sweep GPTQ's (2210.17323). QTIP and EXL3 run the trellis over 16×16 tiles in a basis
rotated on both sides, at one rate. Here it runs down the output dimension, where errors do not interact, so the feedback between columns stays exact; and
columns differ in rate, which is reverse water-filling: the error falls from the arithmetic towards the geometric mean of the columns' prices, which
is the same in every basis, so the input needs no rotation (measured: 10 to 45 % less than one rate in a rotated basis). Coordinate descent was tried
after it: 0.3 % less error at L = 12 for half as much time again. Cost: some 12 µs a weight on one CPU core at L = 12, 5 at L = 10.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import hadamard
from ..calibration.statistics import Stats
from ..errors import CompressError
from ..formats import Trellis
from ..formats.trellis import RATES, digits, states, step_sizes, stream_length
from .descent import one_thread
from .target import TargetOptions
from .viterbi import Viterbi

BLOCK = 128  # columns between two updates of all later columns
STREAMS = 16  # searched together: narrow layers solve up to 8 columns as one for it, which costs 1 % of the error at 4 (they do not feed each other)


@dataclass(frozen=True)
class TrellisCoding(TargetOptions):
    bits: float = 2  # mean bits of a weight, from 1 to 5; 2.5 works as well
    L: int = 12  # bits of trellis state; each one more doubles the time, 10 costs 8 to 15 % more error than 12
    length: int = 128  # weights of a stream at most
    damp: float = 0.01  # added to the diagonal of H, relative to its mean; raised tenfold until H can be factored
    seed: int = 0  # of the signs before the Hadamard transform

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.bits <= 5:
            raise CompressError(f"bits {self.bits} must lie between 1 and 5; use gptq for more")
        if not 6 <= self.L <= 16:
            raise CompressError(f"L {self.L} must lie between 6 and 16; 12 is usual")
        if self.length < 1:
            raise CompressError(f"length {self.length} must be at least 1; 128 is usual")

    def planned(self, shape: tuple[int, int], stored: torch.dtype, where: str) -> Trellis:
        """The format this gives for a weight of that shape, on meta."""
        return Trellis.planned(shape, self.bits, self.L, self.length, self.seed)

    def __call__(self, weight: Tensor, stats: Stats, *, stored: torch.dtype, where: str = "weight") -> Trellis:
        """weight [out, in] fp32 (or fp64) → Trellis; `stored` has no say, its scales are 8-bit exponents."""
        return self.solve(weight, stats)[0]

    def solve(self, weight: Tensor, stats: Stats) -> tuple[Trellis, float]:
        """The format and Σe², its error in the damped H-norm."""
        m, n = weight.shape
        factor = stats.factor(self.damp, True)
        weight = self.target(weight, stats, factor)
        V = hadamard.transform(weight.T.contiguous(), hadamard.signs(m, self.seed, weight.device).to(weight))  # [n, m], one column a row
        energy = V.square().mean(1)
        price = torch.empty_like(energy).index_copy_(0, factor.order, factor.U.diagonal() ** -2)
        rates = allocate(energy * price, int(self.bits * n))
        loud = torch.argsort(energy * stats.hessian.diagonal(), descending=True, stable=True)
        order = loud[torch.argsort(rates[loud], stable=True)]
        U = stats.factorize(factor.damp, order).U
        V, scale = V[order], energy.mean().sqrt().clamp(min=1e-30).float()[None]
        codes, exponents = torch.zeros(n, m, dtype=torch.uint8, device=V.device), torch.zeros(n, dtype=torch.uint8, device=V.device)
        length = stream_length(m, self.length)
        loss, start = 0.0, 0
        for K in RATES:
            viterbi = Viterbi(K, digits(K, self.L, length), V.device) if K else None
            together = max(1, min(8, STREAMS * length // m)) if K else BLOCK
            for block in order[rates[order] == K].split(BLOCK):
                stop = start + len(block)
                E = torch.empty_like(V[start:stop])
                with one_thread(E):
                    for i in range(start, stop, together):
                        j = min(i + together, stop)
                        q = torch.zeros_like(V[i:j])
                        if viterbi is not None:
                            q, codes[order[i:j]], exponents[order[i:j]] = _quantize(V[i:j], scale, viterbi, length)
                        E[i - start : j - start] = e = torch.linalg.solve_triangular(U[i:j, i:j].T, V[i:j] - q, upper=False)
                        V[j:stop].addmm_(U[i:j, j:stop].T, e, alpha=-1)
                V[stop:].addmm_(U[start:stop, stop:].T, E, alpha=-1)
                loss += float(E.square().sum(dtype=torch.float64))
                start = stop
        return Trellis.pack(codes, rates.to(torch.uint8), exponents, scale, self.L, length, self.seed), loss


def _quantize(w: Tensor, scale: Tensor, viterbi: Viterbi, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values [b, m], codes uint8 [b, m] and exponents uint8 [b] for the targets w [b, m]; the scale is rounded before any code is chosen."""
    rms = w.square().mean(1).sqrt().float() / scale
    exponents = (16 * (rms.clamp(min=2**-8).log2() + 8)).round().clamp(max=255).to(torch.uint8)
    s = step_sizes(scale, exponents)
    c = viterbi.encode((w / s).float().view(-1, length).T.contiguous()).T.contiguous()
    return viterbi.values[states(c, viterbi.K, viterbi.n)].view(w.shape) * s.to(w.dtype), c.view(w.shape).to(torch.uint8), exponents


def allocate(price: Tensor, total: int) -> Tensor:
    """int64 rates [n] with Σ = total that minimise Σ price_j d(K_j): d is convex, so taking the largest gain of one more bit each time is exact."""
    d = torch.tensor([1.0] + [1.15 * 4.0**-K for K in RATES[1:]], dtype=torch.float64, device=price.device)
    gains = price.double()[:, None] * (d[:-1] - d[1:])  # [n, 6], falling along each row
    chosen = torch.zeros(gains.numel(), dtype=torch.int64, device=price.device)
    chosen[torch.argsort(gains.flatten(), descending=True, stable=True)[:total]] = 1
    return chosen.view_as(gains).sum(1)
