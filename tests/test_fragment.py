"""python -m pytest tests/test_fragment.py — the fragment kernels in triton's interpreter, their PTX emulated, and compiled for sm_90 unrun."""

import functools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are decorated, so before the import below
pytest.importorskip("triton")

import sass

from compress.formats import Dense, FloatBlock, Format, IntGroup, Lut, Product, Sum
from compress.kernels import fragment, prefill, reference, tiles, unpack
from compress.kernels import fragment_layout as layout
from compress.kernels.fragment import Config
from compress.kernels.gated import Gated

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = torch.bfloat16
E4M3 = torch.float8_e4m3fn
rand = functools.partial(torch.randint, dtype=torch.uint8)


def ints(out, n, bits, group, zeros=None, levels=None, scales=BF16, seed=0) -> IntGroup:
    g, levels, shape = torch.Generator().manual_seed(seed), levels or 2**bits, (out, n // group)
    z = {"int": rand(0, levels, shape, generator=g), "float": levels * torch.rand(shape, generator=g), None: None}[zeros]
    return IntGroup.pack(rand(0, levels, (out, n), generator=g), (torch.rand(shape, generator=g) + 0.1).to(scales), z, bits, levels)


def table(rows=1, entries=16) -> Tensor:
    return torch.randn(rows, entries, generator=torch.Generator().manual_seed(5)).to(BF16)


def fp8(out, n, *scales) -> FloatBlock:
    g = torch.Generator().manual_seed(6)
    return FloatBlock(torch.randn(out, n, generator=g).to(E4M3).view(torch.uint8), torch.rand(*scales, generator=g) + 0.1, None, "fp8")


def fp4(out, n, name) -> FloatBlock:
    g, block = torch.Generator().manual_seed(7), {"mxfp4": 32, "nvfp4": 16}[name]
    low, high, divisor = (100, 130, None) if name == "mxfp4" else (0, 126, torch.tensor([3.0]))  # E4M3's zero and its subnormals too
    return FloatBlock(rand(0, 256, (out, n // 2), generator=g), rand(low, high, (out, n // block), generator=g), divisor, name)


def lut(out, n, entries, groups) -> Lut:
    g = torch.Generator().manual_seed(8)
    scales = torch.rand(out, groups, generator=g) + 0.1 if groups else None
    return Lut.pack(rand(0, entries, (out, n), generator=g), table(1 if groups else out, entries), scales, "nf4")


FORMATS: dict[str, Format] = {  # odd out, odd in, in off the tile, groups of less than a tile, of several and of all
    "int8 channel": ints(37, 131, 8, 131), "int8 asym": ints(33, 128, 8, 64, "int"), "int7": ints(9, 64, 7, 64), "int6 asym": ints(17, 67, 6, 67, "int"),
    "int5 fp32": ints(33, 192, 5, 64, scales=torch.float32), "int4": ints(70, 256, 4, 128), "int4 channel": ints(37, 131, 4, 131),
    "int4 asym": ints(40, 320, 4, 64, "int"), "int4 float zero": ints(33, 320, 4, 64, "float"), "int4 channel float zero": ints(5, 75, 4, 75, "float"),
    "int4 g192 fp16": ints(20, 384, 4, 192, scales=torch.float16), "int4 g32": ints(37, 96, 4, 32), "int4 g16 asym": ints(37, 80, 4, 16, "int"),
    "int3": ints(37, 320, 3, 64), "int3 asym": ints(37, 384, 3, 128, "int"), "int3 g48": ints(17, 96, 3, 48), "int2": ints(37, 128, 2, 128),
    "int2 asym": ints(33, 320, 2, 64, "int"), "ternary": ints(37, 320, 2, 64, levels=3), "ternary asym": ints(9, 128, 2, 64, "int", 3),
    "binary": ints(37, 384, 1, 128), "binary asym": ints(9, 128, 1, 64, "int"), "binary float zero": ints(9, 128, 1, 64, "float"),
    "nf4": lut(37, 192, 16, 3), "lut3 row": lut(37, 75, 8, 0), "fp8 channel": fp8(37, 75, 37, 1), "fp8 tensor": fp8(37, 75, 1, 1),
    "fp8 square": fp8(140, 260, 2, 3), "mxfp4": fp4(37, 160, "mxfp4"), "nvfp4": fp4(37, 144, "nvfp4"),
}  # fmt: skip
ROUNDED = {name for name in FORMATS if "float zero" in name or name == "nvfp4"}  # where an fp32 product or sum is rounded on another way


def inputs(m, n, seed=1, device=DEVICE):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed)).to(BF16).to(device)


def error(y, exact):
    return ((y.double() - exact).abs().max() / exact.abs().max()).item()


def bound(m, format) -> float:
    """One rounding of y; where scales multiply the weight, one of each weight too."""
    return 2**-8 if m <= 64 else 2**-7


@pytest.fixture
def splits(monkeypatch):
    """Every weight of these tests is too narrow for the rule to split."""

    rule = fragment.rule
    monkeypatch.setattr(fragment, "rule", lambda p, m: replace(rule(p, m), split=2 if p.shape[1] > layout.COLUMNS else 1, step=2))


@pytest.fixture
def ptx(monkeypatch):
    """Inline PTX, emulated where there is no GPU."""
    if DEVICE == "cpu":
        import ptx

        monkeypatch.setattr(*ptx.EMULATOR)
        monkeypatch.setattr(unpack, "ASM", True)


# ---------------------------------------------------------------- the layout


@pytest.mark.parametrize("kind", layout.KINDS)
def test_repacking_is_exact_and_dense(kind):
    k = layout.KINDS[kind]
    bits = [place for pair in layout.places(kind) for half in pair for place in half]
    assert sorted(bits) == [(plane, bit) for plane in range(k.planes) for bit in range(32)]  # every bit of every word, once
    codes = rand(0, 2**k.bits, (37, 300), generator=torch.Generator().manual_seed(0))
    words = layout.pack(codes, kind)
    assert words.dtype == torch.int32 and words.numel() * 32 == 64 * 512 * k.bits
    assert torch.equal(layout.unpack(words, kind), F.pad(codes, (0, 212, 0, 27)))


@pytest.mark.parametrize("name", FORMATS)
def test_the_kernel_holds_the_dequantized_weight(name, splits, ptx):
    """Rows of the identity come out as the weight rounded once, through either kernel."""
    format = FORMATS[name].to(DEVICE)
    (out, n), p, W = format.shape, fragment.prepare(format), format.dequantize(BF16)
    eye = torch.eye(n, dtype=BF16, device=DEVICE)[n // 2 - 8 : n // 2 + 24]
    y = fragment.matmul(eye, p).T
    dense = torch.full((out, n + 3), torch.nan, dtype=BF16, device=DEVICE)
    prefill.dequantize(p, 0, out, dense)
    assert dense[:, n:].isnan().all()
    if name in ROUNDED:
        assert error(y, W.double()[:, n // 2 - 8 : n // 2 + 24]) < 2**-8 and error(dense[:, :n], W.double()) < 2**-8
    else:
        assert torch.equal(y, W[:, n // 2 - 8 : n // 2 + 24]) and torch.equal(dense[:, :n], W)


# ---------------------------------------------------------------- the product


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_and_number_of_rows(name, splits):
    format = FORMATS[name].to(DEVICE)
    (out, n), p = format.shape, fragment.prepare(format)
    bias = inputs(1, out, seed=2)[0]
    for m in (1, 2, 3, 16, 17, 64, 65) if name in ("int4 asym", "int3", "nvfp4") else (3, 16, 65):
        x = inputs(m, n)
        assert fragment.supports(format, x) is None
        y = fragment.matmul(x, p, bias if m % 2 else None)
        assert y.dtype == BF16 and y.shape == (m, out)
        assert error(y, reference.matmul(x, format, bias if m % 2 else None, torch.float64)) < bound(m, format), m


@pytest.mark.skipif(DEVICE == "cuda", reason="the GPU has no other path than PTX")
@pytest.mark.parametrize("name", FORMATS)
def test_inline_ptx_is_the_written_out_arithmetic(name, splits, monkeypatch):
    import ptx

    format = FORMATS[name]
    p, xs = fragment.prepare(format), [inputs(m, format.shape[1]) for m in (3, 65)]
    pure = [fragment.matmul(x, p) for x in xs]
    monkeypatch.setattr(*ptx.EMULATOR)
    monkeypatch.setattr(unpack, "ASM", True)
    assert all(torch.equal(fragment.matmul(x, p), y) for x, y in zip(xs, pure))


def low_rank(out, n, rank) -> Product:
    return Product((Dense(inputs(out, rank, seed=3, device="cpu").float() / 8), Dense(inputs(rank, n, seed=4, device="cpu").float() / 8)))


@pytest.mark.parametrize("m", [3, 65, 300])
def test_low_rank_term(m, splits):
    format = Sum((ints(37, 131, 4, 131), low_rank(37, 131, 5))).to(DEVICE)
    x, bias, p = inputs(m, 131), inputs(1, 37)[0], fragment.prepare(format)
    run = fragment.matmul if m < 256 else prefill.matmul
    assert error(run(x, p, bias), reference.matmul(x, format, bias, torch.float64)) < 2**-7  # u = A x is rounded too


@pytest.mark.parametrize("name, out", [("int4", 64), ("lut", 38), ("int8", 74)])
@pytest.mark.parametrize("m", [2, 65])
def test_gate_and_up_in_one_weight(name, out, m, splits):
    leaf = {"int4": ints(out, 192, 4, 64, "int"), "lut": lut(out, 75, 8, 0), "int8": ints(out, 75, 8, 75)}[name]
    format = Sum((leaf, low_rank(*leaf.shape, 4))).to(DEVICE)
    x, bias, p = inputs(m, leaf.shape[1]) / 8, inputs(1, out)[0], fragment.prepare(Gated(format))
    gate, up = reference.matmul(x, format, bias, torch.float64).chunk(2, -1)
    for y in (fragment.matmul(x, p, bias), prefill.matmul(x, p, bias)):
        assert y.shape == (m, out // 2) and error(y, F.silu(gate) * up) < 2**-6


def test_split_sums_are_added_in_one_order():
    format = ints(70, 512, 4, 128)
    p, x = fragment.prepare(format.to(DEVICE)), inputs(3, 512)
    ys = []
    for split in (1, 2, 4):
        config = Config(64, 16, split, 2, 3)
        ys.append(fragment.matmul(x, p, config=config))
        assert all(torch.equal(fragment.matmul(x, p, config=config), ys[-1]) for _ in range(3))
        assert not tiles.workspace(x)[1].any()  # counters are left as they were found
    assert error(ys[1], ys[0].double()) < 2**-8 and error(ys[2], ys[0].double()) < 2**-8


@pytest.mark.parametrize("name", ["int4 asym", "int3", "nf4", "nvfp4", "int4 float zero"])
def test_prefill_by_chunks_is_the_dense_product(name, monkeypatch):
    format = FORMATS[name].to(DEVICE)
    (out, n), p = format.shape, fragment.prepare(format)
    monkeypatch.setattr(prefill, "CHUNK", 64 * n)  # one block of rows at a time
    x, bias = inputs(300, n), inputs(1, out)[0]
    assert error(prefill.matmul(x, p, bias), reference.matmul(x, format, bias, torch.float64)) < 2**-7
    assert error(prefill.matmul(x, p), reference.matmul(x, format, None, torch.float64)) < 2**-7


def test_strides_and_emptiness(splits):
    p = fragment.prepare(ints(32, 64, 4, 64).to(DEVICE))
    x = inputs(12, 128)[::2, :64]  # rows 256 apart
    assert torch.equal(fragment.matmul(x, p), fragment.matmul(x.contiguous(), p))
    assert torch.equal(fragment.matmul(x.T.contiguous().T, p), fragment.matmul(x, p))
    assert fragment.matmul(x[:0], p).shape == (0, 32)


def test_says_why_not():
    x = inputs(1, 64)
    for reason, format, act in [("Dense is not", Dense(torch.zeros(2, 64)), x), ("float32", ints(16, 64, 4, 64), x.float()),
                                ("not a multiple of 16", ints(16, 64, 4, 8), x), ("bf16 would round", ints(16, 64, 4, 32, scales=torch.float32), x),
                                ("float zero points", ints(16, 64, 4, 32, "float"), x),
                                ("32 values", Lut.pack(rand(0, 32, (2, 64)), table(1, 32), None, "l"), x),
                                ("low-rank", Sum((ints(16, 64, 4, 64), Dense(torch.zeros(16, 64)))), x)]:  # fmt: skip
        assert reason in fragment.supports(format.to(DEVICE), act)


# ---------------------------------------------------------------- tilings


def test_the_rule_and_its_rivals_fit_the_kernel():
    for N, K in [(64, 256), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 8192)]:
        for kind in layout.KINDS:
            for m in (1, 17, 64, 65, 256, 2048):
                for scale in ("channel", "group"):
                    p = fragment.Prepared(torch.empty(N // 16, 0), *[None] * 6, kind, scale, 128, 0, (0, 0), False, False, (N, K))
                    c = fragment.rule(p, m)
                    const, programs = fragment.constants(p, m, c), N // c.bn * -(-m // c.bm)
                    assert N % c.bn == 0 and layout.COLUMNS % (layout.UNIT * const["STEP"]) == 0 and const["STEP"] % const["PART"] == 0
                    assert c.split == 1 or (programs * c.split * c.bn * c.bm <= tiles.PARTIAL and programs <= tiles.TILES and c.split <= max(1, K // 256))


@pytest.mark.parametrize("name", FORMATS)
def test_tilings_are_planned_for_what_is_prepared(name):
    for format in (FORMATS[name], Gated(FORMATS[name])):
        plan, p = fragment.planned(format), fragment.prepare(FORMATS[name])
        assert (plan.kind, plan.scale, plan.group, plan.corrected) == (p.kind, p.scale, p.group, p.corrected) and len(plan.words) == len(p.words)
        for m in (1, 16, 64, 256):
            assert fragment.rule(plan, m) == fragment.rule(p, m) or p.scales is None or p.scales.dtype != plan.scales.dtype  # fp32 scales that bf16 holds


def test_a_dozen_tilings_are_raced_and_none_outgrows_the_workspace(monkeypatch):
    seen: list = []
    monkeypatch.setattr(fragment, "_op", lambda *args: seen.append(Config(*args[-1])))
    for N, K in [(4096, 4096), (28672, 4096), (57344, 8192), (4096, 14336)]:
        format = IntGroup.planned((N, K), 4, 128, True, BF16)
        for m in (1, 4, 16, 64, 256):
            runs = fragment.variants(format, m)
            assert 3 <= len(runs) <= 14, (N, K, m)
            for run in runs.values():
                run(None, fragment.planned(format))
                assert seen[-1].split == 1 or N * seen[-1].split * seen[-1].bm * -(-m // seen[-1].bm) <= tiles.PARTIAL
    assert not fragment.variants(format, 2048)


def test_a_tiling_meets_more_rows_than_it_was_chosen_for(monkeypatch):
    """`partial` holds two tiles of 16 rows: 40 rows are three, and nothing is written behind its end."""
    format = FORMATS["int4"].to(DEVICE)
    p, x, N = fragment.prepare(format), inputs(40, 256), 128
    partial, counter = torch.full((N * 16 * 3 * 2 + 64,), torch.nan, device=DEVICE), torch.zeros(2**10, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(fragment, "PARTIAL", N * 16 * 3 * 2)
    monkeypatch.setattr(fragment, "workspace", lambda x: (partial, counter))
    for split in (1, 2, 8):
        y = fragment.matmul(x, p, None, Config(64, 16, split, 2, 3))
        assert error(y, reference.matmul(x, format, None, torch.float64)) < 2**-7 and partial[-64:].isnan().all()
    monkeypatch.setattr(fragment, "PARTIAL", 1)
    assert error(fragment.matmul(x, p, None, Config(64, 16, 8, 2, 3)), reference.matmul(x, format, None, torch.float64)) < 2**-7


@pytest.mark.parametrize("m", [3, 300])
def test_what_inference_mode_made_serves_other_calls(m):
    prefill._scratch.cache_clear()
    tiles._workspace.cache_clear()
    format = Sum((FORMATS["int4"], low_rank(70, 256, 5))).to(DEVICE)
    p, x = fragment.prepare(format), inputs(m, 256)
    with torch.inference_mode():
        y = fragment.matmul(x, p, None, Config(64, 16, 2, 2, 3) if m < 256 else None)
    with torch.no_grad():
        assert torch.equal(fragment.matmul(x, p, None, Config(64, 16, 2, 2, 3) if m < 256 else None), y)


def test_importing_does_nothing():
    script = "import torch, compress.kernels.prefill; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=120)


def test_the_op_keeps_what_torch_library_asks():
    for name, m, config in (("int4 asym", 3, []), ("nf4", 3, [64, 16, 1, 2, 3, 4]), ("fp8 channel", 300, [])):
        format = FORMATS[name].to(DEVICE)
        x, bias = inputs(m, format.shape[1]), inputs(1, format.shape[0])[0]
        torch.library.opcheck(fragment._op, (x, bias, *fragment.values(fragment.prepare(format)), config))
    format = Gated(Sum((ints(64, 192, 4, 64), low_rank(64, 192, 4)))).inner.to(DEVICE)
    torch.library.opcheck(fragment._op, (inputs(2, 192), None, *fragment.values(fragment.prepare(Gated(format))), []))


# ---------------------------------------------------------------- SASS for sm_90

POINTERS = {BF16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int16: "*i16"}
# name: weight, rows of x, tiling, instructions a weight
COMPILED = {
    "int8": (ints(128, 512, 8, 512), 16, Config(64, 16, 4, 2, 4), 3.6),
    "int8 wide": (ints(128, 512, 8, 512), 16, Config(128, 16, 4, 2, 4), 2.8),
    "int4": (ints(128, 512, 4, 128), 1, Config(64, 16, 4, 4, 4), 2.65),
    "int4 wide": (ints(128, 512, 4, 128), 16, Config(128, 16, 4, 4, 4), 2.2),
    "int4 asym": (ints(128, 512, 4, 128, "int"), 3, Config(64, 16, 4, 4, 4), 2.75),
    "int4 asym wide": (ints(128, 512, 4, 128, "int"), 16, Config(128, 16, 4, 4, 4), 2.25),
    "int4 fp16 scales": (ints(128, 512, 4, 128, scales=torch.float16), 16, Config(128, 16, 4, 4, 4), 2.2),
    "int4 float zero wide": (ints(128, 512, 4, 128, "float"), 16, Config(128, 16, 4, 4, 4), 2.5),
    "int4 m64": (ints(128, 512, 4, 128, "int"), 64, Config(128, 64, 2, 2, 3), 2.9),
    "int4 m128": (ints(128, 512, 4, 128, "int"), 128, Config(128, 128, 2, 4, 2, 8), 3.2),
    "int4 odd in": (ints(128, 509, 4, 509), 65, Config(128, 128, 2, 4, 2, 8), 3.5),
    "int4 m256": (ints(128, 512, 4, 128), 256, Config(128, 256, 2, 2, 3, 8), 4.25),
    "int3 wide": (ints(128, 512, 3, 128), 16, Config(128, 16, 4, 4, 3), 2.15),
    "int2 wide": (ints(128, 512, 2, 64, "int"), 16, Config(128, 16, 4, 4, 4), 2.3),
    "ternary wide": (ints(128, 512, 2, 128, levels=3), 16, Config(128, 16, 4, 4, 4), 1.7),
    "binary wide": (ints(128, 512, 1, 256), 16, Config(128, 16, 4, 4, 3), 1.6),
    "nf4": (lut(128, 512, 16, 8), 16, Config(64, 16, 4, 4, 4), 4.45),
    "fp8": (fp8(128, 512, 128, 1), 16, Config(64, 16, 4, 4, 4), sass.limit(3.45, 3.8)),
    "nvfp4 wide": (fp4(128, 512, "nvfp4"), 16, Config(128, 16, 4, 4, 4), 3.25),
    "mxfp4 wide": (fp4(128, 512, "mxfp4"), 16, Config(128, 16, 4, 4, 4), 3.25),
}  # fmt: skip


def spec(format, m, config) -> sass.Spec:
    """The kernel as `matmul` would launch it on a GPU, with a bias."""
    p = fragment.prepare(format)
    const = fragment.constants(p, m, config) | {"ASM": True, "F32": False}
    tensors = {"w": p.words, "s": p.scales, "z": p.zeros, "t": p.table, "row": p.row, "B": p.B}
    signature = {name: POINTERS[t.dtype] for name, t in tensors.items() if t is not None} | dict.fromkeys(("x", "y", "bias"), "*bf16")
    signature |= {"partial": "*fp32", "counter": "*i32"} | ({"sums": "*fp32"} if p.corrected else {}) | ({} if p.B is None else {"u": "*bf16"})
    const |= {name: None for name in ("s", "z", "t", "row", "B", "sums", "u") if name not in signature}
    signature |= dict.fromkeys(("M", "N", "K", "stride", "padded", "steps", "entries"), "i32")
    return sass.Spec("compress.kernels.fragment", "_matmul", signature, const, ("N", "K", "stride", "padded"), config.warps, config.stages)


def dense_spec(format) -> sass.Spec:
    p, kind = fragment.prepare(format), layout.KINDS[fragment.prepare(format).kind]
    signature = {name: POINTERS[t.dtype] for name, t in {"w": p.words, "s": p.scales, "z": p.zeros}.items()} | {"out": "*bf16"}
    const = {"t": None, "row": None, "KIND": p.kind, "UNITS": kind.units, "PLANES": kind.planes, "SCALE": p.scale, "GROUP": p.group_units, "OFFSET": 0,
             "BYTE_MUL": 0, "BYTE_ADD": 0, "PER_ROW": False, "CORRECTED": False, "BN": 64, "ASM": True}  # fmt: skip
    signature |= dict.fromkeys(("first", "last", "K", "stride", "padded", "tiles", "entries"), "i32")
    return sass.Spec("compress.kernels.prefill", "_dequantize", signature, const, ("first", "K", "stride", "padded"))


@pytest.fixture(scope="module")
def compiled() -> dict[str, sass.Kernel]:
    specs = [spec(*entry[:3]) for entry in COMPILED.values()] + [dense_spec(ints(128, 512, 4, 128, "int"))]
    return dict(zip([*COMPILED, "dense chunk"], sass.compile_all(specs)))


def test_sm90_dense_chunks(compiled):
    kernel = compiled["dense chunk"]  # 64 × 64 weights, no loop
    assert kernel.stack == 0 and not kernel.count("I2F", "I2FP", "STS.U16", "STG.E.U16"), kernel.mix
    assert kernel.count("STG") <= 4 and kernel.per_weight(32) <= 12, (kernel.per_weight(32), kernel.mix)


@pytest.mark.parametrize("name", COMPILED)
def test_sm90_instructions(name, compiled):
    kernel, (_, _, config, limit) = compiled[name], COMPILED[name]
    assert kernel.stack == 0 and kernel.count(*sass.TENSOR_CORE)
    weights = config.bn * layout.UNIT * max(config.step, layout.KINDS[fragment.prepare(COMPILED[name][0]).kind].units) / (32 * config.warps)
    assert kernel.count(*sass.CONVERSIONS) + kernel.count("SHFL") < weights / 8, kernel.mix  # not for every weight
    assert "float zero" in name or not kernel.count("LDG")  # sums of x; what else is not loaded ahead is waited for
    assert round(kernel.per_weight(weights), 2) <= limit, (kernel.per_weight(weights), kernel.mix)


# ---------------------------------------------------------------- only on a GPU

BIG = {  # odd out and odd in among them
    "int4 g128 asym": lambda: ints(1000, 4096, 4, 128, "int"), "int4 channel": lambda: ints(4099, 1027, 4, 1027),
    "int3": lambda: ints(4096, 4096, 3, 128), "int2": lambda: ints(999, 4160, 2, 64, "int"), "ternary": lambda: ints(2048, 4096, 2, 128, levels=3),
    "binary": lambda: ints(2048, 4096, 1, 128), "int8": lambda: ints(1001, 2049, 8, 2049),
    "int4 float zero": lambda: ints(512, 4096, 4, 64, "float"), "int4 g32": lambda: ints(512, 4096, 4, 32), "nf4": lambda: lut(1003, 4096, 16, 64),
    "lut4 row": lambda: lut(1003, 1023, 16, 0), "fp8": lambda: fp8(1001, 1023, 1001, 1), "fp8 square": lambda: fp8(1001, 4000, 8, 32),
    "mxfp4": lambda: fp4(1001, 4064, "mxfp4"), "nvfp4": lambda: fp4(1001, 4080, "nvfp4"),
}  # fmt: skip
gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", BIG)
def test_gpu_layers_of_real_size(name):
    format = BIG[name]().to("cuda")
    p, seed = fragment.prepare(format), int.from_bytes(os.urandom(4), "little")
    for m in (1, 2, 3, 16, 17, 64, 65, 200, 2048):
        x, bias = inputs(m, format.shape[1], seed), inputs(1, format.shape[0], seed + 1)[0]
        run = functools.partial(poisoned, fragment.matmul, x, p, bias)
        y = run()
        assert error(y, reference.matmul(x, format, bias, torch.float64)) < bound(m, format), (m, seed)
        assert all(torch.equal(y, run()) for _ in range(100 if m < 200 else 5)), (m, seed)


def poisoned(run, *args):
    """What `run` returns, its memory full of NaN before it is written."""
    y = run(*args)
    y.fill_(torch.nan)
    del y  # the allocator hands the same block out again
    return run(*args)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("m", [1, 64, 256])
def test_gpu_tilings(m):
    """Every third: each is compiled, which takes seconds."""
    format = ints(1024, 4096, 4, 128, "int").to("cuda")
    p, x = fragment.prepare(format), inputs(m, 4096)
    exact = reference.matmul(x, format, None, torch.float64)
    for name, run in list(fragment.variants(format, m).items())[::3]:
        assert error(run(x, p, None), exact) < bound(m, format), name


@pytest.mark.gpu
@gpu
def test_gpu_epilogues_in_a_cuda_graph():
    format = Sum((ints(2048, 4096, 4, 128, "int"), low_rank(2048, 4096, 16))).to("cuda")
    p, q, x, bias = fragment.prepare(format), fragment.prepare(Gated(format)), inputs(3, 4096) / 64, inputs(1, 2048)[0]
    eager = fragment.matmul(x, p, bias), fragment.matmul(x, q, bias)
    exact = reference.matmul(x, format, bias, torch.float64)
    gate, up = exact.chunk(2, -1)
    assert error(eager[0], exact) < 2**-7 and error(eager[1], F.silu(gate) * up) < 2**-6
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fragment.matmul(x, p, bias), fragment.matmul(x, q, bias)
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, eager))
