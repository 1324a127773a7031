"""pytest tests/test_low_bits.py — below two bits: binary, ternary, PTQ1.61's salient columns, their scales, and what trains them (algorithms.md §11, 40)."""

import itertools

import pytest
import torch
from test_methods import correlated, keeps_its_promises, stats_of, weight
from test_walk import TEXT, run
from tiny import save_tiny
from torch.nn import functional as F

import compress
from compress.artifact import Writer
from compress.calibration.statistics import Stats
from compress.errors import CompressError
from compress.formats import Columns, Dense, IntGroup, Lut, Product, Scaled, Sum, build
from compress.kernels import reference
from compress.kernels.dispatch import How
from compress.linear import CompressedLinear
from compress.methods import GPTQ, Binary, Ternary
from compress.methods.dual import refit_columns, refit_rows
from compress.methods.feedback import sweep
from compress.trained import Values, floats

BF16, F64 = torch.bfloat16, torch.float64
METHODS = [Ternary(), Ternary(columns=False), Binary(), Binary(salient=0.25), Ternary(salient=0.1, salient_bits=2, columns=False)]


def damped(s, damp=0.01):
    return s.hessian + damp * s.hessian.diagonal().mean() * torch.eye(len(s.hessian), dtype=s.hessian.dtype)


def integers(m, n, bits=4, group=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (m, n), generator=g, dtype=torch.uint8)
    return IntGroup.pack(codes, torch.rand(m, n // (group or n), generator=g).bfloat16(), None, bits)


# ---- columns of two formats


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_columns_put_every_column_where_it_was(dtype):
    mask = torch.rand(77, generator=torch.Generator().manual_seed(0)) < 0.3
    k = int(mask.sum())
    fmt = Columns.pack(mask, integers(20, k), Scaled(integers(20, 77 - k, 1), torch.rand(77 - k).bfloat16()))
    expected = torch.zeros(20, 77)
    expected[:, mask], expected[:, ~mask] = fmt.first.dequantize(), fmt.second.dequantize()
    assert torch.equal(fmt.dequantize(), expected) and fmt.shape == (20, 77)
    again = build(fmt.meta(), fmt.tensors())
    assert torch.equal(again.dequantize(), expected) and fmt.nbytes() == 10 + fmt.first.nbytes() + fmt.second.nbytes()
    x, bias = torch.randn(2, 3, 77).to(dtype), torch.randn(20)
    exact = reference.matmul(x, fmt, bias, F64)
    for memory in ("keep", "bounded"):
        y = CompressedLinear(fmt, bias, How(memory=memory))(x)
        assert y.dtype == dtype and (y.double() - exact).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2) * exact.abs().max()


# ---- optimum of a row, refits, sweep: against slow references


@pytest.mark.parametrize(("method", "levels"), [(Binary, (-0.5, 0.5)), (Ternary, (-1.0, 0.0, 1.0))])
def test_the_first_scale_is_the_optimum_over_all_codes(method, levels):
    W, h = weight(5, 8).double(), torch.rand(8, generator=torch.Generator().manual_seed(3), dtype=F64) + 0.1
    C = torch.tensor(list(itertools.product(levels, repeat=8)), dtype=F64)
    C = C[C.abs().sum(1) > 0]
    best = (W * W * h).sum(1)[:, None] - ((W * h) @ C.T) ** 2 / ((C * C) @ h)  # each with the scale that suits it
    s = method.optimum(W, h)[:, None, None]
    ours = ((W[:, :, None] - s * torch.tensor(levels, dtype=F64)).abs().amin(2).square() * h).sum(1)
    torch.testing.assert_close(ours, best.amin(1), rtol=1e-9, atol=0)
    torch.testing.assert_close(method.optimum(3 * W, 2 * h), 3 * method.optimum(W, h))


def test_the_ternary_optimum_beats_the_rule_of_bitnet_on_normal_weights():
    W = torch.randn(4000, 12, generator=torch.Generator().manual_seed(0), dtype=F64)
    rounded = lambda s: float(((W / s).round().clamp(-1, 1) * s - W).square().mean())
    assert rounded(Ternary.optimum(W, torch.ones(12, dtype=F64))[:, None]) < 0.165 < 0.225 < rounded(W.abs().mean(1, keepdim=True))


def test_refits_solve_the_least_squares_problems():
    s, W = stats_of(correlated(n=24), F64), weight(6, 24).double().T.contiguous()
    Hd, g = damped(s), torch.Generator().manual_seed(0)
    L = torch.linalg.cholesky(Hd)
    Q = W.sign() * torch.rand(1, 6, generator=g, dtype=F64)
    Q[7] = 0  # a column without a code keeps its scale
    t = refit_columns(Q, W, Hd, torch.ones(24, dtype=F64), F64)
    design = torch.cat([L.T * q for q in Q.T])  # [m · n, n]
    live = Q.abs().sum(1) > 0
    expected = torch.linalg.lstsq(design[:, live], (L.T @ W).T.reshape(-1, 1)).solution[:, 0]
    torch.testing.assert_close(t[live], expected, rtol=1e-5, atol=1e-7)
    assert t[7] == 1
    part = (torch.arange(24) % 3 == 0).long()
    rows = refit_rows(Q, W, Hd, part, torch.full((2, 6), 0.5, dtype=F64), F64)
    for r in range(6):
        two = torch.stack([Q[:, r] * (part == p) for p in (0, 1)], 1)
        best = torch.linalg.lstsq(L.T @ two, (L.T @ W[:, r])[:, None]).solution[:, 0]
        torch.testing.assert_close(rows[:, r], best if (best > 0).all() else torch.full((2,), 0.5, dtype=F64), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("bits", "top"), [(1, 1), ("ternary", 2)])
def test_the_sweep_is_gptqs(bits, top):
    s, W = stats_of(correlated(), F64), weight().double()
    codes, scale, zero, loss = GPTQ(bits=bits, sym=True, group_size=-1, sweeps=0).solve(W, s, BF16)
    f, (scale, zero) = s.factor(0.01, True), (scale[:, 0], zero[:, 0])

    def project(j, w):
        q = (w / scale + zero).round().clamp(0, top)
        return q, (q - zero) * scale

    ours, error = sweep(W.T.contiguous(), f.U, f.order, project)
    assert torch.equal(ours.T, codes)
    torch.testing.assert_close(error, loss, rtol=1e-12, atol=0)


# ---- what the methods promise


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{type(m).__name__} {m.salient} {m.columns}")
def test_no_step_raises_the_error_which_is_that_of_the_damped_hessian(method):
    s, W = stats_of(correlated(n=96, tokens=1024), F64), weight(32, 96).double()
    codes, loud, scale, _, t, losses = method.solve(W, s, BF16)
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(losses)) and losses[-1] < 0.98 * losses[1] < 0.95 * losses[0]
    D = method(W, s, stored=BF16).dequantize(F64) - W
    torch.testing.assert_close(((D @ damped(s)) * D).sum(), torch.tensor(losses[-1], dtype=F64), rtol=1e-6, atol=0)
    assert all(torch.equal(v, v.bfloat16().double()) for v in (scale, t)) and int(loud.sum()) == round(method.salient * 96)
    assert int(codes[:, ~loud].max()) < method.levels


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{type(m).__name__} {m.salient} {m.columns}")
@pytest.mark.parametrize("stored", [BF16, torch.float16, torch.float32])
def test_deterministic_planned_and_finite(method, stored):
    keeps_its_promises(method, stored)


def test_bits_are_those_of_the_layouts():
    bits = lambda method: method.planned((4096, 4096), BF16, "w").bits()
    assert bits(Binary()) == 1 + 2 * 16 / 4096 and round(bits(Ternary()), 2) == 1.61  # 5 trits a byte, 820 bytes a row
    assert round(bits(Binary(salient=0.2)), 2) == 1.62  # 819 columns of 4 bits, a bit a column, three vectors


@pytest.mark.parametrize(("method", "trivial"), [
    (Binary(), lambda W: W.sign() * W.abs().mean(1, keepdim=True)),
    (Ternary(), lambda W: (W / W.abs().mean()).round().clamp(-1, 1) * W.abs().mean()),
])  # fmt: skip
def test_far_better_than_the_trivial_rule_and_better_than_gptq_in_groups(method, trivial):
    s, W = stats_of(correlated(n=256, tokens=2048)), weight(256, 256)
    gptq = GPTQ(bits=1 if method.levels == 2 else "ternary", sym=True, group_size=64, refits=2)(W, s, stored=BF16)
    ours = method(W, s, stored=BF16)
    assert s.error(W, ours.dequantize()) < 0.6 * s.error(W, trivial(W))
    assert s.error(W, ours.dequantize()) < s.error(W, gptq.dequantize()) and ours.bits() <= gptq.bits()


def test_a_scale_a_column_and_salient_columns_pay():
    x = correlated(n=128, tokens=2048)
    x[:, ::16] *= 10
    s, W = stats_of(x), weight(96, 128)
    error = lambda **options: s.error(W, Binary(**options)(W, s, stored=BF16).dequantize())
    assert error() < error(columns=False) and error(salient=0.2) < 0.6 * error()
    loud = Binary(salient=1 / 16).solve(W, s, BF16)[1]
    assert loud[::16].all() and int(loud.sum()) == 8


@pytest.mark.parametrize("method", [Ternary(), Binary()], ids=lambda m: f"{type(m).__name__} {m.salient} {m.columns}")
def test_weights_of_its_own_kind_come_back_exactly(method):
    g = torch.Generator().manual_seed(0)
    C = torch.randint(0, method.levels, (24, 64), generator=g) - (method.levels - 1) / 2
    W = C * torch.rand(24, 1, generator=g).add(0.5).bfloat16().float()
    assert torch.equal(method(W, stats_of(correlated()), stored=BF16).dequantize(), W)


def test_dead_inputs_and_a_hessian_that_fails():
    x, W = correlated(), weight()
    x[:, [3, 40]] = 0
    s = stats_of(x)
    for method in (Ternary, Binary):  # a binary code cannot be 0, but the scale of its column can
        ours, plain = (method(columns=c)(W, s, stored=BF16).dequantize() for c in (True, False))
        assert (ours[:, [3, 40]] == 0).all() and s.error(W, ours) < s.error(W, plain) < 0.5
    s = Stats(torch.full((64, 64), float("nan")))
    fmt = Ternary()(W, s, stored=BF16)
    assert s.fallbacks[0]["what"] == "solver failed, rounded to nearest" and torch.isfinite(fmt.dequantize()).all()


def test_bad_options_are_refused():
    for bad, message in (({"salient": 1.0}, r"salient 1\.0 is not a share"), ({"rounds": -1}, "rounds -1"), ({"damp": -1.0}, r"damp -1\.0")):
        with pytest.raises(CompressError, match=message):
            Binary(**bad)


# ---- training what is not a code


def smooth_formats():
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g).bfloat16()
    mask = torch.arange(64) % 4 == 0
    table = Lut.pack(torch.randint(0, 4, (24, 64), generator=g, dtype=torch.uint8), rand(24, 4), None, "lut2")
    return [Scaled(integers(24, 64, 1), rand(64)), Columns.pack(mask, integers(24, 16), integers(24, 48, 1)), table,
            Sum((integers(24, 64, 2, 32), Product((Dense(rand(24, 8)), Dense(rand(8, 64))))))]  # fmt: skip


@pytest.mark.parametrize("fmt", smooth_formats(), ids=lambda f: type(f).__name__)
def test_any_format_learns_by_its_floating_point_tensors(fmt):
    linear, x = Values(fmt, None, {}), correlated(tokens=40)
    same = linear.weight().tensors()
    assert floats(fmt) and not floats(integers(4, 8)) and not floats(Dense(torch.ones(4, 8)))
    assert torch.equal(linear(x), F.linear(x, fmt.dequantize())) and all(torch.equal(t, same[name]) for name, t in fmt.tensors().items())
    wanted = F.linear(x, weight())
    before = float((linear(x) - wanted).square().mean().detach())
    adam = torch.optim.Adam(linear.parameters(), lr=1e-2)
    for _ in range(30):
        adam.zero_grad()
        (linear(x) - wanted).square().mean().backward()
        adam.step()
    learned = linear.weight()
    assert float((F.linear(x, learned.dequantize()) - wanted).square().mean()) < 0.9 * before
    assert torch.equal(F.linear(x, learned.dequantize()), linear(x).detach())  # what was multiplied is what is stored
    for (name, old), new in zip(fmt.tensors().items(), learned.tensors().values(), strict=True):
        assert new.dtype == old.dtype and torch.equal(new, old) != old.is_floating_point(), name


class Killed(BaseException):
    pass


def test_a_model_of_all_of_them_is_tuned_stored_verified_and_resumed(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT)
    save_tiny("llama", tmp_path / "model")
    steps = [{"method": "ternary", "match": "*.self_attn.*", "propagate": 1.0}, {"method": "binary", "match": "*.down_proj"},
             {"method": "binary", "match": "*", "salient": 0.2}]  # fmt: skip
    recipe = {"name": "all", "steps": steps, "tune": {"steps": 8, "held_out": 0}}
    go = lambda out: run(tmp_path / "model", out, f"file:{tmp_path}/text.txt", recipe, samples=48)
    report = go(tmp_path / "out")
    assert {r.describe for r in report.manifest.layers.values()} == {
        "ternary channel sym · t", "int1 channel sym · t", "13 × int4 channel asym | int1 channel sym · t"}  # fmt: skip
    assert all(r.bytes == r.planned_bytes for r in report.manifest.layers.values())
    assert any(after < before for before, after in report.manifest.training.values())
    checked = compress.verify(str(tmp_path / "out"))
    assert checked.ok and checked.kl < 1e-3, checked.problems
    commit = Writer.commit

    def dying(self, shard, *args):
        if shard == "block-00001":
            raise Killed
        return commit(self, shard, *args)

    monkeypatch.setattr(Writer, "commit", dying)
    with pytest.raises(Killed):
        go(tmp_path / "killed")
    monkeypatch.setattr(Writer, "commit", commit)
    go(tmp_path / "killed")
    for file in sorted((tmp_path / "out").iterdir()):
        assert (tmp_path / "killed" / file.name).read_bytes() == file.read_bytes(), file.name
