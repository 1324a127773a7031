"""Many rows: dequantize a chunk of the weight, multiply it by the vendor's matmul, reuse the memory for the next chunk.

Beyond some 256 rows a matmul is bound by tensor cores, which a weight that is unpacked on the fly keeps waiting. Written out whole it costs
two bytes a weight to memory and back, a tenth of the time at 2048 rows; a chunk of 24 MB is read again from the L2 cache (60 MB on an H200), so
what remains is reading the codes, 2 %. The chunk is (q − z)·s in fp32 rounded to bf16 once: the dense weight, bit for bit.
"""

import functools
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import fragment_layout as layout
from . import gated, unpack
from .fragment_weight import Prepared
from .unpack import copied, high, joined, low, numbers, pairs, rounded, tables, twos

CHUNK = 12 * 2**20  # bf16 weights, 24 MB


@triton.jit
def _scaled(p, z, s, row, ASM: tl.constexpr):
    """A pair minus z, which is no integer, to the pair of weights: in fp32, rounded once."""
    return rounded((low(p) - z) * s * row, (high(p) - z) * s * row, ASM)


@triton.jit
def _dequantize(out, w, s, z, t, row, first, last, K, stride, padded, tiles, entries, KIND: tl.constexpr, UNITS: tl.constexpr, PLANES: tl.constexpr,
                SCALE: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, BYTE_MUL: tl.constexpr, BYTE_ADD: tl.constexpr, PER_ROW: tl.constexpr,
                CORRECTED: tl.constexpr, BN: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """One tile of BN rows from row `first` on, written to out [last − first, K] with rows `stride` apart."""
    tile, rows = tl.program_id(0), tl.program_id(1) * BN
    r, c, k = tl.arange(0, BN // 2), tl.arange(0, 16), tl.arange(0, 64)
    n, n0 = first + rows + tl.arange(0, BN), first + rows + r // 8 * 16 + r % 8
    block = first // 16 + rows // 16 + r // 8
    p = w + (block * (tiles * PLANES * 128) + r % 8 * 16)[:, None] + c[None, :] + tile * (PLANES * 128)
    w0 = tl.load(p)
    w1 = tl.load(p + 128) if PLANES > 1 else w0
    w2 = tl.load(p + 256) if PLANES > 2 else w0
    table = tables(t, n0, entries, PER_ROW) if t is not None else None
    for u in tl.static_range(UNITS):
        unit = tile * UNITS + u
        g, PACK = unit // GROUP, 4 // GROUP if GROUP < 3 else 1
        near = (g // PACK * (padded // 2) + (first + rows) // 2 + r) * PACK + g % PACK
        fine = (block * (tiles * UNITS * 32) + r % 8 * 4)[:, None] + (c % 4)[None, :] + unit * 32
        s0, s1, f0, f1, row0, row1 = 1.0, 1.0, 0.0, 0.0, 1.0, 1.0
        if SCALE == "group":
            s0, s1 = numbers(tl.load(twos(s) + near)[:, None], s.dtype.element_ty)
        if SCALE == "fine":
            s0, s1 = low(tl.load(s + fine)), high(tl.load(s + fine))
        if SCALE == "byte":
            both = tl.load(s + fine).to(tl.int32)
            s0, s1 = low(copied(both, 0, 8, ASM) * BYTE_MUL + BYTE_ADD), low(copied(both, 1, 8, ASM) * BYTE_MUL + BYTE_ADD)
        if row is not None:
            row0, row1 = tl.load(row + n0)[:, None], tl.load(row + n0 + 8)[:, None]
        if CORRECTED:
            f0, f1 = numbers(tl.load(twos(z) + near)[:, None], z.dtype.element_ty)
        if z is None or CORRECTED:
            z0 = tl.full((1, 1), OFFSET, tl.int32) if OFFSET else None
            z1 = z0
        else:
            both = tl.load(z + fine) if SCALE == "fine" else tl.load(twos(z) + near)[:, None]
            z0, z1 = copied(both, 0, 16, ASM), copied(both, 1, 16, ASM)
        p00, p01, p10, p11 = pairs(w0, w1, w2, table, z0, z1, u, KIND, ASM)
        v = (_scaled(p00, f0, s0, row0, ASM), _scaled(p01, f0, s0, row0, ASM), _scaled(p10, f1, s1, row1, ASM), _scaled(p11, f1, s1, row1, ASM))
        column = unit * 64 + k
        tl.store(out + (n - first)[:, None].to(tl.int64) * stride + column[None, :], joined(v, 1, BN), (n[:, None] < last) & (column[None, :] < K))


@functools.cache
def _scratch(device: torch.device, stream: int, elements: int) -> Tensor:
    """One a device and stream, but for rows of which 64 are more than a chunk. Never an inference tensor: the first call need not be like the next."""
    with torch.inference_mode(False):
        return torch.empty(elements, dtype=torch.bfloat16, device=device)


def dequantize(p: Prepared, first: int, last: int, out: Tensor) -> None:
    """Rows first … last − 1 of the weight, in the order of the layout, to the first columns of out [last − first, ≥ in]; first a multiple of 64."""
    kind, (_, K) = layout.KINDS[p.kind], p.shape
    N, padded = layout.padded((16 * p.words.shape[0], K))
    tiles = padded // (layout.UNIT * kind.units)
    with torch.cuda.device_of(out):
        _dequantize[(tiles, triton.cdiv(last - first, 64))](
            out, p.words, p.scales, p.zeros, p.table, p.row, first, last, K, out.stride(0), N, tiles, 8 * p.per_row, KIND=p.kind, UNITS=kind.units,
            PLANES=kind.planes, SCALE=p.scale, GROUP=p.group_units, OFFSET=p.offset, BYTE_MUL=p.byte[0], BYTE_ADD=p.byte[1], PER_ROW=p.per_row,
            CORRECTED=p.corrected, BN=64, ASM=unpack.ASM, num_warps=4)  # fmt: skip


def matmul(x: Tensor, p: Prepared, bias: Tensor | None = None) -> Tensor:
    """x bf16 [m, in] → bf16 [m, out], or [m, out/2] of a gated weight. A low-rank term is columns more: [x, u] · [W, B]^T."""
    if p.gated:
        both = matmul(x, replace(p, gated=False, shape=(-(-p.shape[0] // 16) * 16, p.shape[1]))).view(len(x), -1, 2, 8)  # 8 gates, their 8 ups, …
        y = torch.cat([both[:, :, half].reshape(len(x), -1)[:, : p.features] for half in (0, 1)], 1)
        return gated.apply(y if bias is None else y + bias)
    (N, K), rank, y = p.shape, 0 if p.A is None else len(p.A), x.new_empty(x.shape[0], p.shape[0])
    rows = min(max(CHUNK // (K + rank) // 64, 1) * 64, -(-N // 64) * 64)
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    W = _scratch(x.device, stream, max(CHUNK, rows * (K + rank)))[: rows * (K + rank)].view(rows, -1)
    x = x if p.A is None else torch.cat([x, x @ p.A.T], 1)
    for first in range(0, N, rows):
        chunk = W[: min(rows, N - first)]
        last = first + len(chunk)
        dequantize(p, first, last, chunk)
        if p.B is not None:
            chunk[:, K:] = p.B[first:last]
        if bias is None:
            torch.mm(x, chunk.T, out=y[:, first:last])
        else:
            torch.addmm(bias[first:last], x, chunk.T, out=y[:, first:last])
    return y
