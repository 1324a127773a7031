"""Fragment order: packed weights as they must lie so that a GPU thread loads exactly the operand registers its tensor-core instruction reads.

Y^T = W · X^T makes the weight the tall operand A, which wgmma takes from registers. In a fragment of 16 rows by 16 columns thread (g, t) of a
warp, g = lane / 4 and t = lane % 4, holds rows g and g + 8, columns 2t, 2t + 1 and 2t + 8, 2t + 9: four registers of two bf16 neighbours.

    row = 16·block + 8h + g        column = 64·unit + 16w + 8k + 2t + e        h, k, e ∈ {0, 1}, w = 0 … 3

A *unit* is 16 rows by 64 columns: four fragments w, and in each the pairs (h, k) = 00, 01, 10, 11, of which e is the low or the high half.
A *tile* is as many units as fill its int32 words: 1 at 4 bits, 2 at 2 bits, 4 at 3 bits (in three planes) or 1 bit, 1 at 8 bits (in two planes).
A plane is [8 g][4 t][4 w] words, 512 bytes that a warp loads 16 bytes a thread, fully coalesced; one word holds all pairs of its (g, t, w).
Neither the kernel's tile sizes nor its split along K show in the layout. Exact widths: 8, 4, 3, 2 or 1 bits a weight, padding aside.

Where a bit of a code lies in the words is a table, `places`, chosen so that unpacking (unpack.py) takes one shift and one three-input logic
instruction for two weights. The layout is made at load from the codes of the artifact and never stored; LAYOUT numbers it for tuning tables.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LAYOUT = 2
ROWS, COLUMNS = 64, 256  # what a weight is padded to: the rows of a wgmma, the columns of the longest tile
UNIT = 64


@dataclass(frozen=True)
class Kind:
    bits: int
    units: int  # in a tile
    planes: int


KINDS = {
    "int8": Kind(8, 1, 2),  # two's complement
    "int4": Kind(4, 1, 1),
    "int3": Kind(3, 4, 3),
    "int2": Kind(2, 2, 1),
    "ternary": Kind(2, 2, 1),  # a sign and a magnitude
    "binary": Kind(1, 4, 1),  # a sign
    "lut": Kind(4, 1, 1),
    "e4m3": Kind(8, 1, 2),
    "e2m1": Kind(4, 1, 1),
}
E2M1_PLACES = ((6, 7, 8, 15), (3, 4, 5, 12), (0, 1, 2, 9), (13, 10, 11, 14))  # mantissa, exponent, exponent, sign: bf16's own distances, thrice


def places(kind: str) -> list[list[list[tuple[int, int]]]]:
    """[pair][e][bit of the code] → (plane, bit of the word). Pair 4u + 2h + k is (h, k) of the tile's unit u."""

    def place(pair: int, e: int, bit: int) -> tuple[int, int]:
        if kind in ("int8", "e4m3"):
            return pair // 2, 8 * (pair % 2) + 16 * e + bit
        if kind == "int3":  # five fields a half-word; the sixteenth pair takes the three spare bits
            return (pair // 5, 3 * (pair % 5) + 16 * e + bit) if pair < 15 else (bit, 15 + 16 * e)
        if kind == "lut":  # the order of a permute's selector
            return 0, 8 * pair + 4 * e + bit
        if kind == "e2m1":
            return 0, E2M1_PLACES[pair][bit] + 16 * e
        if kind in ("ternary", "binary"):  # shifted up to the sign
            return 0, 16 * e + 16 - KINDS[kind].bits * (pair + 1) + bit
        return 0, KINDS[kind].bits * pair + 16 * e + bit

    return [[[place(pair, e, bit) for bit in range(KINDS[kind].bits)] for e in range(2)] for pair in range(4 * KINDS[kind].units)]


def padded(shape: tuple[int, int]) -> tuple[int, int]:
    return shape[0] + -shape[0] % ROWS, shape[1] + -shape[1] % COLUMNS


def pack(codes: Tensor, kind: str) -> Tensor:
    """Codes [out, in], of which the kind's low bits are kept → int32 [out/16, tiles, planes, 8, 16]. Padding is code 0, which every kind decodes
    to a finite number, and meets zeros of x."""
    N, K = padded(tuple(codes.shape))
    k = KINDS[kind]
    codes = F.pad(codes.to(torch.int32), (0, K - codes.shape[1], 0, N - codes.shape[0]))
    split = codes.view(N // 16, 2, 8, -1, k.units, 4, 2, 4, 2)  # block, h, g, tile, u, w, k, t, e
    pairs = split.permute(0, 3, 2, 7, 5, 4, 1, 6, 8).reshape(N // 16, -1, 8, 16, 4 * k.units, 2)  # block, tile, g, (t, w), (u, h, k), e
    words = torch.zeros(N // 16, pairs.shape[1], k.planes, 8, 16, dtype=torch.int32, device=codes.device)
    for p, halves in enumerate(places(kind)):
        for e, bits in enumerate(halves):
            for b, (plane, bit) in enumerate(bits):
                words[:, :, plane] |= ((pairs[..., p, e] >> b) & 1) << bit
    return words


def unpack(words: Tensor, kind: str) -> Tensor:
    """The inverse of `pack`, padding included: uint8 [N, K]."""
    k, blocks = KINDS[kind], words.shape[0]
    pairs = torch.zeros(*words.shape[:2], 8, 16, 4 * k.units, 2, dtype=torch.int32, device=words.device)
    for p, halves in enumerate(places(kind)):
        for e, bits in enumerate(halves):
            for b, (plane, bit) in enumerate(bits):
                pairs[..., p, e] |= ((words[:, :, plane] >> bit) & 1) << b
    split = pairs.view(blocks, -1, 8, 4, 4, k.units, 2, 2, 2)  # block, tile, g, t, w, u, h, k, e
    return split.permute(0, 6, 2, 1, 5, 4, 7, 3, 8).reshape(16 * blocks, -1).to(torch.uint8)


def fragment_scales(table: Tensor, K: int) -> Tensor:
    """[N, K/16], one entry a row and 16 columns → [N/16, K/64, 8 g, 4 w, 2 h]: next to each other what a thread scales in one unit."""
    N = table.shape[0]
    return table.view(N // 16, 2, 8, K // UNIT, 4).permute(0, 3, 2, 4, 1).contiguous()
