"""2:4 sparsity for a decoding step: the kept half of the weights is read, and spread over four places in registers by byte permutation.

    y[m, n] = Σ_g s[n, g] · Σ_{k ∈ g kept} v[n, k] · x[m, k] + b[n]          v bf16 or fp16, or 4-bit q − z

A thread of the tensor core's fragment owns columns 2t, 2t + 1, 2t + 8, 2t + 9 of a block of 16, which is made one group of four (inputs are taken in that
order). Two kept values are one register; the pattern, one of six, is a nibble. Four PRMT look four patterns up at once, one for each place: which two bytes
of the register go there, or two bytes of zeros; two more put a group's four bytes together, and two fill its two registers of A. 20 instructions for 16
weights, and the matrix is dense again without leaving registers: half the bytes, all of the multiply-adds, which a few rows of x do not notice.
A prompt is for the sparse tensor cores (cusparselt.py), or for the dense weight.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..formats import Dense, Format, IntGroup, Sparse24
from ..formats.packing import unpack_rows
from . import ops, tiles
from .unpack import and_or, sub

COLUMNS = 256  # of a K tile: 16 bytes a thread of patterns
PATTERNS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


def _selectors() -> list[int]:
    """For each of the four places: a byte for each of eight patterns, two registers. 0x10 takes the first value, 0x32 the second, 0x44 zeros."""
    octets = [[0x10 if place == p else 0x32 if place == q else 0x44 for p, q in PATTERNS] + [0x44, 0x44] for place in range(4)]
    return [sum(octet << 8 * i for i, octet in enumerate(row[j : j + 4])) for row in octets for j in (0, 4)]


S = _selectors()
_SPREAD = f"""{{ .reg .b32 a, b, c, d, s, z; mov.b32 z, 0;
    prmt.b32 a, {S[0]}, {S[1]}, $8; prmt.b32 b, {S[2]}, {S[3]}, $8; prmt.b32 c, {S[4]}, {S[5]}, $8; prmt.b32 d, {S[6]}, {S[7]}, $8;
    prmt.b32 s, a, b, 0x5140; prmt.b32 $0, $9, z, s; shr.u32 s, s, 16; prmt.b32 $2, $10, z, s;
    prmt.b32 s, a, b, 0x7362; prmt.b32 $4, $11, z, s; shr.u32 s, s, 16; prmt.b32 $6, $12, z, s;
    prmt.b32 s, c, d, 0x5140; prmt.b32 $1, $9, z, s; shr.u32 s, s, 16; prmt.b32 $3, $10, z, s;
    prmt.b32 s, c, d, 0x7362; prmt.b32 $5, $11, z, s; shr.u32 s, s, 16; prmt.b32 $7, $12, z, s; }}"""
SPREAD = tl.constexpr(_SPREAD)


@triton.jit
def _spread(patterns, v0, v1, v2, v3, DTYPE: tl.constexpr):
    """Four groups of four: patterns in the low nibbles, kept pairs of (block i, h 0), (i, h 1), (i + 1, h 0), (i + 1, h 1) → [..., e, kk, h, i]."""
    a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(SPREAD, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r", [patterns, v0, v1, v2, v3],
                                                       dtype=(tl.int32,) * 8, is_pure=True, pack=1)  # fmt: skip
    return tl.join(tiles.quad(a, b, c, d, DTYPE), tiles.quad(e, f, g, h, DTYPE))


@triton.jit
def _integers(word, zero):
    """Nibbles at bits 0 and 16 to bf16 pairs q − z: 128 + q by its bits, minus 128 + z."""
    return sub(and_or(word, 0x000F000F, 0x43004300, True), zero, True)


@triton.jit
def _half(patterns, low, high, z0, z1, w, p: tl.constexpr, INT4: tl.constexpr, DTYPE: tl.constexpr):
    """Blocks 2p, 2p + 1 of every 64 columns: from planes of values at w, or from the nibbles of two words."""
    if INT4:
        word = high if p else low
        v0, v1, v2, v3 = _integers(word, z0), _integers(word >> 4, z1), _integers(word >> 8, z0), _integers(word >> 12, z1)
    else:
        v0, v1 = tl.load(w + (4 * p) * 128, eviction_policy="evict_first"), tl.load(w + (4 * p + 1) * 128, eviction_policy="evict_first")
        v2, v3 = tl.load(w + (4 * p + 2) * 128, eviction_policy="evict_first"), tl.load(w + (4 * p + 3) * 128, eviction_policy="evict_first")
    return _spread(patterns, v0, v1, v2, v3, DTYPE)


@triton.jit
def _matmul(x, w, scales, zeros, bias, y, partial, arrived, M, N, K, stride_x, rows, INT4: tl.constexpr, SCALED: tl.constexpr, PER_TILE: tl.constexpr,
            EVEN: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """w int32 [rows/16, tiles, 3 or 9 planes, 8, 16]: values, then patterns; scales, zeros [scale rows, rows], a K tile has its own where PER_TILE,
    zeros as bf16 pairs 128 + z. x's columns are in the thread's order: 2t, 2t + 1, 2t + 8, 2t + 9."""
    PLANES: tl.constexpr = 3 if INT4 else 9
    r, c = tl.arange(0, BN // 2), tl.arange(0, 16)
    m, n = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    block = tl.program_id(0) * (BN // 16) + r // 8
    steps = tl.cdiv(K, 256)
    w += (block.to(tl.int64) * (steps * PLANES * 128) + r % 8 * 16)[:, None] + c[None, :]
    # column 16i + 8kk + 2t + e of the fragment is input 16i + 4t + 2kk + e: a group of four is one thread's
    f = tl.arange(0, 256)
    column = tl.max_contiguous(tl.multiple_of(f // 16 * 16 + f % 8 // 2 * 4 + f % 16 // 8 * 2 + f % 2, 2), 2)
    xp = x + m[None, :].to(tl.int64) * stride_x + column[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for tile in range(tl.program_id(2), steps, SPLIT):
        p = w + tile * (PLANES * 128)
        patterns = tl.load(p + (PLANES - 1) * 128, eviction_policy="evict_first")
        low, high, z0, z1 = patterns, patterns, patterns, patterns
        if INT4:
            low, high = tl.load(p, eviction_policy="evict_first"), tl.load(p + 128, eviction_policy="evict_first")
            z = zeros + (tile * rows if PER_TILE else 0) + block * 16 + r % 8
            z0, z1 = tl.load(z)[:, None], tl.load(z + 8)[:, None]
        v = tl.join(_half(patterns, low, high, z0, z1, p, 0, INT4, x.dtype.element_ty),
                    _half(patterns >> 16, low, high, z0, z1, p, 1, INT4, x.dtype.element_ty))  # fmt: skip
        # [rt·g, t·word, e, kk, h, i, half] → [rt, h, g] × [word, half, i, kk, t, e]
        v = v.reshape(BN // 16, 8, 4, 4, 2, 2, 2, 2, 2).permute(0, 6, 1, 3, 8, 7, 5, 2, 4).reshape(BN, 256)
        xt = tiles.columns(xp + tile * 256, m, tile * 256 + column, M, K, EVEN)
        if PER_TILE:
            part = tiles.dot(v, xt, tl.zeros((BN, BM), tl.float32), EXACT)
            acc += part * tl.load(scales + tile * rows + n).to(tl.float32)[:, None]
        else:
            acc = tiles.dot(v, xt, acc, EXACT)
    if SCALED and not PER_TILE:
        acc *= tl.load(scales + n).to(tl.float32)[:, None]
    tiles.finish(acc, y, bias, partial, arrived, m, n, M, N, BIAS, SPLIT, BN, BM)


@dataclass(frozen=True)
class Prepared:
    words: Tensor  # int32 [rows/16, K tiles, planes, 8, 16]
    scales: Tensor | None  # [1 or K tiles, rows]
    zeros: Tensor | None  # int32 [1 or K tiles, rows], 128 + z as a pair of bf16
    shape: tuple[int, int]


def supports(format: Format, x: Tensor) -> str | None:
    """None if `prepare` and `matmul` run this, else the reason."""
    if not isinstance(format, Sparse24):
        return f"{type(format).__name__} is not Sparse24"
    if (format.n, format.m) != (2, 4):
        return f"{format.n}:{format.m}, not 2:4"
    v = format.values
    if isinstance(v, Dense):
        if v.weight.dtype != x.dtype:
            return f"values are {v.weight.dtype}, activations {x.dtype}: they are moved byte by byte, not converted"
    elif not isinstance(v, IntGroup) or v.levels != 16:
        return f"values are {v.describe()}, not 16 bits or int4"
    elif x.dtype != torch.bfloat16:
        return f"activations are {x.dtype}; 4-bit values become bf16"
    elif v.zeros is not None and v.zeros.is_floating_point():
        return "float zero points: the kernel's products are exact because q − z is an integer"
    elif v.groups > 1 and v.group_size % (COLUMNS // 2):
        return f"groups of {v.group_size} kept weights are not a multiple of {COLUMNS // 2}, what a K tile keeps"
    return tiles.refuses(x, v, least=(8, 0) if isinstance(v, Dense) else (9, 0))  # arithmetic on pairs of bf16


def prepare(format: Sparse24, dtype: torch.dtype) -> Prepared:
    """Pairs of kept values and their patterns in fragment order: one group of four is one thread's share of 16 columns of a row."""
    (N, K), values = format.shape, format.values
    places = unpack_rows(format.places, K // 2, 2).view(N, -1, 2).long()
    number = torch.zeros(4, 4, dtype=torch.int64, device=places.device)
    for i, (p, q) in enumerate(PATTERNS):
        number[p, q] = i
    pattern = number[places[..., 0], places[..., 1]]  # [N, K/4]

    def order(t: Tensor) -> Tensor:
        """[N, K/4] → [rt, K tile, g, t, word, half, i, h], with zeros up to whole tiles."""
        t = F.pad(t, (0, -K % COLUMNS // 4, 0, -N % tiles.BN))
        return t.view(-(-N // tiles.BN) * tiles.BN // 16, 2, 8, -(-K // COLUMNS), 4, 2, 2, 4).permute(0, 3, 2, 7, 4, 5, 6, 1)

    eight = torch.arange(8).view(2, 2, 2)
    planes = []
    scales = zeros = None
    if isinstance(values, IntGroup):
        q = values.unpack().view(N, -1, 2).long()
        pair = order(q[..., 0] | q[..., 1] << 16)  # at bits 0 and 16
        planes = [tiles.words(pair[..., half, :, :], 4 * eight[0]) for half in (0, 1)]
        repeat = values.group_size // (COLUMNS // 2) if values.groups > 1 else 1
        spread = lambda t: F.pad(t.T.repeat_interleave(repeat, 0), (0, -N % tiles.BN)).contiguous()
        scales = spread(values.scales.float())
        offset = (128 + spread(values.zero_points())).to(torch.bfloat16).view(torch.int16).int() & 0xFFFF
        zeros = offset | offset << 16
    else:
        kept = values.dequantize(dtype).contiguous().view(torch.int32)  # [N, K/4]: a pair is a word
        planes = list(order(kept).flatten(5).unbind(-1))
    planes.append(tiles.words(order(pattern), 4 * eight))
    words = torch.stack([p.flatten(3) for p in planes], 2).contiguous()
    return Prepared(words, scales, zeros, (N, K))


def launch(m: int) -> dict:
    return {"BM": min(32, tiles.rows_of_tile(m)), "BN": tiles.BN}  # 64 columns of the result and 256 of the weight spill registers


def matmul(x: Tensor, prepared: Prepared, bias: Tensor | None = None) -> Tensor:
    """x [m, in] → [m, out] in its dtype, accumulated in fp32."""
    return op(x, prepared.words, prepared.scales, prepared.zeros, bias, *prepared.shape)


def _launch(x: Tensor, words: Tensor, scales: Tensor | None, zeros: Tensor | None, bias: Tensor | None, N: int, K: int) -> Tensor:
    x, M = x if x.stride(1) == 1 else x.contiguous(), x.shape[0]
    const = launch(M)
    grid = triton.cdiv(N, const["BN"]), triton.cdiv(M, const["BM"])
    shares = tiles.split(grid[0] * grid[1], triton.cdiv(K, COLUMNS), const["BN"] * const["BM"], x.device) if grid[1] <= 2 else 1
    y, (partial, arrived) = tiles.output(x, N), tiles.workspace(x)
    if M:
        _matmul[(*grid, shares)](x, words, scales, zeros, bias, y, partial, arrived, M, N, K, x.stride(0), grid[0] * const["BN"],
                                 INT4=zeros is not None, SCALED=scales is not None, PER_TILE=scales is not None and len(scales) > 1,
                                 EVEN=tiles.even(M, K, const), BIAS=bias is not None, SPLIT=shares, EXACT=tiles.INTERPRET, num_warps=4, num_stages=3,
                                 **const)  # fmt: skip
    return y.to(x.dtype)


op = ops.define("sparse24_matmul", "(Tensor x, Tensor words, Tensor? scales, Tensor? zeros, Tensor? bias, int N, int K) -> Tensor",
                lambda x, words, scales, zeros, bias, N, K: x.new_empty(x.shape[0], N), CPU=_launch, CUDA=_launch)  # fmt: skip
