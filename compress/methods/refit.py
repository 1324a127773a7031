"""Closed-form scales: with the integer codes fixed, the best scale of every group of a row, jointly, in the norm of H.

    ŵ = Σ_g s_g v_g,  v_g = codes − zero on group g, 0 elsewhere;   minimise (ŵ−w)ᵀ H_d (ŵ−w)   →   (Vᵀ H_d V) s = Vᵀ H_d w

A grid is fitted before the codes are known; once they are, the scales are the solution of a small linear system a row (groups × groups). The new
scale is rounded to its storage dtype first and kept only on rows where the error fell, so the layer's error never rises. Not in the GPTQ paper;
EfficientQAT (arXiv 2407.11062) trains the same scales by gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def refit_scales(codes: Tensor, W: Tensor, H: Tensor, ridge: Tensor, scale: Tensor, zero: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Scales [groups, m] that are at least as good as `scale`. codes, W [n, m], one column of the layer a row; zero [groups, m];
    H_d = H [n, n] + diag(ridge [n])."""
    (groups, m), size = scale.shape, len(W) // len(scale)
    A = torch.empty(m, groups, groups, dtype=W.dtype, device=W.device)
    b = torch.empty(m, groups, dtype=W.dtype, device=W.device)
    V = codes.to(W.dtype).view(groups, size, m).sub_(zero[:, None])
    for g in range(groups):
        rows = slice(g * size, (g + 1) * size)
        P = H[:, rows] @ V[g]  # [n, m]: H_d v_g for every row of the layer
        P[rows].addcmul_(ridge[rows, None], V[g])
        b[:, g] = (P * W).sum(0)
        A[:, :, g] = P.view(groups, size, m).mul_(V).sum(1).T
    floor = 1e-6 * A.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)  # a group whose codes are all zero has no say: keep the system regular
    solved, info = torch.linalg.solve_ex(A + torch.diag_embed(floor[:, None].expand(m, groups)), b)
    new = solved.T.to(scale_dtype).to(W.dtype)  # rounded before it is judged
    usable = torch.isfinite(new) & (new * scale > 0) & (info == 0)
    new = torch.where(usable, new, scale)

    def error(s: Tensor) -> Tensor:  # [m], up to a constant
        s = s.T
        return (s[:, None] @ A @ s[:, :, None])[:, 0, 0] - 2 * (s * b).sum(1)

    return torch.where(error(new) < error(scale), new, scale)
