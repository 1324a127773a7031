"""What the swap-AB kernels share: Yᵀ = W · Xᵀ, weights in tensor-core fragment order, split-K in a fixed order.

The weights are the tall operand and stay in registers: a thread's words hold exactly its elements of wgmma's A fragment, so unpacking needs no
exchange between threads. In a block of 16 rows and 16 columns thread (g, t) of a warp owns rows g and g + 8 (h) and columns 8·kk + 2t + e,

    element (row 8h + g, column 16i + 8kk + 2t + e),      g 0…7,  t 0…3,  h, kk, e 0…1,

and a word holds pairs e = 0, 1 as the low and high 16 bits of a register. `fragments` brings codes into that order. x has few rows: split-K fills the GPU,
each program adds its share of K tiles, and the last one to arrive at a tile sums all shares in their order: the same bits on every run, no float atomics.
"""

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..formats import Format

INTERPRET = triton.knobs.runtime.interpret  # fixed when kernels are decorated; its bf16 arithmetic is on raw bits, so operands are cast to fp32
BN = 64  # rows of W a program: one warpgroup of wgmma
PARTIAL, TILES = 2**22, 2**16  # fp32 partial sums (16 MB) and counters of a workspace


@triton.jit
def pair(word, DTYPE: tl.constexpr):
    """int32 → its low and high halves as 16-bit floats, along a new last dimension e."""
    return tl.join((word & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True), (word >> 16).to(tl.int16).to(DTYPE, bitcast=True))


@triton.jit
def quad(h0k0, h0k1, h1k0, h1k1, DTYPE: tl.constexpr):
    """The four registers of a 16×16 block, [...] each → [..., e, kk, h]."""
    return tl.join(tl.join(pair(h0k0, DTYPE), pair(h0k1, DTYPE)), tl.join(pair(h1k0, DTYPE), pair(h1k1, DTYPE)))


@triton.jit
def dot(w, x, acc, EXACT: tl.constexpr):
    """EXACT: in fp32, which is what the interpreter needs."""
    if EXACT:
        return tl.dot(w.to(tl.float32), x.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(w, x, acc)


@triton.jit
def columns(p, m, k, M, K, EVEN: tl.constexpr):
    """Xᵀ [k, m] at pointers p, zero outside. EVEN 2: nothing is outside, and without a mask a copy to shared memory costs one instruction; 1: no column is."""
    if EVEN == 2:
        return tl.load(p)
    elif EVEN == 1:
        return tl.load(p, m[None, :] < M, 0.0)
    else:
        return tl.load(p, (m[None, :] < M) & (k[:, None] < K), 0.0)


@triton.jit
def shares(partial, tile, SPLIT: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr):
    """Where the workspace holds the first share of a tile, fp32 [BN, BM]; the others follow."""
    return partial + tile * (SPLIT * BN * BM) + (tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :])


@triton.jit
def handed_in(acc, p, arrived, share, SPLIT: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr):
    """Leave this program's share of a tile in the workspace. True for the last of SPLIT to do so."""
    tl.store(p + share * (BN * BM), acc)
    tl.debug_barrier()  # all threads have stored before one says so
    return tl.atomic_add(arrived, 1, sem="acq_rel") == SPLIT - 1


@triton.jit
def total(p, arrived, SPLIT: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr):
    """All shares of a tile, added in their order; the counter is left as it was found."""
    acc = tl.zeros((BN, BM), tl.float32)
    for i in range(SPLIT):
        acc += tl.load(p + i * (BN * BM), cache_modifier=".cg")
    tl.store(arrived, 0)
    return acc


@triton.jit
def _write(acc, y, bias, m, n, M, N, BIAS: tl.constexpr):
    if BIAS:
        acc += tl.load(bias + n, n < N, 0.0).to(tl.float32)[:, None]
    tl.store(y + m[None, :].to(tl.int64) * N + n[:, None], acc.to(y.dtype.element_ty), (m[None, :] < M) & (n[:, None] < N))


@triton.jit
def finish(acc, y, bias, partial, arrived, m, n, M, N, BIAS: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr):
    """acc fp32 [BN, BM], this program's share of rows n of W and rows m of x → y, once all SPLIT shares of the tile are there."""
    if SPLIT == 1:
        _write(acc, y, bias, m, n, M, N, BIAS)
    else:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        p = shares(partial, tile, SPLIT, BN, BM)
        if handed_in(acc, p, arrived + tile, tl.program_id(2), SPLIT, BN, BM):
            _write(total(p, arrived + tile, SPLIT, BN, BM), y, bias, m, n, M, N, BIAS)


def fragments(codes: Tensor, columns: int) -> Tensor:
    """[N, K], any dtype → [N/16, K/columns, g 8, t 4, i, h 2, kk 2, e 2], rows and columns padded with zeros to whole tiles."""
    N, K = codes.shape
    codes = F.pad(codes, (0, -K % columns, 0, -N % BN))
    return codes.view(-(-N // BN) * BN // 16, 2, 8, -(-K // columns), columns // 16, 2, 4, 2).permute(0, 3, 2, 6, 4, 1, 5, 7)


def words(fields: Tensor, shifts: Tensor) -> Tensor:
    """Fields [..., *s] shifted left by shifts [*s] and added up: int32 [...]. Fields must not overlap."""
    total = (fields.long() << shifts.to(fields.device)).flatten(fields.dim() - shifts.dim()).sum(-1)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def even(M: int, K: int, const: dict) -> int:
    """For `columns`, of kernels that take 256 columns an iteration."""
    return 0 if K % 256 else 1 if M % const["BM"] else 2


def rows_of_tile(m: int) -> int:
    """BM: the width of the tensor-core instruction; 16 is the least that keeps weights in registers."""
    return 16 if m <= 16 else 32 if m <= 32 else 64


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def split(tiles: int, steps: int, cells: int, device: torch.device) -> int:
    """Shares of K: some four programs a multiprocessor, no more than there are steps or than the workspace holds of tiles of so many cells."""
    return max(1, min(4 * multiprocessors(device) // tiles, steps, 16, PARTIAL // (tiles * cells)))


@functools.cache
def _workspace(device: torch.device, stream: int | str) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # the first call need not be like the next
        return torch.empty(PARTIAL, device=device), torch.zeros(TILES, dtype=torch.int32, device=device)


def workspace(x: Tensor) -> tuple[Tensor, Tensor]:
    """Partial sums and counters of tiles, once a device and stream: what runs on one stream runs in turn. CUDA graphs of one device share one: no two
    may run at a time."""
    if not x.is_cuda:
        return _workspace(x.device, 0)
    _workspace(x.device, "graph")  # before the first capture: memory of a graph's pool is not zeroed until that graph runs
    return _workspace(x.device, "graph" if torch.cuda.is_current_stream_capturing() else torch.cuda.current_stream(x.device).cuda_stream)


def output(x: Tensor, N: int, dtype: torch.dtype | None = None) -> Tensor:
    """y [m, N] in `dtype`, else x's; in the interpreter fp32, because it truncates to bf16."""
    return torch.empty(x.shape[0], N, dtype=torch.float32 if INTERPRET else dtype or x.dtype, device=x.device)


def refuses(x: Tensor, format: Format, dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16), least: tuple[int, int] = (8, 0)) -> str | None:
    """What all these kernels ask of the activations and the GPU, whose compute capability is to be at `least` this; None if x is fine."""
    if x.dtype not in dtypes:
        return f"activations are {x.dtype}, not {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}"
    if not (x.is_cuda or INTERPRET):
        return f"activations are on {x.device}, not on CUDA"
    if x.is_cuda and (capability := torch.cuda.get_device_capability(x.device)) < least:
        return f"compute capability {capability} lacks instructions of this kernel, which came with {least}"
    device = next(iter(format.tensors().values())).device
    return f"the weight is on {device}, activations on {x.device}" if device != x.device else None
