"""Dense bit packing: b-bit codes cost b bits, for every b from 1 to 8, and ternary digits cost 1.6.

A row is one little-endian bit stream: code j occupies bits j·b … j·b+b−1. Rows of codes are padded to whole int32 words (what a kernel
loads), flat lists of zero points to whole bytes. Ternary digits pack five to a byte, 3⁵ = 243 ≤ 256 (the layout of BitNet b1.58, arXiv
2402.17764). Nothing here depends on the machine's byte order except the final view, which is little-endian like safetensors.
"""

from math import lcm

import torch
from torch import Tensor


def packed_words(columns: int, bits: int) -> int:
    """int32 words that a row of `columns` b-bit codes takes."""
    return -(-columns * bits // 32)


def pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [rows, n] < 2**bits → uint8 [rows, ceil(n·bits/8)], little-endian within the row."""
    rows, n = codes.shape
    step = lcm(8, bits) // bits  # codes that fill a whole number of bytes
    padded = torch.nn.functional.pad(codes, (0, -n % step)).view(rows, -1, step).to(torch.int64)
    stream = torch.zeros(padded.shape[:2], dtype=torch.int64, device=codes.device)  # step·bits ≤ 56 bits: fits
    for j in range(step):
        stream |= padded[:, :, j] << (j * bits)
    octets = torch.stack([(stream >> (8 * i)) & 255 for i in range(step * bits // 8)], dim=-1).to(torch.uint8)
    return octets.reshape(rows, -1)[:, : -(-n * bits // 8)].contiguous()


def unpack_bytes(packed: Tensor, n: int, bits: int) -> Tensor:
    """The inverse of pack_bytes: uint8 [rows, n]."""
    if bits == 8:
        return packed[:, :n].contiguous()
    rows = packed.shape[0]
    step = lcm(8, bits) // bits
    width = step * bits // 8
    if width == 1:  # a byte's codes are spread over as many bytes by halves: the upper half of each run moves up to where its bytes begin
        wide = packed.to({2: torch.int16, 4: torch.int32, 8: torch.int64}[step], memory_format=torch.contiguous_format)
        run = 8
        while run > bits:
            run //= 2
            apart = 8 * run // bits
            wide = (wide | wide << (apart - run)) & sum((2**run - 1) << i for i in range(0, 8 * step, apart))
        return wide.view(torch.uint8)[:, :n].contiguous()
    octets = torch.nn.functional.pad(packed, (0, -packed.shape[1] % width)).view(rows, -1, width)
    stream = torch.zeros(octets.shape[:2], dtype=torch.int32 if width < 4 else torch.int64, device=packed.device)
    for i in range(width):
        stream |= octets[:, :, i].to(stream.dtype) << (8 * i)
    codes = torch.stack([((stream >> (j * bits)) & (2**bits - 1)).to(torch.uint8) for j in range(step)], dim=-1)
    return codes.reshape(rows, -1)[:, :n].contiguous()


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [rows, n] → int32 [rows, ceil(n·bits/32)]."""
    octets = pack_bytes(codes, bits)
    octets = torch.nn.functional.pad(octets, (0, 4 * packed_words(codes.shape[1], bits) - octets.shape[1]))
    return octets.contiguous().view(torch.int32)


def unpack_rows(words: Tensor, n: int, bits: int) -> Tensor:
    """The inverse of pack_rows: uint8 [rows, n]."""
    return unpack_bytes(words.contiguous().view(torch.uint8), n, bits)


def pack_trits(codes: Tensor) -> Tensor:
    """uint8 digits 0…2 [rows, n] → uint8 [rows, ceil(n/5)], lowest digit first."""
    rows, n = codes.shape
    digits = torch.nn.functional.pad(codes, (0, -n % 5)).view(rows, -1, 5).to(torch.int32)
    return (digits * torch.tensor([1, 3, 9, 27, 81], dtype=torch.int32, device=codes.device)).sum(-1).to(torch.uint8)


def unpack_trits(packed: Tensor, n: int) -> Tensor:
    """The inverse of pack_trits: uint8 [rows, n]."""
    digits = torch.stack([packed // 3**i % 3 for i in range(5)], dim=-1)
    return digits.reshape(packed.shape[0], -1)[:, :n].contiguous()
