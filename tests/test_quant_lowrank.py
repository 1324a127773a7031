"""pytest tests/test_quant_lowrank.py — quantized + low rank: the loss identity, turns, whitening, quantized factors, every leaf (algorithms.md §16, 47.5)."""

import pytest
import torch
from test_methods import correlated, stats_of, weight
from test_walk import TEXT, run
from tiny import save_tiny

import compress
from compress.errors import CompressError
from compress.formats import Sum
from compress.methods import GPTQ, LNQ, NF, RTN, Binary, QuantLowRank, Ternary, TrellisCoding

BF16, F64 = torch.bfloat16, torch.float64
LEAVES = {"rtn": (3, RTN(bits=3, group_size=32)), "gptq": (2, GPTQ(bits=2, group_size=32)), "lnq": (2, LNQ(bits=2)), "nf": (4, NF(group_size=32)),
          "trellis": (2, TrellisCoding(bits=2)), "ternary": (1.6, Ternary()), "binary": (1, Binary())}  # fmt: skip


def same(a, b):
    return a.meta() == b.meta() and all(torch.equal(x, y) for x, y in zip(a.tensors().values(), b.tensors().values(), strict=True))


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_leaf_alone_at_rank_0_and_better_with_a_product(leaf):
    s, W = stats_of(correlated()), weight(48)
    bits, alone = LEAVES[leaf]
    make = lambda **options: QuantLowRank(leaf=leaf, bits=bits, group_size=32, **options)
    plain = alone(W, s, stored=BF16)
    for nothing in ({"rank": 0}, {"extra": 0.0}):
        assert same(make(**nothing)(W, s, stored=BF16), plain) and make(**nothing).planned((48, 64), BF16, "w").meta() == plain.meta()
    method = make(rank=8, rounds=1)
    fmt, planned = method(W, s, stored=BF16), method.planned((48, 64), BF16, "w")
    assert same(method(W.clone(), s, stored=BF16), fmt) and planned.nbytes() == fmt.nbytes() and planned.meta() == fmt.meta()
    assert isinstance(fmt, Sum) and s.error(W, fmt.dequantize()) < 0.9 * s.error(W, plain.dequantize())


@pytest.mark.parametrize("shape", [(48, 96), (96, 48)])
def test_the_loss_is_the_tail_of_the_residuals_singular_values(shape):
    s, W = stats_of(correlated(n=shape[1]), F64), weight(*shape).double()
    Hd = s.hessian + 0.01 * s.hessian.diagonal().mean() * torch.eye(shape[1], dtype=F64)
    (fmt,), (error,) = QuantLowRank(leaf="rtn", bits=3, group_size=-1, rank=12, rounds=0).solve(W, s, F64, "w")
    R = W - fmt.terms[0].dequantize(F64)
    assert same(fmt.terms[0], RTN(bits=3, group_size=-1)(W, s, stored=F64))
    tail = torch.linalg.svdvals(R @ torch.linalg.cholesky(Hd))[12:].square().sum()
    torch.testing.assert_close(torch.tensor(error, dtype=F64), tail, rtol=1e-5, atol=0)


def test_more_turns_never_harm_and_the_best_is_kept():
    s, W = stats_of(correlated(n=128, tokens=1024)), weight(96, 128)
    method = QuantLowRank(group_size=64, rank=8, rounds=5)
    found, errors = method.solve(W, s, BF16, "w")
    best = [min(errors[: k + 1]) for k in range(6)]
    assert best == sorted(best, reverse=True) and best[-1] < 0.95 * best[0]
    assert same(method(W, s, stored=BF16), found[errors.index(min(errors))])
    assert errors[:3] == QuantLowRank(group_size=64, rank=8, rounds=2).solve(W, s, BF16, "w")[1]


def test_whitening_by_the_hessian_beats_its_diagonal_and_none():
    s, W = stats_of(correlated(n=128, tokens=2048)), weight(96, 128)
    error = {w: s.error(W, QuantLowRank(leaf="rtn", bits=3, group_size=64, rank=8, rounds=0, whiten=w)(W, s, stored=BF16).dequantize())
             for w in ("hessian", "diagonal", "none")}  # fmt: skip
    assert error["hessian"] < 0.95 * min(error["diagonal"], error["none"])


def test_a_product_of_full_rank_leaves_nothing():
    s, W = stats_of(correlated()), weight(40)
    assert s.error(W, QuantLowRank(group_size=32, rank=40, rounds=0)(W, s, stored=torch.float32).dequantize()) < 1e-9


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_factors_buy_more_rank_for_the_same_bits(bits):
    s, W = stats_of(correlated(n=256, tokens=2048)), weight(256, 256)
    make = lambda **options: QuantLowRank(leaf="rtn", bits=3, extra=1.0, rounds=0, **options)
    quantized, dense = make(factor_bits=bits), make()
    fmt, planned = quantized(W, s, stored=BF16), quantized.planned((256, 256), BF16, "w")
    assert planned.nbytes() == fmt.nbytes() and planned.meta() == fmt.meta() and 3.75 < fmt.bits() <= 4 + 19 / 128
    assert s.error(W, fmt.dequantize()) < s.error(W, dense(W, s, stored=BF16).dequantize())
    assert fmt.terms[1].factors[0].shape[1] > dense.rank_of((256, 256), BF16, "w") == 8


def test_what_cannot_be_done_is_refused_with_a_way_out():
    with pytest.raises(CompressError, match=r"bits 3 is not what leaf nf has; set bits to 4"):
        QuantLowRank(leaf="nf", bits=3)
    with pytest.raises(CompressError, match=r"rounds -1"):
        QuantLowRank(rounds=-1)
    with pytest.raises(CompressError, match=r"bits 7\.5 must lie between 1 and 5"):
        QuantLowRank(leaf="trellis", bits=7.5)
    with pytest.raises(CompressError, match=r"k_proj: 0\.01 extra bits a weight of \[64, 64\] buy no product, rank 1 costs 0\.5"):
        QuantLowRank(extra=0.01).planned((64, 64), BF16, "k_proj")
    with pytest.raises(CompressError, match=r"w: rank 70 of \[64, 96\] must be 0 to 64, in steps of 8"):
        QuantLowRank(rank=70, factor_bits=4, group_size=32).planned((64, 96), BF16, "w")


def test_a_model_of_all_leaves_is_stored_verified_and_loaded(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    save_tiny("llama", tmp_path / "model")
    make = lambda match, leaf, **options: {"method": "quant-lowrank", "match": match, "leaf": leaf, "bits": LEAVES[leaf][0], "group_size": 32, "rank": 8,
                                           "rounds": 1} | options  # fmt: skip
    steps = [make("*.[qk]_proj", "gptq", propagate=1.0), make("*.v_proj", "nf"), make("*.o_proj", "rtn", whiten="diagonal", factor_bits=8),
             make("*.down_proj", "trellis", factor_bits=4, guided=True), make("*", "ternary")]  # fmt: skip
    recipe = {"name": "all", "steps": steps, "tune": {"steps": 8, "held_out": 0}}
    report = run(tmp_path / "model", tmp_path / "out", f"file:{tmp_path}/text.txt", recipe, samples=48)
    assert all(r.bytes == r.planned_bytes for r in report.manifest.layers.values())
    assert any(after < before for before, after in report.manifest.training.values())
    checked = compress.verify(str(tmp_path / "out"))
    assert checked.ok and checked.kl < 1e-3, checked.problems
