"""Hidden states of all calibration windows between two blocks: in RAM, or in a memory-mapped file past a limit.

One buffer is enough: a block reads window i and writes window i. The file lives in a temporary folder and is unlinked at once, so that no kill
leaves it behind; it is scratch space, not state (a resumed run recomputes it from the finished blocks).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

RAM_LIMIT = 4 << 30  # bytes of hidden states kept in RAM before a file takes over


def allocate(shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None = None, limit: int = RAM_LIMIT) -> Tensor:
    """An uninitialised tensor [windows, seqlen, width], memory-mapped from `folder` when larger than `limit` bytes."""
    count = torch.Size(shape).numel()
    if count * dtype.itemsize <= limit:
        return torch.empty(shape, dtype=dtype)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="hidden-") as file:
        file.truncate(count * dtype.itemsize)
        return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)
