"""Every format on a CPU with AVX-512, bf16 dot products and VNNI: codes are read from memory as they are and decoded in registers.

    y[m, n] = α s_x[m] Σ_b s[n, b] (Σ_{k ∈ b} c[n, k] x[m, k] − z[n, b] Σ_{k ∈ b} x[m, k]) + bias[n]        b: blocks of columns with one scale a row

    activations    weight                                    c                                               products
    bf16, fp16     integers to 4 bits, NF4, FP4, MXFP4,      one table of 2^bits values for all rows         pairs of bf16, sums in fp32
                   NVFP4
                   tables of rows, to 4 bits                 a table of each row
                   integers of 5 to 8 bits, FP8              the number itself
                   zeros anywhere, 2:4                       one bit a weight, values that are kept
    int8, int4     integers to 8 bits, groups too            the code, unsigned                              four bytes each, sums exact

What torch ships holds int4 and int8, in bf16 only for a few rows, and rounded activations only with one scale a row. Here a format keeps its bits while it is
multiplied (3 bits take 3.2), and many tokens are as fast as few, because a block of codes is decoded once for all of them: no dense copy is needed for
prompts. How it is laid out and multiplied: cpu_native.cpp.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import FloatBlock, Format, IntGroup, Lut, Masked, Sparse24
from ..formats.float_block import E2M1
from ..formats.int_group import symmetric_zero
from . import native, ops
from .activations import LARGEST, Rounded

ROWS = 32  # of the weight, side by side in two registers
BLOCK = 64  # operands that are decoded at a time, at most: a quarter of the L1 cache
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SHARED, PER_ROW, BYTE, FP8, SPARSE, INTEGERS = range(6)
SLICE = 2**20  # weights that are laid out at a time: what is between takes some 20 bytes a weight


class Weight(ctypes.Structure):
    """As cpu_native.cpp has it."""

    _fields_ = [*((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "table", "masks", "starts")),
                *((name, ctypes.c_int64) for name in ("n", "k", "blocks", "block", "words")),
                *((name, ctypes.c_int32) for name in ("kind", "bits", "wide")),
                *((name, ctypes.c_float) for name in ("alpha", "center", "zero"))]  # fmt: skip


@dataclass(frozen=True)
class Packed:
    tensors: tuple[Tensor | None, ...]  # codes, scales, zeros, table, masks, starts
    sizes: tuple[int, ...]  # n, k, blocks, block, words, kind, bits, wide
    numbers: tuple[float, ...]  # α, what is subtracted from bytes, zero point of all, largest number of the activations' grid (0: not rounded)

    @cached_property
    def weight(self) -> Weight:
        return Weight(*(0 if t is None else t.data_ptr() for t in self.tensors), *self.sizes, *self.numbers[:3])


def supports(format: Format | Rounded, x: Tensor) -> str | None:
    """None if `prepare` and `matmul` run this, else the reason."""
    if isinstance(format, Rounded):
        if format.grid == "fp8":
            return "this processor has no fp8"
        if not isinstance(format.inner, IntGroup):
            return f"{type(format.inner).__name__} is not IntGroup"
        if x.dtype not in TYPES:
            return f"activations are {x.dtype}"
    elif x.dtype not in (torch.bfloat16, torch.float16):
        return f"activations are {x.dtype}; products are of bf16"
    try:
        group = columns(format)
        cut(format.shape[1], group, 4 if isinstance(format, Rounded) else 2)
    except ValueError as error:
        return str(error)
    return None if isinstance(lib := native.library(), ctypes.CDLL) else lib


def columns(format: Format | Rounded) -> int:
    """That share a scale. Raises ValueError with the reason where the format has no way here."""
    n = format.shape[1]
    if isinstance(format, Rounded):
        return columns(format.inner)
    if isinstance(format, IntGroup):
        return format.group_size
    if isinstance(format, Lut) and format.table.shape[1] <= 16:
        return n if format.scales is None else n // format.scales.shape[1]
    if isinstance(format, FloatBlock):
        return format.block[1]
    if isinstance(format, Masked | Sparse24):
        return n
    raise ValueError(f"{format.describe()}: tables end at 16 entries here" if isinstance(format, Lut) else f"{type(format).__name__} has no kernel on CPU")


def cut(n: int, group: int, unit: int) -> tuple[int, int]:
    """(blocks, columns of a block): at most BLOCK operands of `unit` columns, all of one group. Raises ValueError where that cannot be."""
    if group >= n:
        blocks = -(-n // (BLOCK * unit))
        return blocks, -(-n // (blocks * unit)) * unit
    fits = [b for b in range(BLOCK * unit, unit - 1, -unit) if group % b == 0]
    if not fits or fits[0] < min(group, 16):
        raise ValueError(f"group {group} is not a multiple of {unit}")
    return -(-n // fits[0]), fits[0]


def laid_out(read: Callable[[slice], Tensor], shape: tuple[int, int], blocks: int, block: int, bits: int, lane: int, unit: int) -> Tensor:
    """Codes [n, k] as the kernel reads them, [panels, blocks, words, 32, unit] of `lane` bits: lane // bits codes of one row and column modulo `unit` in each.

    read: uint8 codes of some rows. Rows and columns that are not there are 0."""
    (n, k), per = shape, lane // bits
    words = -(-block // (per * unit))
    panels, made = max(1, SLICE // (k * ROWS)), []
    for first in range(0, n, panels * ROWS):
        q = read(slice(first, first + panels * ROWS))
        q = F.pad(q, (0, blocks * block - k, 0, -len(q) % ROWS)).view(-1, ROWS, blocks, block)
        q = F.pad(q, (0, words * per * unit - block)).view(-1, ROWS, blocks, words, per, unit)
        lanes = q[..., 0, :].to(torch.int32 if lane > 8 else torch.uint8)
        for j in range(1, per):
            lanes = lanes | q[..., j, :].to(lanes.dtype) << bits * j
        made.append(lanes.permute(0, 2, 3, 1, 4).to(torch.int16 if lane > 8 else torch.uint8).contiguous())
    return torch.cat(made)


@dataclass
class Parts:
    """A format in the kernel's terms, before anything is laid out."""

    kind: int
    bits: int  # of a code in memory
    codes: Callable[[slice], Tensor]  # uint8 codes of some rows
    scales: Tensor  # fp32 [n, groups]
    zeros: Tensor | None = None  # fp32 [n, groups]
    table: Tensor | None = None  # [1 or n, 2^bits]
    alpha: float = 1.0
    center: float = 0.0  # subtracted from bytes
    zero: float = 0.0  # zero point of all


def _integers(W: IntGroup, rounded: bool) -> Parts:
    """bf16: c = q less the middle of the grid, so that a symmetric weight has no zero points and sums of others stay small. Rounded inputs: c = q."""
    middle, zeros, bits = symmetric_zero(W.bits_per_code, W.levels), None if W.zeros is None else W.zero_points(), W.bits_per_code
    if rounded:
        return Parts(INTEGERS, {3: 4, 5: 8, 6: 8, 7: 8}.get(bits, bits), W.unpack, W.scales.float(), zeros, zero=middle)
    zeros = None if zeros is None else zeros - middle
    if bits > 4:
        return Parts(BYTE, 8, W.unpack, W.scales.float(), zeros, center=middle)
    return Parts(SHARED, bits, W.unpack, W.scales.float(), zeros, torch.arange(2**bits)[None] - middle)


def _table(W: Lut) -> Parts:
    scales = torch.ones(W.shape[0], 1) if W.scales is None else W.scales.float()
    return Parts(SHARED if len(W.table) == 1 else PER_ROW, W.table.shape[1].bit_length() - 1, W.unpack().__getitem__, scales, table=W.table.float())


def _floats(W: FloatBlock) -> Parts:
    if W.name == "fp8":  # read as fp16 its bits are 2^-8 of it
        return Parts(FP8, 8, W.unpack().__getitem__, W.factors().repeat_interleave(W.block[0], 0)[: W.shape[0]], alpha=256.0)
    scales, alpha = (W.factors(), 1.0) if W.divisor is None else (W.scales.view(torch.float8_e4m3fn).float(), 1 / float(W.divisor))
    return Parts(SHARED, 4, W.unpack().__getitem__, scales, table=torch.tensor([[*E2M1, *(-v for v in E2M1)]]), alpha=alpha)


def prepare(format: Format | Rounded, dtype: torch.dtype = torch.bfloat16) -> Packed:
    """The layout for `matmul`: the format's bits, 3 bits in 3.2 (4 where activations are rounded), 5 to 7 in 8, sparse ones as bf16 and a bit a weight."""
    grid, leaf = (format.grid, format.inner) if isinstance(format, Rounded) else (None, format)
    (n, k), unit = leaf.shape, 4 if grid else 2
    blocks, block = cut(k, columns(leaf), unit)
    masks = starts = table = None
    if isinstance(leaf, Masked | Sparse24):
        codes, masks, starts = _kept(leaf, blocks, block)
        parts, words = Parts(SPARSE, 0, codes.__getitem__, torch.ones(n, 1)), masks.shape[2]
    else:
        parts = _integers(leaf, bool(grid)) if isinstance(leaf, IntGroup) else _table(leaf) if isinstance(leaf, Lut) else _floats(leaf)  # type: ignore[arg-type]
        codes = laid_out(parts.codes, (n, k), blocks, block, parts.bits, 16 if parts.table is not None else 8, unit)
        words = codes.shape[2]
    if parts.table is not None:
        table = parts.table.flatten().repeat(32 >> parts.bits) if parts.kind == SHARED else F.pad(parts.table, (0, 0, 0, -n % ROWS))
        table = table.bfloat16().contiguous()
    group = torch.arange(blocks) * block // columns(leaf)  # of each block
    factors = [None if f is None else F.pad(f[:, group], (0, 0, 0, -n % ROWS)).view(-1, ROWS, blocks).mT for f in (parts.scales, parts.zeros)]
    wide = any(f is not None and not torch.equal(f.bfloat16().float(), f) for f in factors)
    scales, zeros = (None if f is None else f.to(torch.float32 if wide else torch.bfloat16).contiguous() for f in factors)
    return Packed((codes, scales, zeros, table, masks, starts), (n, k, blocks, block, words, parts.kind, parts.bits, int(wide)),
                  (parts.alpha, parts.center, parts.zero, LARGEST[grid] if grid else 0.0))  # fmt: skip


def _kept(format: Masked | Sparse24, blocks: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values bf16, masks int32 [panels, blocks, words, 2] and where the values of a panel begin."""
    lanes = [laid_out(whole.__getitem__, format.shape, blocks, block, lane, lane, 2)
             for whole, lane in ((format.keep().to(torch.uint8), 8), (format.dequantize(torch.bfloat16).view(torch.int16), 16))]  # fmt: skip
    keep = lanes[0].bool()
    values = F.pad(lanes[1][keep], (0, ROWS))  # a register is read whole
    starts = F.pad(keep.sum((1, 2, 3, 4)).cumsum(0), (1, 0))[:-1].contiguous()
    octets = (keep.view(-1, 8).to(torch.uint8) << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)  # bit i: lane i
    return values, octets.view(torch.int32).view(*keep.shape[:3], 2), starts


def _multiply(x: Tensor, packed: Packed, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    x = x.contiguous()
    y = x.new_empty(x.shape[0], packed.sizes[0], dtype=dtype)
    if x.shape[0]:
        at, kind = (0, 0) if bias is None else (bias.data_ptr(), TYPES[bias.dtype])
        failed = native.library().multiply(  # type: ignore[union-attr]
            ctypes.byref(packed.weight), ctypes.c_void_p(x.data_ptr()), TYPES[x.dtype], ctypes.c_float(packed.numbers[3]), ctypes.c_int64(x.shape[0]),
            ctypes.c_void_p(y.data_ptr()), TYPES[dtype], ctypes.c_void_p(at), kind, torch.get_num_threads())  # fmt: skip
        if failed:
            raise MemoryError(f"cpu-native: no memory for {x.shape[0]} tokens") if failed == 2 else RuntimeError("cpu_native.cpp has no such weight")
    return y


def _op(x, codes, scales, zeros, table, masks, starts, bias, sizes, numbers, dtype) -> Tensor:
    return _multiply(x, Packed((codes, scales, zeros, table, masks, starts), tuple(sizes), tuple(numbers)), bias, dtype)


op = ops.define("cpu_native", "(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? table, Tensor? masks, Tensor? starts, Tensor? bias, "
                "int[] sizes, float[] numbers, ScalarType dtype) -> Tensor",
                lambda x, *rest: x.new_empty(x.shape[0], rest[-3][0], dtype=rest[-1]), CPU=_op)  # fmt: skip


def matmul(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x [m, in] → [m, out] in x's dtype."""
    if x.dtype == torch.float16 and not packed.numbers[3]:  # the sum of two bf16 numbers, exactly: 11 bits are 8 and 3
        high = x.bfloat16()
        low = (x.float() - high.float()).bfloat16()
        y = _run(torch.cat([high, low]), packed, None, torch.float32)
        y = y[: len(x)] + y[len(x) :]
        return (y if bias is None else y + bias).to(x.dtype)
    return _run(x, packed, bias, x.dtype)


def _run(x: Tensor, packed: Packed, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if torch.compiler.is_compiling():
        return op(x, *packed.tensors, bias, packed.sizes, packed.numbers, dtype)
    return _multiply(x, packed, bias, dtype)
