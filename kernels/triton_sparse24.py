"""2:4 sparsity for a decoding step: the kept half of the weights is read, and spread over four places in registers by byte permutation.

    y[m, n] = Σ_g s[n, g] · Σ_{k ∈ g kept} v[n, k] · x[m, k] + b[n]          v bf16 or fp16, or 4-bit q − z

A thread of the tensor core's fragment owns columns 2t, 2t + 1 and 8 further of a block of 16: halves of groups of four. Two neighbours share a group, read
the same kept values and the same pattern, one of six, a nibble, and x lies as it is. PRMT looks four patterns up at once in the thread's table: which
two bytes of the values go to a place, or two bytes of zeros. Two lookups, two permutes that put both places together, two shifts and four more permutes
make four registers of A: 10 instructions for 8 weights, and the matrix is dense again without leaving registers: half the bytes, all of the
multiply-adds, which a few rows of x do not notice. Codes of 4 bits are spread as bytes, the zero point where nothing is kept; a permute gives them
the upper byte of 128, and 128 + z is subtracted: 16 for 8 weights. A prompt is for the sparse tensor cores (cusparselt.py), or for the dense weight.
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
from .unpack import after, copied, in_rows, nth, numbers, twos

COLUMNS = 256  # of a K tile: 16 bytes a thread of patterns
LARGE = 2**25  # weights
PATTERNS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


def _tables(code: tuple[int, int, int], places: tuple[int, ...]) -> tuple[int, ...]:
    """A byte for each pattern, in two registers, for the even threads and for the odd ones: `code` of what is at these places of their half, the first value
    kept, the second or none; of two places a nibble each."""
    number = lambda pattern, place: code[pattern.index(place) if place in pattern else 2]
    octets = [[sum(number(pattern, 2 * odd + e) << 4 * i for i, e in enumerate(places)) for pattern in PATTERNS] for odd in (0, 1)]
    registers = [sum(octet << 8 * i for i, octet in enumerate(row[j : j + 4])) for j in (0, 4) for row in octets]
    return tuple(r - 2**32 if r >= 2**31 else r for r in registers)


FIRST, SECOND = (tl.constexpr(_tables((0x10, 0x32, 0x44), (e,))) for e in (0, 1))  # bytes to take: of the first value, of the second, zeros
NIBBLES = tl.constexpr(_tables((0, 1, 4), (0, 1)))  # ... the first code, the second, the zero point
SPREAD = tl.constexpr("""{ .reg .b32 a, b, s, z; mov.b32 z, 0;
    prmt.b32 a, $9, $10, $4; prmt.b32 b, $11, $12, $4;
    prmt.b32 s, a, b, 0x5140; prmt.b32 $0, $5, z, s; shr.u32 s, s, 16; prmt.b32 $1, $6, z, s;
    prmt.b32 s, a, b, 0x7362; prmt.b32 $2, $7, z, s; shr.u32 s, s, 16; prmt.b32 $3, $8, z, s; }""")
SPREAD4 = tl.constexpr("""{ .reg .b32 a, b, s, p;
    and.b32 a, $5, 0x0F0F0F0F; shr.u32 b, $5, 4; and.b32 b, b, 0x0F0F0F0F; prmt.b32 s, $8, $9, $4; add.u32 s, s, 0x22002200;
    prmt.b32 a, a, $6, s; prmt.b32 p, a, $6, 0x5150; sub.bf16x2 $0, p, $6; prmt.b32 p, a, $6, 0x5352; sub.bf16x2 $1, p, $6; shr.u32 s, s, 16;
    prmt.b32 b, b, $7, s; prmt.b32 p, b, $7, 0x5150; sub.bf16x2 $2, p, $7; prmt.b32 p, b, $7, 0x5352; sub.bf16x2 $3, p, $7; }""")


@triton.jit
def _registers(TABLES: tl.constexpr):
    """A thread's own, [1, t, 1]. Constants would be copied to a register for every permute."""
    odd = (tl.arange(0, 4) % 2)[None, :, None] == 1
    return tl.where(odd, TABLES[1], TABLES[0]), tl.where(odd, TABLES[3], TABLES[2])


@triton.jit
def _load(p, R: tl.constexpr):
    """A plane [R, 2, 8] for threads t = 0 … 3, of which two share a group: [R, 4, 8]."""
    return tl.load(p, eviction_policy="evict_first")[:, :, None, :].broadcast_to(R, 2, 2, 8).reshape(R, 4, 8)


@triton.jit
def _half(patterns, w, t, z0, z1, HALF: tl.constexpr, INT4: tl.constexpr, R: tl.constexpr):
    """The registers (h, kk) of half of 256 columns, a block of 16 a word: from planes of values at w, or from one of nibbles."""
    if INT4:
        return tl.inline_asm_elementwise(SPREAD4, "=r,=r,=r,=r,r,r,r,r,r,r", [patterns, _load(w + HALF * 128, R), z0, z1, t[0], t[1]],
                                         dtype=(tl.int32,) * 4, is_pure=True, pack=1)  # fmt: skip
    else:
        p = w + HALF * 512
        return tl.inline_asm_elementwise(SPREAD, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r",
                                         [patterns, _load(p, R), _load(p + 128, R), _load(p + 256, R), _load(p + 384, R), t[0], t[1], t[2], t[3]],
                                         dtype=(tl.int32,) * 4, is_pure=True, pack=1)  # fmt: skip


@triton.jit
def _joined(p, BN: tl.constexpr, DTYPE: tl.constexpr):
    """Registers (h, kk) of [block·g, t, j] → [block, h, g] × [j, kk, t, e]."""
    v = tiles.quad(p[0], p[1], p[2], p[3], DTYPE)
    return v.reshape(BN // 16, 8, 4, 8, 2, 2, 2).permute(0, 6, 1, 3, 5, 2, 4).reshape(BN, 128)


@triton.jit
def _matmul(x, w, scales, zeros, bias, y, partial, arrived, M, N, K, stride_x, rows, INT4: tl.constexpr, SCALED: tl.constexpr, PER_TILE: tl.constexpr,
            EVEN: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """w int32 [rows/16, tiles, 3 or 9 planes, 8 g, 2 groups, 8]: values, then patterns; scales, zeros [scale rows, rows/2], pairs of the rows g and g + 8, a
    K tile has its own where PER_TILE, zeros as bf16 128 + z."""
    PLANES: tl.constexpr = 3 if INT4 else 9
    r, column = tl.arange(0, BN // 2), tl.arange(0, 128)
    m, n = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    block = tl.program_id(0) * (BN // 16) + r // 8
    steps = tl.cdiv(K, 256)
    w += (block.to(tl.int64) * (steps * PLANES * 128) + r % 8 * 16)[:, None, None] + tl.arange(0, 2)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    xp = x + m[None, :].to(tl.int64) * stride_x + column[:, None]
    n0 = tl.program_id(0) * (BN // 2) + r
    WIDE: tl.constexpr = 256 // BN  # as in fragment.py: what has a number for every thread is loaded ahead
    table = _registers(NIBBLES) if INT4 else _registers(FIRST) + _registers(SECOND)
    acc = tl.zeros((BN, BM), tl.float32)
    for tile in range(tl.program_id(2), steps, SPLIT):
        p, xt = w + tile * (PLANES * 128), xp + tile * 256
        patterns = _load(p + (PLANES - 1) * 128, BN // 2)
        z0, z1, scale = patterns, patterns, 1.0
        if PER_TILE:
            pair = nth(tl.load(twos(scales) + tile * (rows // 2) + n0[:, None] + tl.zeros((1, WIDE), tl.int32)), 0, WIDE, BN // 2)
            scale = in_rows(*numbers(pair, scales.dtype.element_ty), BN)
            patterns = after(patterns, pair[:, :, None], True)
        if INT4:
            z = tl.load(zeros + (tile * (rows // 2) if PER_TILE else 0) + n0)[:, None, None]
            z0, z1 = copied(z, 0, 16, True), copied(z, 1, 16, True)
        part = tl.zeros((BN, BM), tl.float32) if PER_TILE else acc
        for half in tl.static_range(2):
            v = _joined(_half(patterns >> 16 * half, p, table, z0, z1, half, INT4, BN // 2), BN, x.dtype.element_ty)
            part = tiles.dot(v, tiles.columns(xt + 128 * half, m, tile * 256 + 128 * half + column, M, K, EVEN), part, EXACT)
        acc = acc + part * scale if PER_TILE else part
    if SCALED and not PER_TILE:
        acc *= in_rows(*numbers(tl.load(twos(scales) + n0)[:, None], scales.dtype.element_ty), BN)
    tiles.finish(acc, y, bias, partial, arrived, m, n, M, N, BIAS, SPLIT, BN, BM)


@dataclass(frozen=True)
class Prepared:
    words: Tensor  # int32 [rows/16, K tiles, planes, 128]
    scales: Tensor | None  # [1 or K tiles, rows/2, 2]: rows g and g + 8
    zeros: Tensor | None  # int32 [1 or K tiles, rows/2], 128 + z as pairs of bf16
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
        """[N, K/4] → [rt, K tile, g, two groups, j, half, h, kk], with zeros up to whole tiles."""
        t = F.pad(t, (0, -K % COLUMNS // 4, 0, -N % tiles.BN))
        return t.view(-(-N // tiles.BN) * tiles.BN // 16, 2, 8, -(-K // COLUMNS), 2, 8, 2, 2).permute(0, 3, 2, 7, 5, 4, 1, 6)

    scales = zeros = None
    if isinstance(values, IntGroup):
        q = values.unpack().view(N, -1, 2).long()
        codes = order(q[..., 0] | q[..., 1] << 8)
        planes = [tiles.words(codes[..., half, :, :], torch.tensor([[0, 16], [4, 20]])) for half in (0, 1)]
        repeat = values.group_size // (COLUMNS // 2) if values.groups > 1 else 1

        def pairs(t: Tensor) -> Tensor:
            """[N, groups] → [1 or K tiles, rows/2, 2]."""
            t = F.pad(t.T.repeat_interleave(repeat, 0), (0, -N % tiles.BN))
            return t.view(len(t), -1, 2, 8).transpose(2, 3).reshape(len(t), -1, 2)

        scales, zeros = pairs(values.scales), pairs(128 + values.zero_points()).to(torch.bfloat16).view(torch.int32)[..., 0]
    else:
        kept = values.dequantize(dtype).contiguous().view(torch.int32)  # [N, K/4]: a pair is a word
        planes = list(order(kept).flatten(5).unbind(-1))
    planes.append(tiles.words(order(pattern), 4 * torch.arange(8).view(2, 2, 2)))
    words = torch.stack([p.flatten(2) for p in planes], 2).contiguous()
    return Prepared(words, scales, zeros, (N, K))


def launch(m: int, rows: int, K: int) -> dict:
    """128 rows of a large weight: fewer instructions for each."""
    return {"BM": min(32, tiles.rows_of_tile(m)), "BN": 128 if rows % 128 == 0 and rows * K >= LARGE else tiles.BN}


def matmul(x: Tensor, prepared: Prepared, bias: Tensor | None = None) -> Tensor:
    """x [m, in] → [m, out] in its dtype, accumulated in fp32."""
    return op(x, prepared.words, prepared.scales, prepared.zeros, bias, *prepared.shape)


def _launch(x: Tensor, words: Tensor, scales: Tensor | None, zeros: Tensor | None, bias: Tensor | None, N: int, K: int) -> Tensor:
    x, M = x if x.stride(1) == 1 else x.contiguous(), x.shape[0]
    const = launch(M, 16 * len(words), K)
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
