"""python -m pytest tests/test_kernels.py — without a GPU the Triton kernel runs in triton's interpreter, and compiles for sm_90 unrun."""

import json
import logging
import os
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernel is decorated, so before the import below
pytest.importorskip("triton")

from compress.formats import Dense, IntGroup, Lut, Product, Scaled, Sum, Transformed
from compress.kernels import bench, cpu_int, dispatch, reference, triton_int, tune
from compress.kernels.dispatch import How
from compress.kernels.gated import Gated

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CODES = [(bits, 2**bits) for bits in range(1, 9)] + [(2, 3)]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROUNDING = {BF16: 2**-8, FP16: 2**-11, FP32: 2e-6}  # one rounding of the output, relative to its largest element


def make(out, n, bits, group, asym=False, levels=None, scales=BF16, seed=0, device="cpu") -> IntGroup:
    g, levels = torch.Generator().manual_seed(seed), levels or 2**bits
    codes = torch.randint(0, levels, (out, n), generator=g, dtype=torch.uint8)
    zeros = torch.randint(0, levels, (out, n // group), generator=g, dtype=torch.uint8) if asym else None
    return IntGroup.pack(codes, (torch.rand(out, n // group, generator=g) + 0.1).to(scales), zeros, bits, levels).to(device)


def inputs(m, n, dtype=FP32, seed=1, device="cpu"):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def error(y, exact):
    return ((y.double() - exact).abs().max() / exact.abs().max()).item()


# ---------------------------------------------------------------- the oracle


def test_reference_is_the_written_out_sum():
    format, x, bias = make(3, 8, 3, 4, asym=True, scales=FP32), inputs(2, 8), inputs(1, 3)[0]
    q, z, s = format.unpack().tolist(), format.zero_points().tolist(), format.scales.tolist()
    for m in range(2):
        for n in range(3):
            y = sum((q[n][k] - z[n][k // 4]) * s[n][k // 4] * x[m, k].item() for k in range(8)) + bias[n].item()
            assert abs(reference.matmul(x, format, bias, torch.float64)[m, n].item() - y) < 1e-6


def test_reference_runs_every_combinator():
    A, B, T = inputs(6, 4, seed=2), inputs(4, 8, seed=3), inputs(8, 8, seed=4)
    format, x, t = make(6, 8, 4, 8), inputs(5, 8), inputs(1, 8, seed=5)[0]
    W = format.dequantize().double()
    for combined, exact in ((Sum((format, Product((Dense(A), Dense(B))))), W + A.double() @ B.double()), (Transformed(format, Dense(T)), W @ T.double().T),
                            (Scaled(format, t), W * t.double())):
        assert error(reference.matmul(x, combined, dtype=torch.float64), x.double() @ exact.T) < 1e-12


# ---------------------------------------------------------------- Triton: in the interpreter here, compiled where there is a GPU

SHAPES = [  # out, in, group, rows: odd out, odd in, groups off the tile, a tail tile, one group a row
    (37, 96, 48, 3), (70, 64, 16, 17), (33, 96, 32, 65), (40, 131, 131, 1), (65, 128, 64, 2), (17, 75, 25, 16), (5, 330, 330, 33),
]  # fmt: skip


@pytest.mark.parametrize("bits, levels", CODES, ids=lambda v: str(v))
@pytest.mark.parametrize("asym", [False, True], ids=["sym", "asym"])
def test_triton_every_code_and_shape(bits, levels, asym):
    for i, (out, n, group, m) in enumerate(SHAPES):
        dtype, scales = (BF16, FP16, FP32)[(i + bits) % 3], (FP32, BF16, FP16)[(i + asym) % 3]
        format = make(out, n, bits, group, asym, levels, scales, device=DEVICE)
        x, bias = inputs(m, n, dtype, device=DEVICE), inputs(1, out, dtype, device=DEVICE)[0] if i % 2 else None
        assert triton_int.supports(format, x) is None
        y = triton_int.matmul(x, format, bias)
        assert y.dtype == dtype and y.shape == (m, out)
        assert error(y, reference.matmul(x, format, bias, torch.float64)) < ROUNDING[dtype], (out, n, group, m, dtype)


def test_triton_never_rounds_the_weight():
    """bf16 x against 8-bit codes: exact products leave only the output's rounding, where a dense bf16 weight adds its own."""
    format, x = make(64, 256, 8, 128, asym=True, device=DEVICE), inputs(16, 256, BF16, device=DEVICE)
    exact = reference.matmul(x, format, dtype=torch.float64)
    ours, rounded, dense = (((y.double() - exact).norm() / exact.norm()).item() for y in (
        triton_int.matmul(x, format), exact.to(BF16), F.linear(x, format.dequantize(BF16))))  # fmt: skip
    assert ours < 1.02 * rounded < dense


def test_triton_strides_batches_emptiness_and_repetition():
    format = make(32, 64, 3, 16, asym=True, device=DEVICE)
    x = inputs(12, 128, FP32, device=DEVICE)[::2, :64]  # rows 256 apart
    y = triton_int.matmul(x.reshape(2, 3, 64), format)
    assert y.shape == (2, 3, 32) and torch.equal(y.view(6, 32), triton_int.matmul(x, format))
    assert torch.equal(triton_int.matmul(x.T.contiguous().T, format), triton_int.matmul(x, format))
    assert triton_int.matmul(x[:0], format).shape == (0, 32)


def test_triton_says_why_not():
    format = make(32, 64, 4, 32, device=DEVICE)
    assert "Dense" in triton_int.supports(Dense(torch.zeros(2, 2)), inputs(1, 2, device=DEVICE))
    assert "float64" in triton_int.supports(format, inputs(1, 64, torch.float64, device=DEVICE))
    assert "codes are on" in triton_int.supports(format, torch.empty(1, 64, device="meta")) or DEVICE == "cuda"


COMPILE = """
import json, subprocess, sys, tempfile, torch, triton
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from compress.formats import IntGroup
from compress.kernels import triton_int

names, report = triton_int._matmul.arg_names, []
pointer = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.uint8: "*u8"}
for bits, levels, group, sym, m, dtype in [(4, 16, 128, False, 1, "bfloat16"), (4, 16, 128, True, 16, "bfloat16"), (3, 8, 128, False, 64, "bfloat16"),
        (8, 256, 4096, True, 32, "float16"), (2, 3, 128, True, 16, "bfloat16"), (5, 32, 64, False, 64, "float16"), (7, 128, 25, False, 4, "bfloat16"),
        (6, 64, 32, True, 256, "float16")]:
    K = 4096 if 4096 % group == 0 else 4000
    dtype = getattr(torch, dtype)
    format = IntGroup.planned((4096, K), bits, group, sym, torch.bfloat16, levels)
    const = triton_int.constants(format, m, dtype, bias=True) | ({"zeros": None} if sym else {})
    kinds = {"x": pointer[dtype], "y": pointer[dtype], "bias": pointer[dtype], "codes": pointer[format.codes.dtype], "scales": "*bf16", "zeros": "*u8"}
    signature = {name: "constexpr" if name in const else kinds.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    kernel = triton.compile(ASTSource(fn=triton_int._matmul, signature=signature, constexprs={(names.index(k),): v for k, v in const.items()}, attrs=aligned),
                            target=GPUTarget("cuda", 90, 32), options=triton_int.launch(m))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"), "-res-usage", file.name],
                               capture_output=True, text=True, check=True).stdout
    report.append({"name": f"{format.describe()} m{m} {dtype}", "usage": usage, "smem": kernel.metadata.shared,
                   "tensor cores": "wgmma.mma" in kernel.asm["ptx"] or "mma.sync" in kernel.asm["ptx"]})
print(json.dumps(report))
"""


def test_compiles_for_sm90_without_spills_and_with_tensor_cores(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    script = tmp_path / "compile_sm90.py"
    script.write_text(COMPILE)
    run = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads(run.stdout)
    assert len(report) == 8
    for kernel in report:
        assert "STACK:0 " in kernel["usage"] and "LOCAL:0 " in kernel["usage"], kernel  # registers spill to the stack
        assert kernel["tensor cores"], kernel["name"]
        assert kernel["smem"] <= 48 * 1024, kernel["name"]  # what every GPU has, not only Hopper


# ---------------------------------------------------------------- CPU


@pytest.mark.parametrize("bits, levels", CODES, ids=lambda v: str(v))
@pytest.mark.parametrize("asym", [False, True], ids=["sym", "asym"])
def test_cpu_pack_holds_the_same_weight(bits, levels, asym):
    """Multiplied by the identity, the packed copy is the dequantized weight rounded once: same codes, same zeros, same scales."""
    for out, n, group in [(37, 192, 96), (16, 256, 256), (33, 512, 512), (48, 512, 128), (20, 256, 32), (37, 48, 48)]:
        format, x = make(out, n, bits, group, asym, levels), torch.eye(n).to(BF16)
        if why := cpu_int.supports(format, x):
            assert (bits > 4 and (group != n or asym)) or group % 32, why
            continue
        W, ours = format.dequantize(BF16), cpu_int.matmul(x, cpu_int.prepare(format)).T
        if bits == 4 and asym:  # the op's offset, up to 8 scales, is one bf16 a group: half a unit in the last place is 2⁻⁸ of it
            bound = 8 * 2**-8 * format.scales.float().repeat_interleave(group, dim=1)
            assert ((ours.float() - format.dequantize()).abs() <= bound + 2**-8 * W.float().abs()).all()
        else:
            assert torch.equal(ours, W)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 17])
def test_cpu_pack_is_as_accurate_as_bf16(m):
    for format in (make(37, 384, 4, 128), make(37, 384, 4, 64, asym=True), make(37, 384, 3, 384, asym=True), make(37, 384, 8, 384)):
        x, bias = inputs(m, 384, BF16), inputs(1, 37, BF16)[0]
        assert error(cpu_int.matmul(x, cpu_int.prepare(format), bias), reference.matmul(x, format, bias, torch.float64)) < 2**-7


def test_cpu_pack_says_why_not():
    x = inputs(1, 64, BF16)
    for reason, format, act in [("float32", make(16, 64, 4, 64), x.float()), ("multiple of 32", make(16, 64, 4, 16), x),
                                ("float16", make(16, 64, 4, 64, scales=FP16), x), ("one scale a row", make(16, 64, 8, 32), x),
                                ("fit int8", make(16, 64, 8, 64, asym=True), x), ("multiple of 16", make(16, 72, 8, 72), inputs(1, 72, BF16)),
                                ("not IntGroup", Dense(torch.zeros(2, 64)), x)]:  # fmt: skip
        assert reason in cpu_int.supports(format, act)


# ---------------------------------------------------------------- dispatch


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def races(cache_folder, monkeypatch):
    """Races are not run but looked up in `races.us`, and counted; whatever is not named there takes 100 us. With what every processor has."""

    class Races(list):
        us: dict = {}

    held = Races()

    def race(runs, device, seconds=0.2, twins=None):
        held.append(set(runs))
        for name in runs:
            assert torch.equal(runs[name](), twins[name]())
        return {name: held.us.get(name, 100.0) for name in runs}

    monkeypatch.setattr(tune, "race", race)
    monkeypatch.delitem(dispatch.KERNELS["cpu"], "cpu-native")
    return held


def route_of(cache, m, dtype=BF16):
    return next(value[0].name for key, value in cache.items() if key[:2] == (dispatch.bucket(m), dtype))


BIG = dict(out=512, n=512, bits=4, group=128)  # exactly SMALL elements: worth measuring


def test_the_fastest_route_is_taken_and_dense_when_packing_is_slower(races):
    races.us = {"cpu-pack": 10.0}
    format, cache = make(**BIG), {}
    x = inputs(2, 512, BF16)
    keep = How(memory="keep")
    assert error(dispatch.matmul(x, format, None, cache, keep), reference.matmul(x, format, dtype=torch.float64)) < 2**-7
    assert route_of(cache, 2) == "cpu-pack" and races == [{"dense-cached", "cpu-pack"}]
    races.us = {"cpu-pack": 1000.0}
    dispatch.matmul(inputs(40, 512, BF16), format, None, cache, keep)
    assert route_of(cache, 40) == "dense-cached"


def test_measured_once_across_calls_modules_and_processes(races, cache_folder):
    format, file = make(**BIG), cache_folder / "tune.json"
    for cache in ({}, {}):
        for m in (3, 4):
            dispatch.matmul(inputs(m, 512, BF16), format, None, cache)
    assert len(races) == 1
    table, written = json.loads(file.read_text()), file.stat().st_mtime_ns
    assert list(table.values()) == [{"dense-streamed": 100.0, "cpu-pack": 100.0}]
    tune.memory.cache_clear()  # a new process
    dispatch.matmul(inputs(4, 512, BF16), format, None, {})
    assert len(races) == 1 and file.stat().st_mtime_ns == written
    dispatch.matmul(inputs(1, 512, BF16), format, None, {})  # another bucket
    assert len(races) == 2 and len(json.loads(file.read_text())) == 2


@pytest.mark.parametrize("what", ["matmul", "prepare"])
def test_a_kernel_that_fails_is_left_out_and_said(races, cache_folder, monkeypatch, caplog, what):
    class OutOfResources(Exception):  # as triton's errors are: of no kind that torch raises
        pass

    def broken(*_):
        raise OutOfResources("out of resource: shared memory\nmore")

    races.us, format, x, cache = {"cpu-pack": 1.0}, make(**BIG), inputs(4, 512, BF16), {}
    monkeypatch.setattr(cpu_int, what, broken)
    with caplog.at_level(logging.WARNING):
        y = dispatch.matmul(x, format, None, cache)
    assert error(y, reference.matmul(x, format, dtype=torch.float64)) < 2**-7 and route_of(cache, 4) == "dense-streamed"
    assert "cpu-pack does not run here (OutOfResources: out of resource: shared memory); other" in caplog.text
    dispatch.matmul(x, format, None, {})  # it is not tried again
    [row] = json.loads((cache_folder / "tune.json").read_text()).values()
    assert list(races) == [{"dense-streamed"}] and row == {"dense-streamed": 100.0}
    gated = Gated(format)
    plain = dispatch.plain(gated, dispatch.AUTO)
    kernel = dispatch.Route("kernel", plain.prepare, broken)
    assert dispatch.measured(gated, x, [kernel, plain]).keys() == {"parts"} and dispatch.fastest([kernel, plain], {"parts": 1.0}) is plain
    with pytest.raises(OutOfResources):
        dispatch.measured(format, x, [dispatch.Route("dense-streamed", cpu_int.prepare, broken), dispatch.CACHED])


def test_while_a_cuda_graph_is_captured_nothing_is_measured_or_kept(races, monkeypatch):
    races.us = {"cpu-pack": 1.0}
    format, x, cache = make(**BIG), inputs(4, 512, BF16), {}
    with monkeypatch.context() as graph:
        graph.setattr(torch.cuda, "is_initialized", lambda: True)
        graph.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        y = dispatch.matmul(x, format, None, cache)
        assert not races and not cache and error(y, reference.matmul(x, format, dtype=torch.float64)) < 2**-7
    dispatch.matmul(x, format, None, cache)
    assert route_of(cache, 4) == "cpu-pack"


def test_a_prompt_has_a_bucket_of_its_own_on_cuda():
    assert [dispatch.bucket(m) for m in (1, 5, 256, 257, 5000)] == [1, 16, 256, 256, 256]
    assert [dispatch.bucket(m, True) for m in (256, 257, 2048, 5000)] == [256, 2048, 2048, 2048]


def test_measurements_do_not_outlive_kernels(races, cache_folder, monkeypatch):
    dispatch.matmul(inputs(4, 512, BF16), make(**BIG))
    assert dispatch.edition("cpu") in next(iter(json.loads((cache_folder / "tune.json").read_text()))) and "layout" in dispatch.edition("cuda")
    monkeypatch.setattr(dispatch, "edition", lambda device: "native 01234567")
    dispatch.matmul(inputs(4, 512, BF16), make(**BIG))
    assert len(races) == 2


def test_another_process_is_not_overwritten(races, cache_folder):
    format, file = make(**BIG), cache_folder / "tune.json"
    dispatch.matmul(inputs(1, 512, BF16), format)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"elsewhere": {"dense-cached": 1.0}}))
    dispatch.matmul(inputs(4, 512, BF16), format)
    assert len(json.loads(file.read_text())) == 3


@pytest.mark.parametrize("content", ["{broken", "[1, 2]", '{"a": 3}', '{"a": {"b": "c"}}', "\xff"])
def test_corrupt_table_is_reported_and_rewritten(races, cache_folder, caplog, content):
    file = cache_folder / "tune.json"
    file.write_text(content, encoding="latin-1")
    with caplog.at_level(logging.WARNING):
        dispatch.matmul(inputs(1, 512, BF16), make(**BIG))
    assert str(file) in caplog.text and "ignoring" in caplog.text
    assert len(json.loads(file.read_text())) == 1 and not list(cache_folder.glob("*.tmp"))


def test_unwritable_table_is_reported(races, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "file" / "below"))
    dispatch.matmul(inputs(1, 512, BF16), make(**BIG))
    assert "COMPRESS_CACHE" in caplog.text


def test_table_location(monkeypatch):
    monkeypatch.delenv("COMPRESS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert tune.table_file() == Path("/x/compress/tune.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tune.table_file() == Path.home() / ".cache/compress/tune.json"


@pytest.mark.parametrize("memory", ["keep", "bounded"])
@pytest.mark.parametrize("policy", ["auto", "dense"])
def test_fp32_stays_exact_and_unmeasured(races, memory, policy):
    format, x = make(**BIG, asym=True), inputs(2, 512)
    y = dispatch.matmul(x, format, None, {}, How(policy, memory))
    assert torch.equal(y, F.linear(x, format.dequantize())) and not races


def test_dense_policy_is_the_dequantized_matrix_in_every_dtype(races):
    races.us = {"cpu-pack": 1.0}
    format, bias = make(**BIG, asym=True), inputs(1, 512)[0]
    for dtype in (BF16, FP16, FP32):
        x = inputs(3, 512, dtype)
        assert torch.equal(dispatch.matmul(x, format, bias, {}, How("dense")), F.linear(x, format.dequantize(dtype), bias.to(dtype)))
        assert torch.equal(dispatch.matmul(x, format, bias, {}, How("reference")), reference.matmul(x, format, bias.to(dtype)).to(dtype))
    assert not races


@pytest.mark.parametrize("memory", ["auto", "bounded"])
def test_where_a_kernel_takes_the_codes_no_dense_copy_is_kept(races, memory):
    low_rank = Product((Dense(inputs(512, 8)), Dense(inputs(8, 512))))
    for format in (make(**BIG), Sum((make(**BIG), low_rank)), Scaled(make(**BIG), inputs(1, 512)[0])):
        cache: dict = {}
        for m in (1, 100):
            dispatch.matmul(inputs(m, 512, BF16), format, None, cache, How(memory=memory))
        assert races[0] == {"dense-streamed", "cpu-pack"}
        assert not [value for value in cache.values() if isinstance(value, torch.Tensor)]


def test_where_none_does_or_the_weight_is_small_a_copy_is_kept_unless_bounded(races):
    nf4 = Lut.pack(make(**BIG).unpack(), torch.arange(16.0)[None], torch.ones(512, 8), "nf4")
    for format, plain in ((nf4, "dense-streamed"), (Sum((nf4, nf4)), "parts"), (make(64, 64, 4, 64), "dense-streamed")):
        races.us = {"dense-cached": 1.0}
        for memory, route in (("auto", "dense-cached"), ("bounded", plain)):
            cache: dict = {}
            dispatch.matmul(inputs(1, format.shape[1], BF16), format, None, cache, How(memory=memory))
            assert route_of(cache, 1) == route


def test_small_weights_and_lone_routes_are_not_measured(races):
    for format in (make(64, 64, 4, 64), make(512, 512, 8, 128), Dense(inputs(512, 512))):
        dispatch.matmul(inputs(1, format.shape[1], BF16), format)
    assert not races


def test_autograd_goes_through_dense(races):
    races.us = {"cpu-pack": 1.0}
    format, cache = make(**BIG), {}
    with torch.inference_mode():
        dispatch.matmul(inputs(200, 512, BF16), format, None, cache, How("dense"))  # what inference prepared must serve training
    x = inputs(2, 512, BF16).requires_grad_()
    dispatch.matmul(x, format, None, cache).sum().backward()
    assert error(x.grad, format.dequantize().double().sum(0).expand(2, -1)) < 2**-7


def combinators():
    g = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn(*shape, generator=g) / shape[-1] ** 0.5
    low_rank = Product((Dense(draw(512, 8)), Dense(draw(8, 512))))
    rotation = Dense(torch.linalg.qr(draw(512, 512))[0])
    quantized = Product((make(512, 64, 4, 32), make(64, 512, 3, 128, asym=True)))
    return {"sum": Sum((make(**BIG), low_rank)), "product": low_rank, "quantized product": quantized, "wide product": Product((rotation, make(**BIG))),
            "transformed": Transformed(make(**BIG, asym=True), rotation), "scaled": Scaled(make(**BIG), draw(512, 1)[:, 0]),
            "nested": Transformed(Sum((make(**BIG), low_rank)), rotation)}  # fmt: skip


@pytest.mark.parametrize("name", combinators())
@pytest.mark.parametrize("winner", ["parts", "dense-cached"])
def test_combinators(races, name, winner):
    races.us = {winner: 1.0, "cpu-pack": 2.0}
    format, bias = combinators()[name], inputs(1, 512)[0]
    for dtype, limit in ((FP32, 2e-6), (BF16, 2**-6)):
        for how in (How(), How("dense"), How(memory="keep"), How(memory="bounded")):
            x, cache = inputs(3, 512, dtype).view(1, 3, 512), {}
            y = dispatch.matmul(x, format, bias, cache, how)
            assert y.shape == (1, 3, 512) and error(y, reference.matmul(x, format, bias, torch.float64)) < limit
            if dtype == BF16 and how == How(memory="keep"):
                assert route_of(cache, 3) == ("parts" if "product" in name and "wide" not in name else winner)


@pytest.mark.parametrize("shape", [(512,), (0, 512), (2, 3, 512)])
def test_any_leading_shape(races, shape):
    races.us = {"cpu-pack": 1.0}
    x = torch.randn(shape).to(BF16)
    assert dispatch.matmul(x, make(**BIG)).shape == (*shape[:-1], 512)


@pytest.mark.parametrize("name", ["leaf", "sum", "nested"])
def test_inside_torch_compile_and_on_meta_nothing_is_measured(races, name):
    format = ({"leaf": make(**BIG)} | combinators())[name]
    x, cache = inputs(2, 512), {}
    compiled = torch.compile(lambda x: dispatch.matmul(x, format, None, cache), fullgraph=True, backend="aot_eager")
    exact = reference.matmul(x, format, dtype=torch.float64)
    assert error(compiled(x), exact) < 2e-6 and not cache
    dispatch.matmul(x, format, None, cache)  # an eager call keeps something; the next trace uses it
    torch._dynamo.reset()
    assert error(compiled(x), exact) < 2e-6
    assert dispatch.matmul(torch.empty(3, 512, device="meta"), format.to("meta")).shape == (3, 512) and not races


def test_the_door_opens_without_triton():
    script = "import sys; sys.modules['triton'] = None; import compress.kernels.dispatch as d, compress.kernels.bench; " \
             "assert 'compress.kernels.triton_int' not in sys.modules; assert d._kernel('triton_int') is None"  # fmt: skip
    subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=120)


# ---------------------------------------------------------------- measuring


def test_a_race_is_won_by_the_faster_run(monkeypatch):
    monkeypatch.setattr(tune, "FLUSH", 2**20)
    a, b = torch.randn(16, 64), torch.randn(1024, 1024)
    us = tune.race({"small": lambda: a @ a.T, "large": lambda: b @ b}, torch.device("cpu"), seconds=0.01)
    assert us["small"] < us["large"]


def test_a_real_measurement_leaves_the_random_numbers_alone(cache_folder, monkeypatch):
    monkeypatch.setattr(tune, "FLUSH", 2**20)
    state = torch.get_rng_state()
    dispatch.matmul(inputs(1, 512, BF16), make(**BIG))
    assert torch.equal(state, torch.get_rng_state()) and len(json.loads((cache_folder / "tune.json").read_text())) == 1


def test_bench_reports_every_path(monkeypatch, capsys, cache_folder):
    monkeypatch.setattr(tune, "race", lambda runs, device, seconds=0.2, twins=None: {name: 2.0 for name in runs})
    monkeypatch.setattr(bench, "ceilings", lambda device, notes: {"read GB/s": 10.0})
    monkeypatch.setattr(bench, "SHAPES", {"cpu": [(32, 256)]})
    monkeypatch.setattr(bench, "ROWS", {"cpu": (1, 5)})
    monkeypatch.setattr(bench, "CPU", tuple(bench.FORMATS))
    file, document = cache_folder / "bench.json", cache_folder / "kernels.md"
    document.write_text("# Kernels\n\nAbove.\n\n<!-- bench cpu -->\nold\n<!-- bench cpu -->\n\nBelow.\n")
    command = ["bench", "--device", "cpu", "--json", str(file), "--write", str(document)]
    monkeypatch.setattr(sys, "argv", [*command, "--minutes", "0"])
    bench.main()
    assert "0 minutes: 32×256 with 1 rows, 32×256 with 5 rows; the same command goes on" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", command)
    bench.main()
    result = json.loads(file.read_text())
    assert len(result["rows"]) == 2 * (2 + len(bench.FORMATS)) and not result["notes"]
    assert all(r["speedup"] == 1 and (r["path"] == bench.DENSE or (r["error"] < 0.01 and r["kernel"])) for r in result["rows"])
    text = document.read_text()
    assert capsys.readouterr().out.strip() in text and "Above." in text and "Below." in text and "old" not in text and text.count("bench cpu") == 2
    monkeypatch.setattr(bench, "measure", None)  # nothing is left to measure, and no other machine's figures are mixed in
    bench.main()
    assert json.loads(file.read_text()) == result
    file.write_text(json.dumps(result | {"machine": "another"}))
    with pytest.raises(SystemExit, match="figures of another"):
        bench.main()


def test_what_fails_in_a_bench_is_a_note(monkeypatch):
    class PTXASError(Exception):  # as triton's
        pass

    def broken(x):
        raise PTXASError("ptxas died\nat length")

    path = lambda name, run, exact=None: bench.Line(name, [run, run], 8, lambda x: "", exact)
    monkeypatch.setattr(tune, "race", lambda runs, device, twins=None: dict.fromkeys(runs, 2.0))
    notes, x = [], inputs(3, 8, BF16)
    rows = bench._records([path(bench.DENSE, lambda x: x), path("kernel", broken), path("inexact", lambda x: x, broken)], (8, 8), x, notes)
    assert [r["path"] for r in rows] == [bench.DENSE, "inexact"] and rows[1]["error"] is None
    assert notes == ["kernel, 3 rows of 8: ptxas died", "inexact, error at 3 rows of 8: ptxas died"]
    assert not bench._records([path(bench.DENSE, broken), path("kernel", lambda x: x)], (8, 8), x, notes)  # nothing to compare with
    monkeypatch.setitem(bench.FORMATS, "W8A8", (broken, None))
    bench.build("cpu", (32, 256), "W8A8")  # nor does what cannot be made end a process


def test_no_more_is_compiled_at_a_time_than_the_device_holds():
    running, most = [], []

    class Pool:
        def submit(self, function, *args):
            future = Future()
            running.append(future)
            most.append(len([f for f in running if not f.done()]))
            threading.Timer(0.01, future.set_result, [None]).start()
            return future

    for free, room in ((bench.MAKING * 64 * 64 * 3, 3), (0, 1)):
        running.clear()
        most.clear()
        bench.build_all(Pool(), "cpu", (64, 64), free)
        assert max(most) == room and len(running) == len(bench.FORMATS)


def test_bench_builds_every_kernel_beforehand(monkeypatch):
    seen, inner = [], bench._kernel
    monkeypatch.setattr(bench, "_kernel", lambda layer, name: lambda x: (seen.append((name, len(x))), inner(layer, name)(x)))
    monkeypatch.setattr(bench, "ROWS", {"cpu": (1, 5)})
    bench.build("cpu", (32, 256), "W8A8")
    assert seen == [(name, m) for name in dispatch.KERNELS["cpu"] for m in (1, 5)]


# ---------------------------------------------------------------- only on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("bits, levels", CODES, ids=lambda v: str(v))
def test_gpu_layers_of_real_size(bits, levels):
    for asym in (False, True):
        for m in (1, 3, 16, 17, 64, 65, 300):
            format, x = make(1000, 4096, bits, 128, asym, levels, device="cuda"), inputs(m, 4096, BF16, device="cuda")
            y = triton_int.matmul(x, format)
            assert error(y, reference.matmul(x, format, dtype=torch.float64)) < ROUNDING[BF16]
            assert all(torch.equal(y, triton_int.matmul(x, format)) for _ in range(20))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_gpu_dispatch_in_a_cuda_graph(cache_folder):
    format, x, cache = make(4096, 4096, 4, 128, device="cuda"), inputs(1, 4096, BF16, device="cuda"), {}
    eager = dispatch.matmul(x, format, None, cache)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = dispatch.matmul(x, format, None, cache)
    graph.replay()
    assert torch.equal(y, eager) and {"dense-streamed", "triton-int", "triton-fragment"} == set(*json.loads((cache_folder / "tune.json").read_text()).values())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_gpu_bench(monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", {"cuda": [(1024, 1024)]})
    monkeypatch.setattr(bench, "ROWS", {"cuda": (1, 64)})
    monkeypatch.setattr(bench, "FORMATS", {name: bench.FORMATS[name] for name in ("int4 g128", "W8A8")})
    assert not bench.bench("cuda", [], rows := []) and all(row["us"] > 0 and (row["error"] or 0) < 0.01 for row in rows)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("name", bench.FORMATS)
def test_gpu_every_format_through_the_door(name, cache_folder, caplog):
    """Every kernel that says it can is raced, and none is dropped."""
    make, grid = bench.FORMATS[name]
    format, how = make((1024, 1024), torch.Generator("cuda").manual_seed(0)), How(activations=grid)
    for m in (1, 40, 300):
        x, cache = inputs(m, 1024, BF16, device="cuda"), {}
        with caplog.at_level(logging.WARNING):
            y, exact = dispatch.matmul(x, format, None, cache, how), bench._exact(format, grid, x)
        assert "does not run here" not in caplog.text and torch.equal(y, dispatch.matmul(x, format, None, cache, how))
        assert min(((y.double() - z).norm() / z.norm()).item() for z in exact) < 0.01, m
