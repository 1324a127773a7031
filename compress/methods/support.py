"""Exact least squares on a fixed mask: the best values that the kept weights can have, all rows at once.

    minimise (ŵ−w)ᵀ H_d (ŵ−w) over ŵ with ŵ = 0 off the mask   →   H_SS ŵ_S = (H_d w)_S   for every row with its own support S

A system a row, k³ each, would be too many; conjugate gradients with the diagonal as preconditioner solve them together, one product with H a
step (2mn²), and every step lowers the error of every row, so any number of steps refines whatever mask a method chose.
"""

from __future__ import annotations

import torch
from torch import Tensor


def least_squares(W: Tensor, start: Tensor, keep: Tensor, H: Tensor, ridge: Tensor, steps: int = 100, tolerance: float = 1e-4) -> Tensor:
    """The minimiser Ŵ [out, in], from `start`; keep bool [out, in], H_d = H [in, in] + diag(ridge [in]).

    Ends after `steps`, or where the preconditioned gradient has fallen to `tolerance` of what it was."""
    X = start * keep
    product = lambda A: (A @ H).addcmul_(ridge, A)
    R = product(W - X).mul_(keep)  # what is left of the gradient on the mask
    inverse = 1 / (H.diagonal() + ridge)
    P = R * inverse
    rho = (R * P).sum(1, keepdim=True)
    end = tolerance**2 * rho.sum()
    for _ in range(steps):
        if rho.sum() <= end:
            break
        Q = product(P).mul_(keep)
        step = rho / (P * Q).sum(1, keepdim=True).clamp_(min=torch.finfo(P.dtype).tiny)
        X.addcmul_(step, P)
        R.addcmul_(step, Q, value=-1)
        Z = R * inverse
        before, rho = rho, (R * Z).sum(1, keepdim=True)
        P = P.mul_(rho / before.clamp(min=torch.finfo(P.dtype).tiny)).add_(Z)
    return X
