"""A Format in fragment order: the kind of its codes, and where its scales and zero points go.

How far a scale reaches decides what it multiplies:

    channel   one scale a row: after everything is summed
    group     a multiple of 64 columns: a partial sum a group times its scale, in fp32. A code minus its zero point is exact in bf16, so the
              weight is never rounded
    fine      a multiple of 16 columns: times the weight in bf16 (one rounding, that of a dense bf16 weight), from a table with an entry a
              row and 16 columns
    byte      MXFP4 and NVFP4: the same, entries of one byte; a 4-bit float times such a scale is exact in bf16

Zero points that are no integers cannot be subtracted exactly from a code; they are taken off the partial sums instead, z · Σ x, with sums over the
groups of x. Codes of 5 to 7 bits take 8, asymmetric ternary and binary ones 2.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import Dense, FloatBlock, Format, IntGroup, Lut, Product, Sum
from . import fragment_layout as layout
from .gated import Gated
from .unpack import INTERPRET


@dataclass(frozen=True)
class Prepared:
    """A weight in fragment order. N and K stand for the padded shape; rows of a gated weight lie 8 of the gate, 8 of the up projection, …"""

    words: Tensor  # int32 [N/16, tiles, planes, 8, 16]
    scales: Tensor | None  # group: rows g and g + 8 of the groups in 256 columns together, [K/256 or groups, N/2, groups, 2]; fine: int32 pairs of bf16
    # [N/16, K/64, 8, 4]; byte: int16 pairs of bytes, the same shape
    zeros: Tensor | None  # what is subtracted, as `scales`: bf16; corrected: fp32
    table: Tensor | None  # int32 [N or 1, 8]: the high bytes of 16 bf16 values, then the low ones
    row: Tensor | None  # fp32 [N]: the last factor of a row
    A: Tensor | None  # [rank, in] and ...
    B: Tensor | None  # [N, rank] of the low-rank term, rank padded to 16
    kind: str
    scale: str  # channel, group, fine or byte
    group: int  # columns
    offset: int  # a pair of bf16
    byte: tuple[int, int]  # bf16 pair of a scale = pair of bytes · first + second
    corrected: bool
    gated: bool
    shape: tuple[int, int]
    layout: int = layout.LAYOUT

    @property
    def features(self) -> int:
        """Columns of y."""
        return self.shape[0] // 2 if self.gated else self.shape[0]

    @property
    def group_units(self) -> int:
        """Units of 64 columns that share a scale; all of them if they do."""
        return layout.padded(self.shape)[1] // layout.UNIT if self.group >= self.shape[1] else max(self.group // layout.UNIT, 1)

    @property
    def per_row(self) -> bool:
        """Has every row a table of its own?"""
        return self.table is not None and len(self.table) > 1

    @property
    def weight_side(self) -> bool:
        """May scales multiply the weight in bf16 without being rounded?"""
        return self.scale == "group" and not self.corrected and self.scales is not None and self.scales.dtype == torch.bfloat16


def _leaf(format: Format) -> Format:
    return format.terms[0] if isinstance(format, Sum) else format


def _is_low_rank(format: Format) -> bool:
    return isinstance(format, Product) and len(format.factors) == 2 and all(isinstance(f, Dense) for f in format.factors) and format.factors[0].shape[1] <= 128


def _exact(scales: Tensor) -> bool:
    return scales.dtype == torch.bfloat16 or bool((scales.to(torch.bfloat16).to(scales.dtype) == scales).all())


def supports(format: Format | Gated, x: Tensor) -> str | None:
    """None if `prepare` and `matmul` run this, else the reason."""
    format = format.inner if isinstance(format, Gated) else format
    if isinstance(format, Sum) and not (len(format.terms) == 2 and _is_low_rank(format.terms[1])):
        return f"{format.describe()} is not a weight plus one low-rank product of at most 128 columns"
    leaf = _leaf(format)
    if not isinstance(leaf, IntGroup | Lut | FloatBlock):
        return f"{type(leaf).__name__} is not IntGroup, Lut or FloatBlock"
    if x.dtype != torch.bfloat16:
        return f"activations are {x.dtype}; codes are unpacked to bf16"
    if not (x.is_cuda or INTERPRET):
        return f"activations are on {x.device}, not on CUDA"
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (9, 0):
        return "this GPU is older than Hopper: no arithmetic on pairs of bf16"
    if leaf.codes.device != x.device:
        return f"codes are on {leaf.codes.device}, activations on {x.device}"
    if isinstance(leaf, Lut) and leaf.table.shape[1] > 16:
        return f"{leaf.table.shape[1]} values do not fit a table in registers"
    if isinstance(leaf, FloatBlock):
        return None
    scales = leaf.scales
    group = leaf.shape[1] // scales.shape[1] if scales is not None else leaf.shape[1]
    if group == leaf.shape[1] or group % layout.UNIT == 0:
        return None
    if group % 16:
        return f"groups of {group} columns are not a multiple of 16"
    if isinstance(leaf, IntGroup) and leaf.zeros is not None and leaf.zeros.is_floating_point():
        return f"float zero points of groups of {group} columns: only groups of a multiple of 64 can be corrected"
    return None if _exact(scales) else f"groups of {group} columns with {scales.dtype} scales, which bf16 would round"


@dataclass(frozen=True)
class Codes:
    """What a leaf says, in the terms of the kernel: (number(q) − zero) · scale, rows still in the order of the model."""

    kind: str
    q: Tensor  # [out, in], the kind's bits
    scales: Tensor | None  # [out, groups]
    group: int  # columns
    zeros: Tensor | None = None  # [out, groups], subtracted from the numbers that q is unpacked to
    offset: int = 0  # the same for all, a pair of bf16
    corrected: bool = False  # zeros are no integers and come after the offset
    table: Tensor | None = None
    byte: tuple[int, int] = (0, 0)
    outer: float = 1.0  # times everything


def planned(format: Format) -> Prepared:
    """What `prepare` would make as far as tilings depend on it, without a look at the codes."""
    leaf = _leaf(format.inner if isinstance(format, Gated) else format)  # type: ignore[attr-defined]
    n = leaf.shape[1]
    scales, zeros, corrected = None if isinstance(leaf, FloatBlock) else leaf.scales, None, False
    group = leaf.block[1] if isinstance(leaf, FloatBlock) else n if scales is None else n // scales.shape[1]  # type: ignore[attr-defined]
    if isinstance(leaf, IntGroup):
        zeros, corrected = leaf.zeros, leaf.zeros is not None and leaf.zeros.is_floating_point()
        kind = "ternary" if zeros is None and leaf.levels == 3 else "binary" if zeros is None and leaf.bits_per_code == 1 else _integer_kind(leaf)
    else:
        kind = "lut" if isinstance(leaf, Lut) else "e4m3" if leaf.name == "fp8" else "e2m1"  # type: ignore[attr-defined]
    scale, table = _reach(kind, group, n, corrected), leaf.table if isinstance(leaf, Lut) else None
    words = torch.empty(layout.padded(leaf.shape)[0] // 16, 0, device="meta")
    return Prepared(words, scales, zeros, table, None, None, None, kind, scale, group, 0, (0, 0), corrected, False, leaf.shape)


def _integer_kind(leaf: IntGroup) -> str:
    return f"int{max(leaf.bits_per_code, 2)}" if leaf.bits_per_code <= 4 else "int8"


def _reach(kind: str, group: int, n: int, corrected: bool) -> str:
    """How far a scale reaches."""
    return "byte" if kind == "e2m1" else "channel" if group >= n and not corrected else "fine" if group < n and group % layout.UNIT else "group"


def _pair(number: float) -> int:
    """A bf16 as a pair of itself, int32."""
    half = int(torch.tensor(number, dtype=torch.bfloat16).view(torch.int16)) & 0xFFFF
    return half << 16 | half if half < 0x8000 else (half << 16 | half) - 2**32


def _integers(leaf: IntGroup) -> Codes:
    """Up to 4 bits come out of unpacking as 128 + q, 8 bits as two's complement; ternary as −2, 0, 2 and binary as −1, 1, twice what they are."""
    q, zero, bits, group = leaf.unpack().int(), leaf.zero_points(), leaf.bits_per_code, leaf.group_size
    if leaf.zeros is None and leaf.levels == 3:
        return Codes("ternary", torch.tensor([3, 0, 1], device=q.device)[q], leaf.scales / 2, group)  # a sign above a magnitude
    if leaf.zeros is None and bits == 1:
        return Codes("binary", 1 - q, leaf.scales / 2, group)
    kind, base = _integer_kind(leaf), 128 if bits <= 4 else 0
    if bits > 4:
        q, zero = q - 2 ** (bits - 1), zero - 2 ** (bits - 1)
    if leaf.zeros is None:
        return Codes(kind, q, leaf.scales, group, offset=_pair(base + zero[0, 0].item()))
    if leaf.zeros.is_floating_point():
        return Codes(kind, q, leaf.scales, group, zero, offset=_pair(base), corrected=True)
    return Codes(kind, q, leaf.scales, group, base + zero)


def _values(leaf: Lut) -> Codes:
    """The table as int32 [rows, 8]: bytes 0…3, 4…7, 8…11, 12…15 of the high halves of its bf16 values, then of the low ones."""
    octets = F.pad(leaf.table.to(torch.bfloat16), (0, 16 - leaf.table.shape[1])).contiguous().view(torch.uint8).view(len(leaf.table), 16, 2)
    table = torch.cat([octets[..., 1], octets[..., 0]], 1).contiguous().view(torch.int32)
    return Codes("lut", leaf.unpack(), leaf.scales, leaf.shape[1] // (1 if leaf.scales is None else leaf.scales.shape[1]), table=table)


def _floats(leaf: FloatBlock) -> Codes:
    """4-bit floats come out of unpacking 2^126 too small. Their scales become bytes that an integer product and sum turn into bf16 near the top of its
    range, so that neither scales nor products underflow. mxfp4: the byte is the exponent, 254 for the largest scale. nvfp4: 5 bits of exponent
    and 3 of mantissa, in which E4M3's subnormals are normal."""
    q, (rows, group) = leaf.unpack(), leaf.block
    if leaf.name == "fp8":
        return Codes("e4m3", q, leaf.factors().repeat_interleave(rows, 0)[: leaf.shape[0]], group)
    if leaf.name == "mxfp4":
        top = int(leaf.scales.max())
        scales = (leaf.scales.int() + (254 - top)).clamp(1)
        return Codes("e2m1", q, scales.to(torch.uint8), group, byte=(1 << 7, 0), outer=2.0 ** (top - 128))
    mantissa, exponent = torch.frexp(leaf.scales.view(torch.float8_e4m3fn).float())  # in [½, 1), −8 … 9
    dead = mantissa == 0
    scales = ((exponent + 8) * 8 + (mantissa * 16).int() - 8).masked_fill(dead, 0)
    q = q.masked_fill(dead.repeat_interleave(group, 1), 0)
    return Codes("e2m1", q, scales.to(torch.uint8), group, byte=(1 << 4, 223 << 7 | 223 << 23), outer=2.0**21 / leaf.divisor.item())  # type: ignore[union-attr]


def _gate_order(out: int, device: torch.device) -> Tensor:
    """Rows of the model in the order of the layout, 8 gates and their 8 ups in turn; `out` where there is none."""
    half = out // 2
    rows = F.pad(torch.arange(out, device=device).view(2, half), (0, -half % 8), value=out)
    return rows.view(2, -1, 8).transpose(0, 1).reshape(-1)


def prepare(format: Format | Gated, dtype: torch.dtype = torch.bfloat16) -> Prepared:
    """Repack a weight that `supports` accepts."""
    gated, format = isinstance(format, Gated), format.inner if isinstance(format, Gated) else format
    leaf = _leaf(format)
    (out, n), device = leaf.shape, leaf.codes.device
    c = _integers(leaf) if isinstance(leaf, IntGroup) else _values(leaf) if isinstance(leaf, Lut) else _floats(leaf)
    scale = _reach(c.kind, c.group, n, c.corrected)
    N, K = layout.padded((-(-out // 16) * 16 if gated else out, n))
    order = _gate_order(out, device) if gated else torch.arange(out, device=device)

    def rows(t: Tensor) -> Tensor:
        """In the order of the layout, padded with zeros."""
        t = torch.cat([t, t.new_zeros(1, t.shape[1])])[order]
        return F.pad(t, (0, 0, 0, N - len(t))).contiguous()

    def groups(t: Tensor) -> Tensor:
        """Scales or zero points [out, groups] as the kernel reads them."""
        if scale in ("group", "channel"):
            t, pack = F.pad(rows(t), (0, -(-K // c.group) - t.shape[1])), layout.COLUMNS // c.group if c.group < n and c.group in (64, 128) else 1
            return t.view(N // 16, 2, 8, -1, pack).permute(3, 0, 2, 4, 1).reshape(t.shape[1] // pack, N // 2, pack, 2)
        t = rows(t).repeat_interleave(c.group // 16, 1)
        return layout.fragment_scales(F.pad(t, (0, K // 16 - t.shape[1])), K).view(torch.int16 if scale == "byte" else torch.int32)[..., 0]

    scales, row, A, B = c.scales, None, None, None
    if scale == "byte":
        row = rows(torch.full((out, 1), c.outer, device=device))[:, 0].contiguous()
    elif scales is not None:
        scales = scales.to(torch.bfloat16) if _exact(scales) else scales
        if scale == "channel":
            row, scales = rows(scales.float())[:, 0].contiguous(), None
    if isinstance(format, Sum):
        B, A = (f.weight.to(torch.bfloat16) for f in format.terms[1].factors)
        A, B = F.pad(A, (0, 0, 0, -len(A) % 16)).contiguous(), rows(F.pad(B, (0, -len(A) % 16)))
    zeros = None if c.zeros is None else groups(c.zeros if c.corrected else c.zeros.to(torch.bfloat16))
    table = c.table if c.table is None or len(c.table) == 1 else rows(c.table)
    return Prepared(layout.pack(rows(c.q), c.kind), None if scales is None else groups(scales), zeros, table, row, A, B, c.kind, scale, c.group, c.offset,
                    c.byte, c.corrected, gated, (out, n))  # fmt: skip
