"""pytest tests/test_methods.py — statistics, grids, RTN and GPTQ against slow fp64 references and their properties (algorithms.md §1)."""

import itertools

import pytest
import torch

from compress.calibration.statistics import Stats
from compress.errors import CompressError
from compress.methods import GPTQ, RTN, grid
from compress.methods.options import IntOptions
from compress.methods.refit import refit_scales


def correlated(n=64, tokens=512, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=g) / n**0.5
    x = torch.randn(tokens, n, generator=g) @ (mix + 0.3 * torch.eye(n)) * torch.rand(n, generator=g).add(0.1).mul(2).exp()
    return x.to(dtype)


def stats_of(x, dtype=torch.float32):
    s = Stats.zeros(x.shape[1])
    for part in x.split(100):
        s.add(part)
    s.finish()
    if dtype == torch.float64:
        s.hessian = (x.double().T @ x.double()) / len(x)
    return s


def weight(m=24, n=64, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=g) * torch.rand(m, 1, generator=g).add(0.2)


# ---- statistics


def keeps_its_promises(method, stored):
    """The same bytes twice, the bytes that were planned, and finite numbers whatever is zero."""
    s, W = stats_of(correlated()), weight().to(stored).float()
    a, b = (method(W.clone(), s, stored=stored) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.tensors().values(), b.tensors().values(), strict=True))
    planned = method.planned((24, 64), stored, "w")
    assert planned.nbytes() == a.nbytes() and planned.meta() == a.meta() and planned.describe() == a.describe()
    zero = W.clone()
    zero[3:7] = 0
    zero[:, 10:50] = 0
    for Z in (zero, torch.zeros(24, 64)):
        fmt = method(Z, s, stored=stored)
        assert all(torch.isfinite(t.float()).all() for t in fmt.tensors().values()) and (fmt.dequantize()[3:7] == 0).all()


def test_hessian_is_the_mean_outer_product_in_fp64():
    x = correlated(n=300, tokens=777)  # more than one tile, ragged batches
    s = stats_of(x)
    expected = x.double().T @ x.double() / len(x)
    torch.testing.assert_close(s.hessian.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert torch.equal(s.hessian, s.hessian.T) and s.count == 777 and s.dropped == 0


def test_bf16_activations_lose_nothing_in_the_fast_product():
    x = correlated(n=300, tokens=4096, dtype=torch.bfloat16)
    expected = x.double().T @ x.double() / len(x)
    s = Stats.zeros(300)
    s.add(x)
    error = (s.finish().hessian.double() - expected).abs().max() / expected.abs().max()
    assert error < 1e-5
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"  # the knob is put back


def test_non_finite_rows_are_counted_and_left_out():
    x = correlated(tokens=50)
    bad = torch.cat([x[:10], torch.full((1, 64), float("nan")), x[10:], torch.full((2, 64), float("inf"))])
    s = Stats.zeros(64)
    s.add(bad)
    s.finish()
    assert s.count == 50 and s.dropped == 3
    torch.testing.assert_close(s.hessian, stats_of(x).hessian)


@pytest.mark.parametrize("act_order", [False, True])
def test_factor_is_the_upper_cholesky_factor_of_the_damped_inverse(act_order):
    s = stats_of(correlated(), torch.float64)
    f = s.factor(0.01, act_order)
    Hd = s.hessian + 0.01 * s.hessian.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    Hp = Hd[f.order][:, f.order]
    torch.testing.assert_close(f.U, torch.linalg.cholesky(torch.linalg.inv(Hp), upper=True), rtol=1e-8, atol=1e-8)
    assert not f.failed and f.damp == 0.01 and s.factor(0.01, act_order) is f  # factored once, shared
    if act_order:
        assert (Hd.diagonal()[f.order].diff() <= 0).all()


def test_damping_is_raised_and_told():
    x = torch.ones(8, 16)  # rank one
    s = stats_of(x)
    f = s.factor(0.0, False)
    assert f.damp > 0 and not f.failed
    assert s.fallbacks == [{"what": "damping raised", "detail": f"from 0 to {f.damp:g}"}]


def test_a_hessian_that_cannot_be_factored_gives_rounding_and_says_so():
    s = stats_of(correlated())
    s.hessian = -s.hessian
    s.hessian.diagonal().abs_()
    f = s.factor(0.01, False)
    if f.failed:
        assert s.fallbacks[0]["what"] == "solver failed, rounded to nearest"
    s.hessian.fill_(float("nan"))
    s._factors.clear()
    assert s.factor(0.01, False).failed


# ---- grids


def slow_fit(w, levels, bits, sym, dtype):
    """min-max grid of one group, in plain Python."""
    lo, hi = min(0.0, min(w)), max(0.0, max(w))
    if sym:
        extreme = lo if -lo > hi else hi
        if levels == 3:
            s, z = abs(extreme), 1.0
        elif sym == "full" and bits > 1:
            s, z = extreme / -(2 ** (bits - 1)), 2 ** (bits - 1)
        else:
            s, z = 2 * abs(extreme) / (levels - 1), 0.5 if bits == 1 else 2 ** (bits - 1)
    else:
        s, z = (hi - lo) / (levels - 1), None
    s = torch.tensor(s, dtype=torch.float32).to(dtype).float().item() or 1.0
    if z is None:
        z = min(max(round(-lo / s), 0), levels - 1)
    return s, float(z)


@pytest.mark.parametrize(("bits", "sym"), [*itertools.product([2, 3, 4, 8], [False, True, "full"]), (1, True), ("ternary", True)])
def test_min_max_grid_against_plain_python(bits, sym):
    options = IntOptions(bits=bits, sym=sym)
    W = weight(6, 64).view(6, 2, 32)
    g = grid.fit(W, options.levels, options.code_bits, sym, "none", None, torch.bfloat16)
    for i, k in itertools.product(range(6), range(2)):
        assert (g.scale[i, k].item(), g.zero[i, k].item()) == slow_fit(W[i, k].tolist(), options.levels, options.code_bits, sym, torch.bfloat16)


@pytest.mark.parametrize("sym", [False, True, "full"])
def test_clip_search_never_raises_the_damage_it_minimises(sym):
    W, h = weight(16, 128).pow(3).view(16, 2, 64), torch.rand(2, 64)
    for bits, power in ((2, 4), (3, 3), (4, 2)):
        damages = {}
        for clip in ("none", "hessian"):
            g = grid.fit(W, 2**bits, bits, sym, clip, h, torch.bfloat16, power)
            D = ((g.codes(W, g.scale[..., None], g.zero[..., None]) - g.zero[..., None]) * g.scale[..., None] - W).double().abs()
            damages[clip] = (D**power * h).sum(-1)
        assert (damages["hessian"] <= damages["none"] * (1 + 1e-5)).all() and damages["hessian"].sum() < damages["none"].sum()


def test_an_all_zero_group_is_zero_and_finite():
    for cls in (RTN, GPTQ):
        for sym in (False, True, "full"):
            fmt = cls(bits=4, group_size=32, sym=sym, clip="none")(torch.zeros(4, 64), stats_of(correlated()), stored=torch.bfloat16)
            assert torch.equal(fmt.dequantize(), torch.zeros(4, 64))


# ---- RTN and GPTQ


def slow_gptq(W, H, g, order, damp, group_size):
    """OBS one column at a time with the inverse Hessian written out (arXiv 2210.17323 eq. 2-3), fp64, no Cholesky, no blocks."""
    W, n = W.double().clone(), W.shape[1]
    Hd = H.double() + damp * H.double().diagonal().mean() * torch.eye(n, dtype=torch.float64)
    Q, left = torch.zeros_like(W), list(order)
    while left:
        i, inv = left[0], torch.linalg.inv(Hd[left][:, left])
        s, z = g.scale[:, i // group_size].double(), g.zero[:, i // group_size].double()
        Q[:, i] = (((W[:, i] / s + z).round().clamp(0, g.levels - 1)) - z) * s
        W[:, left] -= torch.outer(W[:, i] - Q[:, i], inv[0] / inv[0, 0])
        left = left[1:]
    return Q


@pytest.mark.parametrize(("bits", "sym", "act_order"), [(4, False, True), (3, True, False), (2, "full", True), ("ternary", True, True), (1, True, False)])
def test_gptq_equals_the_slow_reference(bits, sym, act_order):
    x, W = correlated(), weight()
    s = stats_of(x, torch.float64)
    method = GPTQ(bits=bits, sym=sym, act_order=act_order, group_size=32, clip="none", block_size=16, sweeps=0)
    codes, scale, zero, _ = method.solve(W.double(), s, torch.bfloat16)
    got = (codes.view(24, 2, 32).double() - zero[:, :, None]) * scale[:, :, None]
    g = grid.fit(W.view(24, 2, 32), method.levels, method.code_bits, sym, "none", None, torch.bfloat16)
    order = s.hessian.diagonal().argsort(descending=True, stable=True).tolist() if act_order else range(64)
    torch.testing.assert_close(got.view(24, 64), slow_gptq(W, s.hessian, g, order, 0.01, 32), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_dynamic_groups_are_fitted_on_the_compensated_weights(bits):
    """Blocks smaller and larger than a group give the codes of one big block: no group is ever fitted on stale weights."""
    s, W = stats_of(correlated(), torch.float64), weight().double()
    results = [GPTQ(bits=bits, group_size=16, act_order=False, static_groups=False, block_size=b).solve(W, s, torch.bfloat16) for b in (64, 8, 24, 32)]
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0]) and torch.equal(results[0][1], other[1])
    static = GPTQ(bits=bits, group_size=16, act_order=False, block_size=64).solve(W, s, torch.bfloat16)
    assert not torch.equal(static[1], results[0][1])


def test_block_size_does_not_change_the_result():
    s, W = stats_of(correlated(), torch.float64), weight().double()
    results = [GPTQ(bits=3, group_size=32, block_size=b).solve(W, s, torch.bfloat16)[0] for b in (1, 7, 64, 500)]
    assert all(torch.equal(results[0], r) for r in results[1:])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("clip", ["none", "mse"])
def test_with_an_identity_hessian_gptq_is_rtn_bit_for_bit(bits, clip):
    s, W = Stats(torch.eye(64)), weight()
    for act_order in (False, True):
        a = GPTQ(bits=bits, group_size=32, clip=clip, act_order=act_order, damp=0.0)(W, s, stored=torch.bfloat16)
        b = RTN(bits=bits, group_size=32, clip=clip)(W, s, stored=torch.bfloat16)
        assert all(torch.equal(x, y) for x, y in zip(a.tensors().values(), b.tensors().values(), strict=True))


@pytest.mark.parametrize("sweeps", [0, 3])
def test_the_sum_of_squared_errors_is_the_damped_hessian_error(sweeps):
    s, W = stats_of(correlated(), torch.float64), weight().double()
    codes, scale, zero, loss = GPTQ(bits=3, group_size=32, sweeps=sweeps).solve(W, s, torch.bfloat16)
    D = ((codes.view(24, 2, 32) - zero[:, :, None]) * scale[:, :, None]).view(24, 64).double() - W
    Hd = s.hessian + 0.01 * s.hessian.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    torch.testing.assert_close(loss, ((D @ Hd) * D).sum(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("bits", ["ternary", 2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_gptq_beats_rounding_on_correlated_inputs(bits, group_size):
    s, W = stats_of(correlated(n=128, tokens=2048)), weight(48, 128)
    sym = bits == "ternary"
    for clip in ("none", "hessian"):
        plain = RTN(bits=bits, group_size=group_size, sym=sym, clip=clip)(W, s, stored=torch.bfloat16)
        ours = GPTQ(bits=bits, group_size=group_size, sym=sym, clip=clip)(W, s, stored=torch.bfloat16)
        assert s.error(W, ours.dequantize()) < 0.7 * s.error(W, plain.dequantize())
        assert ours.nbytes() == plain.nbytes()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_descent_never_raises_the_error_and_stops_at_a_coordinate_minimum(bits):
    s, W = stats_of(correlated(n=128, tokens=1024), torch.float64), weight(48, 128).double()
    results = [GPTQ(bits=bits, group_size=32, sweeps=k).solve(W, s, torch.bfloat16) for k in (0, 1, 2, 100)]
    losses = [float(r[3]) for r in results]
    assert losses[0] > losses[1] >= losses[2] >= losses[3]
    codes, scale, zero, _ = results[3]
    Hd = s.hessian + 0.01 * s.hessian.diagonal().mean() * torch.eye(128, dtype=torch.float64)
    S, Z = (t.repeat_interleave(32, 1).double() for t in (scale, zero))
    D = ((codes - Z) * S - W) @ Hd
    better = 0
    for step in (-1, 1):  # no single code can move by one level and lower the error (stopping at 1e-4 of changes leaves very few)
        legal = (codes.int() + step >= 0) & (codes.int() + step < 2**bits)
        gain = 2 * step * S * D + S.square() * Hd.diagonal()
        better += int(((gain < -1e-9) & legal).sum())
    assert better <= 1e-3 * codes.numel()


@pytest.mark.parametrize("block_size", [1, 7, 128])
def test_descent_does_not_depend_on_the_block_size(block_size):
    s, W = stats_of(correlated(), torch.float64), weight().double()
    a, b = (GPTQ(bits=2, group_size=32, sweeps=2, block_size=k).solve(W, s, torch.bfloat16)[0] for k in (64, block_size))
    assert torch.equal(a, b)


def test_refitted_scales_solve_the_least_squares_problem_of_each_row():
    s, W = stats_of(correlated(n=96, tokens=512), torch.float64), weight(6, 96).double()
    codes, scale, zero, _ = GPTQ(bits=2, group_size=32, sweeps=0, act_order=False).solve(W, s, torch.float64)
    ridge, groups = s.ridge(s.factor(0.01, False)), torch.arange(96) // 32
    new = refit_scales(codes.T, W.T, s.hessian, ridge, scale.T.double(), zero.T.double(), torch.float64)
    L = torch.linalg.cholesky(s.hessian + ridge.diag())  # ‖(ŵ−w) L‖² is the error: ordinary least squares in the columns v_g L
    for r in range(6):
        V = torch.zeros(3, 96, dtype=torch.float64)
        for g in range(3):
            V[g, groups == g] = codes[r, groups == g].double() - zero[r, g].double()
        expected = torch.linalg.lstsq((V @ L).T, (W[r] @ L)[:, None]).solution[:, 0]
        torch.testing.assert_close(new[:, r], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", ["ternary", 2, 3, 4])
def test_refits_never_raise_the_error_and_store_what_they_judged(bits):
    s, W = stats_of(correlated(n=128, tokens=1024), torch.float64), weight(48, 128).double()
    make = lambda k: GPTQ(bits=bits, group_size=32, sym=bits == "ternary", refits=k).solve(W, s, torch.bfloat16)
    losses = [float(make(k)[3]) for k in (0, 1, 3)]
    assert losses[0] > losses[1] >= losses[2]
    scale = make(2)[1]
    assert torch.equal(scale, scale.bfloat16().to(scale.dtype)) and torch.isfinite(scale).all()


def test_a_group_of_zero_codes_keeps_its_scale():
    s, W = stats_of(correlated()), weight()
    W[:, 32:] = 0
    fmt = GPTQ(bits=4, group_size=32, refits=2)(W, s, stored=torch.bfloat16)
    assert torch.isfinite(fmt.scales).all() and torch.isfinite(fmt.dequantize()).all()


def test_more_bits_less_error():
    s, W = stats_of(correlated()), weight()
    errors = [s.error(W, GPTQ(bits=b, group_size=32)(W, s, stored=torch.bfloat16).dequantize()) for b in range(2, 9)]
    assert all(a > b for a, b in itertools.pairwise(errors)) and errors[-1] < 1e-4


def test_dead_inputs_get_the_zero_code_and_no_nan():
    x, W = correlated(), weight()
    x[:, [3, 40]] = 0
    s = stats_of(x)
    fmt = GPTQ(bits=4, group_size=32)(W, s, stored=torch.bfloat16)
    assert torch.isfinite(fmt.dequantize()).all() and (fmt.dequantize()[:, [3, 40]] == 0).all()


def test_permuting_inputs_permutes_codes_when_act_order_is_on():
    x, W = correlated(dtype=torch.float32), weight().double()
    p = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    method = GPTQ(bits=3, group_size=-1, sweeps=0)  # descent goes through the columns as the layer has them
    a = method.solve(W, stats_of(x, torch.float64), torch.bfloat16)[0]
    b = method.solve(W[:, p], stats_of(x[:, p], torch.float64), torch.bfloat16)[0]
    assert torch.equal(a[:, p], b)


def test_fewer_tokens_than_inputs_still_works():
    s, W = stats_of(correlated(tokens=16)), weight()
    assert s.error(W, GPTQ(bits=4, group_size=32)(W, s, stored=torch.bfloat16).dequantize()) < 1e-2


@pytest.mark.parametrize("method", [RTN, GPTQ])
def test_every_method_is_deterministic_and_keeps_to_its_plan(method):
    s, W = stats_of(correlated()), weight()
    method = method(bits=3, group_size=32)
    a, b = (method(W.clone(), s, stored=torch.float16) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.tensors().values(), b.tensors().values(), strict=True))
    planned = method.planned((24, 64), torch.float16, "w")
    assert planned.nbytes() == a.nbytes() and planned.meta() == a.meta() and a.scales.dtype == torch.float16


@pytest.mark.parametrize("method", [RTN, GPTQ])
def test_eight_bits_per_channel_is_nearly_a_no_op(method):
    s, W = stats_of(correlated()), weight()
    assert s.error(W, method(bits=8, group_size=16)(W, s, stored=torch.float32).dequantize()) < 2e-5


def test_codes_follow_the_rounded_scale():
    """Nothing is rounded twice: with the stored (bf16) scale and zero, rounding the dequantized weight again changes no code."""
    W = weight()
    fmt = RTN(bits=4, group_size=32)(W, None, stored=torch.bfloat16)
    again = (fmt.dequantize().view(24, 2, 32) / fmt.scales.float()[:, :, None] + fmt.zero_points()[:, :, None]).round()
    assert torch.equal(again.view(24, 64), fmt.unpack().float())
    assert (fmt.dequantize() - W).abs().max() <= fmt.scales.float().max() * 0.51


def test_options_that_contradict_each_other_are_refused():
    with pytest.raises(CompressError, match="static_groups"):
        GPTQ(act_order=True, static_groups=False)
    with pytest.raises(CompressError, match="set sym to true"):
        RTN(bits=1)
    with pytest.raises(CompressError, match=r"in_features 64 is not a multiple of group_size 48; use .*16.*32.*64"):
        GPTQ(group_size=48)(weight(), stats_of(correlated()), stored=torch.bfloat16)


def test_the_asymmetric_clip_never_costs_more_and_wins_where_one_tail_is_long():
    W = weight(16, 64).exp() - 0.7  # a long tail above, nothing far below zero
    h = torch.ones(1, 64)
    fit = lambda clip: grid.fit(W[:, None], 4, 2, False, clip, h, torch.bfloat16)
    damage = lambda g: (g.project(W, g.scale, g.zero)[1] - W).square().sum(1)
    symmetric, asymmetric = damage(fit("hessian")), damage(fit("asymmetric"))
    assert (asymmetric <= symmetric).all() and asymmetric.sum() < 0.99 * symmetric.sum()
    with pytest.raises(CompressError, match="moves the zero point"):
        RTN(bits=4, sym=True, clip="asymmetric")
