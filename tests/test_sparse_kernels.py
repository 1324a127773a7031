"""pytest tests/test_sparse_kernels.py — 2:4 weights for a decoding step: in the interpreter, PTX emulated, compiled for sm_90."""

import pytest
import torch

pytest.importorskip("triton")
import ptx
import sass
from test_lut_kernels import one_row

from compress.formats import Dense, IntGroup, Masked, Sparse24
from compress.kernels import cusparselt, dispatch, reference, tiles, triton_sparse24

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP16 = torch.bfloat16, torch.float16
ROUNDING = {BF16: 2**-8, FP16: 2**-11}


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    if tiles.INTERPRET:
        monkeypatch.setattr(*ptx.EMULATOR)


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def mask(N, K, n=2, m=4, seed=0):
    """n of every m, all patterns."""
    score = torch.rand(N, K // m, m, generator=torch.Generator().manual_seed(seed))
    return torch.zeros(N, K // m, m, dtype=torch.bool).scatter_(2, score.topk(n, 2).indices, True).view(N, K).to(DEVICE)


def integers(N, kept, group, asym=False, bits=4):
    g = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 2**bits, (N, kept), generator=g, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (N, kept // group), generator=g, dtype=torch.uint8) if asym else None
    return IntGroup.pack(codes, (torch.rand(N, kept // group, generator=g) + 0.1).to(BF16), zeros, bits).to(DEVICE)


@pytest.mark.parametrize("values", ["bf16", "fp16", "int4", "int4 asym", "int4 g128", "int4 g256 asym"])
def test_sparse24(values, monkeypatch):
    for i, (N, K, M) in enumerate([(70, 332, 3), (33, 132, 17), (64, 512, 1), (130, 1028, 34), (120, 512, 2)]):
        monkeypatch.setattr(triton_sparse24, "LARGE", 0 if N == 120 else 2**25)  # 128 rows a program
        dtype = FP16 if values == "fp16" else BF16
        if "g" in values:
            K = -(-K // 512) * 512
        group = 128 if "g128" in values else 256 if "g256" in values else K // 2
        kept = integers(N, K // 2, group, "asym" in values) if "int4" in values else Dense(gaussian(N, K // 2, dtype=dtype))
        format = Sparse24.pack(mask(N, K), kept, 2, 4)
        x, bias = gaussian(M, K, seed=1, dtype=dtype), gaussian(N, seed=2, dtype=dtype) if i % 2 else None
        assert triton_sparse24.supports(format, x) is None
        prepared = triton_sparse24.prepare(format, dtype)
        y, exact = triton_sparse24.matmul(x, prepared, bias), reference.matmul(x, format, bias, torch.float64)
        assert y.dtype == dtype and ((y.double() - exact).abs().max() / exact.abs().max()).item() < ROUNDING[dtype], (N, K, M)
        assert torch.equal(y, triton_sparse24.matmul(x, prepared, bias)) and not tiles.workspace(x)[1].any()


def test_ops():
    """Fake outputs have the real ones' shapes, nothing is written to but the result."""
    for kept in (Dense(gaussian(33, 128, dtype=BF16)), integers(33, 128, 128, True)):
        p = triton_sparse24.prepare(Sparse24.pack(mask(33, 256), kept, 2, 4), BF16)
        torch.library.opcheck(triton_sparse24.op, (gaussian(3, 256, dtype=BF16), p.words, p.scales, p.zeros, gaussian(33, dtype=BF16), *p.shape))


def test_half_the_bytes():
    for kept, bits in ((Dense(gaussian(64, 256, dtype=BF16)), 9), (integers(64, 256, 128), 3)):
        assert triton_sparse24.prepare(Sparse24.pack(mask(64, 512), kept, 2, 4), BF16).words.nbytes * 8 == bits * 64 * 512


def test_why_not():
    x = gaussian(1, 64, dtype=BF16)
    dense = lambda dtype=BF16, m=4: Sparse24.pack(mask(8, 64, 2, m), Dense(gaussian(8, 128 // m, dtype=dtype)), 2, m)
    ints = lambda **kwargs: Sparse24.pack(mask(8, 64), integers(8, 32, **kwargs), 2, 4)
    for reason, f in (("not Sparse24", Dense(x)), ("not 2:4", dense(m=8)), ("not converted", dense(FP16)), ("not 16 bits or int4", ints(group=32, bits=3)),
                      ("multiple of 128", ints(group=16))):  # fmt: skip
        assert reason in triton_sparse24.supports(f, x)
    for reason, f in (("not Sparse24", Dense(x)), ("not 2:4", dense(m=8))) + ((("not on CUDA", dense()),) if DEVICE == "cpu" else ()):
        assert reason in cusparselt.supports(f, x)


def test_masks_without_a_pattern_run_dense(monkeypatch):
    monkeypatch.delitem(dispatch.KERNELS["cpu"], "cpu-native")  # which not every processor has, and no GPU
    keep = torch.rand(512, 512, generator=torch.Generator().manual_seed(0)) < 0.5
    format = Masked.pack(keep.to(DEVICE), Dense(gaussian(1, int(keep.sum()))))
    assert [route.name for route in dispatch.routes(format, gaussian(4, 512, dtype=BF16))] == ["dense-cached"]


# ---- what ptxas makes of them


def spec(int4, m):
    types = {"x": "*bf16", "w": "*i32", "bias": "*bf16", "y": "*bf16", "partial": "*fp32", "arrived": "*i32"} | dict.fromkeys(
        ("M", "N", "K", "stride_x", "rows"), "i32") | ({"scales": "*bf16", "zeros": "*i32"} if int4 else {})  # fmt: skip
    constants = {"INT4": int4, "SCALED": int4, "PER_TILE": int4, "EVEN": 2 if m == 32 else 1, "BIAS": True, "SPLIT": 4, "EXACT": False}
    constants |= triton_sparse24.launch(m, 8192, 8192) | ({} if int4 else {"scales": None, "zeros": None})
    return one_row(sass.Spec("compress.kernels.triton_sparse24", "_matmul", types, constants, aligned=("N", "K", "stride_x", "rows")), m)


def test_compiles_without_spills_to_few_instructions():
    cases = [(False, 1, 2.2), (True, 1, 2.9), (True, 32, 3.0)]
    for (int4, m, limit), kernel in zip(cases, sass.compile_all([spec(int4, m) for int4, m, _ in cases]), strict=True):
        per_weight = kernel.per_weight(triton_sparse24.COLUMNS * triton_sparse24.launch(m, 8192, 8192)["BN"] / 128)
        print("2:4", "int4" if int4 else "bf16", m, per_weight, kernel.registers, kernel.shared, kernel.mix.most_common(12))
        assert kernel.stack == 0 and kernel.count(*sass.TENSOR_CORE) and not kernel.count(*sass.CONVERSIONS, "LDG")  # what is not loaded ahead is waited for
        assert per_weight < limit, (int4, m)
