"""pytest tests/test_tables.py — tables of values (NF4, FP4, LNQ), float zero points (HQQ) and column scales (SINQ), algorithms.md §37, §46.1."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from test_methods import correlated, keeps_its_promises, stats_of, weight
from test_walk import TEXT, run
from tiny import save_tiny

import compress
from compress.calibration.statistics import Stats
from compress.errors import CompressError
from compress.formats import IntGroup, Lut, Scaled
from compress.kernels import cpu_int, dispatch, reference
from compress.linear import CompressedLinear
from compress.methods import GPTQ, HQQ, LNQ, NF, RTN, SINQ, grid
from compress.methods.feedback import sweep
from compress.methods.lnq import project, quartic_means, refit_tables

BF16 = torch.bfloat16
METHODS = [NF(group_size=32), NF("fp4", group_size=-1), HQQ(bits=3, group_size=32), SINQ(bits=3, group_size=32), LNQ(bits=3), LNQ(bits=1)]


# ---- formats


@pytest.mark.parametrize(("bits", "n"), [(1, 33), (2, 96), (3, 77), (4, 64), (6, 45)])
def test_a_table_is_looked_up_code_by_code(bits, n):
    codes = torch.randint(0, 2**bits, (5, n), dtype=torch.uint8)
    shared, rows, scales = torch.randn(1, 2**bits), torch.randn(5, 2**bits).half(), torch.rand(5, n // 11 if n % 11 == 0 else 1).bfloat16()
    a, b = Lut.pack(codes, shared, scales, "x"), Lut.pack(codes, rows, None, "y")
    size = n // scales.shape[1]
    for i, j in itertools.product(range(5), range(n)):
        assert a.dequantize()[i, j] == shared[0, int(codes[i, j])] * scales[i, j // size].float()
        assert b.dequantize()[i, j] == rows[i, int(codes[i, j])].float()
    assert torch.equal(a.unpack(), codes) and a.dequantize(BF16).dtype == BF16
    assert (a.describe(), b.describe()) == (f"x g{size}", "y row")


def test_layers_of_every_new_format_run_dense():
    """Kernels know none of these leaves: the dequantized matrix, whatever the policy, and float zeros in the int4 op of the CPU."""
    s, W, bias = stats_of(correlated()), weight(), torch.randn(24)
    for method in METHODS:
        fmt = method(W, s, stored=BF16)
        for dtype, limit in ((torch.float32, 1e-5), (BF16, 2e-2)):
            x = torch.randn(2, 3, 64).to(dtype)
            exact = reference.matmul(x, fmt, bias, torch.float64)
            for memory in ("keep", "bounded"):
                y = CompressedLinear(fmt, bias, memory=memory)(x)
                assert y.dtype == dtype and (y.double() - exact).abs().max() < limit * exact.abs().max()


def test_kernels_handle_or_refuse_float_zeros():
    g = torch.Generator().manual_seed(0)
    for bits in (1, 2, 3, 4, 5, 8):
        codes = torch.randint(0, 2**bits, (20, 64), generator=g, dtype=torch.uint8)
        zeros = (2**bits * torch.rand(20, 2 if bits <= 4 else 1, generator=g) - 0.5).half()
        fmt, x = IntGroup.pack(codes, torch.rand(zeros.shape, generator=g).bfloat16(), zeros, bits), torch.eye(64).to(BF16)
        assert torch.equal(fmt.zero_points(), zeros.float()) and "float zero" in fmt.describe()
        if bits > 4:
            assert "float zero points" in cpu_int.supports(fmt, x)
        else:
            ours = cpu_int.matmul(x, cpu_int.prepare(fmt)).T.float()
            step = fmt.scales.float().repeat_interleave(32, dim=1)
            assert ((ours - fmt.dequantize()).abs() <= 2**-8 * (fmt.dequantize().abs() + 8 * step)).all()
        if triton_int := dispatch._kernel("triton_int"):
            assert "float zero points" in triton_int.supports(fmt, x)


# ---- what every method promises


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("stored", [BF16, torch.float16, torch.float32])
def test_deterministic_planned_and_finite(method, stored):
    keeps_its_promises(method, stored)


def test_groups_that_do_not_fit_are_refused_with_a_way_out():
    for method in (NF(), HQQ(), SINQ()):
        with pytest.raises(CompressError, match=r"down_proj: in_features 96 is not a multiple of group_size 64; use 16, 32, 48, 96 or -1"):
            method(torch.randn(4, 96), None, stored=BF16, where="down_proj")
        with pytest.raises(CompressError, match="in_features 96 is not a multiple of group_size 64"):
            method.planned((4, 96), BF16, "down_proj")
    for bad in (lambda: HQQ(p=0), lambda: HQQ(kappa=0.5), lambda: SINQ(iterations=-1), lambda: LNQ(rounds=-1), lambda: LNQ(damp=-1)):
        with pytest.raises(CompressError):
            bad()


def test_a_model_of_all_of_them_is_stored_verified_and_loaded(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    save_tiny("llama", tmp_path / "model")
    steps = [{"method": "nf", "match": "*.[qk]_proj"}, {"method": "hqq", "match": "*.v_proj", "group_size": 32}, {"method": "lnq", "match": "*.o_proj"},
             {"method": "sinq", "match": "*.mlp.*", "group_size": 32}]  # fmt: skip
    report = run(tmp_path / "model", tmp_path / "out", f"file:{tmp_path}/text.txt", {"name": "all", "steps": steps})
    assert {r.method: r.describe for r in report.manifest.layers.values()} == {
        "nf": "nf4 g64", "hqq": "int4 g32 float zero", "lnq": "lut3 row", "sinq": "int4 g32 asym · t"}  # fmt: skip
    assert all(r.bytes == r.planned_bytes for r in report.manifest.layers.values()) and report.fallbacks == []
    checked = compress.verify(str(tmp_path / "out"))
    assert checked.ok and checked.kl < 1e-4, checked.problems


# ---- NF4 and FP4


def golden_weight():
    """[2, 128], exact in bf16, with a run of zeros and blocks of very different size."""
    W = torch.tensor([[((37 * (128 * i + j) ** 2 + 11 * j) % 211 - 105) / 64 * (128 * i + j >= 8) for j in range(128)] for i in range(2)])
    W[1, 64:] /= 128
    return W


@pytest.mark.parametrize(("kind", "packed"), [
    ("nf4", ["77777777ab0de312c9d3150f2ee2ff512b7a1f2dbe76d66d89fde413ece75b33923b56ebd313ecf76c44b45d8a0e07481f2ed0cc0de2f18470e0a8d54b44c67f",
             "01a6a1f2dcfa9e9a0cd201b7b213ee1dd1de2f1836fd096c32922934d7a1e095a2150f3ff401836ede638104ff3f0512a590e1a7d43922923c690df6381f2ed1"]),
    ("fp4", ["0000000074b22cad565caeb3d22d33fad497a3a542195ee216352cac2439e4cd6dd4f9242dad2431e5fc4fe267b2b0c1b3d25b55b52d3b1c0b2b762ef4cf5e13",
             "ba7e7a3d25376367b52dba494aac22a55a22d3b1c932b695cd6dd6dc517b2b6e7aafb3d33cba6ce353ec6abc33d3bfaa7e6b2b715cd6dd6dc596b239c1b3d22a"]),
])  # fmt: skip
def test_codes_and_scales_are_those_of_bitsandbytes(kind, packed):
    """quantize_4bit(W.bfloat16(), blocksize=64) of bitsandbytes 0.50.2 on CPU: two codes a byte, the first one in the high half."""
    W, octets = golden_weight(), torch.tensor(list(bytes.fromhex("".join(packed))))
    codes = torch.stack([octets >> 4, octets & 15], dim=1).view(2, 128)
    for stored in (BF16, torch.float32):
        fmt = NF(kind)(W, None, stored=stored)
        assert torch.equal(fmt.unpack(), codes) and fmt.scales.dtype == stored
        assert fmt.scales.flatten().tolist() == [1.640625, 1.625, 1.640625, 0.0128173828125]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_value_of_the_table_is_kept_and_every_weight_goes_to_the_nearest(kind):
    table = NF(kind)(torch.ones(1, 64), None, stored=BF16).table[0]
    exact = F.pad(table, (0, 48), value=1.0)[None] * 3
    assert torch.equal(NF(kind)(exact, None, stored=torch.float32).dequantize(), exact)
    W = weight()
    fmt = NF(kind, group_size=32)(W, None, stored=torch.float32)
    distance = (W.view(24, 2, 32, 1) / fmt.scales[:, :, None, None] - table).abs().amin(-1) * fmt.scales[:, :, None]
    torch.testing.assert_close((fmt.dequantize() - W).abs().view(24, 2, 32), distance, atol=1e-6, rtol=0)


def test_nf4_beats_fp4_and_uniform_levels_on_normal_weights():
    W = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    error = lambda method: float((method(W, None, stored=BF16).dequantize() - W).square().mean())
    assert error(NF()) < 0.95 * error(RTN(sym=True, group_size=64)) and error(NF()) < 0.7 * error(NF("fp4"))


# ---- HQQ


def slow_hqq(w, scale, zero, bits, p, beta, kappa, iterations):
    """One group in plain Python: the zero point of the smallest Σ|error|, in steps."""
    best, lowest = None, float("inf")
    for i in range(iterations + 1):
        z = float(torch.tensor(zero).half())
        q = [min(max(round(x / scale + z), 0), 2**bits - 1) for x in w]
        r = [x / scale - (c - z) for x, c in zip(w, q, strict=True)]
        if (error := sum(abs(x) for x in r)) < lowest:
            best, lowest = z, error
        if i < iterations:
            e = [0.0 if x == 0 else (1 if x > 0 else -1) * max(0.0, abs(x) - abs(x) ** (p - 1) / beta) for x in r]
            zero, beta = sum(c - (x / scale - y) for c, x, y in zip(q, w, e, strict=True)) / len(w), beta * kappa
    return best


@pytest.mark.parametrize("bits", [2, 4])
def test_hqq_zero_points_against_plain_python(bits):
    W, method = weight(6, 64).double().view(6, 2, 32), HQQ(bits=bits)
    g = grid.fit(W.float(), 2**bits, bits, False, "mse", None, BF16)
    zero = method._zero(W, g.scale.double(), g.zero.double(), g)
    for i, k in itertools.product(range(6), range(2)):
        assert float(zero[i, k]) == slow_hqq(W[i, k].tolist(), float(g.scale[i, k]), float(g.zero[i, k]), bits, 0.7, 10.0, 1.01, 20)
    fmt = HQQ(bits=bits, group_size=32)(W.float().view(6, 64), None, stored=BF16)
    assert fmt.zeros.dtype == torch.float16 and torch.equal(fmt.scales.float(), g.scale) and (fmt.zeros.double() - zero).abs().max() < 0.1


@pytest.mark.parametrize("nothing", [{"iterations": 0}, {"beta": float("inf"), "p": 1.0}])
def test_hqq_without_iterations_or_with_infinite_beta_is_rounding(nothing):
    W = weight()
    ours, plain = HQQ(bits=3, group_size=32, **nothing)(W, None, stored=BF16), RTN(bits=3, group_size=32, clip="mse")(W, None, stored=BF16)
    assert torch.equal(ours.unpack(), plain.unpack()) and torch.equal(ours.dequantize(), plain.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hqq_lowers_what_it_minimises_in_every_group(bits):
    W = weight(32, 256)
    for clip in ("none", "mse"):
        ours, plain = (cls(bits=bits, group_size=64, clip=clip)(W, None, stored=BF16) for cls in (HQQ, RTN))
        damage = lambda fmt: ((fmt.dequantize() - W).view(32, 4, 64) / fmt.scales.float()[:, :, None]).abs().sum(-1)
        assert (damage(ours) <= damage(plain) * (1 + 1e-4)).all() and damage(ours).sum() < 0.98 * damage(plain).sum()


# ---- SINQ


def loud_columns():
    g = torch.Generator().manual_seed(2)
    return torch.randn(48, 128, generator=g) * torch.rand(128, generator=g).mul(3).exp() * torch.rand(48, 1, generator=g).add(0.1)


def imbalance(W):
    std = torch.cat([W.std(0, correction=0), W.std(1, correction=0)])
    return float(std.max() / std.min())


def test_sinq_without_iterations_is_rounding():
    W = weight()
    ours, plain = SINQ(bits=3, group_size=32, iterations=0)(W, None, stored=BF16), RTN(bits=3, group_size=32, clip="mse")(W, None, stored=BF16)
    assert isinstance(ours, Scaled) and (ours.columns == 1).all() and torch.equal(ours.dequantize(), plain.dequantize())


def test_sinq_balances_the_columns_and_rounds_what_is_left():
    W = loud_columns()
    t = SINQ().columns(W)
    spread = lambda W: float(W.std(0).max() / W.std(0).min())
    assert spread(W / t) < 2 < 10 < spread(W)
    rows = (W / t).std(1, keepdim=True, correction=0)
    assert imbalance(W / t / rows) < 1.1 < 10 < imbalance(W / W.std(1, keepdim=True, correction=0))
    fmt = SINQ(bits=4, group_size=64)(W, None, stored=BF16)
    plain = RTN(bits=4, group_size=64, clip="mse")(W / fmt.columns.float(), None, stored=BF16)  # by the rounded t: nothing is rounded twice
    assert torch.equal(fmt.inner.unpack(), plain.unpack()) and fmt.nbytes() == plain.nbytes() + 2 * 128
    torch.testing.assert_close(SINQ().columns(1000 * W), t)  # the scale of the layer is not the columns' business


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_sinq_beats_rounding_where_columns_differ(bits):
    W = loud_columns()
    x = torch.randn(512, 128, generator=torch.Generator().manual_seed(3)) / W.std(0)  # loud weights, quiet inputs, as layers have them
    s = stats_of(x)
    ours, plain = (cls(bits=bits, group_size=64, clip="mse")(W, s, stored=BF16).dequantize() for cls in (SINQ, RTN))
    assert s.error(W, ours) < 0.6 * s.error(W, plain)


# ---- LNQ


def damped(s, damp=0.01):
    return s.hessian + damp * s.hessian.diagonal().mean() * torch.eye(len(s.hessian), dtype=s.hessian.dtype)


@pytest.mark.parametrize("levels", [2, 8])
def test_quartic_means_are_a_fixed_point_that_beats_ordinary_means(levels):
    W, h = weight(6, 200).double(), torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    c = quartic_means(W, h, levels)
    assert (c.diff(dim=1) > 0).all()
    nearest = (W[:, :, None] - c[:, None]).abs().argmin(2)
    cost = lambda c: ((W[:, :, None] - c[:, None]).abs().amin(2) ** 4 * h).sum(1)
    for i, k in itertools.product(range(6), range(levels)):
        cell = nearest[i] == k
        if cell.sum() > 1:  # the derivative of Σ h (w − c)⁴ is zero: no move of one value alone helps
            assert abs(float((h[cell] * (W[i, cell] - c[i, k]) ** 3).sum())) < 1e-4 * float((h[cell] * (W[i, cell] - c[i, k]).abs() ** 3).sum())
    grid = torch.linspace(0, 1, levels, dtype=torch.float64) * (W.amax(1) - W.amin(1))[:, None] + W.amin(1)[:, None]
    assert (cost(c) < cost(grid)).all()


def test_the_sweep_equals_gptq_on_the_same_levels():
    """Rows whose table is GPTQ's own grid get GPTQ's codes: one error feedback, two kinds of level."""
    s, W = stats_of(correlated(), torch.float64), weight().double()
    codes, scale, zero, _ = GPTQ(bits=3, group_size=-1, sweeps=0).solve(W, s, BF16)
    table = ((torch.arange(8) - zero) * scale).T.contiguous()  # [8, m]
    f = s.factor(0.01, True)
    assert torch.equal(sweep(W.T, f.U, f.order, lambda j, w: project(w, table))[0].T, codes)


def test_a_refit_solves_the_least_squares_problem_of_each_row():
    s, W = stats_of(correlated(n=96), torch.float64), weight(6, 96).double()
    codes, table, _ = LNQ(bits=2, rounds=0).solve(W, s, torch.float64)
    codes[0][codes[0] == 1] = 2  # a value that no code names stays as it was
    ridge = s.ridge(s.factor(0.01, True))
    new_codes, new = refit_tables(codes.T.contiguous(), W.T.contiguous(), s.hessian, ridge, table.T.contiguous(), torch.float64)
    L = torch.linalg.cholesky(damped(s))
    for r in range(6):
        P = F.one_hot(codes[r].long(), 4).double()
        used = P.sum(0) > 0
        expected = torch.linalg.lstsq((P[:, used].T @ L).T, (W[r] @ L)[:, None]).solution[:, 0]
        torch.testing.assert_close(new[:, r].gather(0, new_codes[:, r].long()), P[:, used] @ expected, rtol=1e-6, atol=1e-8)
    assert table[0, 1] in new[:, 0] and (new.diff(dim=0) >= 0).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_rounds_never_raise_the_error_and_the_loss_is_the_damped_hessian_error(bits):
    s, W = stats_of(correlated(n=128, tokens=1024), torch.float64), weight(32, 128).double()
    losses = []
    for rounds in (0, 1, 3, 6):
        codes, table, loss = LNQ(bits=bits, rounds=rounds).solve(W, s, BF16)
        D = table.gather(1, codes.long()) - W
        torch.testing.assert_close(loss, ((D @ damped(s)) * D).sum(), rtol=1e-9, atol=0)
        assert torch.equal(table, table.bfloat16().double()) and (table.diff(dim=1) >= 0).all()
        losses.append(float(loss))
    assert losses[0] > losses[1] > losses[2] >= losses[3]
    targets = table.gather(1, codes.long()) - (D @ damped(s)) / damped(s).diagonal()
    best = torch.stack([project(w, table.T)[0] for w in targets.T], 1)
    assert (best != codes).double().mean() < 0.02  # next to no single code can change and lower the error


def test_block_size_and_chunks_do_not_change_the_result(monkeypatch):
    s, W = stats_of(correlated(), torch.float64), weight().double()
    a = LNQ(bits=2).solve(W, s, BF16)
    monkeypatch.setattr("compress.methods.lnq.CHUNK", 300)
    for b in (LNQ(bits=2, block_size=k).solve(W, s, BF16) for k in (1, 7, 500)):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_lnq_beats_rounding_and_gptq_with_one_grid_a_row(bits):
    s, W = stats_of(correlated(n=256, tokens=2048)), weight(48, 256)
    ours = LNQ(bits=bits)(W, s, stored=BF16)
    sym = bits == 1
    plain, gptq = (cls(bits=bits, group_size=-1, sym=sym, clip="hessian")(W, s, stored=BF16) for cls in (RTN, GPTQ))
    assert s.error(W, ours.dequantize()) < 0.95 * s.error(W, gptq.dequantize()) < s.error(W, plain.dequantize())
    assert ours.bits() == bits + 16 * 2**bits / 256


def test_rows_of_two_values_come_back_exactly():
    g = torch.Generator().manual_seed(0)
    W = torch.randn(24, 2, generator=g).bfloat16().float().gather(1, torch.arange(64).repeat(24, 1) % 2)
    assert torch.equal(LNQ(bits=1)(W, stats_of(correlated()), stored=BF16).dequantize(), W)


def test_lnq_on_dead_inputs_few_tokens_and_a_hessian_that_fails():
    x, W = correlated(), weight()
    x[:, [3, 40]] = 0
    for s in (stats_of(x), stats_of(correlated(tokens=16))):
        assert s.error(W, LNQ(bits=4)(W, s, stored=BF16).dequantize()) < 2e-2
    s = Stats(torch.full((64, 64), float("nan")))
    fmt = LNQ(bits=4)(W, s, stored=BF16)  # nearest values of the row's own table, and it is told
    assert s.fallbacks[0]["what"] == "solver failed, rounded to nearest" and (fmt.dequantize() - W).square().mean() < 0.01 * W.square().mean()
