"""pytest tests/test_lut_kernels.py — kernels that look weights up, per-row tables and trellis streams: in the interpreter, PTX emulated, compiled for sm_90."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
import ptx
import sass

from compress.formats import Dense, Lut, Trellis
from compress.kernels import reference, tiles, triton_lut, triton_trellis

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP16 = torch.bfloat16, torch.float16
ROUNDING = {BF16: 2**-8, FP16: 2**-11}  # of the output, relative to its largest element


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    if tiles.INTERPRET:
        monkeypatch.setattr(*ptx.EMULATOR)


def gaussian(*shape, seed=0, dtype=torch.float32, device=DEVICE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def error(y, exact):
    return ((y.double() - exact).abs().max() / exact.abs().max()).item()


def random_lut(N, K, bits, dtype=BF16, seed=0):
    codes = torch.randint(0, 2**bits, (N, K), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Lut.pack(codes.to(DEVICE), gaussian(N, 2**bits, seed=seed, dtype=dtype), None, f"lut{bits}")


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_lut(bits):
    for i, (N, K, M) in enumerate([(70, 330, 3), (64, 256, 1), (33, 129, 17), (130, 64, 65)]):
        dtype = (BF16, FP16)[i % 2]
        format, x, bias = random_lut(N, K, bits, dtype), gaussian(M, K, seed=1, dtype=dtype), gaussian(N, seed=2, dtype=dtype) if i % 2 else None
        assert triton_lut.supports(format, x) is None
        prepared = triton_lut.prepare(format, dtype)
        y, exact = triton_lut.matmul(x, prepared, bias), reference.matmul(x, format, bias, torch.float64)
        assert y.dtype == dtype and error(y, exact) < ROUNDING[dtype], (N, K, M)
        assert torch.equal(y, triton_lut.matmul(x, prepared, bias)) and not tiles.workspace(x)[1].any()


def test_lut_takes_its_bits():
    for bits in (1, 2, 3):
        assert 8 * triton_lut.prepare(random_lut(64, 512, bits), BF16).words.nbytes == bits * 64 * 512


def test_lut_says_why_not():
    format, x = random_lut(8, 32, 3), gaussian(1, 32, dtype=BF16)
    shared = Lut.pack(format.unpack(), format.table[:1], torch.ones(8, 1, device=DEVICE), "nf4")
    for reason, f, a in (("not Lut", Dense(format.dequantize()), x), ("by group", shared, x), ("float32, not", random_lut(8, 32, 3, torch.float32), x.float()),
                         ("byte by byte", format, x.half()), ("16 values", random_lut(8, 32, 4), x)):  # fmt: skip
        assert reason in triton_lut.supports(f, a)


# ---- trellis


def random_trellis(N, n, L=12, length=64, seed=0):
    """All seven rates, signs and scales drawn."""
    g = torch.Generator().manual_seed(seed)
    rates = torch.randint(0, 7, (n,), generator=g, dtype=torch.uint8)
    codes = torch.stack([torch.randint(0, 2 ** int(K), (N,), generator=g, dtype=torch.uint8) for K in rates])
    exponents = torch.randint(100, 150, (n,), generator=g, dtype=torch.uint8)
    return Trellis.pack(codes, rates, exponents, torch.tensor([0.7]), L, length, seed=3).to(DEVICE)


@pytest.mark.parametrize(("N", "n", "L", "length"), [(192, 75, 12, 64), (128, 40, 16, 128), (320, 33, 8, 64)])
def test_trellis(N, n, L, length):
    format = random_trellis(N, n, L, length)
    for M, dtype in ((3, BF16), (17, FP16), (65, BF16)):
        x, bias = gaussian(M, n, seed=1, dtype=dtype), gaussian(N, seed=2, dtype=dtype) if M == 3 else None
        assert triton_trellis.supports(format, x) is None
        prepared = triton_trellis.prepare(format, dtype)
        y, exact = triton_trellis.matmul(x, prepared, bias), reference.matmul(x, format, bias, torch.float64)
        dense = torch.nn.functional.linear(x, format.dequantize(dtype), bias)
        assert y.dtype == dtype and error(y, exact) < max(1.5 * error(dense, exact), ROUNDING[dtype]), M
        assert torch.equal(y, triton_trellis.matmul(x, prepared, bias)) and not tiles.workspace(x)[1].any()


def test_trellis_says_why_not():
    x = gaussian(1, 40, dtype=BF16)
    for reason, f, a in (("not Trellis", random_lut(8, 40, 2), x), ("fill words", random_trellis(80, 40, length=40), x),
                         ("float32, not", random_trellis(128, 40), x.float())):  # fmt: skip
        assert reason in triton_trellis.supports(f, a)


def test_ops():
    """Fake outputs have the real ones' shapes, nothing is written to but the result."""
    for module, format in ((triton_lut, random_lut(33, 129, 3)), (triton_trellis, random_trellis(128, 40))):
        seen = []
        real, module.op = module.op, lambda *args, seen=seen: seen.append(args)
        try:
            module.matmul(gaussian(3, format.shape[1], dtype=BF16), module.prepare(format, BF16), None)
        finally:
            module.op = real
        torch.library.opcheck(real, seen[0])


# ---- what ptxas makes of them


def one_row(spec, m):
    """Triton makes a constant of an argument that is 1."""
    return spec if m > 1 else replace(spec, signature={k: v for k, v in spec.signature.items() if k != "M"}, constants=spec.constants | {"M": 1})


def lut_spec(bits, m):
    types = {"x": "*bf16", "w": "*i32", "tables": "*i32", "bias": "*bf16", "y": "*bf16", "partial": "*fp32", "arrived": "*i32"} | dict.fromkeys(
        ("M", "N", "K", "stride_x", "rows"), "i32")  # fmt: skip
    constants = {"BITS": bits, "BIAS": True, "SPLIT": 4, "EXACT": False, "EVEN": 2 if m == 64 else 1} | triton_lut.launch(bits, m)
    return one_row(sass.Spec("compress.kernels.triton_lut", "_matmul", types, constants, aligned=("K", "N", "stride_x", "rows"), num_stages=4), m)


def test_lut_compiles_without_spills_to_few_instructions():
    cases = [(2, 1, 2.5), (3, 64, sass.limit(2.7, 3.0))]
    for (bits, m, limit), kernel in zip(cases, sass.compile_all([lut_spec(bits, m) for bits, m, _ in cases]), strict=True):
        columns = triton_lut.launch(bits, m)["COLUMNS"] * triton_lut.launch(bits, m)["REPEAT"]
        print(bits, m, kernel.per_weight(columns * tiles.BN / 128), kernel.registers, kernel.shared, kernel.mix.most_common(12))
        assert kernel.stack == 0 and kernel.count(*sass.TENSOR_CORE)
        assert not kernel.count(*sass.CONVERSIONS)
        assert kernel.per_weight(columns * tiles.BN / 128) < limit, (bits, m)


def trellis_spec(m):
    types = {"x": "*bf16", "words": "*i32", "luts": "*bf16", "info": "*i32", "columns": "*i32", "steps": "*fp32", "y": "*fp32", "partial": "*fp32",
             "arrived": "*i32"} | dict.fromkeys(("M", "N", "tiles_of_k", "stride_x"), "i32")  # fmt: skip
    constants = {"SPLIT": 4, "LENGTH": 128, "EXACT": False} | triton_trellis.launch(m)
    return one_row(sass.Spec("compress.kernels.triton_trellis", "_matmul", types, constants, aligned=("N", "stride_x")), m)


def test_trellis_compiles_without_spills_to_few_instructions():
    cases = [(1, sass.limit(10.5, 10.8)), (32, 13.0)]  # a wide x is gathered by columns, 16 bits at a time
    for (m, limit), kernel in zip(cases, sass.compile_all([trellis_spec(m) for m, _ in cases]), strict=True):
        per_weight = kernel.per_weight(triton_trellis.COLUMNS * triton_trellis.BN / 128)
        print("trellis", m, per_weight, kernel.registers, kernel.shared, kernel.mix.most_common(14))
        assert kernel.stack == 0 and kernel.count(*sass.TENSOR_CORE)
        assert per_weight < limit, m
