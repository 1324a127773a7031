"""From packed words to tensor-core operands: one shift and one three-input logic instruction for two weights, no conversion, no shuffle.

A bf16 whose exponent says 128 counts in its 7 bits of mantissa: 0x4300 | q is the number 128 + q. So codes become floats by masking them
into a constant, two at a time (lop3); zero points are subtracted and scales multiplied on packed pairs too (sub.bf16x2, mul.bf16x2). A register
of two bf16 is an int32 here until the last moment, because Triton takes bf16 arithmetic apart at the cost of a permute a weight. One or two
bits need no offset: they are moved to where bf16 has its sign, its largest exponent bit. Floats are shifted to bf16's place and multiplied by
the power of two that their bias was off. A 16-entry table is four registers of high bytes and four of low ones, looked up by byte permutes.

ASM=False writes the same in plain Triton, bit for bit: for the interpreter, and to be read.
"""

import triton
import triton.language as tl

from .tiles import INTERPRET, quad

ASM = not INTERPRET  # the interpreter has no arithmetic on bf16, and no inline PTX, which tests emulate


@triton.jit
def and_or(w, MASK: tl.constexpr, OR, ASM: tl.constexpr):
    if ASM:  # Triton 3.6 emits two instructions for the expression below
        return tl.inline_asm_elementwise("lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [w, MASK, OR], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return (w & MASK) | OR


@triton.jit
def low(p):
    """The pair's first number, fp32."""
    return (p << 16).to(tl.float32, bitcast=True)


@triton.jit
def high(p):
    return (p & -65536).to(tl.float32, bitcast=True)


@triton.jit
def rounded(a, b, ASM: tl.constexpr):
    """Two fp32 to a pair of bf16, to the nearest even (the interpreter's cast truncates)."""
    if ASM:
        return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [a, b], dtype=tl.int32, is_pure=True, pack=1)
    else:
        u, v = a.to(tl.uint32, bitcast=True), b.to(tl.uint32, bitcast=True)
        u, v = (u + 0x7FFF + ((u >> 16) & 1)) >> 16, (v + 0x7FFF + ((v >> 16) & 1)) & 0xFFFF0000
        return (u | v).to(tl.int32, bitcast=True)


@triton.jit
def sub(a, b, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise("sub.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return rounded(low(a) - low(b), high(a) - high(b), ASM)


@triton.jit
def mul(a, b, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise("mul.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return rounded(low(a) * low(b), high(a) * high(b), ASM)


@triton.jit
def copied(w, I: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Byte or half I of w (BITS 8 or 16) in the low bits of both halves."""
    if ASM:
        S: tl.constexpr = 0x1010 + 0x2222 * I if BITS == 16 else 0x4040 + 0x0101 * I
        return tl.inline_asm_elementwise("prmt.b32 $0, $1, 0, $2;", "=r,r,r", [w, S], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return ((w >> BITS * I) & ((1 << BITS) - 1)) * 0x00010001


@triton.jit
def twos(p):
    """A pointer to numbers, now to pairs of them as one integer."""
    return p.to(tl.pointer_type(tl.int64 if p.dtype.element_ty == tl.float32 else tl.int32), bitcast=True)


@triton.jit
def numbers(pair, DTYPE: tl.constexpr):
    """Both numbers of a pair, fp32."""
    if DTYPE.is_bf16():
        return low(pair), high(pair)
    elif DTYPE.is_fp16():
        return pair.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32), (pair >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    else:
        return pair.to(tl.int32).to(DTYPE, bitcast=True), (pair >> 32).to(tl.int32).to(DTYPE, bitcast=True)


@triton.jit
def nth(t, I: tl.constexpr, N: tl.constexpr, R: tl.constexpr):
    """Column I of t [R, N], N = 1, 2 or 4, as [R, 1]."""
    if N == 1:
        return t
    elif N == 2:
        return t.split()[I].reshape(R, 1)
    else:
        return nth(t.reshape(R, 2, 2).split()[I % 2], I // 2, 2, R)


@triton.jit
def after(w, s, ASM: tl.constexpr):
    """w, in name computed from s. Triton loads ahead only what leads to a dot, and a scale comes behind it."""
    if ASM:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", [w, s.to(tl.int32)], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return w


@triton.jit
def in_rows(h0, h1, BN: tl.constexpr):
    """What belongs to the rows h = 0 and h = 1 of words, [BN/2, 1] each → [BN, 1]."""
    return tl.join(h0, h1).reshape(BN // 16, 8, 2).permute(0, 2, 1).reshape(BN, 1)


@triton.jit
def joined(p, UNITS: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr = tl.bfloat16):
    """The pairs (h, k) of words [BN/2, 16], those of each unit in turn → bf16 [BN, 64 · UNITS]. Moves nothing: every thread keeps its registers,
    only their names change."""
    if UNITS == 1:
        return unit(p, 0, DTYPE).reshape(BN // 16, 8, 4, 4, 2, 2, 2).permute(0, 6, 1, 3, 5, 2, 4).reshape(BN, 64)
    elif UNITS == 2:
        two = tl.join(unit(p, 0, DTYPE), unit(p, 4, DTYPE))
        return two.reshape(BN // 16, 8, 4, 4, 2, 2, 2, 2).permute(0, 6, 1, 7, 3, 5, 2, 4).reshape(BN, 128)
    else:
        four = tl.join(tl.join(unit(p, 0, DTYPE), unit(p, 8, DTYPE)), tl.join(unit(p, 4, DTYPE), unit(p, 12, DTYPE)))
        return four.reshape(BN // 16, 8, 4, 4, 2, 2, 2, 2, 2).permute(0, 6, 1, 7, 8, 3, 5, 2, 4).reshape(BN, 256)


@triton.jit
def unit(p, I: tl.constexpr, DTYPE: tl.constexpr):
    return quad(p[I], p[I + 1], p[I + 2], p[I + 3], DTYPE)  # [BN/2, 16, e, k, h]


@triton.jit
def byte(w, z, ASM: tl.constexpr):
    """Bits 0…7 of both halves as signed numbers, (b mod 128 + 128) − (128 or 256), minus z if there is one."""
    q = sub(and_or(w, 0x007F007F, 0x43004300, ASM), and_or(w, 0x00800080, 0x43004300, ASM), ASM)
    return q if z is None else sub(q, z, ASM)


@triton.jit
def field(w, z, I: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Field I of both halves minus z − 128. Six bits of a mantissa hold two fields of 3 bits or three of 2 without a shift between them: one that is
    2^p times too large counts from 128 / 2^p instead of 128, and so does its z."""
    PER: tl.constexpr = 6 // BITS  # fields a shift brings into the mantissa
    P: tl.constexpr = I % PER * BITS
    BASE: tl.constexpr = 0x43004300 - P * 0x00800080
    q = and_or(w >> I // PER * PER * BITS, ((1 << BITS) - 1) * 0x00010001 << P, BASE, ASM)
    SHIFTED: tl.constexpr = (BASE - (0x43004300 << P) + 2**31) % 2**32 - 2**31
    return sub(q, z * (1 << P) + SHIFTED, ASM)


@triton.jit
def three(w0, w1, w2, z, PAIR: tl.constexpr, ASM: tl.constexpr):
    if PAIR == 15:
        return sub(((w0 >> 15) & 0x00010001) | ((w1 >> 14) & 0x00020002) | ((w2 >> 13) & 0x00040004) | 0x43004300, z, ASM)
    else:
        return field(w0 if PAIR < 5 else w1 if PAIR < 10 else w2, z, PAIR % 5, 3, ASM)


@triton.jit
def e4m3(w, ASM: tl.constexpr):
    """The high bytes of both halves: the exponent four places down, where its bias is 2^120 too small."""
    return mul(and_or(w, -2147450880, and_or(w >> 4, 0x07F007F0, 0, ASM), ASM), tl.full((1, 1), 0x7B807B80, tl.int32), ASM)


@triton.jit
def e2m1(w, PAIR: tl.constexpr, ASM: tl.constexpr):
    """1 + 2 + 1 bits at bf16's own places, 2^126 too small."""
    if PAIR < 3:
        return and_or(w << 3 * PAIR, -2118090304, 0, ASM)  # 0x81C081C0
    else:
        return and_or(w << 1, -2147450880, and_or(w >> 3, 0x01800180, and_or(w >> 7, 0x00400040, 0, ASM), ASM), ASM)


@triton.jit
def lookup(w, h0, h1, h2, h3, l0, l1, l2, l3, ASM: tl.constexpr):
    """The low half of w, four nibbles, through the table of high bytes h and low bytes l → two pairs of bf16."""
    if ASM:
        return tl.inline_asm_elementwise("""{ .reg .b32 s, t, x, y, h, l;
            and.b32 s, $2, 0x7777; shr.u32 t, $2, 1; lop3.b32 t, t, 0x4444, 0x3210, 0xEA;
            prmt.b32 x, $3, $4, s; prmt.b32 y, $5, $6, s; prmt.b32 h, x, y, t;
            prmt.b32 x, $7, $8, s; prmt.b32 y, $9, $10, s; prmt.b32 l, x, y, t;
            prmt.b32 $0, l, h, 0x5140; prmt.b32 $1, l, h, 0x7362; }""",
            "=r,=r,r,r,r,r,r,r,r,r,r", [w, h0, h1, h2, h3, l0, l1, l2, l3], dtype=(tl.int32, tl.int32), is_pure=True, pack=1)  # fmt: skip
    else:
        a = entry(w, h0, h1, h2, h3, l0, l1, l2, l3) | (entry(w >> 4, h0, h1, h2, h3, l0, l1, l2, l3) << 16)
        b = entry(w >> 8, h0, h1, h2, h3, l0, l1, l2, l3) | (entry(w >> 12, h0, h1, h2, h3, l0, l1, l2, l3) << 16)
        return a, b


@triton.jit
def entry(q, h0, h1, h2, h3, l0, l1, l2, l3):
    s, r = (q & 3) * 8, (q >> 2) & 3
    h = tl.where(r == 0, h0, tl.where(r == 1, h1, tl.where(r == 2, h2, h3)))
    l = tl.where(r == 0, l0, tl.where(r == 1, l1, tl.where(r == 2, l2, l3)))
    return (((h >> s) & 255) << 8) | ((l >> s) & 255)


@triton.jit
def pairs(w0, w1, w2, t, z0, z1, U: tl.constexpr, KIND: tl.constexpr, ASM: tl.constexpr):
    """Words [BN/2, 16] of a tile's planes → the pairs (h, k) = 00, 01, 10, 11 of its unit U: packed bf16, exact.
    z0, z1: what integers are counted from in the rows h = 0 and h = 1 (128 + zero point up to 4 bits), pairs of bf16.
    t: for a table, h0…h3, l0…l3 of the rows h = 0, then those of the rows h = 1."""
    if KIND == "int4":
        return field(w0, z0, 0, 4, ASM), field(w0, z0, 1, 4, ASM), field(w0, z1, 2, 4, ASM), field(w0, z1, 3, 4, ASM)
    elif KIND == "int3":
        return (three(w0, w1, w2, z0, 4 * U, ASM), three(w0, w1, w2, z0, 4 * U + 1, ASM),
                three(w0, w1, w2, z1, 4 * U + 2, ASM), three(w0, w1, w2, z1, 4 * U + 3, ASM))  # fmt: skip
    elif KIND == "int2":
        return (field(w0, z0, 4 * U, 2, ASM), field(w0, z0, 4 * U + 1, 2, ASM), field(w0, z1, 4 * U + 2, 2, ASM), field(w0, z1, 4 * U + 3, 2, ASM))
    elif KIND == "ternary":
        M: tl.constexpr = -1073692672  # 0xC000C000
        return (and_or(w0 << 8 * U, M, 0, ASM), and_or(w0 << 8 * U + 2, M, 0, ASM),
                and_or(w0 << 8 * U + 4, M, 0, ASM), and_or(w0 << 8 * U + 6, M, 0, ASM))  # fmt: skip
    elif KIND == "binary":
        S: tl.constexpr = -2147450880  # 0x80008000
        return (and_or(w0 << 4 * U, S, 0x3F803F80, ASM), and_or(w0 << 4 * U + 1, S, 0x3F803F80, ASM),
                and_or(w0 << 4 * U + 2, S, 0x3F803F80, ASM), and_or(w0 << 4 * U + 3, S, 0x3F803F80, ASM))  # fmt: skip
    elif KIND == "int8":
        return byte(w0, z0, ASM), byte(w0 >> 8, z0, ASM), byte(w1, z1, ASM), byte(w1 >> 8, z1, ASM)
    elif KIND == "e4m3":
        return e4m3(w0 << 8, ASM), e4m3(w0, ASM), e4m3(w1 << 8, ASM), e4m3(w1, ASM)
    elif KIND == "e2m1":
        return e2m1(w0, 0, ASM), e2m1(w0, 1, ASM), e2m1(w0, 2, ASM), e2m1(w0, 3, ASM)
    else:
        a, b = lookup(w0, t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], ASM)
        c, d = lookup(w0 >> 16, t[8], t[9], t[10], t[11], t[12], t[13], t[14], t[15], ASM)
        return a, b, c, d


@triton.jit
def tables(t, n, stride, PER_ROW: tl.constexpr):
    """Registers h0…h3, l0…l3 for rows n, then for rows n + 8, [rows, 1]. One table for all rows has a stride of 0 that the compiler does not know of: it
    would keep the table in uniform registers and copy it for every permute."""
    p = (t + n * stride)[:, None]
    first = (tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3), tl.load(p + 4), tl.load(p + 5), tl.load(p + 6), tl.load(p + 7))
    if PER_ROW:
        q = (t + (n + 8) * stride)[:, None]
        return first + (tl.load(q), tl.load(q + 1), tl.load(q + 2), tl.load(q + 3), tl.load(q + 4), tl.load(q + 5), tl.load(q + 6), tl.load(q + 7))  # noqa: RUF005
    else:
        return first + first
