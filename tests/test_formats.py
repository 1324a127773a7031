"""pytest tests/test_formats.py — packing, bytes on disk, the algebra."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import CompressError
from compress.formats import Columns, Dense, IntGroup, Kronecker, Lut, Masked, Product, Scaled, Sparse24, Sum, Transformed, Trellis, build, packing
from compress.formats.int_group import check_group_size


def int_group(out=6, n=96, bits=4, group=32, sym=False, levels=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, levels or 2**bits, (out, n), generator=g, dtype=torch.uint8)
    scales = torch.rand(out, n // group, generator=g).bfloat16() + 0.5
    zeros = None if sym else torch.randint(0, 2**bits, (out, n // group), generator=g, dtype=torch.uint8)
    return IntGroup.pack(codes, scales, zeros, bits, levels), codes, scales, zeros


def n_of_m(n, m, out=6, columns=96):
    return torch.rand(out, columns // m, m, generator=torch.Generator().manual_seed(n)).argsort(-1).lt(n).view(out, columns)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n", [1, 7, 32, 33, 96, 129])
def test_packing_is_the_bit_stream_that_the_docstring_says(bits, n):
    codes = torch.randint(0, 2**bits, (3, n), dtype=torch.uint8)
    words = packing.pack_rows(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (3, packing.packed_words(n, bits))
    for row, line in zip(codes.tolist(), words.tolist(), strict=True):
        stream = sum(q << (j * bits) for j, q in enumerate(row))  # Python's integers are the oracle
        assert [w & 0xFFFFFFFF for w in line] == [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(len(line))]
    assert torch.equal(packing.unpack_rows(words, n, bits), codes)
    assert torch.equal(packing.unpack_bytes(packing.pack_bytes(codes, bits), n, bits), codes)


@pytest.mark.parametrize("n", [1, 4, 5, 6, 64])
def test_ternary_digits_are_base_three(n):
    codes = torch.randint(0, 3, (3, n), dtype=torch.uint8)
    packed = packing.pack_trits(codes)
    assert packed.shape == (3, -(-n // 5))
    for row, line in zip(codes.tolist(), packed.tolist(), strict=True):
        assert line == [sum(d * 3**i for i, d in enumerate(row[s : s + 5])) for s in range(0, n, 5)]
    assert torch.equal(packing.unpack_trits(packed, n), codes)


@pytest.mark.parametrize(("bits", "sym", "levels"), [(b, s, None) for b in range(1, 9) for s in (False, True)] + [(2, True, 3)])
def test_int_group_dequantizes_code_by_code(bits, sym, levels):
    fmt, codes, scales, zeros = int_group(bits=bits, sym=sym, levels=levels)
    middle = 1 if levels == 3 else 0.5 if bits == 1 else 2 ** (bits - 1)
    for i, j in [(0, 0), (5, 95), (2, 31), (3, 32)]:
        z = middle if zeros is None else int(zeros[i, j // 32])
        assert fmt.dequantize(torch.float64)[i, j] == (int(codes[i, j]) - z) * float(scales[i, j // 32])
    assert fmt.dequantize(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("make", [
    lambda: Dense(torch.randn(4, 6).bfloat16()),
    lambda: int_group()[0],
    lambda: int_group(bits=3, n=97 - 1, group=96)[0],
    lambda: int_group(bits=2, levels=3, sym=True)[0],
    lambda: Trellis.pack(torch.randint(0, 4, (96, 6), dtype=torch.uint8), torch.full((96,), 2, dtype=torch.uint8),
                         torch.full((96,), 128, dtype=torch.uint8), torch.ones(1), 8, 6, 0),
    lambda: Sum((int_group()[0], Product((Dense(torch.randn(6, 2)), Dense(torch.randn(2, 96)))))),
    lambda: Product((int_group(out=6, n=32)[0], int_group(out=32, n=64, bits=8)[0])),
    lambda: Transformed(int_group()[0], Kronecker.hadamard(96)),
    lambda: Transformed(int_group()[0], Dense(torch.linalg.qr(torch.randn(96, 96))[0].contiguous())),
    lambda: Masked.pack(n_of_m(3, 13, columns=91), Dense(torch.randn(6, 21).bfloat16())),
    lambda: Masked.pack(torch.eye(5, 9).bool(), Dense(torch.randn(1, 5))),
    lambda: Masked.pack(n_of_m(8, 12), int_group(n=64)[0]),
    lambda: Sparse24.pack(n_of_m(2, 4), Dense(torch.randn(6, 48).bfloat16()), 2, 4),
    lambda: Sum((Sparse24.pack(n_of_m(1, 3), int_group(n=32)[0], 1, 3), Product((Dense(torch.randn(6, 2)), Dense(torch.randn(2, 96)))))),
    lambda: IntGroup.pack(int_group()[0].unpack(), torch.rand(6, 3).bfloat16(), 15 * torch.rand(6, 3).half(), 4),
    lambda: Lut.pack(torch.randint(0, 16, (6, 96), dtype=torch.uint8), torch.randn(1, 16), torch.rand(6, 3).bfloat16(), "nf4"),
    lambda: Lut.pack(torch.randint(0, 8, (5, 77), dtype=torch.uint8), torch.randn(5, 8).half(), None, "lut3"),
    lambda: Columns.pack(torch.arange(128) % 4 == 0, int_group(n=32)[0], Scaled(int_group(bits=1, sym=True)[0], torch.rand(96))),
    lambda: Scaled(Scaled(int_group()[0], torch.rand(96)), torch.rand(96).bfloat16()),
])  # fmt: skip
def test_round_trip_through_a_file_and_bits_equal_bytes_on_disk(make, tmp_path):
    fmt = make()
    save_file(fmt.tensors(), tmp_path / "w.safetensors")
    meta = json.loads(json.dumps(fmt.meta()))
    again = build(meta, load_file(tmp_path / "w.safetensors"))
    assert torch.equal(again.dequantize(), fmt.dequantize()) and again.shape == fmt.shape and again.describe() == fmt.describe()
    with open(tmp_path / "w.safetensors", "rb") as f:
        header = int.from_bytes(f.read(8), "little")
    on_disk = (tmp_path / "w.safetensors").stat().st_size - 8 - header
    assert fmt.nbytes() == on_disk
    assert fmt.bits() == 8 * on_disk / (fmt.shape[0] * fmt.shape[1])


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 2), (3, 16), (1, 1)])
def test_sparse_formats_put_values_where_the_mask_is_and_zero_elsewhere(n, m):
    keep = n_of_m(n, m)
    values = int_group(n=96 * n // m, group=96 * n // m)[0]
    expected = torch.zeros(6, 96)
    expected[keep] = values.dequantize().flatten()
    masked, pattern = Masked.pack(keep, values), Sparse24.pack(keep, values, n, m)
    for fmt in (masked, pattern):
        W = fmt.dequantize()
        assert torch.equal(W, expected) and torch.equal(fmt.keep(), keep) and fmt.shape == (6, 96)
        assert (W[~keep].view(torch.int32) == 0).all()  # +0, bit for bit
    assert Masked.planned((6, 96), values).nbytes() == masked.nbytes()
    assert Sparse24.planned(values, n, m).nbytes() == pattern.nbytes()
    with pytest.raises(CompressError, match="keeps 1 weights"):
        Masked.pack(torch.eye(96)[:1].bool(), values)
    with pytest.raises(CompressError, match="no 2:4 mask"):
        Sparse24.pack(torch.ones(6, 96, dtype=torch.bool), values, 2, 4)


def test_two_of_four_is_four_bits_a_group_low_ones_first():
    keep = torch.tensor([[1, 0, 0, 1, 0, 1, 1, 0]]).bool()
    fmt = Sparse24.pack(keep, Dense(torch.ones(1, 4).bfloat16()), 2, 4)
    assert fmt.places.tolist() == [[0b1001_1100]]  # places 0 3 | 1 2
    wide = Sparse24.pack(n_of_m(2, 4, 4, 64), Dense(torch.ones(4, 32).bfloat16()), 2, 4)
    assert wide.bits() == 9


def test_the_algebra_is_matrix_algebra():
    a, b, c = torch.randn(5, 3).double(), torch.randn(3, 7).double(), torch.randn(5, 7).double()
    total = Sum((Dense(c), Product((Dense(a), Dense(b))))).dequantize(torch.float64)
    torch.testing.assert_close(total, c + a @ b, rtol=1e-5, atol=1e-5)
    T = torch.linalg.qr(torch.randn(7, 7))[0]
    x, inner = torch.randn(4, 7), torch.randn(5, 7)
    torch.testing.assert_close(x @ Transformed(Dense(inner), Dense(T)).dequantize().T, (x @ T) @ inner.T)


@pytest.mark.parametrize(("bits", "levels"), [(b, None) for b in range(1, 9)] + [(2, 3)])
@pytest.mark.parametrize("n", [32, 96, 160])
def test_planned_bytes_are_the_bytes_that_come_out(bits, levels, n):
    for sym in (True, False):
        if levels == 3 and not sym:
            continue
        fmt, *_ = int_group(out=7, n=n, bits=bits, group=32, sym=sym, levels=levels)
        planned = IntGroup.planned((7, n), bits, 32, sym, torch.bfloat16, levels)
        assert planned.nbytes() == fmt.nbytes() and planned.describe() == fmt.describe() and planned.meta() == fmt.meta()


def test_three_bits_cost_three_bits():
    fmt, *_ = int_group(out=128, n=1024, bits=3, group=128)
    assert fmt.bits() == 3 + 16 / 128 + 3 / 128


def test_group_size_error_has_numbers_and_a_way_out():
    with pytest.raises(CompressError, match=r"down_proj: in_features 11008 is not a multiple of group_size 96; use .*32.*64.*128"):
        check_group_size(11008, 96, "down_proj")
    assert check_group_size(11008, -1, "") == 11008


def test_a_format_of_a_later_version_is_named():
    with pytest.raises(CompressError, match="unknown format 'Trellis9'"):
        build({"format": "Trellis9"}, {})
