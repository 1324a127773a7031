"""python -m pytest tests/test_native.py: C++ on this processor against the oracle on awkward shapes, its threads and reasons, and what the compiler makes."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_cpu_kernels import ONCE, quick  # noqa: F401
from test_kernels import BF16, CODES, FP16, FP32, error, inputs, make

from compress.formats import Dense, FloatBlock, IntGroup, Lut, Masked, Sparse24
from compress.kernels import cpu_native, dispatch, native, reference
from compress.kernels.activations import Rounded
from compress.kernels.bench import FORMATS
from compress.kernels.dispatch import How

here = pytest.mark.skipif(isinstance(native.library(), str), reason=f"native code: {native.library()}")
SHAPES = [  # out, in, group, rows: fewer than a panel, odd in, groups that end within a word, many blocks, more than one pass of tokens
    (37, 96, 48, 3), (70, 64, 16, 17), (33, 96, 32, 65), (40, 131, 131, 1), (5, 330, 330, 5), (64, 520, 130, 2), (96, 1024, 256, 4), (65, 128, 64, 97),
    (31, 44, 44, 12),
]  # fmt: skip


def judged(format, x, bias=None, tolerance=1.0):
    packed = cpu_native.prepare(format, x.dtype)
    y, exact = cpu_native.matmul(x, packed, bias), reference.matmul(x, format, bias, torch.float64)
    assert y.dtype == x.dtype and y.shape == exact.shape
    assert error(y, exact) < tolerance * ONCE[x.dtype], (format.describe(), tuple(x.shape))
    return packed


@here
@pytest.mark.parametrize("bits, levels", CODES, ids=lambda v: str(v))
@pytest.mark.parametrize("asym", [False, True], ids=["sym", "asym"])
def test_every_code_and_shape(bits, levels, asym):
    for i, (out, n, group, m) in enumerate(SHAPES):
        format = make(out, n, bits, group, asym, levels, (FP32, BF16, FP16)[(i + bits) % 3])
        x, bias = inputs(m, n, (BF16, FP16)[(i + bits) % 2]), inputs(1, out, (BF16, FP32)[i % 2])[0] if i % 3 else None
        assert cpu_native.supports(format, x) is None
        judged(format, x, bias)
        rounded, x = Rounded(format, "int8" if i % 2 else "int4"), inputs(m, n, (FP32, BF16, FP16)[(i + asym) % 3])
        if group % 4 and group < n:
            assert "not a multiple of 4" in cpu_native.supports(rounded, x)
            continue
        assert cpu_native.supports(rounded, x) is None
        judged(rounded, x, bias, 2.0)


@here
def test_float_zero_points():
    codes, g = inputs(40, 96).abs().mul(5).clamp(max=15).to(torch.uint8), torch.Generator().manual_seed(0)
    for dtype in (BF16, FP32):
        format = IntGroup.pack(codes, torch.rand(40, 3, generator=g).to(BF16), torch.rand(40, 3, generator=g).mul(15).to(dtype), 4)
        for m in (1, 7):
            judged(format, inputs(m, 96, BF16))
            judged(Rounded(format, "int8"), inputs(m, 96))


@here
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_tables(bits):
    g = torch.Generator().manual_seed(bits)
    for out, n, group, m in SHAPES:
        codes = torch.randint(0, 2**bits, (out, n), generator=g, dtype=torch.uint8)
        rows = Lut.pack(codes, torch.randn(out, 2**bits, generator=g).to(BF16), None, f"lut{bits}")
        judged(rows, inputs(m, n, BF16))
        shared = Lut.pack(codes, torch.randn(1, 2**bits, generator=g).to(BF16), torch.rand(out, n // group, generator=g).to(BF16), "own")
        judged(shared, inputs(m, n, BF16))
    wide = Lut.pack(codes, torch.randn(31, 32, generator=g), None, "lut5")
    assert "16 entries" in cpu_native.supports(wide, inputs(1, 44, BF16))


@here
def test_floats():
    g = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randint(0, 256, size, generator=g, dtype=torch.uint8)
    every = torch.tensor([c for c in range(256) if c & 127 != 127], dtype=torch.uint8)  # E4M3 but for what is not a number; subnormal numbers too
    codes = every[torch.randint(0, len(every), (150, 300), generator=g)]
    for scales in (torch.rand(150, 1, generator=g), torch.rand(1, 1, generator=g), torch.rand(2, 3, generator=g)):
        for m in (1, 6):
            judged(FloatBlock(codes, scales, None, "fp8"), inputs(m, 300, BF16))
    for m in (1, 6):
        judged(FloatBlock(draw(45, 48), draw(45, 3) % 16 + 120, None, "mxfp4"), inputs(m, 96, BF16))
        judged(FloatBlock(draw(45, 48), draw(45, 6) % 64 + 32, torch.tensor([448.0]), "nvfp4"), inputs(m, 96, BF16))
    one = FloatBlock(every[None].repeat(2, 1)[:, :-1], torch.ones(2, 1), None, "fp8")  # one number at a time: every code is exact
    x = torch.eye(253, dtype=BF16)
    assert torch.equal(cpu_native.matmul(x, cpu_native.prepare(one)).T.float(), one.dequantize())


@here
def test_zeros_anywhere():
    g = torch.Generator().manual_seed(0)
    for out, n, _, m in SHAPES:
        keep = torch.rand(out, n, generator=g) < torch.rand(out, 1, generator=g)  # some rows full, some empty
        keep[0], keep[1] = False, True
        judged(Masked.pack(keep, Dense(torch.randn(1, int(keep.sum()), generator=g).to(BF16))), inputs(m, n, BF16))
    half = torch.rand(48, 64, 4, generator=g).argsort(-1).lt(2).view(48, 256)
    for values in (Dense(torch.randn(48, 128, generator=g).to(BF16)), make(48, 128, 4, 64)):
        for m in (1, 20):
            judged(Sparse24.pack(half, values, 2, 4), inputs(m, 256, BF16), tolerance=1.5)  # integers times scales are rounded to bf16


@here
def test_weights_are_not_rounded():
    """Codes and scales are kept apart: what is left is the rounding of the output, where a dense bf16 weight adds its own."""
    for format in (make(64, 256, 8, 128, asym=True), make(64, 256, 4, 32, asym=True)):
        for m in (1, 16):
            x = inputs(m, 256, BF16)
            exact = reference.matmul(x, format, dtype=torch.float64)
            ours, rounded, dense = (((y.double() - exact).norm() / exact.norm()).item() for y in (
                cpu_native.matmul(x, cpu_native.prepare(format)), exact.to(BF16), x @ format.dequantize(BF16).T))  # fmt: skip
            assert ours < 1.02 * rounded < dense


@here
def test_bits_that_are_read():
    """What is in memory while it is multiplied: the format's bits, and no more than is said."""
    bits = lambda format: 8 * sum(t.nbytes for t in cpu_native.prepare(format).tensors if t is not None) / (format.shape[0] * format.shape[1])
    for b, most in ((1, 1.13), (2, 2.13), (3, 3.4), (4, 4.13), (6, 8.13), (8, 8.13)):
        assert bits(make(64, 1280, b, 128)) <= most + 0.01, b
    assert bits(Rounded(make(64, 1280, 4, 128), "int8")) <= 4.13
    keep = torch.arange(1280).remainder(4).lt(2).expand(64, -1)
    assert bits(Sparse24.pack(keep, Dense(inputs(64, 640, BF16)), 2, 4)) <= 9.2


@here
def test_tokens_and_threads_change_no_bit():
    """A token's result depends neither on how many threads there are nor, within one way of multiplying, on the tokens beside it."""
    before = torch.get_num_threads()
    try:
        for format in (make(100, 256, 4, 64, asym=True), Rounded(make(100, 256, 8, 256), "int8")):
            x, packed = inputs(150, 256, BF16), cpu_native.prepare(format)
            whole = cpu_native.matmul(x, packed)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert torch.equal(cpu_native.matmul(x, packed), whole)
                assert torch.equal(cpu_native.matmul(x[40:60], packed), whole[40:60])
                assert torch.equal(cpu_native.matmul(x[:1], packed)[0], cpu_native.matmul(x[:3], packed)[0])
    finally:
        torch.set_num_threads(before)


@here
def test_one_pool_of_threads():
    """A second OpenMP in the process would wait in a loop on the cores that the first one works on."""
    packed = cpu_native.prepare(make(64, 128, 4, 64))
    cpu_native.matmul(inputs(4, 128, BF16), packed)
    assert len({line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "gomp" in line}) == 1


@here
def test_emptiness_strides_and_tokens_of_zeros():
    format = make(32, 64, 3, 16, asym=True)
    packed, x = cpu_native.prepare(format), inputs(12, 128, BF16)[::2, :64]
    assert cpu_native.matmul(x[:0], packed).shape == (0, 32)
    assert torch.equal(cpu_native.matmul(x, packed), cpu_native.matmul(x.contiguous(), packed))
    rounded, x = cpu_native.prepare(Rounded(format, "int8")), x.clone()
    x[1], x[2, 3] = 0, torch.nan
    y = cpu_native.matmul(x, rounded)
    assert (y[1] == 0).all() and y[2].isnan().all() and y[[0, 3, 4, 5]].isfinite().all()


@here
def test_in_a_graph(quick):  # noqa: F811
    quick.clear()
    quick.add("cpu-native")
    weights = {"int4": How(), "W8A8": How(activations="int8"), "nf4 g64": How(), "2:4 bf16": How()}
    for name, how in weights.items():
        format = make(64, 256, 4, 64) if name == "int4" else FORMATS[name][0]((64, 256), torch.Generator().manual_seed(0))
        seen, x, cache = Rounded(format, how.activations) if how.activations else format, inputs(2, 256, BF16), {}
        packed = cpu_native.prepare(seen)
        for bias in (None, inputs(1, 64, BF16)[0]):
            torch.library.opcheck(cpu_native.op, (x, *packed.tensors, bias, packed.sizes, packed.numbers, x.dtype))
        eager = dispatch.matmul(x, format, None, cache, how)
        assert next(v[0].name for k, v in cache.items() if len(k) > 2) == "cpu-native"
        compiled = torch.compile(lambda x, f=format, c=cache, h=how: dispatch.matmul(x, f, None, c, h), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), eager)


@here
def test_says_why_not():
    W, x = make(16, 64, 4, 32), inputs(1, 64, BF16)
    trellis = FORMATS["trellis2 L12"][0]((64, 64), torch.Generator().manual_seed(0))
    for reason, format, seen in [("products are of bf16", W, x.float()), ("no fp8", Rounded(W, "fp8"), x), ("Dense has no kernel", Dense(torch.zeros(2, 2)), x),
                              ("Trellis has no kernel", trellis, x), ("not a multiple of 2", make(16, 75, 4, 25), inputs(1, 75, BF16)),
                              ("float64", Rounded(W, "int8"), x.double())]:  # fmt: skip
        assert reason in cpu_native.supports(format, seen)


def test_no_native_code_is_a_reason(monkeypatch, tmp_path):
    """And never an error: other routes are there."""
    ask = native.library.__wrapped__
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    with monkeypatch.context() as m:
        m.setenv("COMPRESS_NATIVE", "0")
        assert ask() == "COMPRESS_NATIVE=0"
    monkeypatch.setattr(native, "NEEDED", {"avx1024": "avx1024"})
    assert ask() == "this processor has no avx1024"
    monkeypatch.setattr(native, "NEEDED", {})
    with monkeypatch.context() as m:
        m.setenv("PATH", str(tmp_path))
        m.delenv("CXX", raising=False)
        assert "not on PATH" in ask()
    broken = tmp_path / "broken.cpp"
    broken.write_text("this is no C++\n")
    monkeypatch.setattr(native, "SOURCE", broken)
    if shutil.which("c++"):
        assert "does not compile broken.cpp" in ask()
        broken.write_text('extern "C" int seven() { return 7; }\n')
        assert isinstance(lib := ask(), ctypes.CDLL) and lib.seven() == 7
    monkeypatch.setattr(native, "library", lambda: "there is none")
    assert cpu_native.supports(make(16, 64, 4, 32), inputs(1, 64, BF16)) == "there is none"


@here
@pytest.mark.skipif(not shutil.which("objdump"), reason="binutils are needed to look at it")
def test_sums_stay_in_registers():
    """What decided about a factor of two: gcc once kept the sums of a tile in memory."""
    listing = subprocess.run(["objdump", "-d", "-C", "--no-show-raw-insn", native.library()._name], capture_output=True, text=True, check=True).stdout
    seen = 0
    for function in listing.split("\n\n"):
        name = function.partition("\n")[0]
        if re.search(r"<void tile<(Float|Int), 12>|<void few<(Shared<4>|Bytes<4>|Bytes<8>), [1-4]>", name):
            dots = list(re.finditer("vdpbf16ps|vpdpbusd", function))
            loop = function[dots[0].start() : dots[-1].end()]
            assert len(dots) >= 2 and not re.findall(r"zmm\d+,-?(?:0x\w+)?\(%r[bs]p\)|\(%r[bs]p\),%zmm", loop), name
            seen += 1
    assert seen >= 2 + 3 * 4
