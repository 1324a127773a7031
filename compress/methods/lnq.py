"""LNQ, layer-wise non-uniform quantization: every row its own table of 2^b values, codes and table fitted by turns in the norm of H.

    minimise (ŵ−w)ᵀ H_d (ŵ−w) a row,   ŵ = P c,   P one-hot [in, 2^b], c [2^b] the table
    codes:  coordinate descent onto the table (descent.py);        table:  c = (Pᵀ H_d P)⁻¹ Pᵀ H_d w

Both halves only ever lower the error (Kim et al., GuidedQuant, arXiv 2505.07004). The paper starts from SqueezeLLM's tables (arXiv 2306.07629),
k-means of the row weighted by diag(H), and their nearest codes. What we do differently: the first tables minimise Σ_j |w_j − c|⁴ / U_jj², what an
error in column j costs when all later columns make up for it, with a power above 2 because the weights that meet the table have taken up the
errors of those before them and reach further than the originals; the first codes are a GPTQ sweep onto these tables. On the yardstick's
layers the two leave 20 to 45 % less error than the paper's start, rounds and all. A new table is rounded to its stored 16 bits before it is
judged, and kept only where the row's error fell. Cost for W [m, n]: mn² for the sweep and each round of descent, 2^b mn² for each refit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..calibration.statistics import Stats
from ..errors import CompressError
from ..formats import Lut
from .descent import descend
from .feedback import sweep
from .options import IntOptions
from .target import TargetOptions

CHUNK = 1 << 20  # weights whose tables are found together: bounds the temporaries
LLOYD = 100  # iterations of k-means, at most; some 20 to 60 are needed


@dataclass(frozen=True)
class LNQ(TargetOptions):
    bits: Literal[1, 2, 3, 4] = 3  # bits of a code; the table of a row has 2**bits values
    rounds: int = 2  # table refits, each followed by coordinate descent on the codes; 0: the tables of k-means
    sweeps: int = 2  # rounds of coordinate descent after the column sweep and after every refit
    damp: float = 0.01  # added to the diagonal of H, relative to its mean; raised tenfold until H can be factored
    block_size: int = 128  # columns between two updates of all later columns; changes the time, not the result

    def __post_init__(self):
        super().__post_init__()
        if self.rounds < 0 or self.sweeps < 0 or not 0 <= self.damp < torch.inf or self.block_size < 1:
            raise CompressError(f"rounds {self.rounds}, sweeps {self.sweeps} and damp {self.damp} must be at least 0, block_size {self.block_size} at least 1")

    def __call__(self, weight: Tensor, stats: Stats, *, stored: torch.dtype, where: str = "weight") -> Lut:
        """weight [out, in] in the precision to solve in (fp32, or fp64 in tests) → Lut; its tables have the 16-bit dtype that `stored` allows."""
        dtype = IntOptions.scale_dtype(stored)
        codes, table, _ = self.solve(weight, stats, dtype)
        return Lut.pack(codes, table.to(dtype), None, f"lut{self.bits}")

    def planned(self, shape: tuple[int, int], stored: torch.dtype, where: str) -> Lut:
        """The format this gives for a weight of that shape, on meta."""
        table = torch.empty(shape[0], 2**self.bits, dtype=IntOptions.scale_dtype(stored), device="meta")
        return Lut.pack(torch.empty(shape, dtype=torch.uint8, device="meta"), table, None, f"lut{self.bits}")

    def solve(self, weight: Tensor, stats: Stats, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Codes uint8 [out, in], tables [out, 2**bits], ascending and representable in `dtype`, and the error in the damped H-norm."""
        factor = stats.factor(self.damp, True)
        weight = self.target(weight, stats, factor)
        W, H, ridge = weight.T.contiguous(), stats.hessian, stats.ridge(factor)  # one column of the layer a row, as in gptq
        h = torch.empty_like(H[0]).index_copy_(0, factor.order, factor.U.diagonal() ** -2)
        table = torch.cat([quartic_means(part, h, 2**self.bits) for part in weight.split(max(1, CHUNK // len(W)))])
        table = table.T.to(dtype).to(W.dtype).contiguous()  # [2^b, m]
        codes, _ = sweep(W, factor.U, factor.order, lambda j, w: project(w, table), self.block_size)
        if factor.failed:
            return codes.T.contiguous(), table.T.contiguous(), H.new_tensor(torch.nan)

        def descended() -> Tensor:
            Q = table.gather(0, codes.long())
            return descend(codes, Q, W, H, ridge, lambda j, w: project(w, table), self.sweeps, self.block_size, factor.order)

        loss = descended()
        for _ in range(self.rounds):
            codes, table = refit_tables(codes, W, H, ridge, table, dtype)
            loss = descended()
        return codes.T.contiguous(), table.T.contiguous(), loss


def project(w: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes [m] and values [m] of w [m] in table [2^b, m], ascending; ties to the lower."""
    codes = (w > (table[1:] + table[:-1]) / 2).sum(0)
    return codes, table.gather(0, codes[None])[0]


def quartic_means(W: Tensor, h: Tensor, levels: int) -> Tensor:
    """Tables [m, levels] fp64, ascending, of W [m, n]: k-means for Σ_j h_j |w_j − c|⁴ from the quantiles of the row, h [n].

    Cells of a sorted row are intervals: sums over them are differences of running sums, of h, hw, hw² and hw³, and those give the quartic's
    first and second derivative in c. One Newton step a turn."""
    w, order = W.double().sort(dim=1)
    reach = w.abs().amax(1, keepdim=True).clamp(min=1e-30)
    w, h = w / reach, h.double()[order]
    sums = torch.stack([torch.nn.functional.pad((h * w**k).cumsum(1), (1, 0)) for k in range(4)])  # [4, m, n + 1]
    wanted = sums[0, :, -1:] * (torch.arange(levels, device=w.device) + 0.5) / levels
    c = w.gather(1, torch.searchsorted(sums[0, :, 1:].contiguous(), wanted).clamp_(max=w.shape[1] - 1))
    for _ in range(LLOYD):
        inner = torch.searchsorted(w, (c[:, 1:] + c[:, :-1]) / 2)
        edges = torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=w.shape[1])
        s0, s1, s2, s3 = sums.gather(2, edges.expand(4, -1, -1)).diff(dim=2)  # over each cell
        slope = s3 - 3 * c * s2 + 3 * c**2 * s1 - c**3 * s0  # Σ h (w − c)³
        bend = 3 * (s2 - 2 * c * s1 + c**2 * s0)
        step = torch.where(bend > 1e-9 * s0, slope / bend, 0.0)  # cells that are empty or hold one value stay
        c = c + step
        if step.abs().max() < 1e-6:
            break
    return c.sort(dim=1).values * reach


def refit_tables(codes: Tensor, W: Tensor, H: Tensor, ridge: Tensor, table: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tables [2^b, m] that are at least as good as `table`, ascending, and the codes renamed to match; W and codes [n, m], H_d = H + diag(ridge).

    With E = ŵ − w the change d of a table changes the row's error by dᵀA d + 2 dᵀb,  A = Pᵀ H_d P,  b = Pᵀ H_d E."""
    (n, m), K, parts = W.shape, len(table), []
    for rows in torch.arange(m, device=W.device).split(max(1, 4 * CHUNK // (n * K))):
        index, old = codes[:, rows].long(), table[:, rows]
        P = torch.zeros(n, K, len(rows), dtype=W.dtype, device=W.device).scatter_(1, index[:, None], 1)
        HP = (H @ P.view(n, -1)).addcmul_(ridge[:, None], P.view(n, -1)).view_as(P)
        A = torch.einsum("nkr,nlr->rkl", P, HP).double()
        b = torch.einsum("nkr,nr->rk", HP, old.gather(0, index) - W[:, rows]).double()
        unused = (A.diagonal(dim1=1, dim2=2) == 0).double()  # values that no code names stay
        solved, info = torch.linalg.solve_ex(A + torch.diag_embed(unused), -b)
        new = (old + solved.T).to(dtype).to(W.dtype)  # rounded before it is judged
        d = (new - old).T.double()
        better = ((A @ d[:, :, None])[..., 0] + 2 * b).mul_(d).sum(1) < 0
        new, order = torch.where(better & (info == 0), new, old).sort(dim=0)
        parts.append((order.argsort(dim=0).gather(0, index).to(torch.uint8), new))
    return torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1)
