"""Coordinate descent on the codes: after the sweep, ask of every weight again whether another level would lower the layer's error.

    minimise tr[(Q−W) H_d (Q−W)ᵀ];   D = (Q−W) H_d;   for column j:   q = Π(Q_j − D_j / H_jj),   D += (q − Q_j) H_j

Each step is the exact minimum over one column with all others fixed, so the error never rises. GPTQ decides each column once, in the light of
the columns before it; descent lets the early columns answer to the late ones (as in QuIP#'s and CDQuant's refinements, arXiv 2402.04396,
2406.17542). One sweep costs 2mn² operations for W [m, n], twice GPTQ's own; blocks of columns keep them in matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor

Project = Callable[[int, Tensor], tuple[Tensor, Tensor]]  # column j, targets [m] → the nearest codes and the values they stand for


@contextmanager
def one_thread(block: Tensor):
    """Steps over one column of a small block take microseconds: threads would wait for each other longer than they work. Bytes do not change."""
    threads = torch.get_num_threads()
    few = block.device.type == "cpu" and block.numel() < 1 << 18
    if few:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if few:
            torch.set_num_threads(threads)


def descend(codes: Tensor, Q: Tensor, W: Tensor, H: Tensor, ridge: Tensor, project: Project, sweeps: int, block_size: int, order: Tensor) -> Tensor:
    """Improve `codes` (uint8) in place; returns the error that is left. codes, W and Q, the values that the codes stand for (used up), are
    [n, m], one column of the layer a row; H_d = H [n, n] + diag(ridge [n]); columns are asked in `order` [n]."""
    E = Q - W
    D = (H @ E).addcmul_(ridge[:, None], E)  # [n, m], kept at H_d (Q − W)
    del E
    inverse = (1 / (H.diagonal() + ridge)).tolist()
    for _ in range(sweeps):
        changed = 0
        for rows in order.split(block_size):
            H_rows = H[rows]  # [b, n]
            H_block, D_block, Q_block, C_block = H_rows[:, rows] + ridge[rows].diag(), D[rows], Q[rows], codes[rows]
            before = Q_block.clone()
            with one_thread(D_block):
                for i, j in enumerate(rows.tolist()):
                    C_block[i], value = project(j, Q_block[i].sub(D_block[i], alpha=inverse[j]))
                    D_block.addr_(H_block[i], value - Q_block[i])
                    Q_block[i] = value
            Q[rows], codes[rows] = Q_block, C_block
            step = Q_block - before
            changed += int(step.count_nonzero())
            D.addmm_(H_rows.T, step)
            D[rows] = D_block
        if changed < 1e-4 * Q.numel():
            break
    return Q.sub_(W).mul_(D).sum(dtype=torch.float64)
