"""One Triton kernel for every IntGroup: 1 to 8 bits or ternary, symmetric or not, any group size, any shape.

    y[m, n] = Σ_g s[n, g] · Σ_{k ∈ g} (q[n, k] − z[n, g]) · x[m, k]  + b[n]

A group is a run of K tiles, so a tile never meets two scales and the scale can wait: the inner sum multiplies x by the integer q − z, at
most 255 in magnitude and therefore EXACT in bf16 and fp16, and s multiplies the fp32 partial sum. The weight is never rounded, which makes
the kernel more accurate than a dense bf16 matrix. Partial sums are added in one fixed order, without atomics: the same input gives the same
bits on every run.

What it costs: each code is fetched by itself (a word, two when 3, 5, 6 or 7 bits straddle) and shifted into place, so a GPU runs out of
instructions before it runs out of bandwidth; dispatch measures where that still beats dense. It reads the codes as they lie on disk and
nothing else; tensor-core fragment layouts are another file.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import Format, IntGroup
from ..formats.int_group import symmetric_zero

INTERPRET = triton.knobs.runtime.interpret  # fixed when the kernel below is decorated; its bf16 arithmetic is on raw bits: silent garbage
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _matmul(x, codes, scales, zeros, bias, y, M, N, words, stride, zero_bytes, K: tl.constexpr, GROUP: tl.constexpr,
            BITS: tl.constexpr, TERNARY: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, EXACT: tl.constexpr,
            BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """ZERO: the implied zero point, None when `zeros` holds packed ones. EXACT: fp32 operands, which is also what the interpreter needs."""
    MASK: tl.constexpr = (1 << BITS) - 1
    GROUPS: tl.constexpr = K // GROUP
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_in, n_in = m < M, n < N
    row = codes + n[:, None].to(tl.int64) * words  # [BN, 1]
    acc = tl.zeros((BN, BM), tl.float32)  # yᵀ: the weights are the tall operand, x the narrow one
    for g in range(0, GROUPS):
        scale = tl.load(scales + n * GROUPS + g, n_in, 0.0).to(tl.float32)
        zero = ZERO
        if ZERO is None:
            start = (n * GROUPS + g) * BITS  # zero points are one bit stream over [out, groups]
            byte = start // 8
            zero = tl.load(zeros + byte, n_in, 0).to(tl.int32)
            if 8 % BITS:
                zero |= tl.load(zeros + byte + 1, n_in & (byte + 1 < zero_bytes), 0).to(tl.int32) << 8
            zero = ((zero >> (start % 8)) & MASK)[:, None]
        part = tl.zeros((BN, BM), tl.float32)
        for tile in range(0, GROUP, BK):
            k = g * GROUP + tile + tl.arange(0, BK)
            k_in = k < K if GROUP % BK == 0 else tile + tl.arange(0, BK) < GROUP
            mask = n_in[:, None] & k_in[None, :]
            if TERNARY:
                q = tl.load(row + (k // 5)[None, :], mask, 0).to(tl.int32)
                digit = (k % 5)[None, :]
                q = tl.where(digit == 0, q, tl.where(digit == 1, q // 3, tl.where(digit == 2, q // 9, tl.where(digit == 3, q // 27, q // 81))))
                q = q % 3
            else:
                bit = k * BITS
                word, shift = (bit // 32)[None, :], (bit % 32)[None, :]
                q = tl.load(row + word, mask, 0).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)
                if 32 % BITS:  # the high bits may lie in the next word; << 1 << (31 − shift) because a shift by 32 is undefined
                    over = tl.load(row + word + 1, mask & (shift + BITS > 32), 0).to(tl.uint32, bitcast=True)
                    q |= (over << 1) << (31 - shift).to(tl.uint32)
                q = (q & MASK).to(tl.int32)
            w = tl.where(k_in[None, :], q.to(tl.float32) - zero, 0.0)  # [BN, BK], |w| ≤ 255
            xt = tl.load(x + m[None, :].to(tl.int64) * stride + k[:, None], m_in[None, :] & k_in[:, None], 0.0)  # [BK, BM]
            if EXACT:
                part = tl.dot(w, xt.to(tl.float32), part, input_precision="ieee")
            else:
                part = tl.dot(w.to(xt.dtype), xt, part)
        acc += part * scale[:, None]
    if BIAS:
        acc += tl.load(bias + n, n_in, 0.0).to(tl.float32)[:, None]
    tl.store(y + m[None, :].to(tl.int64) * N + n[:, None], acc.to(y.dtype.element_ty), m_in[None, :] & n_in[:, None])


def supports(format: Format, x: Tensor) -> str | None:
    """None if `matmul` runs this, else the reason."""
    if not isinstance(format, IntGroup):
        return f"{type(format).__name__} is not IntGroup"
    if format.zeros is not None and format.zeros.is_floating_point():
        return "float zero points: the kernel's products are exact because q − z is an integer"
    if x.dtype not in DTYPES:
        return f"activations are {x.dtype}, not bf16, fp16 or fp32"
    if not (x.is_cuda or INTERPRET):
        return f"activations are on {x.device}, not on CUDA"
    if x.is_cuda and x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "this GPU is older than bf16"
    if format.codes.device != x.device:
        return f"codes are on {format.codes.device}, activations on {x.device}"
    return None


def tiles(m: int, group: int) -> dict[str, int]:
    """Tile sizes that spill no register in bf16 and fp16 on sm_90, whatever the code; K tiles that divide the group if any do."""
    widest = 64 if m <= 16 else 32
    divisors = [bk for bk in (64, 32, 16) if bk <= widest and group % bk == 0]
    return {"BM": 16 if m <= 16 else 32 if m <= 32 else 64, "BN": 32 if m <= 16 else 64,
            "BK": divisors[0] if divisors else widest if group > 256 else 16}  # fmt: skip


def launch(m: int) -> dict:
    """The compiler's options. Two stages keep shared memory under 48 KB, which every GPU has; FP fusion is said because its default moves."""
    return {"num_warps": 4 if m <= 16 else 8, "num_stages": 2, "enable_fp_fusion": True}


def constants(format: IntGroup, m: int, dtype: torch.dtype, bias: bool) -> dict:
    """The compile-time arguments of the kernel."""
    ternary = format.levels == 3
    zero = symmetric_zero(format.bits_per_code, format.levels) if format.zeros is None else None
    return {"K": format.shape[1], "GROUP": format.group_size, "BITS": format.bits_per_code, "TERNARY": ternary, "ZERO": zero,
            "BIAS": bias, "EXACT": INTERPRET or dtype == torch.float32} | tiles(m, format.group_size)  # fmt: skip


def prepare(format: IntGroup, dtype: torch.dtype) -> IntGroup:
    """Nothing: codes are read as they lie on disk."""
    return format


def matmul(x: Tensor, format: IntGroup, bias: Tensor | None = None) -> Tensor:
    """x [..., in] → [..., out] in x's dtype, accumulated in fp32."""
    lead, (N, K) = x.shape[:-1], format.shape
    x = x.reshape(-1, K)
    x = x if x.stride(1) == 1 else x.contiguous()
    M = x.shape[0]
    y = torch.empty(M, N, dtype=torch.float32 if INTERPRET else x.dtype, device=x.device)  # the interpreter truncates fp32 → bf16
    if M:
        const = constants(format, M, x.dtype, bias is not None)
        grid = (triton.cdiv(N, const["BN"]), triton.cdiv(M, const["BM"]))
        zeros = format.zeros
        with torch.cuda.device_of(x):
            _matmul[grid](x, format.codes, format.scales, zeros, bias, y, M, N, format.codes.stride(0), x.stride(0),
                          0 if zeros is None else zeros.numel(), **const, **launch(M))  # fmt: skip
    return y.to(x.dtype).view(*lead, N)
