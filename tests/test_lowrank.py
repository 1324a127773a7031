"""pytest tests/test_lowrank.py — whitened SVD: the loss identity, its rivals, quantized factors, break-even; dense × sparse (algorithms.md §17, 20)."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_methods import correlated, stats_of, weight

import compress
from compress.embedded import model_path
from compress.errors import CompressError
from compress.formats import Dense, IntGroup, Masked, Product, Sparse24
from compress.methods import GPTQ, SVD, DenseSparse
from compress.methods.masks import top
from compress.methods.svd import answer, leading
from compress.preflight import bundled
from compress.recipe import load
from compress.trained import Values
from compress.walk import pieces

F64 = torch.float64


def solve(method, W, s, stored=torch.float32):
    return method(W, s, stored=stored, where="w")


@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (64, 64)])
@pytest.mark.parametrize("refit", [False, True])
def test_the_loss_is_the_tail_of_the_singular_values(shape, refit):
    m, n = shape
    s, W = stats_of(correlated(n=n), F64), weight(m, n).double()
    product = solve(SVD(rank=20, damp=0.0, refit=refit), W, s, stored=F64).factors
    W_hat = product[0].weight @ product[1].weight
    D, singular = W_hat - W, torch.linalg.svdvals(W @ torch.linalg.cholesky(s.hessian))
    torch.testing.assert_close(((D @ s.hessian) * D).sum(), singular[20:].square().sum(), rtol=1e-9, atol=0)


def test_output_pca_is_the_whitened_svd():
    """U Σ Vᵀ S⁻¹ cut at the rank, as SVD-LLM writes it, is P Pᵀ W."""
    s, W = stats_of(correlated(), F64), weight(40).double()
    S = torch.linalg.cholesky(s.hessian + 0.01 * s.hessian.diagonal().mean() * torch.eye(64, dtype=F64))
    U, sigma, V = torch.linalg.svd(W @ S, full_matrices=False)
    expected = U[:, :10] * sigma[:10] @ V[:10] @ torch.linalg.inv(S)
    A, B = (f.weight for f in solve(SVD(rank=10), W, s, stored=F64).factors)
    torch.testing.assert_close(A @ B, expected, rtol=1e-7, atol=1e-9)
    P = leading(W @ S, 10)
    torch.testing.assert_close(P.T @ P, torch.eye(10, dtype=F64), rtol=0, atol=1e-9)
    torch.testing.assert_close(P @ (P.T @ W), expected, rtol=1e-7, atol=1e-9)


def test_plain_svd_is_the_best_in_the_plain_norm_and_asvd_without_power_is_plain():
    s, W = stats_of(correlated()), weight(40)
    U, sigma, V = torch.linalg.svd(W, full_matrices=False)
    expected = U[:, :12] * sigma[:12] @ V[:12]
    for options in ({"whiten": "none"}, {"whiten": "asvd", "alpha": 0.0}):
        torch.testing.assert_close(solve(SVD(rank=12, refit=False, **options), W, s).dequantize(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6])
def test_whitening_beats_asvd_and_plain_svd_and_a_refit_never_harms(ratio):
    s, W = stats_of(correlated(n=128, tokens=2048)), weight(96, 128)
    error = {(w, r): s.error(W, solve(SVD(ratio=ratio, whiten=w, refit=r), W, s).dequantize()) for w in ("cholesky", "asvd", "none") for r in (False, True)}
    assert error["cholesky", False] < 0.9 * error["asvd", True] and error["asvd", False] < error["none", False]
    assert all(error[w, True] < 0.95 * error[w, False] for w in ("asvd", "none"))
    assert error["cholesky", True] <= 1.001 * error["cholesky", False]


def test_the_refit_is_the_least_squares_answer():
    s, W = stats_of(correlated(), F64), weight(8).double()
    B = torch.randn(5, 64, generator=torch.Generator().manual_seed(2), dtype=F64)
    L = torch.linalg.cholesky(s.hessian)
    torch.testing.assert_close(answer(W, B, s.hessian), torch.linalg.lstsq((B @ L).T, (W @ L).T).solution.T, rtol=1e-6, atol=1e-8)


def test_the_rank_spends_the_budget_and_more_rank_less_error():
    s, W = stats_of(correlated(n=128)), weight(96, 128)
    errors = []
    for ratio in (0.6, 0.4, 0.2, 1e-6):
        method = SVD(ratio=ratio)
        fmt, planned = solve(method, W, s, torch.bfloat16), method.planned((96, 128), torch.bfloat16, "w")
        assert planned.nbytes() == fmt.nbytes() and planned.meta() == fmt.meta() and all(isinstance(f, Dense) for f in fmt.factors)
        assert (1 - ratio) * 16 - 16 * (96 + 128) / (96 * 128) < fmt.bits() <= (1 - ratio) * 16
        errors.append(s.error(W, fmt.dequantize()))
    assert errors == sorted(errors, reverse=True)
    assert torch.equal(solve(SVD(ratio=0.0), W, s).dequantize(), W) and torch.equal(solve(DenseSparse(ratio=0.0), W, s).dequantize(), W)
    low = weight(96, 20) @ weight(20, 128, seed=4)
    assert s.error(low, solve(SVD(rank=20), low, s).dequantize()) < 1e-9  # a weight of that rank comes back


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_quantized_factors_by_gptq_beat_rounding_them(bits):
    s, W = stats_of(correlated(n=128, tokens=2048)), weight(96, 128)
    method = SVD(rank=32, bits=bits, group_size=32)
    fmt, planned = solve(method, W, s, torch.bfloat16), method.planned((96, 128), torch.bfloat16, "w")
    assert planned.nbytes() == fmt.nbytes() and planned.meta() == fmt.meta() and all(isinstance(f, IntGroup) for f in fmt.factors)
    again = solve(method, W, s, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(fmt.tensors().values(), again.tensors().values(), strict=True))
    A, B = (f.weight for f in solve(SVD(rank=32), W, s).factors)
    identity = type(s)(torch.eye(32)), type(s)(torch.eye(128))
    rounded = [GPTQ(bits=bits, group_size=32, damp=0.0)(M, i, stored=torch.bfloat16).dequantize() for M, i in zip((A, B), identity, strict=True)]
    exact, ours = s.error(W, A @ B), s.error(W, fmt.dequantize())
    assert exact < ours and ours - exact < 0.8 * (s.error(W, rounded[0] @ rounded[1]) - exact)


def test_dead_inputs_are_told_and_take_no_rank():
    x = correlated()
    x[:, [3, 40]] = 0
    s, W = stats_of(x), weight(40)
    for whiten in ("cholesky", "asvd", "none"):
        W_hat = solve(SVD(rank=10, whiten=whiten), W, s).dequantize()
        assert torch.isfinite(W_hat).all() and (W_hat[:, [3, 40]].abs() < 1e-6).all()
    assert [f["what"] for f in s.fallbacks] == ["inputs never active"]


def test_a_rank_above_break_even_is_refused():
    with pytest.raises(CompressError, match=r"k_proj: rank 100 of \[128, 384\]: two factors of rank r store r·512 numbers, break-even is 96; use rank 1 to 96"):
        SVD(rank=100).planned((128, 384), torch.bfloat16, "k_proj")
    with pytest.raises(CompressError, match=r"rank 40 of .* use rank 32 to 96 in steps of 32"):
        SVD(rank=40, bits=4).planned((128, 384), torch.bfloat16, "k_proj")
    with pytest.raises(CompressError, match=r"ratio 1\.0"):
        SVD(ratio=1.0)
    with pytest.raises(CompressError, match="joint solves q, k and v on one H"):
        SVD(joint=True, guided=True)
    assert SVD(rank=96).planned((128, 384), torch.bfloat16, "k_proj").bits() == 16


def test_rows_that_matter_to_the_loss_get_their_rank():
    s, W = stats_of(correlated()), weight(40)
    s.gradient = torch.logspace(-2, 2, 40)
    feels = lambda W_hat: float(s.gradient @ ((D := W_hat - W) @ s.hessian * D).sum(1))
    assert feels(solve(SVD(rank=10, gradient=True), W, s).dequantize()) < 0.9 * feels(solve(SVD(rank=10), W, s).dequantize())


def test_the_span_of_the_inputs_is_better_than_plain_svd_and_worse_than_the_outputs():
    s, W = stats_of(correlated(n=128, tokens=2048)), weight(96, 128)
    error = {w: s.error(W, solve(SVD(ratio=0.4, whiten=w, refit=False), W, s).dequantize()) for w in ("cholesky", "inputs", "none")}
    assert error["cholesky"] < error["inputs"] < error["none"]


# ---- one right factor for several linears


def test_one_shared_factor_beats_separate_ones_of_the_same_size():
    """q, k and v of one model are alike, which two matrices of noise are not: here they share half of their rows' directions."""
    s, base = stats_of(correlated(n=128, tokens=2048)), weight(64, 128, seed=5)
    Ws = [weight(64, 64, seed=k) @ base + 0.3 * weight(64, 128, seed=9 + k) for k in (6, 7, 8)]
    together = solve(SVD(ratio=0.4), torch.cat(Ws), s, torch.bfloat16)
    parts, own = pieces(together, [64] * 3)
    assert sum(n for _, n in own) == together.nbytes() and own[0][0] == ["0_weight", "1_weight"] and own[1][0] == own[2][0] == ["0_weight"]
    assert all(torch.equal(a.dequantize(), b) for a, b in zip(parts, together.dequantize().split(64), strict=True))
    separate = [solve(SVD(ratio=0.4), W, s, torch.bfloat16) for W in Ws]
    assert together.nbytes() <= 1.03 * sum(f.nbytes() for f in separate)
    assert sum(s.error(W, f.dequantize()) for W, f in zip(Ws, parts, strict=True)) < 0.9 * sum(
        s.error(W, f.dequantize()) for W, f in zip(Ws, separate, strict=True))  # fmt: skip


def run(checkpoint, out, recipe, **settings):
    return compress.run(str(checkpoint), recipe, f"file:{checkpoint}/text.txt", out, settings=settings, samples=16, seqlen=64, show=False, device="cpu")


def test_a_shared_factor_is_stored_once_loaded_for_all_resumed_and_exported(checkpoint, tmp_path):
    report = run(checkpoint, tmp_path / "a", {"name": "joint", "steps": [{"method": "svd", "joint": True}]})
    layers, q = report.manifest.layers, "model.layers.0.self_attn.q_proj"
    assert layers["model.layers.0.self_attn.v_proj"].shared == {"1_weight": f"{q}.1_weight"} and layers[q].tensors == ["0_weight", "1_weight"]
    stored = {name: t for f in (tmp_path / "a").glob("block*.safetensors") for name, t in load_file(f).items()}
    assert f"{q}.1_weight" in stored and "model.layers.0.self_attn.k_proj.1_weight" not in stored
    model, tokens = compress.load(str(tmp_path / "a"), dtype=torch.float32, policy="dense"), torch.arange(48)[None]
    k = model.get_submodule("model.layers.0.self_attn.k_proj")
    torch.testing.assert_close(k.format.dequantize(), stored[k_name := "model.layers.0.self_attn.k_proj.0_weight"].float() @ stored[f"{q}.1_weight"].float())
    assert k_name and sum(t.nbytes for name, t in model.state_dict().items() if "model.layers.0.self_attn.k_proj" in name) == k.format.factors[0].nbytes()
    compress.export(str(tmp_path / "a"), "dense", tmp_path / "dense")
    dense = compress.load(str(tmp_path / "dense"), dtype=torch.float32)
    torch.testing.assert_close(dense(tokens).logits, model(tokens).logits, rtol=0.1, atol=0.1)  # its weights are rounded to bf16
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "block-00001.safetensors").unlink()
    again = run(checkpoint, tmp_path / "b", {"name": "joint", "steps": [{"method": "svd", "joint": True}]})
    assert again.resumed_layers == 7 and again.manifest == report.manifest
    damaged = tmp_path / "b" / "block-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    assert not compress.verify(str(tmp_path / "b")).ok


def test_a_plan_of_joint_factors_needs_a_known_architecture():
    with pytest.raises(CompressError, match="not in the table of architectures"):
        source = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(model_type="unheard_of")), num_blocks=1)
        bundled(source, load("svd-20"), [("a.q", 0, (8, 8))])


# ---- training


@pytest.mark.parametrize("options", [{}, {"masks": True, "perturbation": 0.01}])
def test_the_tuner_trains_factors_and_kept_values_and_keeps_as_many_zeros(tmp_path, options):
    steps = [{"match": "*mlp*", "method": "wanda", "pattern": "2:4"}, {"method": "svd", "ratio": 0.5, "joint": True}]
    recipe = {"name": "both", "steps": steps, "tune": {"steps": 8} | options}
    out = compress.run(model_path(), recipe, "stdlib", tmp_path / "out", samples=72, seqlen=64, show=False, device="cpu")
    assert all(after < before for before, after in out.manifest.training.values())
    assert compress.verify(str(tmp_path / "out")).ok
    weight = compress.load(str(tmp_path / "out")).get_submodule("model.layers.0.mlp.up_proj").format
    assert (weight.keep().view(-1, 4).sum(-1) == 2).all() and (weight.dequantize() != 0).float().mean() <= 0.5


def masks():
    W, keep = weight(24, 32), torch.rand(24, 32, generator=torch.Generator().manual_seed(3)) < 0.5
    low = Dense(weight(24, 8).bfloat16()), Masked.pack(keep[:8], Dense(W[:8][keep[:8]][None].bfloat16()))
    halves = top(W.abs().view(-1, 4), 2).view_as(W)
    return [Masked.pack(keep, Dense(W[keep][None].bfloat16())), Sparse24.pack(halves, Dense(W[halves].view(24, -1).bfloat16()), 2, 4), Product(low)]


@pytest.mark.parametrize("fmt", masks(), ids=["masked", "2:4", "product"])
def test_an_untrained_shadow_is_its_format_and_gradients_reach_what_is_zero(fmt):
    values = Values(fmt, None, {}, moving=True)
    again = values.weight()
    assert again.meta() == fmt.meta() and all(torch.equal(a, b) for a, b in zip(again.tensors().values(), fmt.tensors().values(), strict=True))
    torch.testing.assert_close(values.matrix(), fmt.dequantize())
    with torch.enable_grad():
        (values.matrix() * weight(24, 32)).sum().backward()
    (p,) = (p for p in values.free.values() if p.shape[1] == 32)
    assert (p.grad[p == 0] != 0).float().mean() > 0.9
    p.data[(p == 0).nonzero()[0].split(1)] = 10.0  # a shadow that outgrew the others
    assert values.weight().nbytes() == fmt.nbytes() and 10 in values.weight().tensors()[next(n for n in fmt.tensors() if n.endswith("values_weight"))]


# ---- dense × sparse


@pytest.mark.parametrize("shape", [(96, 128), (128, 64), (64, 64)])
def test_dense_times_sparse_beats_the_svd_of_the_same_bytes(shape):
    s, W = stats_of(correlated(n=shape[1], tokens=2048)), weight(*shape)
    method = DenseSparse(ratio=0.2)
    fmt, planned = solve(method, W, s, torch.bfloat16), method.planned(shape, torch.bfloat16, "w")
    assert planned.nbytes() == fmt.nbytes() and planned.meta() == fmt.meta() and 0.98 * 0.8 * 16 < fmt.bits() <= 0.8 * 16
    again = solve(method, W.clone(), s, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(fmt.tensors().values(), again.tensors().values(), strict=True))
    error, rival = (s.error(W, f.dequantize()) for f in (fmt, solve(SVD(ratio=0.2), W, s, torch.bfloat16)))
    once = s.error(W, solve(DenseSparse(ratio=0.2, rounds=0), W, s, torch.bfloat16).dequantize())
    assert error < 0.95 * rival and error < once


@pytest.mark.parametrize("shape", [(64, 48), (48, 64)])
def test_where_nothing_must_be_left_out_the_product_is_the_weight(shape):
    s, W = stats_of(correlated(n=shape[1], tokens=2048)), weight(*shape)
    W = W[:, :10] @ W[:10]  # rank 10: fewer than there are atoms
    assert s.error(W, DenseSparse(ratio=0.2)(W, s, stored=torch.float32).dequantize()) < 1e-6


def test_a_weight_too_small_for_a_single_atom_is_refused():
    with pytest.raises(CompressError, match=r"w: 95% fewer bytes than \[8, 8\] leave no room for atoms; use a smaller ratio"):
        DenseSparse(ratio=0.95).planned((8, 8), torch.bfloat16, "w")
