"""LNQ, layer-wise non-uniform quantization: every row its own table of 2^b values, codes and table fitted by turns in the norm of H.

    minimise (ŵ−w)ᵀ H_d (ŵ−w) a row,   ŵ = P c,   P one-hot [in, 2^b], c [2^b] the table
    codes:  coordinate descent onto the table (descent.py);        table:  c = (Pᵀ H_d P)⁻¹ Pᵀ H_d w

Both halves only ever lower the error (Kim et al., GuidedQuant, arXiv 2505.07004). Tables start as 1-D k-means weighted by diag(H) (SqueezeLLM,
arXiv 2306.07629), here solved for all rows at once on sorted weights with running sums. What we do differently: the first codes come from a
GPTQ sweep onto those tables, which starts the descent lower than the nearest codes would; a table is rounded to its stored 16 bits before it
is judged, and kept only where the row's error fell. Cost for W [m, n]: mn² for the sweep and for each round of descent, 2^b mn² for a table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..calibration.statistics import Stats
from ..errors import CompressError
from ..formats import Lut
from .descent import descend, one_thread
from .options import IntOptions

CHUNK = 1 << 22  # elements of the largest temporary of k-means and refit


@dataclass(frozen=True)
class LNQ:
    bits: Literal[1, 2, 3, 4] = 3  # bits of a code; a row's table has 2**bits values
    rounds: int = 3  # of table refit and descent, after the first descent; 0: the tables of k-means
    sweeps: int = 2  # of coordinate descent in a round
    damp: float = 0.01  # added to the diagonal of H, relative to its mean; raised tenfold until H can be factored
    block_size: int = 128  # columns between two updates of all later columns; changes the time, not the result

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    def __call__(self, weight: Tensor, stats: Stats, *, stored: torch.dtype, where: str = "weight") -> Lut:
        """weight [out, in] in the precision to solve in (fp32, or fp64 in tests) → Lut with a table a row, in the 16-bit type `stored` allows."""
        dtype = IntOptions.scale_dtype(stored)
        codes, table, _ = self.solve(weight, stats, dtype)
        return Lut.pack(codes, table.to(dtype), None, f"lut{self.bits}")

    def solve(self, weight, stats, dtype, start="gptq"):
        factor = stats.factor(self.damp, True)
        W, H, ridge = weight.T.contiguous(), stats.hessian, stats.ridge(factor)
        h = H.diagonal() + ridge
        table = kmeans(weight, h, 2**self.bits).T.contiguous().to(dtype).to(W.dtype)  # [2^b, m], ascending
        trace=[]
        if start == "gptq":
            codes = self._sweep(W[factor.order], factor.U, factor.order, table)
        else:
            codes = torch.stack([project(w, table)[0] for w in W]).to(torch.uint8)
        descended = lambda: descend(codes, table.gather(0, codes.long()), W, H, ridge, lambda j, w: project(w, table), self.sweeps, self.block_size)
        loss = descended(); trace.append(float(loss))
        for _ in range(self.rounds):
            table = refit_table(codes, W, H, ridge, table, dtype)
            loss = descended(); trace.append(float(loss))
        self.__dict__.get("trace", trace) 
        LNQ.trace = trace
        return codes.T.contiguous(), table.T.contiguous(), loss

    def _sweep(self, W, U, order, table):
        n, m = W.shape
        codes = torch.empty(n, m, dtype=torch.uint8, device=W.device)
        for start in range(0, n, self.block_size):
            stop = min(start + self.block_size, n)
            block, U_block, E = W[start:stop], U[start:stop, start:stop], torch.empty_like(W[start:stop])
            diagonal = U_block.diagonal().tolist()
            with one_thread(block):
                for i in range(stop - start):
                    codes[order[start + i]], value = project(block[i], table)
                    E[i] = e = (block[i] - value) / diagonal[i]
                    block[i + 1 :].addr_(U_block[i, i + 1 :], e, alpha=-1)
            W[stop:].addmm_(U[start:stop, stop:].T, E, alpha=-1)
        return codes


def project(w: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes [m] and values [m] of targets w [m] in table [2^b, m], ascending; ties to the lower."""
    codes = (w > (table[1:] + table[:-1]) / 2).sum(0)
    return codes, table.gather(0, codes[None])[0]


def kmeans(W: Tensor, h: Tensor, levels: int, iterations: int = 100) -> Tensor:
    """Tables [m, levels], ascending, of W [m, n]: Lloyd's iteration on Σ_j h_j (w_j − c)², from quantiles of the weighted distribution."""
    rows = max(1, CHUNK // W.shape[1])
    return torch.cat([_kmeans(w, h, levels, iterations) for w in W.split(rows)])


def _kmeans(W: Tensor, h: Tensor, levels: int, iterations: int) -> Tensor:
    w, order = W.double().sort(dim=1)
    zero = w.new_zeros(len(w), 1)
    mass = torch.cat([zero, h.double()[order].cumsum(1)], 1)  # [m, n + 1], of all weights below
    moment = torch.cat([zero, (h.double()[order] * w).cumsum(1)], 1)
    wanted = mass[:, -1:] * (torch.arange(levels, device=w.device) + 0.5) / levels
    c = w.gather(1, torch.searchsorted(mass[:, 1:], wanted).clamp_(max=w.shape[1] - 1))
    ends = torch.zeros_like(zero, dtype=torch.int64), torch.full_like(zero, w.shape[1], dtype=torch.int64)
    for _ in range(iterations):
        edges = torch.cat([ends[0], torch.searchsorted(w, (c[:, 1:] + c[:, :-1]) / 2), ends[1]], 1)
        m, s = mass.gather(1, edges).diff(dim=1), moment.gather(1, edges).diff(dim=1)
        before, c = c, torch.where(m > 0, s / m, c)
        if torch.equal(before, c):
            break
    return c


def refit_table(codes: Tensor, W: Tensor, H: Tensor, ridge: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    n, K = len(W), len(table)
    tables = []
    step = max(1, CHUNK // (n * K))
    for columns in range(0, W.shape[1], step):
        c = slice(columns, columns + step)
        index, old = codes[:, c].long(), table[:, c]
        P = torch.zeros(n, K, index.shape[1], dtype=W.dtype, device=W.device).scatter_(1, index[:, None], 1)
        E = old.gather(0, index) - W[:, c]
        HP = (H @ P.view(n, -1)).addcmul_(ridge[:, None], P.view(n, -1)).view_as(P)
        A = torch.einsum("nkc,nlc->ckl", P, HP).double()
        b = torch.einsum("nkc,nc->ck", HP, E).double()
        empty = A.diagonal(dim1=1, dim2=2) == 0
        solved, info = torch.linalg.solve_ex(A + torch.diag_embed(empty.double()), b)
        new = (old - solved.T).to(dtype).to(W.dtype)
        d = (new - old).T.double()
        gain = ((A @ d[:, :, None])[..., 0] + 2 * b) * d
        better = (gain.sum(1) < 0) & (info == 0)
        new = torch.where(better, new, old)
        new, order = new.sort(0)
        codes[:, c] = order.argsort(0).gather(0, index).to(torch.uint8)
        tables.append(new)
    return torch.cat(tables, 1)
