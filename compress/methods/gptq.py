"""GPTQ: quantize a weight column by column, and let the columns still to come make up for each rounding.

    minimise  tr[(W−Q) H (W−Q)ᵀ]  over Q on the grid;   H_d⁻¹ = UᵀU,  H_d = H + damp·mean(diag H)·I
    for column i:   q = Π(W_i),   e = (W_i − q) / U_ii,   W_{j>i} −= e · U_ij

The paper is Frantar et al., arXiv 2210.17323. What we do differently: the grids are fitted before the sweep on the original weights (static
groups), so columns may be solved in any order without a group index at inference; the clip of each group is searched with the price that the sweep
itself puts on an error in column j, 1/U_jj² (all later columns compensating), and a power above 2, because the weights that meet the grid have
taken up the errors of the columns before them and reach further than the originals;
U comes from one Cholesky factorization of the reversed H, shared by all layers that read the same input. Columns are kept as contiguous rows
of Wᵀ. Then coordinate descent (descent.py) lets the early columns answer to the late ones. Cost: n² (m + n/3) multiply-adds for W [m, n], and 2mn² a round
of descent. With H = I it is round-to-nearest on the same grid, bit for bit; without descent Σe² is the damped error, exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..calibration.statistics import Stats
from ..errors import CompressError
from ..formats import IntGroup
from ..formats.int_group import check_group_size
from . import grid
from .descent import descend, one_thread
from .options import IntOptions
from .refit import refit_scales
from .target import TargetOptions


@dataclass(frozen=True)
class GPTQ(TargetOptions, IntOptions):
    act_order: bool = True  # solve the columns with the loudest input first
    static_groups: bool = True  # fit every grid before the sweep; False refits each group on the compensated weights (needs act_order false)
    output_groups: Literal[1, 2, 4] = 1  # with guided: parts of the outputs whose tokens are weighed apart, a Hessian and a sweep each
    damp: float = 0.01  # added to the diagonal of H, relative to its mean; raised tenfold until H can be factored
    sweeps: int = 2  # rounds of coordinate descent on the codes after the column sweep; 0: the GPTQ of the paper
    refits: int = 0  # closed-form scale refits, each followed by the rounds of `sweeps`; 0: scales as fitted before the sweep
    block_size: int = 128  # columns between two updates of all later columns; changes the time, not the result

    def __post_init__(self):
        IntOptions.__post_init__(self)
        TargetOptions.__post_init__(self)
        if self.act_order and not self.static_groups:
            raise CompressError("act_order without static_groups would need a group index at inference; set one of the two to match")
        if self.output_groups > 1 and not self.guided:
            raise CompressError(f"output_groups {self.output_groups} weighs tokens apart for parts of the outputs, so guided must be true")
        if self.output_groups > 1 and self.bias_correction:
            raise CompressError("bias_correction answers for one mean of the tokens, output_groups weighs them several times; set one of the two off")
        if not 0 <= self.damp < math.inf:
            raise CompressError(f"damp {self.damp} must be a number from 0 up; 0.01 is usual")
        if self.block_size < 1 or self.sweeps < 0 or self.refits < 0:
            raise CompressError(f"block_size {self.block_size} must be at least 1, sweeps {self.sweeps} and refits {self.refits} at least 0")

    def __call__(self, weight: Tensor, stats: Stats, *, stored: torch.dtype, where: str = "weight") -> IntGroup:
        """weight [out, in] in the precision to solve in (fp32, or fp64 in tests) → IntGroup; its scales have the dtype `stored` allows."""
        codes, scale, zero, _ = self.solve(weight, stats, self.scale_dtype(stored), where)
        zeros = None if self.sym else zero.to(torch.uint8)
        return IntGroup.pack(codes, scale.to(self.scale_dtype(stored)), zeros, self.code_bits, self.levels)

    def solve(self, weight: Tensor, stats: Stats, scale_dtype: torch.dtype, where: str = "weight") -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The column sweep: codes uint8 [out, in], scale and zero [out, groups], and Σe², the error in the damped H-norm."""
        (m, n), size = weight.shape, check_group_size(weight.shape[1], self.group_size, where)
        factor = stats.factor(self.damp, self.act_order)
        U, order = factor.U, factor.order
        weight = self.target(weight, stats, factor)
        h = torch.empty_like(U[0]).index_copy_(0, order, U.diagonal() ** -2).view(-1, size)
        power = 3 if self.levels > 4 else 4
        fit = lambda W, h: grid.fit(W, self.levels, self.code_bits, self.sym, self.clip, h, scale_dtype, power)  # W [m, groups, size]
        g = fit(weight.reshape(m, -1, size), h)
        scale, zero = g.scale.T.to(weight.dtype).contiguous(), g.zero.T.to(weight.dtype).contiguous()  # [groups, m]
        codes, loss = self._sweep(weight.T[order].contiguous(), U, g, scale, zero, (order // size).tolist(), h, fit)
        restored = torch.empty_like(codes)
        restored[order] = codes
        codes = restored
        if (self.sweeps or self.refits) and not factor.failed:
            W, H, ridge = weight.T.contiguous(), stats.hessian, stats.ridge(factor)

            def descended() -> Tensor:
                Q = codes.to(W.dtype).view(-1, size, m).sub_(zero[:, None]).mul_(scale[:, None]).view(n, m)
                project = lambda j, w: g.project(w, scale[j // size], zero[j // size])
                return descend(codes, Q, W, H, ridge, project, self.sweeps, self.block_size, order)

            loss = descended()
            for _ in range(self.refits):
                scale = refit_scales(codes, W, H, ridge, scale, zero, scale_dtype)
                loss = descended()
        return codes.T.contiguous(), scale.T.contiguous(), zero.T.contiguous(), loss

    def _sweep(self, W: Tensor, U: Tensor, g: grid.Grid, scale: Tensor, zero: Tensor, group_of: list[int], h: Tensor, fit) -> tuple[Tensor, Tensor]:
        """Codes [n, m] and Σe² of W [n, m], one column of the paper a row, in solving order; W is used up."""
        (n, m), size = W.shape, h.shape[1]
        codes = torch.empty(n, m, dtype=torch.uint8, device=W.device)
        loss = torch.zeros((), dtype=torch.float64, device=W.device)
        for start in range(0, n, self.block_size):
            stop = min(start + self.block_size, n)
            block, U_block = W[start:stop], U[start:stop, start:stop]
            diagonal = U_block.diagonal().tolist()
            E = torch.empty_like(block)
            with one_thread(block):
                for i in range(stop - start):
                    column, k = start + i, group_of[start + i]
                    if not self.static_groups and column % size == 0:
                        self._refit(fit, W, E, U, h, start, i, size, scale, zero, k)
                    w, s, z = block[i], scale[k], zero[k]
                    codes[column], value = g.project(w, s, z)
                    E[i] = e = (w - value) / diagonal[i]
                    block[i + 1 :].addr_(U_block[i, i + 1 :], e, alpha=-1)
            W[stop:].addmm_(U[start:stop, stop:].T, E, alpha=-1)
            loss += E.double().square().sum()
        return codes, loss

    @staticmethod
    def _refit(fit, W: Tensor, E: Tensor, U: Tensor, h: Tensor, start: int, i: int, size: int, scale: Tensor, zero: Tensor, k: int) -> None:
        """Fit group k on the weights as they are now, errors of this block's earlier columns included (they reach later blocks only lazily)."""
        column, stop = start + i, start + len(E)
        current = W[column : column + size].clone()
        beyond = max(0, column + size - stop)  # columns of the group that lie past this block
        if beyond and i:
            current[size - beyond :] -= U[start:column, stop : stop + beyond].T @ E[:i]
        g = fit(current.T.reshape(-1, 1, size), h[k : k + 1])
        scale[k], zero[k] = g.scale[:, 0], g.zero[:, 0]
