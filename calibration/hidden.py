"""Hidden states of all calibration windows between two blocks: in RAM, or in a memory-mapped file past a limit.

One buffer is enough: a block reads window i and writes window i. The file is unlinked as soon as it is mapped, so that no kill
leaves it behind; it is scratch space, not state (a resumed run recomputes it from the finished blocks).
"""

from __future__ import annotations

import ctypes
import gc
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CompressError

RAM_LIMIT = 4 << 30  # bytes of hidden states kept in RAM before a file takes over


def release() -> None:
    """Give freed memory back to the system: modules in reference cycles, and what glibc keeps of pieces below 32 MB, which is most of a layer."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def few_kernels() -> None:
    """Have oneDNN, and torch's cache above it, keep 64 compiled products (half a MB each) in place of 1024: routed experts ask for others with every
    batch, for no two give an expert as many tokens. Heeded by a process that has multiplied nothing yet; slower by nothing that was measured."""
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "64")


def allocate(shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None = None, limit: int = RAM_LIMIT) -> Tensor:
    """An uninitialised tensor [windows, seqlen, width], memory-mapped from `folder` when larger than `limit` bytes."""
    count = torch.Size(shape).numel()
    if count * dtype.itemsize <= limit:
        return torch.empty(shape, dtype=dtype)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="hidden-") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)  # a sparse file on a full disk would end in SIGBUS, not in an error
        except OSError as error:
            raise CompressError(f"{folder}: no room for {count * dtype.itemsize / 1e9:.2f} GB of hidden states ({error.strerror}); make room, or use fewer "
                                "--samples or a shorter --seqlen") from error  # fmt: skip
        return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)
