"""CPU paths that torch ships: int4 and int8 weights multiplied as they are, for the few rows of a decoding step.

`_weight_int4pack_mm_for_cpu` holds codes 0…15 with a bf16 pair (s, t) a group and computes  w = (c − 8)·s + t  in fp32. Everything up to 4
bits fits in that container: with q the code, z its zero point and d an integer shift of the group's choosing,

    (q − z)·s = (c − 8)·s + t,      c = q − d,   t = (8 + d − z)·s.

d = z − 8 makes t vanish, and the widening exact: always legal up to 3 bits, ternary and symmetric 4 bits (|q − z| < 8). A 4-bit group that
needs d ≠ z − 8 to keep c in 0…15 rounds t to bf16, half a unit in the last place like any bf16 weight. So does a float zero point. One
bit has z = ½: codes double, scales halve. A group of any multiple of 32 is a run of groups the op knows (32, 64, 128, 256) with one scale repeated.

`_weight_int8pack_mm` computes  Σ w·x  times one bf16 scale a row: 5 to 8 bits per channel, as long as q − z fits int8.

Both read bf16 activations, accumulate in fp32 and beat a bf16 matmul up to about 4 rows (weights are what memory delivers slowly); dispatch
measures where that ends. The packed weight depends on this processor's vector width: it is never stored.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import Format, IntGroup

LEGAL_GROUPS = (256, 128, 64, 32)


@dataclass(frozen=True)
class Packed:
    weight: Tensor  # the op's own layout; int4: uint8 [out rounded up to 16, in / 2]; int8: [out, in]
    scales: Tensor  # int4: bf16 [groups, out rounded up to 16, 2], pairs (s, t); int8: bf16 [out]
    group: int  # int4: the op's group size; int8: 0
    out: int


def supports(format: Format, x: Tensor) -> str | None:
    """None if `prepare` and `matmul` run this, else the reason."""
    if not isinstance(format, IntGroup):
        return f"{type(format).__name__} is not IntGroup"
    if x.dtype != torch.bfloat16 or x.device.type != "cpu":
        return f"activations are {x.dtype} on {x.device}; the op computes in bf16 on CPU"
    if format.scales.dtype != torch.bfloat16:
        return f"scales are {format.scales.dtype}; the op reads bf16 and would round them"
    if format.bits_per_code <= 4:
        return f"group {format.group_size} is not a multiple of 32" if format.group_size % 32 else None
    if why := bytes_per_row(format):
        return why
    # torch 2.13 segfaults on other widths: the vector loop reads 16 codes at a time and has no tail
    return f"in_features {format.shape[1]} is not a multiple of 16" if format.shape[1] % 16 else None


def bytes_per_row(format: Format) -> str | None:
    """None if the weight is one signed byte each times one scale a row, else the reason."""
    if not isinstance(format, IntGroup):
        return f"{type(format).__name__} is not IntGroup"
    if format.groups > 1:
        return f"{format.describe()}: int8 has one scale a row"
    if format.zeros is not None and format.zeros.is_floating_point():
        return "float zero points do not fit int8"
    if format.zeros is not None and format.bits_per_code == 8:
        return "8-bit codes minus their zero point do not fit int8"
    return None


def prepare(format: IntGroup, dtype: torch.dtype = torch.bfloat16) -> Packed:
    """The op's copy of the weight: half a byte a weight up to 4 bits, one byte above."""
    (out, n), q = format.shape, format.unpack().to(torch.int32)
    zero, s = format.zero_points(), format.scales.float()  # [out, groups]
    if format.bits_per_code > 4:
        return Packed((q - zero.to(torch.int32)).to(torch.int8), format.scales[:, 0].contiguous(), 0, out)
    q = q.view(out, format.groups, format.group_size)
    if format.bits_per_code == 1:
        q, zero, s = 2 * q, 2 * zero, s / 2
    d = (zero.to(torch.int32) - 8).clamp(q.amax(2) - 15, q.amin(2))  # the shift nearest to z − 8 that keeps c in 0…15
    pairs = torch.stack([s, (8 + d - zero) * s], dim=-1)  # [out, groups, 2]
    group = next(g for g in LEGAL_GROUPS if format.group_size % g == 0)
    pairs = pairs.repeat_interleave(format.group_size // group, dim=1)
    rows = (0, -out % 16)  # the op wants a multiple of 16 rows: pad, and drop them after
    codes = F.pad((q - d[:, :, None]).view(out, n), (0, 0, *rows))
    weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return Packed(weight, F.pad(pairs, (0, 0, 0, 0, *rows)).transpose(0, 1).to(torch.bfloat16).contiguous(), group, out)


def matmul(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x bf16 [m, in] → bf16 [m, out]."""
    x = x.contiguous()
    if packed.group:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed.weight, packed.group, packed.scales)
        y = y if y.shape[1] == packed.out else y[:, : packed.out]
    else:
        y = torch.ops.aten._weight_int8pack_mm(x, packed.weight, packed.scales)
    return y if bias is None else y + bias.to(y.dtype)
