"""python -m pytest tests/test_cpu_kernels.py: rounded activations, oneDNN's integers, horizontal fusion, ops in a compiled graph, tables that ship."""

import json
import re
import shutil

import pytest
import torch
from test_kernels import BF16, FP16, FP32, error, inputs, make
from torch._inductor.utils import run_and_get_code

import compress
from compress import linear
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
    """Not of cpu_int8's op: opcheck asks oneDNN's layout for its storage. The traces below run it."""
    x, b = inputs(2, 64, BF16), cpu_int_mm.prepare(Rounded(make(16, 64, 8, 64), "int8"))
    for bias in (None, inputs(1, 16, BF16)[0]):
        torch.library.opcheck(cpu_int_mm.op, (*activations.quantize(x, b.grid), b.weight, b.scales, bias, x.dtype))


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Nothing is timed: the kernel that `fast` names wins wherever it runs."""
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    fast = {"cpu-pack", "cpu-int-mm"}
    monkeypatch.setattr(tune, "race", lambda runs, device, seconds=0.2, twins=None: {name: 1.0 if name in fast else 100.0 for name in runs})
    monkeypatch.setattr(dispatch, "SMALL", 0)
    return fast


@pytest.mark.parametrize("format, how, winner", [
    (make(64, 128, 4, 64), How(), "cpu-pack"), (make(64, 128, 8, 128), How(activations="int8"), "cpu-int8"),
    (make(64, 128, 8, 128), How(activations="int8"), "cpu-int-mm"), (make(64, 128, 4, 64), How(activations="int8"), "rounded"),
    (Transformed(Sum((make(64, 128, 4, 128), Product((Dense(inputs(64, 4)), Dense(inputs(4, 128)))))), Dense(torch.eye(128))),
     How(activations="int8"), "parts"),
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


@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor compiles C++")
@pytest.mark.parametrize("kernel", [cpu_int8, cpu_int_mm], ids=lambda k: k.__name__.rpartition(".")[2])
def test_a_compiled_graph_rounds_where_the_norm_is_computed(kernel):
    """One pass of Inductor's makes the codes of two linears behind one norm; what multiplies them stays ours."""
    weights, x, w = [kernel.prepare(Rounded(make(48, 128, 8, 128, seed=i), "int8")) for i in (0, 1)], inputs(3, 128, BF16), inputs(1, 128, BF16, seed=2)[0]

    def norm(x: torch.Tensor) -> torch.Tensor:
        return w * (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)).to(BF16)

    def two(x: torch.Tensor) -> list[torch.Tensor]:
        return [kernel.matmul(norm(x), weight) for weight in weights]

    torch._dynamo.reset()
    found, (code,) = run_and_get_code(torch.compile(two, fullgraph=True), x)
    assert code.count("async_compile.cpp_pybinding") == 1 and len(re.findall(r"buf\d+ = torch.ops.compress.cpu_int", code)) == 2, code
    assert max(map(error, found, two(x))) < 0.02  # the norm is not rounded to 16 bits before it is rounded to 8


def test_inputs_are_not_rounded_where_that_is_slower(quick):
    """The weight's own fastest route, without a detour; fp32 is rounded whatever it costs, and so is the dense policy's input."""
    quick.clear()
    quick.update(("unrounded", "cpu-pack"))
    format, x, cache = make(64, 128, 8, 128), inputs(2, 128, BF16), {}
    y = dispatch.matmul(x, format, None, cache, How(activations="int8"))
    assert torch.equal(y, dispatch.matmul(x, format)) and {v[0].name for k, v in cache.items() if len(k) > 2} == {"cpu-pack"}
    quick.discard("cpu-pack")
    cache = {}
    dispatch.matmul(inputs(100, 128, BF16), make(64, 128, 4, 64), None, cache, How(activations="int8"))  # a weight of groups has no integer kernel here
    assert not any(isinstance(v, torch.Tensor) for v in cache.values())
    for z, how in ((x, How("dense", activations="int8")), (x.float(), How(activations="int8"))):
        exact = reference.matmul(z, Rounded(format, "int8"), dtype=torch.float64)
        assert error(dispatch.matmul(z, format, None, {}, how), exact) < 2**-7


def test_a_second_copy_has_to_be_worth_its_memory(quick, monkeypatch):
    format, us = make(64, 128, 8, 128), {1: {"cpu-int8": 11.0, "cpu-int-mm": 10.0}, 16: {"cpu-int8": 10.0}}
    monkeypatch.setattr(tune, "race", lambda runs, device, twins=None: {n: us[len(run.args[-3])].get(n, 100.0) for n, run in runs.items()})

    def names(**how):
        cache: dict = {}
        for m in (16, 1):
            dispatch.matmul(inputs(m, 128, BF16), format, None, cache, How(activations="int8", **how))
        return [v[0].name for k, v in cache.items() if len(k) > 2]

    assert names() == ["cpu-int8", "cpu-int8"] and names(memory="keep") == ["cpu-int8", "cpu-int-mm"]


def test_hysteresis_keeps_dense_unless_another_is_clearly_faster():
    options = [dispatch.CACHED, dispatch.Route("a", None, None, (dispatch.Route("a/wide", None, None),))]
    pick = lambda **us: dispatch.fastest(options, {name.replace("_", "/"): t for name, t in us.items()} | {"dense-cached": 100.0}).name
    assert pick(a=97.0) == "dense-cached" and pick(a=90.0) == "a"
    assert pick(a=90.0, a_wide=50.0) == "a/wide" and pick(a=101.0, other=1.0) == "dense-cached"
    options = [dispatch.Route(name, None, None) for name in ("rounded", "cpu-int8", "unrounded")]
    pick = lambda us: dispatch.fastest(options, {"rounded": 200.0, "unrounded": 100.0, "cpu-int8": us}).name
    assert pick(97.0) == "unrounded" and pick(90.0) == "cpu-int8"


def test_tables_that_ship_are_read_and_not_written_back(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "SHIPPED", tmp_path / "tune")
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tune").mkdir()
    (tmp_path / "tune" / "h200.json").write_text(json.dumps({"known": {"a": 1.0, "b": 2.0}}))
    monkeypatch.setattr(tune, "race", lambda runs, device, twins=None: dict.fromkeys(runs, 3.0))
    cpu, build = torch.device("cpu"), lambda: lambda name: (int, int)
    assert tune.timings("known", cpu, build, ["a", "b"], "a") == {"a": 1.0, "b": 2.0} and not (tmp_path / "cache").exists()
    assert tune.timings("new", cpu, build, ["a"], "a") == {"a": 3.0}
    assert json.loads((tmp_path / "cache" / "tune.json").read_text()) == {"new": {"a": 3.0}}


def test_the_tables_that_ship_are_of_this_form():
    for file in tune.SHIPPED.glob("*.json"):
        assert tune.read(file), file


# ---------------------------------------------------------------- fusion


@pytest.mark.parametrize("weights", [
    [make(m, 64, bits, 32, asym, seed=m) for m in (32, 7, 5)] for bits in (3, 4) for asym in (False, True)] + [
    [Dense(inputs(m, 64)) for m in (3, 5)], [Lut.pack(make(m, 64, 4, 64).unpack(), torch.arange(16.0)[None], inputs(m, 2).abs(), "t") for m in (3, 5)],
    [FloatBlock(make(m, 64, 8, 64).unpack() % 120, inputs(m, 1), None, "fp8") for m in (3, 5)],
    [FloatBlock(make(m, 32, 8, 32).unpack(), make(m, 2, 7, 1).unpack(), None, "mxfp4") for m in (3, 5)]])  # fmt: skip
def test_joined_rows_are_the_rows(weights):
    joined = join_rows(weights)
    assert torch.equal(joined.dequantize(), torch.cat([w.dequantize() for w in weights])) and type(joined) is type(weights[0])
    again = build(joined.meta(), joined.tensors())
    assert again.shape == joined.shape == (sum(w.shape[0] for w in weights), 64)
    for part, weight in zip(split_rows(joined, [w.shape[0] for w in weights]), weights, strict=True):
        assert torch.equal(part.dequantize(), weight.dequantize())


def test_what_cannot_be_joined_is_not():
    a = make(8, 64, 4, 32)
    for b in (make(8, 64, 3, 32), make(8, 64, 4, 64), make(8, 64, 4, 32, asym=True), make(8, 64, 4, 32, scales=FP32), Dense(inputs(8, 64)), Sum((a, a))):
        assert join_rows([a, b]) is None
    assert join_rows([Lut.pack(a.unpack(), torch.arange(16.0)[None] + i, inputs(8, 2), "t") for i in (0, 1)]) is None


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """A tiny Qwen2: q, k and v have biases, gate and up have none."""
    from tiny import save_tiny

    folder = tmp_path_factory.mktemp("cpu")
    save_tiny("qwen2", folder / "model")
    step = {"method": "rtn", "bits": 8, "group_size": -1, "sym": True}
    compress.run(str(folder / "model"), {"name": "w8", "steps": [step]}, output=folder / "w8", show=False)
    compress.run(str(folder / "model"), {"name": "w4", "steps": [step | {"bits": 4, "group_size": 32, "sym": False}]}, output=folder / "w4", show=False)
    return folder


def test_fused_layers_give_the_same_bits_and_keep_their_tensors(artifact, quick, monkeypatch):
    plain, fused = (compress.load(str(artifact / "w4"), fuse=f) for f in (False, True))
    calls, inner = [], dispatch.matmul
    monkeypatch.setattr(dispatch, "matmul", lambda *args: calls.append(1) or inner(*args))
    ids = torch.arange(1, 4)[None]
    with torch.inference_mode():
        expected = plain(ids).logits
        assert len(calls) == 14 and torch.equal(fused(ids).logits, expected) and len(calls) == 14 + 8 + 2  # gate and up are one inside SiLU(gate) · up
    assert fused.state_dict().keys() == plain.state_dict().keys()
    q = fused.model.layers[0].self_attn.q_proj
    assert q.fused[0].x is None and not q.cache and any(v[0].name == "cpu-pack" for k, v in q.fused[0].cache.items() if len(k) > 2)
    fused.to(torch.float32)
    assert not q.fused[0].cache


class Wrong(torch.nn.Module):
    """Children of the same names, another function."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how
        self.gate_proj, self.up_proj, self.down_proj = (torch.nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, more=None):
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.how == "gelu":
            return self.down_proj(torch.nn.functional.gelu(gate) * up)
        if self.how == "swapped":
            return self.down_proj(torch.nn.functional.silu(up) * gate)
        return self.down_proj(torch.nn.functional.silu(gate) * up) + (more if self.how == "asks" else 0)


def test_a_gate_is_recognized_by_what_it_computes():
    names = ["gate_proj", "up_proj"], "down_proj"
    assert [linear.is_gated(Wrong(how), *names) for how in ("", "gelu", "swapped", "asks")] == [True, False, False, False]
    assert not linear.is_gated(Wrong(""), ["gate_proj"], "down_proj") and not linear.is_gated(Wrong(""), ["gate_proj", "up_proj", "x"], "down_proj")


@pytest.mark.parametrize("name, gated", [("qwen2", 2), ("phi3", 2), ("gemma2", 0), ("opt", 0), ("mixtral", 8)])
def test_models_whose_gate_goes_into_the_product(name, gated, quick, tmp_path):
    """Llama-like ones, Phi-3's and experts whose gate and up are one linear already; the same bits as without."""
    from tiny import save_tiny

    save_tiny(name, tmp_path / "model")
    step = {"method": "rtn", "bits": 4, "group_size": 32}
    compress.run(str(tmp_path / "model"), {"name": "w4", "steps": [step]}, output=tmp_path / "w4", show=False)
    plain, fused = (compress.load(str(tmp_path / "w4"), fuse=f) for f in (False, True))
    assert sum(isinstance(m, linear.GatedMLP) for m in fused.modules()) == gated and fused.state_dict().keys() == plain.state_dict().keys()
    ids = torch.arange(1, 9)[None]
    with torch.inference_mode():
        assert torch.equal(fused(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("options", [{}, {"fuse": True}, {"activations": "int8"}], ids=["plain", "fused", "int8"])
def test_compiled_whole_with_packed_routes_inside(artifact, quick, options):
    """generate() through a static cache: prefill eager, the decoding step one graph; the same tokens."""
    path = str(artifact / ("w8" if "activations" in options else "w4"))
    ids, more = torch.arange(1, 9)[None], dict(max_new_tokens=6, do_sample=False)
    expected = compress.load(path, **options).generate(ids, **more)
    model = compress.load(path, compile=True, **options)
    config = model.generation_config.compile_config
    assert config.fullgraph and model.generation_config.cache_implementation == "static"
    seen: list[str] = []

    def backend(graph, example):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    config.backend = backend
    torch._dynamo.reset()
    assert not options.get("activations") or {v[0].name for m in model.modules() for k, v in getattr(m, "cache", {}).items() if len(k) > 2} == {"cpu-int-mm"}
    assert torch.equal(model.generate(ids, **more), expected)
    assert sum(("int4pack" if path.endswith("w4") else "cpu_int_mm") in target for target in seen) == (8 if "fuse" in options else 14), set(seen)


def test_activations_are_refused_and_measured(artifact):
    with pytest.raises(CompressError, match="int8, int4, fp8"):
        compress.load(str(artifact / "w8"), activations="int2")
    same = dict(samples=2, seqlen=32, device="cpu", show=False)
    kl = {a: compress.evaluate(str(artifact / "w8"), str(artifact / "model"), activations=a, **same)["kl"]["mean"] for a in (None, "int8", "int4")}
    assert kl[None] < kl["int8"] < kl["int4"]
    fast = compress.load(str(artifact / "w8"), dtype=FP32, activations="int8")
    slow = compress.load(str(artifact / "w8"), dtype=FP32, activations="int8", policy="dense")
    ids = torch.arange(1, 9)[None]
    torch.testing.assert_close(fast(ids).logits, slow(ids).logits, rtol=1e-4, atol=1e-4)


def test_tune_tells_every_route(artifact, quick, capsys):
    found = compress.tune_kernels(str(artifact / "w4"), (1, 4), device="cpu", memory="bounded", show=False)
    assert {r["route"] for r in found} == {"cpu-pack"} and {r["rows"] for r in found} == {1, 4} and sum(r["layers"] for r in found if r["rows"] == 1) == 14
    kept = {name: us for name, us in found[0]["us"].items() if name != "cpu-native"}  # which not every processor has
    assert kept == {"dense-streamed": 100.0, "cpu-pack": 1.0} and "not rounded" in found[0]["refused"]["cpu-int8"]
    with pytest.raises(CompressError, match="no compressed layers"):
        compress.tune_kernels(str(artifact / "model"), device="cpu")
