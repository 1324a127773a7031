"""Closed-form scales: with the integer codes fixed, the best scale of every group of a row, jointly, in the norm of H.

    ŵ = Σ_g s_g v_g,  v_g = codes − zero on group g, 0 elsewhere;   minimise (ŵ−w)ᵀ H_d (ŵ−w)   →   (Vᵀ H_d V) s = Vᵀ H_d w

A grid is fitted before the codes are known; once they are, the scales are the solution of a small linear system a row (groups × groups). The new
scale is rounded to its storage dtype first and kept only on rows where the error fell, so the layer's error never rises. Not in the GPTQ paper;
EfficientQAT (arXiv 2407.11062) trains the same scales by gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def refit_scales(codes: Tensor, W: Tensor, Hd: Tensor, scale: Tensor, zero: Tensor, group_of: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Scales [groups, m] that are at least as good as `scale`. codes, W [n, m] one column of the layer a row, in the order of Hd [n, n]; zero [groups, m];
    group_of [n]."""
    groups, m = scale.shape
    V = codes.to(W.dtype) - zero[group_of]  # [n, m]
    A = torch.empty(m, groups, groups, dtype=W.dtype, device=W.device)
    b = torch.empty(m, groups, dtype=W.dtype, device=W.device)
    members = [torch.nonzero(group_of == g)[:, 0] for g in range(groups)]
    for g, rows in enumerate(members):
        P = Hd[:, rows] @ V[rows]  # [n, m]: H_d v_g for every row of the layer
        b[:, g] = (P * W).sum(0)
        A[:, :, g] = torch.zeros(groups, m, dtype=W.dtype, device=W.device).index_add_(0, group_of, P * V).T
    ridge = 1e-6 * A.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)  # a group whose codes are all zero has no say: keep the system regular
    solved, info = torch.linalg.solve_ex(A + torch.diag_embed(ridge[:, None].expand(m, groups)), b)
    new = solved.T.to(scale_dtype).to(W.dtype)  # rounded before it is judged
    usable = torch.isfinite(new) & (new * scale > 0) & (info == 0)
    new = torch.where(usable, new, scale)

    def error(s: Tensor) -> Tensor:  # [m], up to a constant
        s = s.T
        return (s[:, None] @ A @ s[:, :, None])[:, 0, 0] - 2 * (s * b).sum(1)

    return torch.where(error(new) < error(scale), new, scale)
