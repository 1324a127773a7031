"""Trellis: vector-quantization quality at 2 to 4 bits. Every column of W becomes a few bit streams, found by a Viterbi search inside the column sweep
of GPTQ, and each column gets the rate that its price of an error asks for.

    V = Wᵀ diag(±1) H_m       columns of W, now Gaussian whatever they were;  rows stay independent in  tr[(Ŵ−W) H (Ŵ−W)ᵀ]
    K_j:  minimise Σ_j σ_j² d(K_j) / U_jj²  over rates with mean `bits`;   d(K) = 4^−K · 1.15, the distortion of the code at K bits
    sweep:   q = Π_K(V_j),   e = (V_j − q) / U_jj,   V_{i>j} −= U_ji · e;       descent:   q = Π_K(Q_j − D_j / H_jj),   D = H_d (Q − V)

The code is QTIP's bitshift trellis (arXiv 2406.11235), the sweep GPTQ's (2210.17323). QTIP and EXL3 run the trellis over 16×16 tiles in the rotated
basis, one rate for all. Here the trellis runs down the output dimension, where errors do not interact: the feedback between columns stays exact, each
Viterbi search is an exact minimum in the norm of H, and columns can differ in rate, which is reverse water-filling: the error falls from the
arithmetic towards the geometric mean of the columns' prices, in whatever basis; so the input needs no rotation. Columns are solved by rising rate.
Cost: some 10 µs a weight on one CPU core at L = 12, a quarter of it at L = 10.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import hadamard
from ..calibration.statistics import Stats
from ..errors import CompressError
from ..formats import Trellis
from ..formats.trellis import RATES, digits, states, stream_length
from .descent import one_thread
from .viterbi import Viterbi

BLOCK = 128  # columns between two updates of all later columns
STREAMS = 16  # searched together where there are so many; columns solved as one for that (at most 8) do not compensate each other


@dataclass(frozen=True)
class TrellisCoding:
    bits: float = 2  # mean bits of a weight, 1 to 5, fractions too
    L: int = 12  # bits of trellis state; one more costs twice the time, 10 instead of 12 about 3 % of the error at 2 bits
    length: int = 128  # weights of a stream at most
    damp: float = 0.01  # added to the diagonal of H, relative to its mean; raised tenfold until H can be factored
    sweeps: int = 1  # rounds of coordinate descent on the streams after the column sweep
    seed: int = 0  # of the signs before the Hadamard transform

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    def __post_init__(self):
        if not 1 <= self.bits <= 5:
            raise CompressError(f"bits {self.bits} must lie between 1 and 5; use gptq from there on")
        if not 6 <= self.L <= 16:
            raise CompressError(f"L {self.L} must lie between 6 and 16; 12 is usual")

    def planned(self, shape: tuple[int, int], stored: torch.dtype, where: str) -> Trellis:
        """The format this gives for a weight of that shape, on meta."""
        return Trellis.planned(shape, self.bits, self.L, self.length, self.seed)

    def __call__(self, weight: Tensor, stats: Stats, *, stored: torch.dtype, where: str = "weight") -> Trellis:
        """weight [out, in] fp32 → Trellis."""
        return self.solve(weight, stats)[0]

    def solve(self, weight: Tensor, stats: Stats) -> tuple[Trellis, list[float]]:
        """The format, and the error in the damped H-norm after the column sweep and after each round of descent."""
        m, n = weight.shape
        if stats.dead.any():
            stats.note("inputs never active", f"{int(stats.dead.sum())} of {n} inputs were 0 on all {stats.count} tokens: their weights are set to 0")
            weight = weight.masked_fill(stats.dead, 0)
        V = hadamard.transform(weight.T.contiguous(), hadamard.signs(m, self.seed, weight.device).to(weight))  # [n, m]
        energy = V.square().mean(1)
        factor = stats.factor(self.damp, True)
        ridge = stats.ridge(factor)
        price = torch.empty_like(ridge).index_copy_(0, factor.order, factor.U.diagonal() ** -2)
        rates = allocate(energy * price, int(self.bits * n))
        loud = torch.argsort(energy * (stats.hessian.diagonal() + ridge), descending=True, stable=True)
        order = loud[torch.argsort(rates[loud], stable=True)]
        factor = stats.factorize(factor.damp, order)
        length = stream_length(m, self.length)
        scale = energy.mean().sqrt().clamp(min=1e-30)
        coder = _Coder(self.L, length, scale, m, n, V.device)
        columns = max(1, min(8, STREAMS * length // m))
        blocks = [(K, block.split(columns if K else BLOCK)) for K in RATES for block in order[rates[order] == K].split(BLOCK) if len(block)]
        losses = [self._sweep(V[order], factor.U, blocks, coder)]
        if self.sweeps and not factor.failed:
            losses += self._descend(V, stats.hessian, ridge, blocks, coder)
        return Trellis.pack(coder.codes, rates.to(torch.uint8), coder.exponents, scale.float()[None], self.L, length, self.seed), losses

    def _sweep(self, V: Tensor, U: Tensor, blocks: list, coder: _Coder) -> float:
        """V [n, m] in solving order, used up; fills the coder. Returns Σe²."""
        loss, start = 0.0, 0
        for K, parts in blocks:
            stop = start + sum(map(len, parts))
            E, i = torch.empty_like(V[start:stop]), start
            with one_thread(E):
                for part in parts:
                    j = i + len(part)
                    q = coder.quantize(V[i:j], K, part)
                    E[i - start : j - start] = e = torch.linalg.solve_triangular(U[i:j, i:j].T, V[i:j] - q, upper=False)
                    V[j:stop].addmm_(U[i:j, j:stop].T, e, alpha=-1)
                    i = j
            V[stop:].addmm_(U[start:stop, stop:].T, E, alpha=-1)
            loss += float(E.double().square().sum())
            start = stop
        return loss

    def _descend(self, V: Tensor, H: Tensor, ridge: Tensor, blocks: list, coder: _Coder) -> list[float]:
        losses = []
        Q = coder.values()
        D = H @ (Q - V) + ridge[:, None] * (Q - V)
        for sweep in range(self.sweeps):
            for K, part in ((K, part) for K, parts in blocks if K for part in parts):
                H_part = H[part[:, None], part] + ridge[part].diag()
                target = Q[part] - D[part] / H_part.diagonal()[:, None]
                step = coder.improve(target, K, part, Q[part], D[part], H_part, sweep)
                Q[part] += step
                D.addmm_(H[:, part], step)
                D[part] += ridge[part, None] * step
            losses.append(float(((Q - V) * D).sum(dtype=torch.float64)))
        return losses


class _Coder:
    """The streams of all columns: codes uint8 [n, m] and exponents uint8 [n], with the search that finds them."""

    def __init__(self, L: int, length: int, scale: Tensor, m: int, n: int, device):
        self.L, self.length, self.scale = L, length, scale
        self.codes = torch.zeros(n, m, dtype=torch.uint8, device=device)
        self.exponents = torch.zeros(n, dtype=torch.uint8, device=device)
        self.rates = torch.zeros(n, dtype=torch.uint8, device=device)
        self.viterbi: dict[int, Viterbi] = {}

    def search(self, K: int) -> Viterbi:
        if K not in self.viterbi:
            self.viterbi[K] = Viterbi(K, digits(K, self.L, self.length), self.codes.device)
        return self.viterbi[K]

    def step(self, part: Tensor) -> Tensor:
        return (self.scale * torch.exp2(self.exponents[part].float() / 16 - 8))[:, None]

    def quantize(self, w: Tensor, K: int, part: Tensor) -> Tensor:
        """Choose scale and codes of the columns `part` for targets w [b, m]; returns their values."""
        if not K:
            return torch.zeros_like(w)
        rms = w.square().mean(1).sqrt()
        self.exponents[part] = (16 * (torch.log2((rms / self.scale).clamp(min=1e-30)) + 8)).round().clamp(0, 255).to(torch.uint8)
        self.rates[part] = K
        v, s = self.search(K), self.step(part)
        x = (w / s).float().reshape(-1, self.length).T.contiguous()
        c = v.encode(x).T.contiguous()
        self.codes[part] = c.reshape(w.shape).to(torch.uint8)
        return v.values[states(c, K, v.n)].view(w.shape).to(w.dtype) * s.to(w.dtype)

    def improve(self, w: Tensor, K: int, part: Tensor, q: Tensor, D: Tensor, H: Tensor, sweep: int) -> Tensor:
        v, s, T = self.search(K), self.step(part), self.length
        shift = sweep % 2 * (T // 2)
        old = self.codes[part].view(-1, T).long().roll(-shift, 1)
        x = (w / s).float().reshape(-1, T).roll(-shift, 1).T.contiguous()
        c = v.search(x, old[:, T - v.n + 1 :].T if v.n > 1 else old[:, :0].T)
        new = v.values[states(c.T.contiguous(), K, v.n)].roll(shift, 1).view(w.shape).to(w.dtype) * s.to(w.dtype)
        step = new - q
        gain = ((H @ step + 2 * D) * step).view(len(part), -1, T).sum((0, 2))  # of every set of streams that share rows
        better = (gain < 0).repeat(len(part))
        c = torch.where(better[:, None], c.T.roll(shift, 1), self.codes[part].view(-1, T).long())
        self.codes[part] = c.reshape(w.shape).to(torch.uint8)
        return (step.view(-1, T) * better[:, None]).view(w.shape)

    def values(self) -> Tensor:
        n, m = self.codes.shape
        V = torch.zeros(n, m, device=self.codes.device)
        for K, v in self.viterbi.items():
            part = (self.rates == K).nonzero()[:, 0]
            V[part] = v.values[states(self.codes[part].view(-1, self.length), K, v.n)].view(-1, m) * self.step(part)
        return V


def allocate(price: Tensor, total: int) -> Tensor:
    """int64 rates [n] with Σ = total that minimise Σ price_j d(K_j): d is convex, so the largest gains of one more bit are the best."""
    d = torch.tensor([1.0] + [1.15 * 4.0**-K for K in RATES[1:]], dtype=torch.float64, device=price.device)
    gains = price.double()[:, None] * (d[:-1] - d[1:])  # [n, 6], falling along each row
    chosen = torch.zeros(gains.numel(), dtype=torch.bool, device=price.device)
    chosen[torch.argsort(gains.flatten(), descending=True, stable=True)[:total]] = True
    return chosen.view_as(gains).sum(1)
