"""pytest tests/test_sparse.py — masks, pruning methods and sparse integers against slow fp64 references and their properties (algorithms.md §3-5, 21)."""

import itertools
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_methods import correlated, stats_of, weight

import compress
from compress.calibration.statistics import Stats
from compress.errors import CompressError
from compress.formats import Masked, Sparse24
from compress.methods import ADMM, AWP, GPTQ, METHODS, SVD, DenseSparse, Magnitude, SLiM, SparseGPT, Wanda
from compress.methods.awp import largest_eigenvalue
from compress.methods.masks import SparseOptions, top
from compress.methods.support import least_squares
from compress.methods.sweep import sweep
from compress.recipe import load

PRUNING = {name: method for name, method in METHODS.items() if issubclass(method, SparseOptions)}
SOLVING = {"sparsegpt": SparseGPT(), "awp": AWP(), "admm": ADMM()}
DAMP = 0.01


def make(name, **options):
    return PRUNING[name](**({"group_size": 32} if hasattr(PRUNING[name], "group_size") else {}), **({"extra": 4.0} if name == "slim" else {}), **options)


def solve(method, W, s):
    return method(W, s, stored=torch.float32, where="w")


def damped(s):
    return s.hessian + DAMP * s.hessian.diagonal().mean() * torch.eye(len(s.hessian), dtype=s.hessian.dtype)


# ---- masks


def test_top_keeps_exactly_that_many_and_the_first_of_equal_ones():
    score = torch.tensor([[3.0, 1, 1, 2, 1], [0, 0, 0, 0, 0]])
    assert top(score, 3).tolist() == [[True, True, False, True, False], [True, True, True, False, False]]
    assert top(score, 0).sum() == 0 and top(score, 5).all()
    random = torch.rand(7, 50)
    assert torch.equal(top(random, 20).nonzero()[:, 1].view(7, 20), random.topk(20).indices.sort(1).values)


@pytest.mark.parametrize("name", PRUNING)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:8", "3:4"])
def test_n_of_m_holds_in_every_group(name, pattern):
    n, m = map(int, pattern.split(":"))
    fmt = solve(make(name, pattern=pattern), weight(), stats_of(correlated()))
    sparse = fmt.terms[0] if name == "slim" else fmt
    assert isinstance(sparse, Sparse24 if pattern in ("2:4", "1:8") else Masked)  # a bit a weight, or the places, whichever is less
    assert (sparse.keep().view(24, -1, m).sum(-1) == n).all()
    assert ((sparse.dequantize() != 0) <= sparse.keep()).all()


@pytest.mark.parametrize("name", [n for n in PRUNING if n != "slim"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.77])
@pytest.mark.parametrize("scope", ["row", "layer"])
def test_counts_are_exact(name, sparsity, scope):
    keep = solve(make(name, sparsity=sparsity, scope=scope), weight(24, 160), stats_of(correlated(n=160))).keep()  # more than one block of the sweep
    if scope == "row":
        assert (keep.sum(1) == 160 - round(sparsity * 160)).all()
    else:
        assert keep.sum() == 24 * 160 - round(sparsity * 24 * 160) and len(keep.sum(1).unique()) > 1


@pytest.mark.parametrize("name", PRUNING)
@pytest.mark.parametrize("options", [{}, {"sparsity": 0.7}, {"pattern": "2:4"}, {"pattern": "4:8", "bits": 4}, {"sparsity": 0.7, "bits": 3, "sym": True}])
def test_plan_bytes_and_determinism(name, options):
    if "bits" in options and name in ("magnitude", "wanda"):
        return
    s, W, method = stats_of(correlated()), weight(), make(name, **options)
    a, b = (method(W.clone(), s, stored=torch.float16, where="w") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.tensors().values(), b.tensors().values(), strict=True))
    planned = method.planned((24, 64), torch.float16, "w")
    assert planned.nbytes() == a.nbytes() and planned.meta() == a.meta()


def test_bits_per_weight():
    s, W = stats_of(correlated(n=128)), weight(128, 128)
    assert [make("wanda", **o)(W, s, stored=torch.bfloat16).bits() for o in ({"sparsity": 0.5}, {"pattern": "2:4"}, {"sparsity": 0.75})] == [9, 9, 5]
    quantized = ADMM(pattern="2:4", bits=4, group_size=128)(W, s, stored=torch.bfloat16)
    assert quantized.bits() == 1 + 4 / 2 + (16 + 4) / 128 and quantized.values.group_size == 64


def test_few_weights_in_a_very_wide_group():
    s, W = stats_of(correlated(n=512, tokens=64)), weight(4, 512)
    for options in ({"group_size": -1}, {"group_size": 256}):
        method = ADMM(sparsity=0.996, bits=4, **options)
        fmt, planned = solve(method, W, s), method.planned((4, 512), torch.float32, "w")
        assert fmt.meta() == planned.meta() and fmt.nbytes() == planned.nbytes() and (fmt.dequantize() != 0).sum() <= 8


# ---- no-ops and degenerate cases


@pytest.mark.parametrize("name", [n for n in PRUNING if n != "slim"])
@pytest.mark.parametrize("options", [{"sparsity": 0.0}, {"pattern": "4:4"}])
def test_nothing_pruned_is_the_weight_bit_for_bit(name, options):
    W = weight()
    assert torch.equal(solve(make(name, **options), W, stats_of(correlated())).dequantize(), W)


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "awp", "admm"])
def test_with_equal_uncorrelated_inputs_all_are_magnitude_pruning(name):
    """H = I: one column cannot make up for another, so no step, refit or sweep changes anything."""
    W, s = weight(), Stats(torch.eye(64))
    for options in ({"scope": "row"}, {"pattern": "2:4"}):
        expected = solve(Magnitude(**options), W, s).dequantize()
        torch.testing.assert_close(solve(make(name, **options), W, s).dequantize(), expected, rtol=1e-5, atol=1e-6)


def test_wanda_does_not_care_how_a_channel_is_scaled_and_magnitude_does():
    x, W = correlated(), weight()
    c = torch.rand(64, generator=torch.Generator().manual_seed(5)).mul(4).exp()
    for method, same in ((Wanda(), True), (Magnitude(), False)):
        masks = [solve(method, w, stats_of(v)).keep() for v, w in ((x, W), (x * c, W / c))]
        assert torch.equal(*masks) == same


def test_pruned_again_dead_inputs_and_a_hessian_that_fails_are_told():
    x, W = correlated(), weight()
    W[W.abs() < W.abs().quantile(0.6)] = 0
    x[:, [3, 40]] = 0
    for method in SOLVING.values():
        s = stats_of(x)
        W_hat = solve(method, W, s).dequantize()
        assert torch.isfinite(W_hat).all() and (W_hat[:, [3, 40]] == 0).all() and (W_hat[W == 0] == 0).all()
        assert [f["what"] for f in s.fallbacks] == ["pruned before", "inputs never active"]
        s = Stats(torch.full((64, 64), float("nan")))
        assert torch.isfinite(solve(method, weight(), s).dequantize()).all() and "solver failed" in s.fallbacks[0]["what"]


@pytest.mark.parametrize("name", PRUNING)
@pytest.mark.parametrize("options", [{"sparsity": 0.3}, {"sparsity": 0.7}, {"pattern": "2:4"}, {"sparsity": 0.3, "bits": 4},
                                     {"pattern": "2:4", "bits": 4, "sym": True}])  # fmt: skip
def test_a_pruned_weight_pruned_again_keeps_its_zeros(name, options):
    """Even where more may stay than there is, where targets shift, and through integers; no zero takes the place of a weight."""
    if "bits" in options and name in ("magnitude", "wanda"):
        return
    x, W = correlated(), weight()
    W[W.abs() < W.abs().quantile(0.5, dim=1, keepdim=True)] = 0
    s = with_cross(x)
    fmt = solve(make(name, **options, **({} if name in ("magnitude", "wanda") else {"propagate": 1.0})), W, s)
    sparse = fmt.terms[0] if name == "slim" else fmt
    assert (sparse.dequantize()[W == 0] == 0).all() and [f["what"] for f in s.fallbacks] == ["pruned before"]
    if options == {"sparsity": 0.7}:
        assert (sparse.keep() <= (W != 0)).all()


# ---- solvers


def with_cross(x, noise=0.2):
    """Statistics of inputs x where the original model has other ones."""
    s, original = stats_of(x), x + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(9)) * x.std(0)
    s.cross = (original - x).T @ x / len(x)
    return s


@pytest.mark.parametrize("method", [ADMM(), AWP(), SparseGPT(), SparseGPT(bits=4, group_size=32), SLiM(extra=4.0), SVD(), DenseSparse()])
def test_a_propagated_target_gives_outputs_nearer_to_the_original_ones(method):
    g = torch.Generator().manual_seed(3)
    x, W = correlated(), weight(48)
    original = x @ (torch.eye(64) + 0.05 * torch.randn(64, 64, generator=g))
    s = stats_of(x)
    s.cross = (original - x).T @ x / len(x)
    error = lambda m: float((x @ solve(m, W, s).dequantize().T - original @ W.T).square().mean())
    assert method.needs == {"hessian"} and replace(method, propagate=1.0).needs == {"hessian", "cross"}
    assert error(replace(method, propagate=1.0)) < 0.97 * error(method)


@pytest.mark.parametrize("method", [ADMM(gradient=True), AWP(scope="layer", gradient=True), SparseGPT(gradient=True), Wanda(scope="layer", gradient=True)])
def test_rows_that_matter_to_the_loss_keep_more_weights_and_the_loss_feels_less(method):
    s, W = stats_of(correlated()), weight()
    s.gradient = torch.logspace(-2, 2, 24)
    loud, alike = (solve(m, W, s) for m in (method, replace(method, gradient=False)))
    feels = lambda f: float(s.gradient @ ((D := f.dequantize() - W) @ s.hessian * D).sum(1))
    assert loud.keep().sum() == alike.keep().sum() and loud.keep()[-8:].sum() > alike.keep()[-8:].sum()
    assert feels(loud) < 0.9 * feels(alike)
    s.gradient = None
    assert torch.equal(solve(method, W, s).keep(), alike.keep()) and s.fallbacks[-1]["what"] == "outputs not weighed"


def slow_sparsegpt(W, Hd, decide):
    """OBS one column at a time with the inverse written out, fp64 (arXiv 2301.00774, algorithm 1); `decide(column, W, price)` gives the mask."""
    W, n, keep = W.clone(), W.shape[1], None
    U = torch.linalg.cholesky(torch.linalg.inv(Hd), upper=True)
    for i in range(n):
        keep = decide(i, W, U.diagonal(), keep)
        rest, inverse = list(range(i, n)), torch.linalg.inv(Hd[i:, i:])
        error = W[:, i] * ~keep[:, i]
        W[:, rest] -= torch.outer(error, inverse[0] / inverse[0, 0])
    return W * keep, keep


@pytest.mark.parametrize("pattern", ["none", "2:4"])
def test_sparsegpt_equals_the_slow_reference(pattern):
    s, W = stats_of(correlated(), torch.float64), weight().double()

    def decide(i, W, d, keep):
        if (i % 4 and pattern == "2:4") or (i and pattern == "none"):
            return keep
        keep = torch.zeros_like(W, dtype=torch.bool) if keep is None else keep
        score = (W / d) ** 2
        if pattern == "2:4":
            keep[:, i : i + 4].scatter_(1, score[:, i : i + 4].topk(2).indices, True)
        else:
            keep.view(-1)[score.flatten().topk(24 * 32).indices] = True
        return keep

    Q, keep = slow_sparsegpt(W, damped(s), decide)
    method = SparseGPT(pattern=pattern)
    got, mask = sweep(W, s.factor(DAMP, False).U, method, torch.ones_like(W))
    assert torch.equal(mask, keep)
    torch.testing.assert_close(got, Q, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_least_squares_solves_every_row_on_its_own_mask(sparsity):
    s, W = stats_of(correlated(), torch.float64), weight(8).double()
    keep = torch.rand(8, 64, generator=torch.Generator().manual_seed(0)) > sparsity
    H = damped(s)
    got = least_squares(W, W, keep, s.hessian, s.ridge(s.factor(DAMP, False)), steps=500, tolerance=1e-10)
    for i in range(8):
        S = keep[i]
        torch.testing.assert_close(got[i, S], torch.linalg.solve(H[S][:, S], (H @ W[i])[S]), rtol=1e-6, atol=1e-8)
    assert (got[~keep] == 0).all()


def test_every_step_of_least_squares_lowers_the_error_of_every_row():
    s, W = stats_of(correlated(), torch.float64), weight().double()
    keep, ridge, H = top(W.abs(), 32), s.ridge(s.factor(DAMP, False)), damped(s)
    errors = [(((D := least_squares(W, W, keep, s.hessian, ridge, steps=k, tolerance=0) - W) @ H) * D).sum(1) for k in range(8)]
    assert all((b <= a * (1 + 1e-12)).all() for a, b in itertools.pairwise(errors)) and (errors[1] < errors[0]).all()


def test_gradient_steps_lower_the_error_and_the_eigenvalue_is_right():
    s, W = stats_of(correlated(), torch.float64), weight().double()
    H, ridge = damped(s), s.ridge(s.factor(DAMP, False))
    d = H.diagonal().sqrt()
    exact = torch.linalg.eigvalsh(H / d / d[:, None])[-1]
    assert 0.95 * exact <= largest_eigenvalue(s.hessian, ridge, H.diagonal()) <= exact * (1 + 1e-9)

    def error(k, **options):
        D = solve(AWP(iterations=k, refit=False, **options), W, s).dequantize(torch.float64) - W
        return float(((D @ H) * D).sum())

    for options in ({}, {"step": "published"}, {"pattern": "2:4"}):
        errors = [error(k, **options) for k in (0, 1, 2, 5, 20, 60)]
        assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(errors)) and errors[-1] < 0.8 * errors[0]


@pytest.mark.parametrize("options", [{}, {"pattern": "2:4"}, {"sparsity": 0.7}])
def test_each_solver_beats_the_one_before(options):
    """Magnitude > Wanda > SparseGPT > the same mask solved exactly > ADMM, and preconditioned steps are better than the published ones."""
    s, W = stats_of(correlated(n=128, tokens=2048)), weight(48, 128)
    error = lambda method: s.error(W, solve(method, W, s).dequantize())
    chain = [error(m) for m in (Magnitude(**options), Wanda(**options), SparseGPT(**options), SparseGPT(refit=True, **options), ADMM(**options))]
    assert all(b < 0.9 * a for a, b in itertools.pairwise(chain)), chain
    awp, published, wanda = (error(m) for m in (AWP(**options), AWP(step="published", **options), Wanda(**options)))
    assert chain[-1] < awp < published < wanda


@pytest.mark.parametrize("options", [{"pattern": "2:4"}, {"sparsity": 0.5}])
def test_the_update_of_sparsegpt_beats_its_own_mask(options):
    s, W = stats_of(correlated(n=128, tokens=2048)), weight(48, 128)
    fmt = solve(SparseGPT(**options), W, s)
    assert s.error(W, fmt.dequantize()) < 0.8 * s.error(W, W * fmt.keep())


# ---- integers


@pytest.mark.parametrize("name", ["sparsegpt", "admm", "awp"])
@pytest.mark.parametrize(("options", "kept"), [({"pattern": "2:4"}, 16), ({"sparsity": 0.5}, 16), ({"sparsity": 0.7, "sym": True}, 10)])
def test_sparse_integers_keep_their_zeros_and_cost_little_more(name, options, kept):
    s, W = stats_of(correlated(n=128, tokens=2048)), weight(48, 128)
    errors = []
    for bits in (8, 4, 3):
        fmt = solve(make(name, bits=bits, **options), W, s)
        W_hat = fmt.dequantize()
        assert (W_hat[~fmt.keep()].view(torch.int32) == 0).all() and fmt.values.bits_per_code == bits
        assert (fmt.keep().view(48, 4, 32).sum(-1) == kept).all()  # as many in every group of 32 columns
        errors.append(s.error(W, W_hat))
    dense = s.error(W, solve(make(name, pattern=options.get("pattern", f"{kept}:32")), W, s).dequantize())
    assert errors[0] < errors[1] < errors[2] and errors[0] < 1.15 * dense


def test_one_sweep_beats_rounding_after_pruning():
    s, W = stats_of(correlated(n=128, tokens=2048)), weight(48, 128)
    options = dict(pattern="2:4", bits=4, group_size=64, sweeps=0)
    joint = s.error(W, solve(SparseGPT(**options), W, s).dequantize())
    pruned = solve(SparseGPT(pattern="2:4"), W, s)
    codes = GPTQ(bits=4, group_size=64, sweeps=0)(pruned.dequantize(), s, stored=torch.float32).dequantize()
    assert joint < s.error(W, codes * pruned.keep())
    assert s.error(W, solve(SparseGPT(**options | {"sweeps": 2}), W, s).dequantize()) < joint


def test_without_zeros_the_sweep_is_gptq():
    s, W = stats_of(correlated(), torch.float64), weight().double()
    ours = SparseGPT(sparsity=0.0, bits=3, group_size=32, sweeps=0)(W, s, stored=torch.bfloat16).values
    theirs = GPTQ(bits=3, group_size=32, sweeps=0, act_order=False, static_groups=False)(W, s, stored=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(ours.tensors().values(), theirs.tensors().values(), strict=True))


# ---- sparse + low rank


@pytest.mark.parametrize("bits", [None, 4])
def test_a_product_makes_up_for_pruning_and_rounds_do_not_harm(bits):
    s, W = stats_of(correlated(n=128, tokens=2048)), weight(48, 128)
    sparse = s.error(W, solve(ADMM(pattern="2:4", bits=bits, group_size=64), W, s).dequantize())
    errors = [s.error(W, solve(SLiM(pattern="2:4", bits=bits, group_size=64, extra=3.0, rounds=k), W, s).dequantize()) for k in (0, 1, 3)]
    assert errors[0] < 0.95 * sparse and errors[1] <= errors[0] and errors[2] <= errors[1]


def test_a_random_support_is_solved_exactly_and_is_worse_than_a_chosen_one():
    s, W = stats_of(correlated(n=128, tokens=2048)), weight(48, 128)
    chosen, random = (s.error(W, solve(SLiM(sparsity=0.8, extra=2.0, support=support), W, s).dequantize()) for support in ("solved", "random"))
    fmt = solve(SLiM(sparsity=0.8, extra=2.0, support="random", rounds=0), W, s)
    assert chosen < random < s.error(W, fmt.terms[1].dequantize()) and fmt.terms[0].keep().sum() == 48 * 128 - round(0.8 * 48 * 128)


def test_enough_rank_brings_everything_back():
    s, W = stats_of(correlated()), weight()
    assert s.error(W, solve(SLiM(pattern="2:4", extra=1.1 * 32 * (24 + 64) / 64, rounds=0), W, s).dequantize()) < 1e-6


# ---- what is refused


@pytest.mark.parametrize(("options", "told"), [
    ({"sparsity": 1.0}, "sparsity 1.0 is not a share"), ({"sparsity": -0.1}, "sparsity -0.1"), ({"pattern": "5:4"}, "'5:4'.*0 < N <= M"),
    ({"pattern": "half"}, "'half'"), ({"pattern": "0:4"}, "'0:4'"), ({"damp": -1.0}, "damp -1.0"), ({"iterations": 1}, "iterations 1 must be at least 4"),
])  # fmt: skip
def test_bad_options(options, told):
    with pytest.raises(CompressError, match=told):
        load("sparse-50").with_options({f"admm.{k}": v for k, v in options.items()})


def test_a_pattern_that_does_not_divide_names_ways_out():
    with pytest.raises(CompressError, match=r"down_proj: in_features 66 is not a multiple of 4, as pattern 2:4 needs; use an M of 2, or sparsity 0.5"):
        Wanda(pattern="2:4").planned((8, 66), torch.bfloat16, "down_proj")
    with pytest.raises(CompressError, match=r"group_size 30 is not a multiple of 4.*use 32"):
        ADMM(pattern="2:4", bits=4, group_size=30).planned((8, 60), torch.bfloat16, "w")
    with pytest.raises(CompressError, match=r"rank 1 costs 0.917"):
        SLiM(extra=0.1).planned((24, 64), torch.bfloat16, "w")


def test_a_pattern_on_the_command_line_is_not_a_time_of_day():
    step = load("sparse-50").with_options(["admm.pattern=2:4"]).steps[0]
    assert step.build().pattern == "2:4"


@pytest.mark.parametrize("pattern", ["2:4", "'2:4'", "4:8", "1:2", "8:16"])
def test_a_pattern_in_a_recipe_file_needs_no_quotes(pattern, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"steps:\n  - {{method: wanda, pattern: {pattern}, sparsity: 5e-1}}\n")
    assert load(tmp_path / "mine.yaml").steps[0].build().pattern == pattern.strip("'")


# ---- from a checkpoint to an artifact and back


@pytest.mark.parametrize(("recipe", "settings"), [
    ("sparse-50", {}), ("sparse-2of4", {}), ("sparse-50-w4", {"admm.group_size": 64}), ("sparse-2of4-w4-lr", {"slim.group_size": 32, "slim.extra": 1.0}),
    ("svd-20", {}), ("svd-20", {"svd.joint": False}), ("sparse-50", {"schedule.by": "error"}), ("sparse-50-wanda", {}),
    ("svd-20-w4", {"svd.group_size": 32, "svd.rank": 32, "ignore": ["*.o_proj"]}),
    ("svd-20-w4", {"svd.group_size": 32, "svd.rank": 32, "svd.joint": False, "ignore": ["*.k_proj", "*.v_proj"]}), ("dense-sparse-20", {}),
])  # fmt: skip
def test_an_artifact_costs_what_was_planned_verifies_and_computes_what_it_holds(recipe, settings, checkpoint, tmp_path):
    plan = compress.plan(str(checkpoint), recipe, settings=settings)
    run = lambda: compress.run(str(checkpoint), recipe, f"file:{checkpoint}/text.txt", tmp_path / "out", settings=settings, samples=8, seqlen=64, show=False)
    report = run()
    stored = sum(t.numel() * t.element_size() for f in (tmp_path / "out").glob("*[0-9].safetensors") for t in load_file(f).values())
    tolerance = 0.01 if load(recipe).with_options(settings).schedule else 0  # which layer pays what is known once calibration has been seen
    assert abs(stored - plan.bytes_after) <= tolerance * stored and stored == report.manifest.totals["bytes"] == report.manifest.totals["planned_bytes"]
    assert {f.what for f in report.fallbacks} <= {"inputs never active"}  # neurons of which no weight is left
    assert compress.verify(str(tmp_path / "out")).ok
    whole = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "block-00001.safetensors").unlink()
    assert run().resumed_layers and whole == {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
    model, tokens = compress.load(str(tmp_path / "out"), dtype=torch.float32), torch.arange(48)[None]
    layer = model.get_submodule("model.layers.1.mlp.down_proj")
    x = torch.randn(3, layer.in_features)
    torch.testing.assert_close(layer(x), x @ layer.format.dequantize().T, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(model(tokens).logits).all()
