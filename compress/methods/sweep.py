"""The column sweep under a mask: GPTQ's, with zero as one more level that a weight may or must take (sparsegpt.py has the equations).

The mask is given, or chosen on the way; the kept weights stay as they are, or go to the grid of their group of columns. Columns are kept as
contiguous rows of Wᵀ.
"""

from __future__ import annotations

from math import ceil, lcm

import torch
from torch import Tensor

from ..calibration.statistics import Factor, Stats
from ..formats import Format, IntGroup
from ..formats.int_group import check_group_size
from . import grid
from .descent import descend, one_thread
from .masks import SparseIntOptions
from .options import IntOptions
from .support import least_squares

BLOCK = 128  # columns between two updates of all later columns, and those whose weights are compared where there is no pattern


class Codes:
    """The grids of a sweep that quantizes: every group is fitted when its first column comes up, on the weights as they are then."""

    def __init__(self, m: int, n: int, size: int, bits: int, sym: bool, scale_dtype: torch.dtype, like: Tensor):
        self.size, self.bits, self.sym, self.scale_dtype = size, bits, sym, scale_dtype
        self.codes = torch.zeros(n, m, dtype=torch.uint8, device=like.device)
        self.scale, self.zero = like.new_empty(n // size, m), like.new_empty(n // size, m)
        self.grid = grid.Grid(self.scale, self.zero, 2**bits)

    def fit(self, k: int, W: Tensor, keep: Tensor, price: Tensor) -> None:
        """Group k from W [size, m], of which `keep` counts; an error in a column costs its price [size]."""
        kept, prices = (A.T[keep.T].view(W.shape[1], 1, -1) for A in (W, price[:, None].expand_as(W)))
        g = grid.fit(kept, 2**self.bits, self.bits, self.sym, "hessian", prices, self.scale_dtype, 3 if self.bits > 2 else 4)
        self.scale[k], self.zero[k] = g.scale[:, 0], g.zero[:, 0]

    def nearest(self, column: int, w: Tensor) -> Tensor:
        """The value of the level nearest to each weight [m] of a column, whose code is kept."""
        k = column // self.size
        q = self.grid.codes(w, self.scale[k], self.zero[k])
        self.codes[column] = q.to(torch.uint8)
        return (q - self.zero[k]) * self.scale[k]


def sweep(W: Tensor, U: Tensor, options: SparseIntOptions, say: Tensor, keep: Tensor | None = None, codes: Codes | None = None
          ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Ŵ and the mask, [out, in], of W [out, in], of which each weight has its `say` [out, in], 0 where it stays 0. A mask that is given stays;
    `codes` is filled where the kept weights are quantized."""
    n, nm, decide = W.shape[1], options.nm(W.shape[1]), keep is None
    W, say = W.T.contiguous(), say.T.contiguous()
    live = (say > 0).to(W.dtype)
    keep = torch.zeros_like(W, dtype=torch.bool) if keep is None else keep.T.contiguous()
    step = lcm(nm[1] if nm else 1, codes.size if codes else 1)
    width = step * ceil(BLOCK / step)
    for start in range(0, n, width):
        stop = min(start + width, n)
        B, V = W[start:stop], U[start:stop, start:stop]  # [b, m], one column of the layer a row
        d = V.diagonal()
        diagonal, price, E = d.tolist(), d**-2, torch.empty_like(B)
        def score(i: int, j: int, B=B, d=d, start=start) -> Tensor:  # of the block's columns i to j, by the weights as they are now
            return (B[i:j] / d[i:j, None]).mul_(say[start + i : start + j]).square_().T

        if decide and not nm:
            keep[start:stop] = options.select(score(0, stop - start), nm, start).T
        with one_thread(B):
            for i in range(stop - start):
                j = start + i
                if codes and j % codes.size == 0:
                    group = slice(i, i + codes.size)
                    if decide:
                        keep[j : j + codes.size] = options.select(score(i, i + codes.size), nm).T
                    codes.fit(j // codes.size, B[group] * live[j : j + codes.size], keep[j : j + codes.size], price[group])
                if decide and nm and j % nm[1] == 0:
                    keep[j : j + nm[1]] = options.select(score(i, i + nm[1]), nm).T
                q = B[i] * live[j]
                q = (codes.nearest(j, q) if codes else q) * keep[j]
                E[i] = e = (B[i] - q) / diagonal[i]
                B[i + 1 :].addr_(V[i, i + 1 :], e, alpha=-1)
                B[i] = q
        W[stop:].addmm_(U[start:stop, stop:].T, E, alpha=-1)
    return W.T.contiguous(), keep.T.contiguous()


def quantize(W: Tensor, say: Tensor, stats: Stats, factor: Factor, options: SparseIntOptions, stored: torch.dtype, keep: Tensor | None = None) -> Format:
    """Sparse and quantized in one sweep, on a given mask or choosing it, then descent on the codes that are kept. W [out, in]."""
    (m, n), bits, scale_dtype = W.shape, options.bits, IntOptions.scale_dtype(stored)
    assert bits is not None
    c = Codes(m, n, check_group_size(n, options.group_size, "weight"), bits, options.sym, scale_dtype, W)
    _, keep = sweep(W, factor.U, options, say, keep, c)
    if options.sweeps and not factor.failed:
        kept, live, size = keep.T.contiguous(), (say.T > 0).to(W.dtype).contiguous(), n // len(c.scale)

        def project(j: int, w: Tensor) -> tuple[Tensor, Tensor]:  # what is pruned stays 0, whatever its code
            code, value = c.grid.project(w * live[j], c.scale[j // size], c.zero[j // size])
            return code, value * kept[j]

        Q = c.codes.to(W.dtype).view(-1, size, m).sub_(c.zero[:, None]).mul_(c.scale[:, None]).view(n, m).mul_(kept)
        descend(c.codes, Q, W.T.contiguous(), stats.hessian, stats.ridge(factor), project, options.sweeps, BLOCK, factor.order)
    codes = c.codes.T[keep].view(m, -1)
    zeros = None if options.sym else c.zero.T.to(torch.uint8).contiguous()
    return options.holding(IntGroup.pack(codes, c.scale.T.to(scale_dtype).contiguous(), zeros, bits), (m, n), keep)


def finish(W: Tensor, say: Tensor, start: Tensor, keep: Tensor, stats: Stats, factor: Factor, options: SparseIntOptions, stored: torch.dtype) -> Format:
    """A mask that a method has settled on, from the values `start` [out, in]: least squares, then integers or not, and the format.

    Integers are swept from the least-squares solution: no gradient is left on the mask there, so the error is that of the mask plus the distance
    from it, and no column has to make up for zeros that come later."""
    if keep.all():
        start = W * (say > 0)  # nothing is missing: bit for bit what it was
    elif options.refit and not factor.failed:
        start = least_squares(W, start, keep & (say > 0), stats.hessian, stats.ridge(factor))
    return quantize(start, say, stats, factor, options, stored, keep) if options.bits else options.store(start, keep, stored)
