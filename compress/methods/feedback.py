"""Error feedback: the column sweep of GPTQ onto whatever levels a column has, for codes that no uniform grid describes.

    for column i in solving order:   q = Π_i(W_i),   e = (W_i − q) / U_ii,   W_{j>i} −= e · U_ij;       Σ e² is the error in the damped H-norm

gptq.py has the equations and their paper; its own sweep fits grids on the way, this one takes the levels as given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .descent import Project, one_thread


def sweep(W: Tensor, U: Tensor, order: Tensor, project: Project, block_size: int = 128) -> tuple[Tensor, Tensor]:
    """Codes uint8 [n, m] and Σe² of W [n, m], one column of the layer a row; U [n, n] is the factor in solving `order` (calibration/statistics.py)."""
    W, place, codes, loss = W[order], order.tolist(), torch.empty_like(W, dtype=torch.uint8), torch.zeros((), dtype=torch.float64, device=W.device)
    for start in range(0, len(W), block_size):
        stop = min(start + block_size, len(W))
        block, U_block = W[start:stop], U[start:stop, start:stop]
        diagonal, E = U_block.diagonal().tolist(), torch.empty_like(block)
        with one_thread(block):
            for i in range(stop - start):
                codes[place[start + i]], value = project(place[start + i], block[i])
                E[i] = e = (block[i] - value) / diagonal[i]
                block[i + 1 :].addr_(U_block[i, i + 1 :], e, alpha=-1)
        W[stop:].addmm_(U[start:stop, stop:].T, E, alpha=-1)
        loss += E.square().sum(dtype=torch.float64)
    return codes, loss
