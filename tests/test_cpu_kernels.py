"""python -m pytest tests/test_cpu_kernels.py: rounded activations, oneDNN's integers, horizontal fusion, ops in a compiled graph, tables that ship."""

import json

import pytest
import torch
from test_kernels import BF16, FP16, FP32, error, inputs, make

import compress
from compress.errors import CompressError
from compress.formats import Columns, Dense, FloatBlock, IntGroup, Lut, Product, Scaled, Sum, Transformed, build, join_rows, split_rows
from compress.kernels import activations, cpu_int8, cpu_int_mm, dispatch, reference, tune
from compress.kernels.activations import Rounded
from compress.kernels.dispatch import How

ONCE = {BF16: 2**-8, FP16: 2**-11, FP32: 2e-6}  # one rounding of the output


# ---------------------------------------------------------------- rounded activations


@pytest.mark.parametrize("grid, L", activations.LARGEST.items())
def test_codes_are_the_nearest_of_their_grid(grid, L):
    x = inputs(5, 64, BF16)
    x[2] = 0
    q, s = activations.quantize(x, grid)
    assert torch.equal(s[:, 0], x.float().abs().amax(1) / L) and torch.equal(activations.dequantize(q, s, FP32)[2], torch.zeros(64))
    q, steps = q.float()[s[:, 0] > 0], (x.double() / s.double())[s[:, 0] > 0]
    assert ((q - steps).abs() <= (0.50002 if grid != "fp8" else steps.abs() * 2**-4 + 2**-10)).all() and q.abs().max() == L


def test_rounding_reaches_quantized_leaves_only():
    """Behind a transform and a diagonal, not on the factors of a correction: written out here step by step."""
    round8 = lambda x: activations.dequantize(*activations.quantize(x, "int8"), torch.float64)
    W, low = make(32, 64, 4, 32), Product((Dense(inputs(32, 4)), Dense(inputs(4, 64, seed=3))))
    T, t, x = Dense(torch.linalg.qr(inputs(64, 64, seed=4))[0]), inputs(1, 64, seed=5)[0], inputs(3, 64).double()
    D, L = W.dequantize().double(), low.dequantize().double()
    mask = torch.arange(64) % 2 == 0
    left = IntGroup.pack(W.unpack()[:, mask], W.scales, None, 4)
    cases = [(W, round8(x) @ D.T), (Sum((W, low)), round8(x) @ D.T + x @ L.T), (Transformed(W, T), round8(x @ T.weight.double()) @ D.T),
             (Scaled(W, t), round8(x * t.double()) @ D.T), (low, x @ L.T),
             (Columns.pack(mask, left, Dense(W.dequantize()[:, ~mask])), round8(x[:, mask]) @ left.dequantize().double().T + x[:, ~mask] @ D[:, ~mask].T)]
    for format, exact in cases:
        assert error(reference.matmul(x, format, dtype=torch.float64, activations="int8"), exact) < 1e-6
        for how in (How("dense", activations="int8"), How(activations="int8"), How(memory="bounded", activations="int8")):
            assert error(dispatch.matmul(x.float(), format, None, {}, how), exact) < 3e-6, (format.describe(), how)


CODES = [(bits, 2**bits) for bits in range(1, 9)] + [(2, 3)]


@pytest.mark.parametrize("kernel", [cpu_int8, cpu_int_mm], ids=lambda k: k.__name__.rpartition(".")[2])
def test_integers_meet_integers_exactly(kernel):
    for (bits, levels), asym in ((code, asym) for code in CODES for asym in (False, True)):
        for i, dtype in enumerate((BF16, FP16, FP32)):
            format = Rounded(make(37, 80, bits, 80, asym, levels), "int8" if i else "int4")
            if bits == 8 and asym:
                assert "fit int8" in kernel.supports(format, inputs(1, 80))
                continue
            assert kernel.supports(format, inputs(1, 80)) is None
            packed = kernel.prepare(format, dtype)
            for m in (0, 1, 3):
                x, bias = inputs(m, 80, dtype), inputs(1, 37, dtype)[0]
                x[1:2] = 0
                for b in (None, bias):
                    y, exact = kernel.matmul(x, packed, b), reference.matmul(x, format, b, torch.float64)
                    assert y.dtype == dtype and y.shape == exact.shape and (not m or error(y, exact) < ONCE[dtype]), (bits, asym, dtype, m)


@pytest.mark.parametrize("kernel", [cpu_int8, cpu_int_mm], ids=lambda k: k.__name__.rpartition(".")[2])
def test_integers_say_why_not(kernel):
    x, W = inputs(1, 64, BF16), make(16, 64, 8, 64)
    for reason, format in [("not rounded", W), ("no fp8", Rounded(W, "fp8")), ("one scale a row", Rounded(make(16, 64, 8, 32), "int8")),
                           ("not IntGroup", Rounded(Dense(torch.zeros(2, 64)), "int8"))]:  # fmt: skip
        assert reason in kernel.supports(format, x)


def test_a_missing_op_is_a_reason(monkeypatch):
    def missing(*args):
        raise RuntimeError("no such operator")

    cpu_int8.unavailable.cache_clear()
    monkeypatch.setattr(cpu_int8, "_linear", missing)
    try:
        assert "no such operator" in cpu_int8.supports(Rounded(make(16, 64, 8, 64), "int8"), inputs(1, 64))
    finally:
        cpu_int8.unavailable.cache_clear()


# ---------------------------------------------------------------- ops and compiled graphs


def test_opcheck():
    format, x = Rounded(make(16, 64, 8, 64), "int8"), inputs(2, 64, BF16)
    a, b = cpu_int8.prepare(format), cpu_int_mm.prepare(format)
    for bias in (None, inputs(1, 16, BF16)[0]):
        torch.library.opcheck(cpu_int_mm.op, (x, b.weight, b.scales, b.levels, bias))
        torch.library.opcheck(cpu_int8.op, (x, a.weight, a.scales, a.zeros, a.levels, bias),
                              test_utils=("test_autograd_registration", "test_faketensor"))  # the others ask oneDNN's layout for its storage


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Nothing is timed: the kernel that `fast` names wins wherever it runs."""
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    fast = {"cpu-pack", "cpu-int-mm"}
    monkeypatch.setattr(tune, "race", lambda runs, twins, device, seconds=0.2: {name: 1.0 if name in fast else 100.0 for name in runs})
    monkeypatch.setattr(dispatch, "SMALL", 0)
    return fast


@pytest.mark.parametrize("format, how, winner", [
    (make(64, 128, 4, 64), How(), "cpu-pack"), (make(64, 128, 8, 128), How(activations="int8"), "cpu-int8"),
    (make(64, 128, 8, 128), How(activations="int8"), "cpu-int-mm"), (make(64, 128, 4, 64), How(activations="int8"), "rounded"),
    (Transformed(Sum((make(64, 128, 4, 128), Product((Dense(inputs(64, 4)), Dense(inputs(4, 128)))))), Dense(torch.eye(128))), How(activations="int8"), "parts"),
], ids=["pack", "qlinear", "int_mm", "rounded", "nested"])  # fmt: skip
def test_a_trace_takes_the_routes_that_were_chosen(quick, format, how, winner):
    quick.clear()
    quick.add(winner)
    cache, x = {}, inputs(2, 128, BF16)
    eager = dispatch.matmul(x, format, None, cache, how)
    assert {v[0].name for k, v in cache.items() if len(k) > 2} == {winner}
    before = set(cache)
    compiled = torch.compile(lambda x: dispatch.matmul(x, format, None, cache, how), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), eager) and set(cache) == before
