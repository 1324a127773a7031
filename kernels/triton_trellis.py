"""Trellis streams decoded on the way to the tensor cores: a 64-bit window a thread holds eight states, and every state is one look-up.

    y = T⁻¹( Σ_j s_j · x_j · LUT_{K_j}[state_j] ) + b        T⁻¹ the Hadamard transform of the outputs and their signs: triton_transform.py

A state is `digits` neighbouring digits of K bits, the newest lowest. Stored backwards, a stream is one number in which the state of a weight is
K·digits consecutive bits, so three words that a thread loads, shifted into one 64-bit window, give 8 states by shifts and masks alone. Columns are sorted by
rate; a tile of them has one, read with the tile, and one kernel serves all rates. The scales s_j go to x: the same for every row, they are an input
scale. Look-ups go through L1, where the table of a rate (8 KB at L = 12) stays; it starts at a multiple of its size, so an address is one AND
and OR. They, not bandwidth, are the limit: a random look-up a weight is some 4 cycles a warp of a multiprocessor's load unit, about what bf16 weights cost
to read, so this saves memory first; dispatch measures whether it saves time.
More than 32 rows decode chunks of outputs to a bf16 scratch, which stays in L2, and multiply those.

Against the dense weight, which rounds every element of T⁻¹V to bf16: here table and scaled input are rounded, and the transform runs on fp32 sums.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import Format, Kronecker, Trellis, packing
from ..formats.trellis import RATES, digits, lut, step_sizes
from . import ops, tiles, triton_transform
from .triton_transform import LARGEST_TOKEN, transform

BN, COLUMNS = 128, 64  # outputs and columns of a tile: 64 weights a thread
DECODE = 32  # rows of x that are multiplied while decoding; 64 spill registers
CHUNK = 24 * 2**20  # bytes of the scratch that larger inputs are decoded to


@triton.jit
def _look_up(table, states, mask, EXACT: tl.constexpr):
    """16-bit values at byte offsets `states & mask` of a table that starts at a multiple of its size: two to a register, no 64-bit arithmetic for any.
    By hand, because tl.load would first spread pointers over the threads to coalesce them, in vain."""
    if EXACT:
        return tl.load(table + (states & mask) // 2)
    address = table.to(tl.uint64)
    place = (states & mask) | address.to(tl.uint32).to(tl.int32, bitcast=True)
    return tl.inline_asm_elementwise("""{ .reg .b64 a, b; .reg .b16 c, d; mov.b64 a, {$3, $1}; mov.b64 b, {$4, $2};
        ld.global.nc.b16 c, [a]; ld.global.nc.b16 d, [b]; mov.b32 $0, {c, d}; }""", "=r,r,r,r,r", [(address >> 32).to(tl.uint32), place],
        dtype=table.dtype.element_ty, is_pure=True, pack=2)  # fmt: skip


@triton.jit
def _tile(words, luts, info, tile, start, N, UNITS: tl.constexpr, LENGTH: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr):
    """Columns of tile `tile`, backward positions start … start + 8·UNITS: [COLUMNS, 8·UNITS] values."""
    first, rate, mask, table = tl.load(info + 4 * tile), tl.load(info + 4 * tile + 1), tl.load(info + 4 * tile + 2), tl.load(info + 4 * tile + 3)
    ring = LENGTH // 32 * rate  # words of a stream
    place = start + 8 * tl.arange(0, UNITS)[None, :]
    inside, bit = place < N, place % LENGTH * rate
    stream = first + tl.arange(0, COLUMNS)[:, None] * (N // LENGTH * ring) + place // LENGTH * ring  # in words, of which there are fewer than 2^31
    w = bit // 32
    a = tl.load(words + (stream + w), inside, 0).to(tl.uint32, bitcast=True).to(tl.uint64)
    b = tl.load(words + (stream + tl.where(w + 1 < ring, w + 1, w + 1 - ring)), inside, 0).to(tl.uint32, bitcast=True).to(tl.uint64)
    c = tl.load(words + (stream + tl.where(w + 2 < ring, w + 2, w + 2 - ring)), inside, 0).to(tl.uint32, bitcast=True).to(tl.uint64)
    shift = (bit % 32).to(tl.uint64)
    low, high = ((a | (b << 32)) >> shift).to(tl.uint32), ((b | (c << 32)) >> shift).to(tl.uint32)
    # four states and the three rates between them are 31 bits at most: two words hold eight, already doubled to offsets of 16-bit entries
    four = tl.join(low << 1, ((low.to(tl.uint64) | (high.to(tl.uint64) << 32)) >> (4 * rate - 1).to(tl.uint64)).to(tl.uint32))
    two = tl.join(four, four >> (2 * rate).to(tl.uint32))
    one = tl.join(two, two >> rate.to(tl.uint32)).to(tl.int32, bitcast=True)
    return _look_up(luts + table, one.reshape(COLUMNS, 8 * UNITS), mask, EXACT)


@triton.jit
def _outputs(place, LENGTH: tl.constexpr):
    """The output at a backward position."""
    return place // LENGTH * LENGTH + (LENGTH - 1 - place % LENGTH)


@triton.jit
def _matmul(x, words, luts, info, columns, steps, y, partial, arrived, M, N, tiles_of_k, stride_x, SPLIT: tl.constexpr, LENGTH: tl.constexpr,
            EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """y fp32 [M, N] before the transform; columns int32 and steps fp32 [tiles·COLUMNS], 0 where a tile is padded."""
    start = tl.program_id(0) * BN
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    acc = tl.zeros((BN, BM), tl.float32)
    for tile in range(tl.program_id(2), tiles_of_k, SPLIT):
        k = tile * COLUMNS + tl.arange(0, COLUMNS)
        column, step = tl.load(columns + k), tl.load(steps + k)
        xt = tl.load(x + m[None, :].to(tl.int64) * stride_x + column[:, None], (m[None, :] < M) & (step[:, None] > 0), 0.0).to(tl.float32) * step[:, None]
        v = _tile(words, luts, info, tile, start, N, BN // 8, LENGTH, COLUMNS, EXACT)
        acc = tiles.dot(tl.trans(v), xt if EXACT else xt.to(v.dtype), acc, EXACT)
    tiles.finish(acc, y, y, partial, arrived, m, _outputs(start + tl.arange(0, BN), LENGTH), M, N, False, SPLIT, BN, BM)


@triton.jit
def _decode(words, luts, info, out, first, count, N, LENGTH: tl.constexpr, EXACT: tl.constexpr, BN: tl.constexpr, COLUMNS: tl.constexpr):
    """Outputs first … first + count, whole streams, of all columns: out [tiles·COLUMNS, count]."""
    start, tile = first + tl.program_id(0) * BN, tl.program_id(1)
    place = start + tl.arange(0, BN)
    v = _tile(words, luts, info, tile, start, N, BN // 8, LENGTH, COLUMNS, EXACT)
    k = (tile * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    tl.store(out + k[:, None] * count + (_outputs(place, LENGTH) - first)[None, :], v, (place < first + count)[None, :])


@dataclass(frozen=True)
class Prepared:
    words: Tensor  # int32: of every column its streams backwards, columns by rising rate
    luts: Tensor  # the tables of all rates, in the activations' dtype
    info: Tensor  # int32 [tiles, 4]: first word, rate, mask of a doubled state, start of its table
    columns: Tensor  # int32 [tiles·COLUMNS]: the input that a column multiplies
    steps: Tensor  # fp32 [tiles·COLUMNS]: its scale; 0 where a tile is filled up
    inverse: triton_transform.Prepared  # of the outputs
    length: int


def supports(format: Format, x: Tensor) -> str | None:
    """None if `prepare` and `matmul` run this, else the reason."""
    if not isinstance(format, Trellis):
        return f"{type(format).__name__} is not Trellis"
    if format.length % 32 or format.length < 64:
        return f"streams of {format.length} weights are not a multiple of 32 from 64 on: they do not fill words"
    if format.shape[0] > LARGEST_TOKEN:
        return f"{format.shape[0]} outputs: a token of more than {LARGEST_TOKEN} does not fit the transform's registers"
    return tiles.refuses(x, format)


def prepare(format: Trellis, dtype: torch.dtype) -> Prepared:
    """Streams turned round, columns sorted by rate and filled up to whole tiles, tables and transform in the activations' dtype."""
    (N, n), length, device = format.shape, format.length, format.codes.device
    rates = packing.unpack_bytes(format.rates[None], n, 3)[0]
    s, width = step_sizes(format.scale, format.exponents)[:, 0], -(-N // 8)
    words, info, columns, steps = [], [], [], []
    byte = word = 0
    size = {K: 1 << K * digits(K, format.L, length) for K in RATES[1:]}
    starts, end = {}, 0
    for K in sorted(size, key=lambda K: -size[K]):  # powers of two, the largest first: each starts at a multiple of its own size
        starts[K], end = end, end + size[K]
    end = triton.next_power_of_2(end)
    luts = torch.empty(2 * end, dtype=dtype, device=device)
    luts = luts[-luts.data_ptr() // 2 % end :][:end]  # and so does the first
    for K in RATES[1:]:
        of_rate = (rates == K).nonzero()[:, 0]
        count = len(of_rate)
        if not count:
            continue
        missing, k = -count % COLUMNS, digits(K, format.L, length)
        codes = packing.unpack_bytes(format.codes[byte : byte + count * K * width].view(count, K * width), N, K)
        streams = packing.pack_rows(codes.view(-1, length).flip(1), K)  # [columns · N/length, length·K/32]
        words += [streams.flatten(), streams.new_zeros(missing * N // 32 * K)]
        luts[starts[K] : starts[K] + (1 << K * k)] = lut(K, k).to(luts)
        info += [(word + i * (N // 32 * K), K, (2 << K * k) - 2, starts[K]) for i in range(0, count, COLUMNS)]
        columns.append(torch.nn.functional.pad(of_rate, (0, missing)))
        steps.append(torch.nn.functional.pad(s[of_rate], (0, missing)))
        byte, word = byte + count * K * width, word + (count + missing) * (N // 32 * K)
    T = Kronecker.hadamard(N, format.seed)
    inverse = triton_transform.prepared(Kronecker(T.left.to(device), T.right.to(device), T.diagonal.to(device)).T, torch.float32)  # H is orthogonal
    as_int = lambda rows: torch.tensor(rows, dtype=torch.int32, device=device)
    return Prepared(torch.cat(words), luts, as_int(info), torch.cat(columns).int(), torch.cat(steps).float(), inverse, length)


def matmul(x: Tensor, prepared: Prepared, bias: Tensor | None = None) -> Tensor:
    """x [m, in] bf16 or fp16 → [m, out]."""
    p, T = prepared, prepared.inverse
    return op(x, p.words, p.luts, p.info, p.columns, p.steps, T.left, T.right, T.diagonal, bias, p.length, T.a, T.b)


def _run(x: Tensor, words: Tensor, luts: Tensor, info: Tensor, columns: Tensor, steps: Tensor, left: Tensor | None, right: Tensor,
         diagonal: Tensor, bias: Tensor | None, length: int, a: int, b: int) -> Tensor:  # fmt: skip
    x, M, N, tiles_of_k = x if x.stride(1) == 1 else x.contiguous(), x.shape[0], a * b, len(info)
    y = torch.empty(M, N, device=x.device)
    if M > DECODE:
        scaled = (x.index_select(1, columns) * steps).to(x.dtype)
        most = max(1, CHUNK // (2 * len(columns) * length)) * length  # outputs of a chunk: whole streams
        for first in range(0, N, most):
            count = min(most, N - first)
            V = torch.empty(len(columns), count, dtype=x.dtype, device=x.device)
            _decode[(triton.cdiv(count, BN), tiles_of_k)](words, luts, info, V, first, count, N, LENGTH=length, EXACT=tiles.INTERPRET, BN=BN,
                                                          COLUMNS=COLUMNS, num_warps=4)  # fmt: skip
            y[:, first : first + count] = scaled @ V
    elif M:
        const, tiles_of_n = launch(M), triton.cdiv(N, BN)
        shares, (partial, arrived) = tiles.split(tiles_of_n, tiles_of_k, BN * const["BM"], x.device), tiles.workspace(x)
        _matmul[(tiles_of_n, 1, shares)](x, words, luts, info, columns, steps, y, partial, arrived, M, N, tiles_of_k, x.stride(0), SPLIT=shares,
                                           LENGTH=length, EXACT=tiles.INTERPRET, num_warps=4, num_stages=3, **const)  # fmt: skip
    return transform(y, triton_transform.Prepared(left, right, diagonal, True, a, b), bias, x.dtype)


def launch(m: int) -> dict:
    return {"BM": tiles.rows_of_tile(m), "BN": BN, "COLUMNS": COLUMNS}


op = ops.define("trellis_matmul", "(Tensor x, Tensor words, Tensor luts, Tensor info, Tensor columns, Tensor steps, Tensor? left, Tensor right,"
                " Tensor diagonal, Tensor? bias, int length, int a, int b) -> Tensor", lambda x, *args: x.new_empty(x.shape[0], args[-2] * args[-1]),
                CPU=_run, CUDA=_run)  # fmt: skip
