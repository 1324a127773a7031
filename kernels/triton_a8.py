"""8-bit activations on tensor cores: W8A8 and W4A8 in integers, FP8 in floats, one scale a token.

    y[m, n] = sx[m] · Σ_g s[n, g] · Σ_{k ∈ g} (q[n, k] − z) · qx[m, k]  + b[n]

Tokens are quantized by triton_quantize.py, then both operands are bytes and Hopper multiplies them twice as fast as bf16. Eight bits need no unpacking: W goes
to the tensor core from shared memory as it is, .73 instructions a weight (FP8 more, for its tensor cores keep some 14 bits of a sum: every BK
columns are added up in fp32, .97), and one kernel serves a decoding step (Yᵀ = W·Xᵀ, W tall, x narrow, split K)
and a long prompt (tiles of 128×128). Four bits are stored as signed nibbles in the order of the int8 fragment, a byte holding rows g and g + 8:

    w & F0F0F0F0 = 16·q of row g + 8,       (w << 4) & F0F0F0F0 = 16·q of row g            exact, 3/8 of an instruction a weight

and the 16 is divided out of the scale. There are no tensor cores for int4 on Hopper: activations on the int4 grid are int8 codes that stay small.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..formats import FloatBlock, Format, IntGroup
from . import ops, tiles
from .activations import Grid, Rounded
from .triton_quantize import quantize

BN, BK = 128, 128  # rows of W a program, columns an iteration
NIBBLES = 64  # columns of a tile of 4-bit words


@triton.jit
def _bytes(x, w, sx, sw, bias, y, partial, arrived, M, N, K, padded, BIAS: tl.constexpr, SPLIT: tl.constexpr, FP8: tl.constexpr, EXACT: tl.constexpr,
           BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """x int8 [M, K], w int8 [rows, padded], both bit patterns of E4M3 where FP8; sx fp32 [M], sw fp32 [rows]."""
    m, n = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    w += n[:, None].to(tl.int64) * padded + tl.arange(0, BK)[None, :]
    x += m[None, :].to(tl.int64) * K
    acc = tl.zeros((BN, BM), tl.float32 if FP8 or EXACT else tl.int32)
    for step in range(tl.program_id(2), padded // BK, SPLIT):
        k = step * BK + tl.arange(0, BK)[:, None]
        v, xt = tl.load(w + step * BK), tl.load(x + k, (m[None, :] < M) & (k < K), 0)
        if FP8:
            v, xt = v.to(tl.float8e4nv, bitcast=True), xt.to(tl.float8e4nv, bitcast=True)
        if EXACT:
            acc = tl.dot(v.to(tl.float32), xt.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(v, xt, acc, out_dtype=acc.dtype, max_num_imprecise_acc=BK if FP8 else None)
    total = acc.to(tl.float32) * tl.load(sw + n)[:, None] * tl.load(sx + m, m < M, 0.0)[None, :]
    tiles.finish(total, y, bias, partial, arrived, m, n, M, N, BIAS, SPLIT, BN, BM)


@triton.jit
def _signed(w, BN: tl.constexpr):
    """[BN/2, 16] words of nibbles → int8 [BN, 64], 16·q; a thread's four words become eight registers of A."""
    a, b, c, d, e, f, g, h = tl.inline_asm_elementwise("""{ .reg .b32 t;
        shl.b32 t, $8, 4; and.b32 $0, t, 0xF0F0F0F0; and.b32 $1, $8, 0xF0F0F0F0; shl.b32 t, $9, 4; and.b32 $2, t, 0xF0F0F0F0; and.b32 $3, $9, 0xF0F0F0F0;
        shl.b32 t, $10, 4; and.b32 $4, t, 0xF0F0F0F0; and.b32 $5, $10, 0xF0F0F0F0; shl.b32 t, $11, 4; and.b32 $6, t, 0xF0F0F0F0; and.b32 $7, $11, 0xF0F0F0F0;
        }""", "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r", [w], dtype=(tl.int8,) * 8, is_pure=True, pack=4)  # fmt: skip
    v = tl.join(tl.join(tl.join(a, b), tl.join(c, d)), tl.join(tl.join(e, f), tl.join(g, h)))  # [BN/2, (t, byte), h, k16, k32]
    return v.reshape(BN // 16, 8, 4, 4, 2, 2, 2).permute(0, 4, 1, 6, 5, 2, 3).reshape(BN, 64)


@triton.jit
def _nibbles(x, w, sx, sw, bias, y, partial, arrived, M, N, K, groups, rows, BIAS: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr,
             REPEAT: tl.constexpr, GROUPED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """w int32 [rows/16, REPEAT·groups, 8, 16]; sw [groups, rows], a group REPEAT tiles of 64 columns; [1, rows] unless GROUPED: then integers are summed to
    the end, which int32 holds for 130,000 columns."""
    m, n = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    r, c = tl.arange(0, BN // 2), tl.arange(0, 16)
    w += ((tl.program_id(0) * (BN // 16) + r // 8).to(tl.int64) * (REPEAT * groups * 128) + r % 8 * 16)[:, None] + c[None, :]
    x += m[None, :].to(tl.int64) * K
    acc = tl.zeros((BN, BM), tl.float32)
    part = tl.zeros((BN, BM), tl.float32 if EXACT else tl.int32)
    for group in range(tl.program_id(2), groups, SPLIT):
        if GROUPED:
            part = tl.zeros((BN, BM), tl.float32 if EXACT else tl.int32)
            scale = tl.load(sw + group * rows + n).to(tl.float32)
        for i in tl.static_range(REPEAT):
            tile = group * REPEAT + i
            k = tile * 64 + tl.arange(0, 64)[:, None]
            v = _signed(tl.load(w + tile * 128, eviction_policy="evict_first"), BN)
            xt = tl.load(x + k, (m[None, :] < M) & (k < K), 0)
            if EXACT:
                part = tl.dot(v.to(tl.float32), xt.to(tl.float32), part, input_precision="ieee")
            else:
                part = tl.dot(v, xt, part, out_dtype=part.dtype)
        if GROUPED:
            acc += part.to(tl.float32) * scale[:, None]
    if not GROUPED:
        acc = part.to(tl.float32) * tl.load(sw + n)[:, None]
    acc *= tl.load(sx + m, m < M, 0.0)[None, :]
    tiles.finish(acc, y, bias, partial, arrived, m, n, M, N, BIAS, SPLIT, BN, BM)


@dataclass(frozen=True)
class Prepared:
    weight: Tensor  # int8 [rows, in rounded up to BK], FP8 as its bytes; or int32 words of nibbles
    scales: Tensor  # fp32 [rows], or [groups, rows]
    repeat: int  # tiles of nibbles a group; 0: bytes
    grid: Grid  # of the activations
    shape: tuple[int, int]


def supports(format: Format | Rounded, x: Tensor) -> str | None:
    """None if `prepare` and `matmul` run this, else the reason."""
    if not isinstance(format, Rounded):
        return "activations are not rounded"
    leaf, grid = format.inner, format.grid
    if isinstance(leaf, FloatBlock) and leaf.name == "fp8":
        if grid != "fp8":
            return f"an fp8 weight and {grid} activations share no tensor core"
        if leaf.block[1] != leaf.shape[1]:
            return "scales by squares of 128×128: the kernel's are one a row"
    elif not isinstance(leaf, IntGroup):
        return f"{type(leaf).__name__} is neither IntGroup nor fp8"
    elif grid == "fp8":
        return "integer weights and fp8 activations share no tensor core"
    elif not _nibble(leaf):
        if leaf.groups > 1:
            return f"{leaf.describe()}: in-loop scales are for symmetric 4-bit groups of a multiple of {NIBBLES}"
        if leaf.zeros is not None and (leaf.zeros.is_floating_point() or leaf.bits_per_code == 8):
            return f"{leaf.describe()}: codes minus zero points are not int8"
    return tiles.refuses(x, leaf, (torch.bfloat16, torch.float16, torch.float32), least=(8, 9) if grid == "fp8" else (8, 0))


def _nibble(leaf: IntGroup) -> bool:
    return leaf.levels == 16 and leaf.zeros is None and (leaf.groups == 1 or leaf.group_size % NIBBLES == 0)


def prepare(format: Rounded, dtype: torch.dtype) -> Prepared:
    """Codes minus zero points as bytes, or as signed nibbles in fragment order."""
    leaf, (N, K) = format.inner, format.shape
    rows = (0, -N % BN)
    if isinstance(leaf, IntGroup) and _nibble(leaf):
        repeat = 2 if leaf.group_size % BK == 0 or leaf.groups == 1 else 1
        columns = NIBBLES * repeat
        q = F.pad(leaf.unpack().int() - 8, (0, -K % columns, *rows)) & 15
        q = q.view(len(q) // 16, 2, 8, -1, 2, 2, 4, 4).permute(0, 3, 2, 6, 4, 5, 7, 1)  # rt, tile, g, t, k32, k16, byte, h
        words = tiles.words(q, 8 * torch.arange(4)[:, None] + torch.tensor([0, 4])).flatten(3).contiguous()
        scales = leaf.scales.float().T / 16
        scales = scales.repeat_interleave(leaf.group_size // columns, 0) if leaf.groups > 1 else scales
        return Prepared(words, F.pad(scales, rows).contiguous(), repeat, format.grid, (N, K))
    if isinstance(leaf, FloatBlock):
        q, scales = leaf.codes.view(torch.int8), leaf.factors().expand(N, 1)
    else:
        q, scales = leaf.unpack().float() - leaf.zero_points(), leaf.scales.float()
        q, scales = (2 * q, scales / 2) if leaf.bits_per_code == 1 else (q, scales)  # ±½
    return Prepared(F.pad(q.to(torch.int8), (0, -K % BK, *rows)).contiguous(), F.pad(scales[:, 0], rows).contiguous(), 0, format.grid, (N, K))


def launch(m: int) -> dict:
    """Tiles: narrow for a decoding step, square for a prompt."""
    return {"BM": tiles.rows_of_tile(m) if m <= 64 else 128, "BN": BN}


def matmul(x: Tensor, prepared: Prepared, bias: Tensor | None = None) -> Tensor:
    """x [m, in] bf16, fp16 or fp32, rounded to the prepared grid → [m, out] in its dtype."""
    codes, sx = quantize(x, prepared.grid)
    return multiply(codes, sx, prepared, bias, x.dtype)


def multiply(codes: Tensor, sx: Tensor, prepared: Prepared, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Activations that are quantized already (by a transform: triton_rotated.py), codes [m, in] and sx fp32 [m, 1] → [m, out] in `dtype`."""
    return op(codes, sx, prepared.weight, prepared.scales, bias, prepared.repeat, *prepared.shape, dtype)


def _launch(codes: Tensor, sx: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, repeat: int, N: int, K: int,
            dtype: torch.dtype) -> Tensor:  # fmt: skip
    M = codes.shape[0]
    const = launch(M)
    grid = triton.cdiv(N, const["BN"]), triton.cdiv(M, const["BM"])
    steps = weight.shape[1] // (repeat or BK)
    shares = tiles.split(grid[0], steps, BN * const["BM"], codes.device) if grid[1] == 1 else 1
    y, (partial, arrived) = tiles.output(codes, N, dtype), tiles.workspace(codes)
    if M:
        kernel = _nibbles if repeat else _bytes
        shape = (steps, scales.shape[1]) if repeat else (steps * BK,)
        extra = {"REPEAT": repeat, "GROUPED": len(scales) > 1} if repeat else {"FP8": codes.dtype == torch.float8_e4m3fn, "BK": BK}
        kernel[(*grid, shares)](codes.view(torch.int8), weight, sx, scales, bias, y, partial, arrived, M, N, K, *shape, SPLIT=shares,
                                BIAS=bias is not None, EXACT=tiles.INTERPRET, num_warps=4 if M <= 64 else 8, num_stages=4, **extra, **const)  # fmt: skip
    return y.to(dtype)


op = ops.define("a8_matmul", "(Tensor codes, Tensor sx, Tensor weight, Tensor scales, Tensor? bias, int repeat, int N, int K, ScalarType dtype)"
                " -> Tensor", lambda codes, sx, weight, scales, bias, repeat, N, K, dtype: codes.new_empty(codes.shape[0], N, dtype=dtype),
                CPU=_launch, CUDA=_launch)  # fmt: skip
