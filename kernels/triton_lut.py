"""A table a row (LNQ, SqueezeLLM): codes look their 16-bit values up in registers, by byte permutation.

    y[m, n] = Σ_k table[n, q[n, k]] · x[m, k] + b[n]

PRMT picks four bytes out of eight by four 3-bit selectors: with the low bytes of eight table entries in one pair of registers and the high bytes in
another, two PRMT look four codes up and two more interleave the bytes to two pairs of values: one instruction a weight for 1 to 3 bits (4 bits need twice
as many, and are the fragment kernel's), and no shared memory, whose banks random look-ups would fight over.
The codes lie in nibbles for it (selectors are nibbles), 8 to a register: its low half belongs to row g of the fragment, its high half to row g + 8.
Three bits leave every fourth bit free, and the free bits of three words make a fourth, so nothing is wasted.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import Format, Lut
from . import ops, tiles

COLUMNS = {1: 256, 2: 128, 3: 256}  # of a K tile: what 16 bytes a thread hold, three times that for 3 bits


@triton.jit
def _lookup8(codes, l0, l1, h0, h1):
    """Four codes below 8, in the low nibbles: entries whose bytes are l0 l1 and h0 h1 → two registers of two values."""
    return tl.inline_asm_elementwise("""{ .reg .b32 l, h; prmt.b32 l, $3, $4, $2; prmt.b32 h, $5, $6, $2;
        prmt.b32 $0, l, h, 0x5140; prmt.b32 $1, l, h, 0x7362; }""", "=r,=r,r,r,r,r,r", [codes, l0, l1, h0, h1],
        dtype=(tl.int32, tl.int32), is_pure=True, pack=1)  # fmt: skip


@triton.jit
def _block(codes, a, b, DTYPE: tl.constexpr):
    """Eight codes in nibbles → [..., e, kk, h]; a and b are the tables of rows g and g + 8."""
    h0k0, h0k1 = _lookup8(codes, a[0], a[1], a[2], a[3])
    h1k0, h1k1 = _lookup8(codes >> 16, b[0], b[1], b[2], b[3])
    return tiles.quad(h0k0, h0k1, h1k0, h1k1, DTYPE)


@triton.jit
def _weights(w, stride, a, b, BITS: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr):
    """A K tile of `BN` rows: pointers [BN/2, 16] → [BN, columns]."""
    w0 = tl.load(w, eviction_policy="evict_first")
    if BITS == 2:
        v = tl.join(_block(w0 & 0x33333333, a, b, DTYPE), _block((w0 >> 2) & 0x33333333, a, b, DTYPE))
        return v.reshape(BN // 16, 8, 4, 4, 2, 2, 2, 2).permute(0, 6, 1, 7, 3, 5, 2, 4).reshape(BN, 128)
    else:
        if BITS == 1:
            c0, c1, c2, c3 = w0 & 0x11111111, (w0 >> 1) & 0x11111111, (w0 >> 2) & 0x11111111, (w0 >> 3) & 0x11111111
        else:
            w1, w2 = tl.load(w + stride, eviction_policy="evict_first"), tl.load(w + 2 * stride, eviction_policy="evict_first")
            c0, c1, c2 = w0 & 0x77777777, w1 & 0x77777777, w2 & 0x77777777
            c3 = ((w0 >> 3) & 0x11111111) | ((w1 >> 2) & 0x22222222) | ((w2 >> 1) & 0x44444444)
        v = tl.join(tl.join(_block(c0, a, b, DTYPE), _block(c2, a, b, DTYPE)),
                    tl.join(_block(c1, a, b, DTYPE), _block(c3, a, b, DTYPE)))  # fmt: skip
        return v.reshape(BN // 16, 8, 4, 4, 2, 2, 2, 2, 2).permute(0, 6, 1, 7, 8, 3, 5, 2, 4).reshape(BN, 256)


@triton.jit
def _matmul(x, w, tables, bias, y, partial, arrived, M, N, K, stride_x, rows, BITS: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr,
            EXACT: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, COLUMNS: tl.constexpr, REPEAT: tl.constexpr):  # fmt: skip
    """w [rows/16, ceil(K/COLUMNS), planes, 8, 16] int32; tables [registers, rows] int32; grid (rows/BN, ceil(M/BM), SPLIT)."""
    WORDS: tl.constexpr = 3 * 128 if BITS == 3 else 128
    r, c = tl.arange(0, BN // 2), tl.arange(0, 16)
    m, n = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    steps = tl.cdiv(K, COLUMNS)
    block = tl.program_id(0) * (BN // 16) + r // 8
    w += (block.to(tl.int64) * (steps * WORDS) + r % 8 * 16)[:, None] + c[None, :]
    t = tables + (block * 16 + r % 8)[:, None]
    a = (tl.load(t), tl.load(t + rows), tl.load(t + 2 * rows), tl.load(t + 3 * rows))
    b = (tl.load(t + 8), tl.load(t + rows + 8), tl.load(t + 2 * rows + 8), tl.load(t + 3 * rows + 8))
    acc = tl.zeros((BN, BM), tl.float32)
    for step in range(tl.program_id(2), tl.cdiv(steps, REPEAT), SPLIT):
        for i in tl.static_range(REPEAT):
            tile = step * REPEAT + i
            k = tile * COLUMNS + tl.arange(0, COLUMNS)
            xt = tiles.columns(x + m[None, :].to(tl.int64) * stride_x + k[:, None], m, k, M, K, EVEN)
            v = _weights(w + tl.minimum(tile, steps - 1) * WORDS, 128, a, b, BITS, BN, x.dtype.element_ty)
            acc = tiles.dot(v, xt, acc, EXACT)
    tiles.finish(acc, y, bias, partial, arrived, m, n, M, N, BIAS, SPLIT, BN, BM)


@dataclass(frozen=True)
class Prepared:
    words: Tensor  # int32 [rows/16, K tiles, planes, 8, 16]
    tables: Tensor  # int32 [4, rows]: low bytes of the eight entries, then high bytes, four a register
    bits: int
    shape: tuple[int, int]


def supports(format: Format, x: Tensor) -> str | None:
    """None if `prepare` and `matmul` run this, else the reason."""
    if not isinstance(format, Lut):
        return f"{type(format).__name__} is not Lut"
    if format.scales is not None:
        return "its scales are by group: one table for all rows is the fragment kernel's"
    if format.table.shape[1] > 8:
        return f"tables of {format.table.shape[1]} values: two registers of bytes hold 8"
    if format.table.dtype != x.dtype:
        return f"tables are {format.table.dtype}, activations {x.dtype}: values are looked up byte by byte, not converted"
    return tiles.refuses(x, format)


def prepare(format: Lut, dtype: torch.dtype) -> Prepared:
    """Codes in fragment order at `bits` a weight, tables cut into bytes."""
    bits, (N, K) = format.table.shape[1].bit_length() - 1, format.shape
    v = tiles.fragments(format.unpack(), COLUMNS[bits])
    v = v.unflatten(4, (-1, 4))  # [rt, kt, g, t, phase, word, h, kk, e]
    nibble = 4 * torch.arange(8).view(2, 2, 2)
    if bits == 3:
        low = tiles.words(v, nibble)  # [rt, kt, g, t, phase, word], three bits a nibble
        packed = [low[..., p, :] | ((low[..., 3, :] >> p) & 0x11111111) << 3 for p in range(3)]
    else:
        phases = v.shape[4]
        packed = [tiles.words(v.movedim(4, -1), nibble[..., None] + bits * torch.arange(phases))]
    words = torch.stack([p.flatten(3) for p in packed], 2).contiguous()  # [rt, kt, plane, g, 16]
    table = format.table.contiguous().view(torch.int16).int() & 0xFFFF  # [N or 1, 2^bits]
    table = torch.nn.functional.pad(table.expand(N, -1), (0, 8 - 2**bits, 0, -N % tiles.BN))
    octets = torch.stack([table & 255, table >> 8]).unflatten(2, (-1, 4))  # [low or high, rows, register, 4]
    registers = tiles.words(octets, 8 * torch.arange(4)).movedim(1, 2).flatten(0, 1).contiguous()
    return Prepared(words, registers, bits, (N, K))


def launch(bits: int, m: int) -> dict:
    return {"BM": tiles.rows_of_tile(m), "BN": tiles.BN, "COLUMNS": COLUMNS[bits], "REPEAT": 256 // COLUMNS[bits]}


def matmul(x: Tensor, prepared: Prepared, bias: Tensor | None = None) -> Tensor:
    """x [m, in] bf16 or fp16, m ≤ 64 at best → [m, out], accumulated in fp32."""
    return op(x, prepared.words, prepared.tables, bias, prepared.bits, *prepared.shape)


def _launch(x: Tensor, words: Tensor, tables: Tensor, bias: Tensor | None, bits: int, N: int, K: int) -> Tensor:
    x = x if x.stride(1) == 1 else x.contiguous()
    const, rows, M = launch(bits, x.shape[0]), tables.shape[1], x.shape[0]
    grid = rows // const["BN"], triton.cdiv(M, const["BM"])
    shares = tiles.split(grid[0], triton.cdiv(K, const["COLUMNS"] * const["REPEAT"]), const["BN"] * const["BM"], x.device) if grid[1] == 1 else 1
    y, (partial, arrived) = tiles.output(x, N), tiles.workspace(x)
    if M:
        _matmul[(*grid, shares)](x, words, tables, bias, y, partial, arrived, M, N, K, x.stride(0), rows, BITS=bits, SPLIT=shares,
                                 BIAS=bias is not None, EXACT=tiles.INTERPRET, EVEN=tiles.even(M, K, const), num_warps=4, num_stages=4, **const)  # fmt: skip
    return y.to(x.dtype)


op = ops.define("lut_matmul", "(Tensor x, Tensor words, Tensor tables, Tensor? bias, int bits, int N, int K) -> Tensor",
                lambda x, words, tables, bias, bits, N, K: x.new_empty(x.shape[0], N), CPU=_launch, CUDA=_launch)  # fmt: skip
