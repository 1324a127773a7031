"""Dual scales: codes of two or three levels with one scale a row and one a column, all of it in the norm of H. What `binary` and `ternary` share.

    Ŵ = diag(s) C diag(t),   C the codes;       minimise tr[(Ŵ−W) H_d (Ŵ−W)ᵀ] in C, s and t by turns
    C:  GPTQ's column sweep (feedback.py), then coordinate descent (descent.py)
    s:  s_r = b_rᵀ H_d w_r / b_rᵀ H_d b_r,  b_r = C_r ∘ t        a number a row (two, where some columns have a grid of their own)
    t:  (BᵀB ∘ H_d) t = diag(Bᵀ W H_d),     B = diag(s) C         one n × n system for the whole layer

Groups of columns with a scale each cost 0.25 bits a weight at 64 and hardly help once codes answer to H; a scale a column costs 16/out bits and lowers the
error more (2 to 15 % on the yardstick). PTQ1.61 (arXiv 2502.13179) trains such row and column scales by gradient; here either is its exact optimum for the
other, rounded to 16 bits before it is judged and kept only where the error fell. The sweep's first scale is found by sweeping: columns that come late
have taken up the errors of those before, so the scale that is best for the original weights is too small by a factor of up to 2 or 3.

The `salient` columns, those whose error would cost most, may have more bits (PTQ1.61's structured mask; `formats/columns.py`). They are swept last
and take up what the others did wrong. Cost for W [m, n]: mn² for a sweep or a round of descent, 2mn² + n³ for both refits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..calibration.statistics import Stats
from ..errors import CompressError
from ..formats import Columns, Format, IntGroup, Scaled
from ..formats.int_group import symmetric_zero
from . import grid
from .descent import descend
from .feedback import sweep
from .options import IntOptions
from .target import TargetOptions

ROWS = 64  # rows of a layer on which the first scale is searched
REACH = (1.0, 1.2, 1.45, 1.75, 2.1, 2.5, 3.0)  # factors of it that are tried


@dataclass(frozen=True)
class DualScale(TargetOptions):
    salient: float = 0.0  # share of the columns, those whose error costs most, that have salient_bits; 0: all alike
    salient_bits: Literal[2, 3, 4, 5, 6, 7, 8] = 4  # bits of their codes, on a grid with a zero point a row
    columns: bool = True  # a scale a column besides the one a row
    rounds: int = 4  # refits of the scales, each followed by coordinate descent on the codes; 0: as the sweep left them
    sweeps: int = 2  # rounds of coordinate descent after the column sweep and after every refit
    damp: float = 0.01  # added to the diagonal of H, relative to its mean; raised tenfold until H can be factored

    levels: ClassVar[int]

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.salient < 1:
            raise CompressError(f"salient {self.salient} is not a share of the columns from 0 to below 1; PTQ1.61 has 0.2")
        if self.rounds < 0 or self.sweeps < 0 or not 0 <= self.damp < math.inf:
            raise CompressError(f"rounds {self.rounds}, sweeps {self.sweeps} and damp {self.damp} must be at least 0; 4, 2 and 0.01 are usual")

    @staticmethod
    def optimum(W: Tensor, h: Tensor) -> Tensor:
        """The scale [m] of each row of W [m, n] that minimises Σ_j h_j (w_j − s c_j)² over codes and scale together."""
        raise NotImplementedError

    def loud(self, columns: int) -> int:
        """How many of so many columns are salient; one at least is not."""
        return min(columns - 1, round(self.salient * columns))

    def planned(self, shape: tuple[int, int], stored: torch.dtype, where: str) -> Format:
        """The format this gives for a weight of that shape, on meta."""
        (m, n), dtype, k = shape, IntOptions.scale_dtype(stored), self.loud(shape[1])
        found: Format = IntGroup.planned((m, n - k), self.levels - 1, n - k, True, dtype, self.levels)
        if k:
            loud = IntGroup.planned((m, k), self.salient_bits, k, False, dtype)
            found = Columns.pack(torch.empty(n, dtype=torch.uint8, device="meta"), loud, found)
        return Scaled(found, torch.empty(n, dtype=dtype, device="meta")) if self.columns else found

    def __call__(self, weight: Tensor, stats: Stats, *, stored: torch.dtype, where: str = "weight") -> Format:
        """weight [out, in] in the precision to solve in (fp32, or fp64 in tests) → IntGroup, Columns of two, or Scaled around either."""
        dtype = IntOptions.scale_dtype(stored)
        codes, loud, scale, zero, t, _ = self.solve(weight, stats, dtype)
        found: Format = IntGroup.pack(codes[:, ~loud], scale[:, :1].to(dtype), None, self.levels - 1, self.levels)
        if loud.any():
            found = Columns.pack(loud, IntGroup.pack(codes[:, loud], scale[:, 1:].to(dtype), zero[:, 1:].to(torch.uint8), self.salient_bits), found)
        return Scaled(found, t.to(dtype)) if self.columns else found

    def solve(self, weight: Tensor, stats: Stats, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[float]]:
        """Codes uint8 [out, in], which columns are salient [in], scale and zero [out, 1 or 2], t [in], both representable in `dtype`, and the
        error in the damped H-norm after the sweep, after descent, and after every pair of refits and descent."""
        factor = stats.factor(self.damp, True)
        weight = self.target(weight, stats, factor)
        W, H, ridge, k = weight.T.contiguous(), stats.hessian, stats.ridge(factor), self.loud(weight.shape[1])
        h = torch.empty_like(H[0]).index_copy_(0, factor.order, factor.U.diagonal() ** -2)  # what an error in a column costs once all later ones answer
        loud = torch.zeros(len(W), dtype=torch.bool, device=W.device)
        loud[torch.argsort(h * W.square().sum(1), descending=True, stable=True)[:k]] = True
        order = torch.cat([factor.order[~loud[factor.order]], factor.order[loud[factor.order]]])
        U, part = (stats.factorize(factor.damp, order).U if k else factor.U), loud.long()
        scale, top = self.optimum(weight[:, ~loud], h[~loud])[None], [self.levels - 1]
        zero = torch.full_like(scale, symmetric_zero(self.levels - 1, self.levels))
        if k:
            g = grid.fit(weight[:, loud].unsqueeze(1).float(), 2**self.salient_bits, self.salient_bits, False, "hessian", h[loud][None].float(), dtype, 3)
            scale, zero, top = torch.cat([scale, g.scale.T.to(W)]), torch.cat([zero, g.zero.T.to(W)]), [*top, 2**self.salient_bits - 1]
        index, Hd = part.tolist(), H + ridge.diag()

        def improved(W: Tensor, scale: Tensor, zero: Tensor, rounds: int, columns: bool) -> tuple[Tensor, Tensor, Tensor, list[float]]:
            """Codes [n, m], scale, t and the error after every step, for all rows of the layer or some."""
            t, scale = torch.ones_like(H[0]), scale.to(dtype).to(W.dtype)

            def project(j: int, w: Tensor) -> tuple[Tensor, Tensor]:
                step, z = scale[index[j]] * t[j], zero[index[j]]
                q = (w / torch.where(step == 0, 1.0, step) + z).round_().clamp_(0, top[index[j]])  # a row of zeros has no scale
                return q, (q - z) * step

            codes, loss = sweep(W, U, order, project)
            losses = [float(loss)]
            rounds = -1 if factor.failed else rounds
            for r in range(rounds + 1):
                if r and columns:
                    t = refit_columns((codes - zero[part]) * t[:, None] * scale[part], W, Hd, t, dtype)
                if r:
                    scale = refit_rows((codes - zero[part]) * t[:, None], W, Hd, part, scale, dtype)
                losses.append(float(descend(codes, (codes - zero[part]) * t[:, None] * scale[part], W, H, ridge, project, self.sweeps, 128, order)))
            return codes, scale, t, losses

        rows = torch.linspace(0, len(weight) - 1, min(ROWS, len(weight)), device=W.device).long().repeat(len(REACH))
        reach = torch.tensor(REACH, dtype=W.dtype, device=W.device).repeat_interleave(len(rows) // len(REACH))
        sample, first = W[:, rows], torch.cat([scale[:1, rows] * reach, scale[1:, rows]])
        codes, tried, _, _ = improved(sample, first, zero[:, rows], 1, False)
        D = (codes - zero[part][:, rows]) * tried[part] - sample
        scale[0] *= REACH[int((D * (Hd @ D)).sum(0).view(len(REACH), -1).sum(1).argmin())]
        codes, scale, t, losses = improved(W, scale, zero, self.rounds, self.columns)
        return codes.T.contiguous(), loud, scale.T.contiguous(), zero.T.contiguous(), t, losses


def refit_columns(Q: Tensor, W: Tensor, Hd: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
    """Column scales [n] at least as good as `t`, jointly optimal before they are rounded; Q [n, m] what stands there now, t included."""
    A, b = (Q @ Q.T).mul_(Hd).double(), (Hd @ W).mul_(Q).sum(1, dtype=torch.float64)
    silent = A.diagonal() == 0  # columns without a code other than zero keep their scale
    A.diagonal().add_(1e-9 * A.diagonal().mean() + silent)
    solved, info = torch.linalg.solve_ex(A, b)
    new = torch.where(silent, t, t * solved).to(dtype).to(t.dtype)
    cost = lambda u: (A @ u - 2 * b) @ u
    better = info == 0 and bool(torch.isfinite(new).all()) and bool(cost(torch.where(silent, 1.0, new.double() / t)) < cost(torch.ones_like(b)))
    return new if better else t


def refit_rows(B: Tensor, W: Tensor, Hd: Tensor, part: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Row scales [parts, m] at least as good as `scale`, for B [n, m] = Ŵᵀ but for them; columns with part p have scale[p]."""
    masked = [B * (part == p)[:, None] for p in range(len(scale))]
    products = [Hd @ V for V in masked]
    A = torch.stack([torch.stack([(P * V).sum(0) for V in masked], -1) for P in products], -1).double()  # [m, parts, parts]
    b = torch.stack([(P * W).sum(0) for P in products], -1).double()
    A.diagonal(dim1=1, dim2=2).add_((A.diagonal(dim1=1, dim2=2) == 0).double())
    solved, info = torch.linalg.solve_ex(A, b)
    new = solved.T.to(dtype).to(scale.dtype)
    cost = lambda s: (((A @ s[..., None])[..., 0] - 2 * b) * s).sum(1)
    better = (info == 0) & (torch.isfinite(new) & (new * scale > 0)).all(0) & (cost(new.T.double()) < cost(scale.T.double()))
    return torch.where(better, new, scale)
