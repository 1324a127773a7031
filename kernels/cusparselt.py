"""2:4 weights on the sparse tensor cores, through cuSPARSELt: twice the dense rate for a prompt; memory of 9/16 for bf16.

    y = x · Ŵᵀ + b       as  (Ŵ · xᵀ)ᵀ  with Ŵ compressed once: `torch._cslt_compress`, then `torch._cslt_sparse_mm`

It reads 16-bit values: 4-bit ones are dequantized when the weight is prepared, so for them this buys speed with memory.
"""

import torch
from torch import Tensor

from ..formats import Format, Sparse24


def supports(format: Format, x: Tensor) -> str | None:
    """None if `prepare` and `matmul` run this, else the reason."""
    if not isinstance(format, Sparse24):
        return f"{type(format).__name__} is not Sparse24"
    if (format.n, format.m) != (2, 4):
        return f"{format.n}:{format.m}, not 2:4"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"activations are {x.dtype}, not bfloat16 or float16"
    if not x.is_cuda:
        return f"activations are on {x.device}, not on CUDA"
    if not torch.backends.cusparselt.is_available():
        return "this torch has no cuSPARSELt"
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return "this GPU has no sparse tensor cores"
    out, n = format.shape
    return f"{out}×{n}: both are to be multiples of 16" if out % 16 or n % 16 else None


def prepare(format: Sparse24, dtype: torch.dtype) -> Tensor:
    """cuSPARSELt's own layout of values and metadata."""
    return torch._cslt_compress(format.dequantize(dtype))


def matmul(x: Tensor, prepared: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [m, in], filled up with zeros to a multiple of 8 rows → [m, out]."""
    m = len(x)
    padded = torch.nn.functional.pad(x, (0, 0, 0, -m % 8)).contiguous()
    return torch._cslt_sparse_mm(prepared, padded.t(), bias=bias, transpose_result=True)[:m]
