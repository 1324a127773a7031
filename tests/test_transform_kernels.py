"""pytest tests/test_transform_kernels.py — Kronecker transforms and 8-bit activations: in the interpreter against torch, compiled for sm_90."""

import pytest
import torch

pytest.importorskip("triton")
import ptx
import sass
from test_a8_kernels import random_int

from compress import hadamard
from compress.formats import Dense, Kronecker, Transformed
from compress.kernels import activations, dispatch, reference, tiles, triton_quantize, triton_rotated, triton_transform
from compress.kernels.activations import Rounded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def gaussian(*shape, seed=0, dtype=FP32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    if tiles.INTERPRET:
        monkeypatch.setattr(*ptx.EMULATOR)


def error(y, exact):
    return ((y.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("n", [64, 96, 100, 128, 688, 1024, 4096, 14336])
def test_pair_is_the_hadamard_transform(n):
    P, Q = hadamard.pair(n)
    assert len(P) * len(Q) == n
    x = gaussian(2, n).cpu().double()
    y = (P.T @ x.view(2, len(P), len(Q)) @ Q).view(2, n)
    torch.testing.assert_close(y, hadamard.transform(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("a", "b"), [(16, 16), (12, 16), (20, 40), (None, 32), (40, 9)])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_kronecker(a, b, dtype):
    n = 96 if a is None else a * b
    left, right = None if a is None else gaussian(a, a, seed=1, dtype=dtype) / a**0.5, gaussian(b, b, seed=2, dtype=dtype) / b**0.5
    whole = torch.kron(torch.eye(n // b, device=DEVICE) if left is None else left.float(), right.float()).double()
    for m, behind in ((1, True), (3, False), (17, None)):
        d = None if behind is None else gaussian(n, seed=3)
        x, bias = gaussian(m, 2 * n, dtype=dtype)[:, :n], gaussian(n, seed=4, dtype=dtype) if m == 3 else None
        T = Kronecker(torch.eye(n // b, device=DEVICE) if left is None else left, right, torch.ones(n, device=DEVICE) if d is None else d, bool(behind))
        assert triton_transform.supports(T, x) is None or dtype == FP32
        y = triton_transform.matmul(x, triton_transform.prepared(T, dtype), bias)
        exact = x.double() if behind is None or behind else x.double() * d.double()
        exact = exact @ whole * (d.double() if behind else 1) + (0 if bias is None else bias.double())
        assert y.dtype == dtype and error(y, exact) < {FP32: 2e-3 if DEVICE == "cuda" else 1e-6, BF16: 2**-6}[dtype]


def test_columns_that_do_not_fit_the_registers_come_in_turn(monkeypatch):
    T, x = triton_transform.prepared(Kronecker.hadamard(96 * 8, 3).to(DEVICE), BF16), gaussian(2, 96 * 8, dtype=BF16)
    whole = [triton_transform.matmul(x, T), *triton_transform.quantized(x, T, "int8"), *triton_transform.quantized(x, T, "fp8")]
    monkeypatch.setattr(triton_transform, "width", lambda A, B: 8)
    parts = [triton_transform.matmul(x, T), *triton_transform.quantized(x, T, "int8"), *triton_transform.quantized(x, T, "fp8")]
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(whole, parts))


def test_ops():
    """Fake outputs have the real ones' shapes, nothing is written to but the result."""
    T, x = triton_transform.prepared(Kronecker.hadamard(96, 3).to(DEVICE), BF16), gaussian(3, 96, dtype=BF16)
    for bias, grid, dtype in ((gaussian(96), "", BF16), (None, "int8", torch.int8)):
        torch.library.opcheck(triton_transform.op, (x, T.left, T.right, T.diagonal, bias, T.behind, T.a, T.b, grid, dtype))
    torch.library.opcheck(triton_quantize.op, (x, "int8"))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_transformed_weight_runs_by_two_small_matrices(dtype):
    T, inner, x = Kronecker.hadamard(96, 3).to(DEVICE), Dense(gaussian(33, 96)), gaussian(2, 3, 96, seed=1, dtype=dtype)
    for transform in (T, T.T):
        format, bias = Transformed(inner, transform), gaussian(33, seed=2)
        torch.testing.assert_close(transform.T.dequantize(), transform.dequantize().T)
        assert error(transform.apply(x), x.double() @ transform.dequantize().double()) < {FP32: 1e-6, BF16: 2**-6}[dtype]
        y = dispatch.matmul(x, format, bias, {})
        assert y.dtype == dtype and error(y, reference.matmul(x, format, bias, torch.float64)) < {FP32: 1e-6, BF16: 2**-6}[dtype]
    assert dispatch.plain(T, dispatch.AUTO).name == "kronecker" and T.nbytes() < 0.5 * 96 * 96 * 4


def test_transform_says_why_not():
    T = Kronecker.hadamard(64).to(DEVICE)
    wide = Kronecker(torch.eye(2048, device=DEVICE), torch.eye(32, device=DEVICE), torch.ones(2**16, device=DEVICE))
    for reason, f, x in (("not Kronecker", Dense(T.dequantize()), gaussian(1, 64, dtype=BF16)), ("fit registers", wide, gaussian(1, 2**16, dtype=BF16)),
                         ("float32, not", T, gaussian(1, 64))):  # fmt: skip
        assert reason in triton_transform.supports(f, x)


def levels(y, grid):
    """fp64 codes, and scales."""
    L = triton_quantize.LARGEST[grid]
    scale = y.abs().amax(-1, keepdim=True) / L
    return y / scale.clamp(min=1e-30), scale


def near(codes, exact, grid):
    """A code is the nearest level, or the next where fp32 and fp64 see another side of the tie."""
    q = codes.double()
    assert q.abs().max() <= triton_quantize.LARGEST[grid]
    spacing = torch.exp2(exact.abs().clamp(min=2.0**-6).log2().floor() - 3) if grid == "fp8" else 1.0
    off = (q - exact).abs() > 0.5 * spacing + 2e-4 * exact.abs()
    if grid == "fp8" and DEVICE == "cpu":  # the interpreter's cast: ties up, and a mantissa that rounds up to 2 loses its carry
        off &= ((q - exact).abs() > spacing) & (exact.abs() / exact.abs().log2().floor().exp2() < 1.9375)
    assert not off.any(), (q[off], exact[off])


@pytest.mark.parametrize("grid", ["int8", "int4", "fp8"])
def test_quantize(grid):
    for m, n in ((1, 96), (3, 200), (17, 64)):
        x = gaussian(m, 2 * n, dtype=BF16)[:, :n]
        x[-1] *= m > 1  # a token of zeros
        codes, scales = triton_quantize.quantize(x, grid)
        exact, scale = levels(x.double(), grid)
        assert codes.dtype == triton_quantize.codes_like(grid) and scales.shape == (m, 1)
        torch.testing.assert_close(scales.double(), scale, rtol=1e-5, atol=0)
        near(codes, exact, grid)


@pytest.mark.parametrize("grid", ["int8", "int4", "fp8"])
def test_transform_quantizes_what_it_made(grid):
    n, m = 384, 5
    T = triton_transform.prepared(Kronecker.hadamard(n, 1).to(DEVICE), FP32)
    x = gaussian(m, n)
    codes, scales = triton_transform.quantized(x, T, grid)
    exact, scale = levels(hadamard.transform(x, hadamard.signs(n, 1, DEVICE)).double(), grid)
    torch.testing.assert_close(scales.double(), scale, rtol=1e-5 if DEVICE == "cpu" else 2e-3, atol=0)
    if DEVICE == "cpu":
        near(codes, exact, grid)


@pytest.mark.parametrize("bits, group, grid", [(8, None, "int8"), (4, 64, "int8"), (4, None, "int4")])
def test_a_rotated_weight_meets_codes_that_the_transform_made(bits, group, grid, monkeypatch):
    T, weight = Kronecker.hadamard(192, 3).to(DEVICE), random_int(70, 192, bits, group)
    format, x, bias = Transformed(weight, T), gaussian(5, 192, dtype=BF16), gaussian(70, seed=2)
    asked = Rounded(format, grid)
    assert triton_rotated.supports(asked, x) is None
    assert "rounded activations" in triton_rotated.supports(format, x) and "not Kronecker" in triton_rotated.supports(
        Rounded(Transformed(weight, Dense(T.dequantize())), grid), x)  # fmt: skip
    assert "Dense" in triton_rotated.supports(Rounded(Transformed(Dense(weight.dequantize()), T), grid), x)
    prepared = triton_rotated.prepare(asked, BF16)
    codes, scales = triton_transform.quantized(x, prepared.transform, grid)
    exact = codes.double() * scales.double() @ weight.dequantize(torch.float64).T + bias.double()
    assert error(triton_rotated.matmul(x, prepared, bias), exact) < 2**-8
    most, slow = 0.25 if grid == "int4" else 0.02, reference.matmul(x, asked, bias, torch.float64)  # bf16 between the two factors moves some codes by one
    assert error(exact, slow) < most
    monkeypatch.setitem(dispatch.KERNELS, DEVICE, {"triton-rotated": "triton_rotated"})
    monkeypatch.setattr(dispatch, "SMALL", 0)
    for fast in ("triton-rotated", "parts"):
        monkeypatch.setattr(dispatch, "measured", lambda format, x, options, *more, fast=fast: {r.name: 1.0 if r.name == fast else 9.0 for r in options})
        how, cache = dispatch.How(activations=grid), {}
        assert error(dispatch.matmul(x, format, bias, cache, how), slow) < most
        assert [route.name for key, (route, _) in ((k, v) for k, v in cache.items() if len(k) == 4)] == [fast]


def test_ties_go_where_activations_on_cpu_go():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 3.5, 0.0]], device=DEVICE)
    codes, scales = triton_quantize.quantize(x, "int8")
    assert scales.item() == 1 and codes.tolist() == activations.quantize(x, "int8")[0].tolist() == [[127, 0, 2, 2, 0, -2, 4, 0]]


# ---- what ptxas makes of them


def test_compile_without_spills():
    def kronecker(A, B, a, grid, signs=2):
        types = {"x": "*bf16", "left": "*bf16", "right": "*bf16", "diagonal": "*fp32", "bias": "*bf16", "y": "*i8" if grid else "*bf16", "scales": "*fp32"}
        return sass.Spec("compress.kernels.triton_transform", "_kronecker", types | {"stride": "i32", "a": "i32", "b": "i32"},
                         {"LEFT": True, "SIGNS": signs, "BIAS": False, "LARGEST": 127.0 if grid else 0, "FP8": False, "EXACT": False, "A": A, "B": B,
                          "CHUNK": triton_transform.CHUNK, "WIDTH": triton_transform.width(A, B)},
                         num_warps=triton_transform.launch(A, B), aligned=("stride", "a", "b"))  # fmt: skip

    def quantize(block, grid):
        types = {"x": "*bf16", "codes": "*fp8e4nv" if grid == "fp8" else "*i8", "scales": "*fp32", "n": "i32", "stride": "i32"}
        return sass.Spec("compress.kernels.triton_quantize", "_quantize", types,
                         {"LARGEST": triton_quantize.LARGEST[grid], "FP8": grid == "fp8", "BLOCK": block},
                         num_warps=triton_quantize.launch(block), aligned=("n", "stride"))  # fmt: skip

    kernels = sass.compile_all([kronecker(128, 128, 112, True), kronecker(256, 128, 224, False), kronecker(256, 128, 224, True), quantize(16384, "fp8")])
    for kernel in kernels:
        print(kernel.total, kernel.registers, kernel.stack, kernel.shared, kernel.mix.most_common(8))
    assert not any(kernel.stack for kernel in kernels)
    for kernel in (kernels[0], *kernels[2:]):  # rounded as on a CPU
        assert kernel.ptx.count("div.rn.f32") == 2 and "div.full" not in kernel.ptx
    assert all(kernel.count(*sass.TENSOR_CORE, "HMMA") for kernel in kernels[:3])
