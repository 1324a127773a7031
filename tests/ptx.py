"""Inline PTX for Triton's interpreter: a numpy emulator of the few instructions our kernels write by hand.

    monkeypatch.setattr(*ptx.EMULATOR)        # from here on tl.inline_asm_elementwise runs in the interpreter

The interpreter knows no PTX and raises NotImplementedError. Registers here are uint32 arrays over the whole tensor; 16- and 8-bit elements share
a register where `pack` says so, along the last dimension, which is where the compiler finds neighbours of one thread in our layouts.
Straight-line code only: instructions, `.reg` declarations, braces and // comments.
"""

import re

import numpy as np
from triton.runtime import interpreter

U = np.uint32


def bf16_to_fp32(h):
    return (h.astype(U) << U(16)).view(np.float32)


def fp32_to_bf16(f):
    """Round to nearest even, subnormals kept."""
    bits = np.ascontiguousarray(f, np.float32).view(U)
    return (bits + U(0x7FFF) + ((bits >> U(16)) & U(1))) >> U(16)


def bf16x2(op):
    """`op` on both halves. One rounding: products of two bf16 are exact in fp32, our sums too; a fused product and sum go through fp64."""

    def run(*registers):
        low, high = (op(*(bf16_to_fp32(half(r)) for r in registers)) for half in (lambda r: r & U(0xFFFF), lambda r: r >> U(16)))
        return fp32_to_bf16(low) | fp32_to_bf16(high) << U(16)

    return run


def lop3(a, b, c, table):
    """Any function of three bits: bit 4a + 2b + c of the table."""
    result = np.zeros_like(a)
    for row in range(8):
        if int(table.flat[0]) >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


def prmt(a, b, selector):
    """Four bytes picked out of eight, by the nibbles of the selector; a nibble's top bit replicates the byte's sign instead."""
    octets = [(r >> U(8 * i)) & U(255) for r in (a, b) for i in range(4)]
    result = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> U(4 * i)) & U(15)
        octet = np.choose(nibble & U(7), octets).astype(U)
        sign = np.where(octet & U(128), U(255), U(0)).astype(U)
        result |= np.where(nibble & U(8), sign, octet).astype(U) << U(8 * i)
    return result


def shift(op):
    """By 32 or more all bits are gone."""
    return lambda a, b: np.where(b < 32, op(a, b & U(31)), U(0)).astype(U)


OPS = {
    "mov.b32": lambda a: a, "not.b32": lambda a: ~a, "and.b32": np.bitwise_and, "or.b32": np.bitwise_or, "xor.b32": np.bitwise_xor,
    "shl.b32": shift(np.left_shift), "shr.b32": shift(np.right_shift), "shr.u32": shift(np.right_shift), "lop3.b32": lop3, "prmt.b32": prmt,
    "add.u32": np.add, "sub.u32": np.subtract, "mul.lo.u32": np.multiply, "mad.lo.u32": lambda a, b, c: a * b + c,
    "add.bf16x2": bf16x2(np.add), "sub.bf16x2": bf16x2(np.subtract), "mul.bf16x2": bf16x2(np.multiply),
    "cvt.rn.bf16x2.f32": lambda high, low: fp32_to_bf16(low.view(np.float32)) | fp32_to_bf16(high.view(np.float32)) << U(16),
    "fma.rn.bf16x2": bf16x2(lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32)),
}  # fmt: skip


def registers(data, pack: int) -> list:
    """The 32-bit registers that `pack` neighbours along the last dimension fill."""
    data = np.ascontiguousarray(data).reshape(*data.shape[:-1], data.shape[-1] // pack, pack) if pack > 1 else np.ascontiguousarray(data)[..., None]
    assert data.itemsize * pack % 4 == 0, "elements that do not fill a register need a larger pack"
    words = data.view(U)
    return [words[..., i] for i in range(words.shape[-1])]


class Results:
    """What the interpreter expects of a call that returns several values."""

    def __init__(self, handles):
        self.handles = handles

    def get_result(self, i):
        return self.handles[i]


def create_inline_asm(builder, asm, constraints, values, types, is_pure, pack):
    outputs = sum(c.strip().startswith("=") for c in constraints.split(","))
    inputs = [r for data in np.broadcast_arrays(*(v.data for v in values)) for r in registers(data, pack)]
    shape = inputs[0].shape
    held = {f"${outputs + i}": r for i, r in enumerate(inputs)}

    def read(operand):
        return held[operand] if operand in held else np.full(shape, int(operand, 0) & 0xFFFFFFFF, U)

    for statement in re.sub(r"//.*|[{}]", " ", asm).split(";"):
        op, _, operands = statement.strip().partition(" ")
        if op and op != ".reg":
            target, *sources = (o.strip() for o in operands.split(","))
            with np.errstate(over="ignore"):
                held[target] = OPS[op](*map(read, sources))
    handles, first = [], 0
    for kind in types:
        dtype = interpreter._get_np_dtype(kind.scalar)
        count = dtype.itemsize * pack // 4
        words = np.ascontiguousarray(np.stack([held[f"${first + i}"] for i in range(count)], -1))
        handles.append(interpreter.TensorHandle(words.view(dtype).reshape(*shape[:-1], shape[-1] * pack) if shape else words.view(dtype)[0], kind.scalar))
        first += count
    return Results(handles)


EMULATOR = (interpreter.InterpreterBuilder, "create_inline_asm", create_inline_asm)
