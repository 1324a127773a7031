"""pytest tests/test_lowrank.py — whitened SVD: the loss identity, its rivals, quantized factors, break-even; dense × sparse (algorithms.md §17, 20)."""

import pytest
import torch
from test_methods import correlated, stats_of, weight

from compress.errors import CompressError
from compress.formats import Dense, IntGroup
from compress.methods import GPTQ, SVD, DenseSparse
from compress.methods.svd import answer, leading

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
    for ratio in (0.6, 0.4, 0.2, 0.0):
        method = SVD(ratio=ratio)
        fmt, planned = solve(method, W, s, torch.bfloat16), method.planned((96, 128), torch.bfloat16, "w")
        assert planned.nbytes() == fmt.nbytes() and planned.meta() == fmt.meta() and all(isinstance(f, Dense) for f in fmt.factors)
        assert (1 - ratio) * 16 - 16 * (96 + 128) / (96 * 128) < fmt.bits() <= (1 - ratio) * 16
        errors.append(s.error(W, fmt.dequantize()))
    assert errors == sorted(errors, reverse=True)
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
    assert SVD(rank=96).planned((128, 384), torch.bfloat16, "k_proj").bits() == 16


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


def test_atoms_that_leave_no_coefficient_are_refused():
    with pytest.raises(CompressError, match=r"w: 64 atoms of \[64, 64\] leave -?\d+ numbers for 4096 coefficients; set atoms between 1 and 2"):
        DenseSparse(ratio=0.2, atoms=3.0).planned((64, 64), torch.bfloat16, "w")
