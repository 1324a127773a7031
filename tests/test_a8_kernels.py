"""pytest tests/test_a8_kernels.py — W8A8, W4A8 and FP8 in the interpreter against the same arithmetic in fp64, compiled for sm_90."""

import pytest
import torch

pytest.importorskip("triton")
import ptx
import sass
from test_lut_kernels import one_row

from compress.formats import Dense, FloatBlock, IntGroup
from compress.kernels import cublas_a8, tiles, triton_a8, triton_quantize
from compress.kernels.activations import Rounded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    if tiles.INTERPRET:
        monkeypatch.setattr(*ptx.EMULATOR)


def gaussian(*shape, seed=0, dtype=FP32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def random_int(N, K, bits, group=None, asym=False, levels=None, seed=0):
    g, levels, group = torch.Generator().manual_seed(seed), levels or 2**bits, group or K
    codes = torch.randint(0, levels, (N, K), generator=g, dtype=torch.uint8)
    zeros = torch.randint(0, levels, (N, K // group), generator=g, dtype=torch.uint8) if asym else None
    return IntGroup.pack(codes, (torch.rand(N, K // group, generator=g) + 0.1).to(BF16), zeros, bits, levels).to(DEVICE)


def random_fp8(N, K, seed=0):
    return FloatBlock(gaussian(N, K, seed=seed).mul(40).to(torch.float8_e4m3fn).view(torch.uint8), gaussian(N, 1, seed=seed + 1).abs() + 0.1, None, "fp8")


FORMATS = {
    "int8": (lambda N, K: random_int(N, K, 8), "int8"), "int8 token4": (lambda N, K: random_int(N, K, 8), "int4"),
    "int6 asym": (lambda N, K: random_int(N, K, 6, asym=True), "int8"), "ternary": (lambda N, K: random_int(N, K, 2, levels=3), "int8"),
    "binary": (lambda N, K: random_int(N, K, 1), "int8"), "int4": (lambda N, K: random_int(N, K, 4), "int8"), "fp8": (random_fp8, "fp8"),
    "int4 g64": (lambda N, K: random_int(N, -(-K // 64) * 64, 4, 64), "int8"), "int4 g128": (lambda N, K: random_int(N, -(-K // 128) * 128, 4, 128), "int4"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_product_of_bytes(name):
    make, grid = FORMATS[name]
    for i, (N, K, M) in enumerate([(70, 330, 3), (33, 129, 17), (130, 64, 65), (64, 256, 1)]):
        format = make(N, K)
        x, bias = gaussian(M, format.shape[1], seed=i, dtype=(FP32, BF16)[i % 2]), gaussian(N, seed=9) if i % 2 else None
        rounded = Rounded(format, grid)
        assert triton_a8.supports(rounded, x) is None
        prepared = triton_a8.prepare(rounded, x.dtype)
        codes, scales = triton_quantize.quantize(x, grid)
        exact = codes.double() * scales.double() @ format.dequantize(torch.float64).T + (0 if bias is None else bias.double())
        y = triton_a8.matmul(x, prepared, bias)
        assert y.dtype == x.dtype and ((y.double() - exact).abs().max() / exact.abs().max()).item() < (2e-6, 2**-8)[i % 2], (N, K, M)
        assert torch.equal(y, triton_a8.matmul(x, prepared, bias)) and not tiles.workspace(x)[1].any()


def test_a_compiled_graph_rounds_in_plain_arithmetic():
    """Which Inductor fuses with a norm or a gate; the product is one op, and the codes are the kernel's."""
    prepared, x, seen = triton_a8.prepare(Rounded(random_int(48, 64, 8), "int8"), BF16), gaussian(3, 64, dtype=BF16), []

    def backend(graph, example):
        seen.extend(str(node.target) for node in graph.graph.nodes if "compress" in str(node.target))
        return graph.forward

    y = torch.compile(lambda x: triton_a8.matmul(x, prepared), fullgraph=True, backend=backend)(x)
    assert seen == ["compress.a8_matmul.default"] and torch.equal(y, triton_a8.matmul(x, prepared))


def test_ops():
    """Fake outputs have the real ones' shapes, nothing is written to but the result."""
    for name in ("int8", "int4 g64"):
        format, x = FORMATS[name][0](33, 128), gaussian(3, 128, dtype=BF16)
        p, (codes, scales) = triton_a8.prepare(Rounded(format, "int8"), BF16), triton_quantize.quantize(x, "int8")
        torch.library.opcheck(triton_a8.op, (codes, scales, p.weight, p.scales, gaussian(33), p.repeat, *p.shape, BF16))


def test_four_bits_stay_four():
    assert triton_a8.prepare(Rounded(random_int(128, 512, 4, 128), "int8"), BF16).weight.nbytes == 128 * 512 // 2


def test_why_not():
    x, fp8 = gaussian(1, 128, dtype=BF16), random_fp8(16, 128)
    square = FloatBlock(fp8.codes.repeat(9, 2), torch.ones(2, 2, device=DEVICE), None, "fp8")
    for reason, f in (("not rounded", random_int(8, 128, 8)), ("Dense", Rounded(Dense(x), "int8")), ("share no", Rounded(fp8, "int8")),
                      ("in-loop", Rounded(random_int(8, 128, 8, 64), "int8")),
                      ("share no", Rounded(random_int(8, 128, 8), "fp8")), ("not int8", Rounded(random_int(8, 128, 8, asym=True), "int8")),
                      ("128×128", Rounded(square, "fp8"))):  # fmt: skip
        assert reason in triton_a8.supports(f, x)
    for reason, f in (("not rounded", fp8), ("both are to be", Rounded(fp8, "int8")), ("one scale a row", Rounded(random_int(16, 128, 4, 64), "int8")),
                      ("not int8", Rounded(random_int(16, 128, 8, asym=True), "int8")), ("rows" if DEVICE == "cuda" else "not on CUDA", Rounded(fp8, "fp8"))):
        assert reason in cublas_a8.supports(f, x)


# ---- what ptxas makes of them


POINTERS = {"x": "*i8", "sx": "*fp32", "sw": "*fp32", "bias": "*bf16", "y": "*bf16", "partial": "*fp32", "arrived": "*i32"}


def bytes_spec(m, fp8):
    constants = {"BIAS": True, "SPLIT": 4 if m <= 64 else 1, "FP8": fp8, "EXACT": False, "BK": triton_a8.BK} | triton_a8.launch(m)
    types = POINTERS | {"w": "*i8"} | dict.fromkeys(("M", "N", "K", "padded"), "i32")
    return one_row(sass.Spec("compress.kernels.triton_a8", "_bytes", types, constants, aligned=("N", "K", "padded"),
                             num_warps=4 if m <= 64 else 8, num_stages=4), m)  # fmt: skip


def nibbles_spec(m, grouped=True):
    constants = {"BIAS": True, "SPLIT": 4 if m <= 64 else 1, "EXACT": False, "REPEAT": 2, "GROUPED": grouped} | triton_a8.launch(m)
    types = POINTERS | {"w": "*i32"} | dict.fromkeys(("M", "N", "K", "groups", "rows"), "i32")
    return one_row(sass.Spec("compress.kernels.triton_a8", "_nibbles", types, constants, aligned=("N", "K", "rows"),
                             num_warps=4 if m <= 64 else 8, num_stages=4), m)  # fmt: skip


def test_compile_without_spills_to_few_instructions():
    cases = [("W8A8", 1, bytes_spec(1, False), triton_a8.BK * 128 / 128, 0.9, "IGMMA"),
             ("W8A8", 2048, bytes_spec(2048, False), triton_a8.BK * 128 / 256, 1.8, "IGMMA"),
             ("FP8", 16, bytes_spec(16, True), triton_a8.BK * 128 / 128, 1.0, "QGMMA"),
             ("FP8", 2048, bytes_spec(2048, True), triton_a8.BK * 128 / 256, 2.8, "QGMMA"), ("W4A8", 1, nibbles_spec(1), 128 * 128 / 128, 1.5, "IGMMA"),
             ("W4A8 channel", 1, nibbles_spec(1, False), 128 * 128 / 128, 1.25, "IGMMA"), ("W4A8", 64, nibbles_spec(64), 128 * 128 / 128, 2.6, "IGMMA"),
             ("W4A8", 2048, nibbles_spec(2048), 128 * 128 / 256, 4.4, "IGMMA")]  # fmt: skip
    for (name, m, _, weights, limit, mma), kernel in zip(cases, sass.compile_all([case[2] for case in cases]), strict=True):
        print(name, m, kernel.per_weight(weights), kernel.registers, kernel.shared, kernel.mix.most_common(12))
        assert kernel.stack == 0 and kernel.count(mma), (name, m)
        assert kernel.per_weight(weights) < limit, (name, m)
        assert name != "FP8" or kernel.count("FADD") >= triton_a8.launch(m)["BM"] // (1 if m <= 64 else 2), "sums of a step are added in fp32"
