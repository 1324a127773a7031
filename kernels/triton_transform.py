"""Kronecker transforms of activations, Hadamard's above all: one kernel, and quantization of its result while it is still in registers.

    x[m] viewed as X [a, b]:      Y = P₁ᵀ X P₂,      which is  x[m] · (P₁ ⊗ P₂)

A dense transform of n = a·b channels costs n² multiply-adds a token, this n·(a + b): nothing next to the weight that follows. H_n = H_a ⊗ H_b is the case
of QuaRot (arXiv 2404.00456) and of the trellis format's output; learned P₁, P₂ are FlatQuant's (arXiv 2410.09426); without P₁ the transform is
block-diagonal (H_32, H_128). A diagonal, signs or channel scales, goes before (x·D·T) or behind it (x·T·D), then a bias, then, where asked for,

    s = max|y| / L,   q = ⌊y / s⌉      L = 127 (int8), 7 (int4 values in int8), 448 (FP8 E4M3)

so that the rotated token is never written in 16 bits. One program a token, the factors padded with zeros to powers of two of at least 16.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..formats import Format, Kronecker
from . import ops
from .activations import LARGEST, Grid
from .tiles import INTERPRET, refuses
from .triton_quantize import codes_like, rounded

CHUNK = 32  # rows of X multiplied at a time
LARGEST_TOKEN = 2**15  # padded channels that fit a program's registers


@triton.jit
def _columns(z, right, diagonal, bias, i, j, a, b, SIGNS: tl.constexpr, BIAS: tl.constexpr, EXACT: tl.constexpr, B: tl.constexpr):
    """Columns j of Y, fp32, of z [A, B], the first product."""
    P = tl.load(right + tl.arange(0, B)[:, None] * B + j[None, :])
    if EXACT:
        y = tl.dot(z, P.to(tl.float32), input_precision="ieee")
    else:
        y = tl.dot(z, P)
    place, inside = i[:, None] * b + j[None, :], (i[:, None] < a) & (j[None, :] < b)
    if SIGNS == 2:
        y *= tl.load(diagonal + place, inside, 0.0)
    if BIAS:
        y += tl.load(bias + place, inside, 0.0).to(tl.float32)
    return y


@triton.jit
def _kronecker(x, left, right, diagonal, bias, y, scales, stride, a, b, LEFT: tl.constexpr, SIGNS: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr,
               FP8: tl.constexpr, EXACT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """x [M, a·b], left [A, A], right [B, B] zero-padded; SIGNS: the diagonal is 1 before, 2 behind the transform; LARGEST 0: y is not quantized.
    WIDTH: columns of Y that are made at a time; less than B where all of them would not fit the registers: then once for their maximum, once for themselves."""
    token = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, A), tl.arange(0, B)
    if LEFT:
        z = tl.zeros((A, B), tl.float32)
        for start in range(0, A, CHUNK):
            k = start + tl.arange(0, CHUNK)
            place, inside = k[:, None] * b + j[None, :], (k[:, None] < a) & (j[None, :] < b)
            part = tl.load(x + token * stride + place, inside, 0.0)
            if SIGNS == 1:
                part = (part.to(tl.float32) * tl.load(diagonal + place, inside, 0.0)).to(part.dtype)
            P = tl.load(left + k[None, :] * A + i[:, None])  # P₁ᵀ
            if EXACT:
                z = tl.dot(P.to(tl.float32), part.to(tl.float32), z, input_precision="ieee")
            else:
                z = tl.dot(P, part, z)
    else:
        place, inside = i[:, None] * b + j[None, :], (i[:, None] < a) & (j[None, :] < b)
        z = tl.load(x + token * stride + place, inside, 0.0).to(tl.float32)
        if SIGNS == 1:
            z *= tl.load(diagonal + place, inside, 0.0)
    if not EXACT:
        z = z.to(right.dtype.element_ty)
    if WIDTH == B:
        v = _columns(z, right, diagonal, bias, i, j, a, b, SIGNS, BIAS, EXACT, B)
    if LARGEST > 0:
        if WIDTH == B:
            most = tl.max(tl.abs(v), 1)
        else:
            most = tl.zeros((A,), tl.float32)
            for start in range(0, B, WIDTH):
                part = _columns(z, right, diagonal, bias, i, start + tl.arange(0, WIDTH), a, b, SIGNS, BIAS, EXACT, B)
                most = tl.maximum(most, tl.max(tl.abs(part), 1))
        scale = tl.div_rn(tl.max(most, 0), LARGEST)
        tl.store(scales + token, scale)
    for start in range(0, B, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        if WIDTH == B:
            q = v
        else:
            q = _columns(z, right, diagonal, bias, i, columns, a, b, SIGNS, BIAS, EXACT, B)
        if LARGEST > 0:
            q = rounded(q, scale, LARGEST, FP8)
        place, inside = i[:, None] * b + columns[None, :], (i[:, None] < a) & (columns[None, :] < b)
        tl.store(y + token * (a * b) + place, q.to(y.dtype.element_ty), inside)


@dataclass(frozen=True)
class Prepared:
    left: Tensor | None  # [A, A], the a×a matrix padded with zeros; None: the identity, and the transform is block-diagonal
    right: Tensor  # [B, B], likewise
    diagonal: Tensor | None  # fp32 [a·b]; None: ones
    behind: bool
    a: int
    b: int


def supports(format: Format, x: Tensor) -> str | None:
    """None if `prepare` and `matmul` run this, else the reason."""
    if not isinstance(format, Kronecker):
        return f"{type(format).__name__} is not Kronecker"
    if (size := _padded_size(len(format.left)) * _padded_size(len(format.right))) > LARGEST_TOKEN:
        return f"{size} padded channels of a token: {LARGEST_TOKEN} fit registers"
    return refuses(x, format)


def prepare(format: Kronecker, dtype: torch.dtype) -> Prepared:
    """For x · formatᵀ, as a weight is multiplied by."""
    return prepared(format.T, dtype)


def prepared(T: Kronecker, dtype: torch.dtype) -> Prepared:
    """For x · T, factors in the activations' dtype."""
    a, b = len(T.left), len(T.right)
    identity = torch.equal(T.left, torch.eye(a, dtype=T.left.dtype, device=T.left.device))
    ones = bool((T.diagonal == 1).all())
    return Prepared(None if identity else _padded(T.left, dtype), _padded(T.right, dtype), None if ones else T.diagonal.float(), T.behind, a, b)


def _padded_size(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


def _padded(P: Tensor, dtype: torch.dtype) -> Tensor:
    missing = _padded_size(len(P)) - len(P)
    return F.pad(P.to(dtype), (0, missing, 0, missing)).contiguous()


def matmul(x: Tensor, prepared: Prepared, bias: Tensor | None = None) -> Tensor:
    """x [m, n] → [m, n] in its dtype."""
    return transform(x, prepared, bias, x.dtype)


def transform(x: Tensor, T: Prepared, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [m, a·b] in the factors' dtype (fp32 runs in tf32) → [m, a·b] in `dtype`.

    bf16 and fp16 are rounded to their dtype between the two products; sums are fp32."""
    return op(x, T.left, T.right, T.diagonal, bias, T.behind, T.a, T.b, "", dtype)[0]


def quantized(x: Tensor, T: Prepared, grid: Grid) -> tuple[Tensor, Tensor]:
    """The transformed tokens on their grid: codes [m, a·b] and scales fp32 [m, 1]."""
    return op(x, T.left, T.right, T.diagonal, None, T.behind, T.a, T.b, grid, codes_like(grid))


def _launch(x: Tensor, left: Tensor | None, right: Tensor, diagonal: Tensor | None, bias: Tensor | None, behind: bool, a: int, b: int, grid: str,
            dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # fmt: skip
    m, n = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty(m, n, dtype=torch.float32 if INTERPRET and not grid else dtype, device=x.device)
    scales = torch.empty(m if grid else 0, 1, device=x.device)
    A, B = _padded_size(a), _padded_size(b)
    if m:
        _kronecker[(m,)](x, left, right, diagonal, bias, y, scales, x.stride(0), a, b, LEFT=left is not None,
                         SIGNS=0 if diagonal is None else 2 if behind else 1, BIAS=bias is not None, LARGEST=LARGEST.get(grid, 0),
                         FP8=grid == "fp8", EXACT=INTERPRET, A=A, B=B, CHUNK=min(CHUNK, A), WIDTH=width(A, B), num_warps=launch(A, B))  # fmt: skip
    return y.to(dtype), scales


def launch(A: int, B: int) -> int:
    """Warps: 64 accumulators a thread."""
    return min(16, max(4, A * B // 2048))


def width(A: int, B: int) -> int:
    """Columns of Y at a time."""
    return B if A * B < LARGEST_TOKEN else 32


op = ops.define("kronecker", "(Tensor x, Tensor? left, Tensor right, Tensor? diagonal, Tensor? bias, bool behind, int a, int b, str grid, ScalarType dtype)"
                " -> (Tensor, Tensor)", lambda x, left, right, diagonal, bias, behind, a, b, grid, dtype:
                (x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[0] if grid else 0, 1, dtype=torch.float32)), CPU=_launch, CUDA=_launch)  # fmt: skip
