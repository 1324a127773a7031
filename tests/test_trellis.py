"""pytest tests/test_trellis.py — the bitshift trellis: packing, the Viterbi search against all streams, distortion, rates, the sweep (algorithms.md §39)."""

import itertools
import math

import pytest
import torch
from test_methods import correlated, stats_of, weight

from compress import hadamard
from compress.errors import CompressError
from compress.formats import Trellis, build
from compress.formats.trellis import RATES, digits, lut, states, stream_length
from compress.methods import GPTQ, TrellisCoding
from compress.methods.trellis import allocate
from compress.methods.viterbi import Viterbi


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the code


def random_trellis(m=40, n=12, L=6, length=20):
    g = torch.Generator().manual_seed(0)
    rates = torch.randint(0, 7, (n,), generator=g, dtype=torch.uint8)
    codes = torch.stack([torch.randint(0, 2 ** int(K), (m,), generator=g, dtype=torch.uint8) for K in rates])
    exponents = torch.randint(100, 160, (n,), generator=g, dtype=torch.uint8)
    return Trellis.pack(codes, rates, exponents, torch.tensor([0.7]), L, length, seed=3), codes, rates, exponents


@pytest.mark.parametrize(("m", "length"), [(40, 20), (7, 7), (24, 24)])
def test_dequantize_reads_each_stream_bit_by_bit(m, length):
    fmt, codes, rates, exponents = random_trellis(m=m, length=length)
    V = torch.zeros(12, m, dtype=torch.float64)
    for j, K in enumerate(rates.tolist()):
        n = digits(K, 6, length) if K else 0
        for i in range(m * (K > 0)):
            first = i // length * length
            state = 0
            for back in range(n - 1, -1, -1):  # the last L bits up to and with this weight's, around the end of its stream
                state = state << K | int(codes[j, first + (i - first - back) % length])
            V[j, i] = float(lut(K, n)[state]) * 0.7 * 2 ** (int(exponents[j]) / 16 - 8)
    expected = (V @ hadamard.matrix(m, torch.float64).T * hadamard.signs(m, 3).double()).T
    torch.testing.assert_close(fmt.dequantize(torch.float64), expected, rtol=1e-4, atol=1e-6)
    again = build(fmt.meta(), fmt.tensors())
    assert torch.equal(again.dequantize(), fmt.dequantize()) and again.shape == (m, 12)


def test_neighbouring_states_overlap():
    c = torch.randint(0, 4, (5, 30))
    s = states(c, 2, 5)
    assert torch.equal(s.roll(-1, 1) >> 2, s & 0xFF)


@pytest.mark.parametrize(("K", "n"), [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (6, 1)])
def test_the_lut_is_a_permutation_of_quantiles_whose_continuations_spread_out(K, n):
    v, r = lut(K, n), 1 << K
    normal = torch.special.ndtri((torch.arange(r**n).double() + 0.5) / r**n)
    torch.testing.assert_close(v.sort().values / v.square().mean().sqrt(), (normal / normal.square().mean().sqrt()).float(), rtol=1e-3, atol=1e-3)
    if n > 1:
        band = torch.bucketize(v.view(-1, r), v.sort().values[r ** (n - 1) :: r ** (n - 1)] * (1 + 1e-6), right=True)
        assert (band.sort(1).values == torch.arange(r)).float().mean() > 0.99  # but for ties after rounding to fp16
    assert torch.equal(v, v.half().float())


@pytest.mark.parametrize(("K", "n", "T"), [(1, 3, 8), (1, 1, 5), (2, 2, 5), (2, 1, 4), (2, 3, 5), (3, 2, 4)])
def test_the_search_finds_the_best_of_all_streams(K, n, T):
    x, viterbi = gaussian(T, 6), Viterbi(K, n)
    every = torch.tensor(list(itertools.product(range(1 << K), repeat=T)))
    distance = (viterbi.values[states(every, K, n)][:, :, None] - x).square().sum(1)
    best, which = distance.min(0)
    past = every[which][:, T - n + 1 :].T
    found = viterbi.search(x, past)
    assert torch.equal(found[T - n + 1 :], past)
    cost = lambda c: (viterbi.values[states(c.T.contiguous(), K, n)].T - x).square().sum(0)
    torch.testing.assert_close(cost(found), best)
    assert (cost(viterbi.encode(x)) >= best * 0.9999).all()


@pytest.mark.parametrize(("K", "L", "known"), [(1, 10, 0.285), (2, 8, 0.083), (2, 10, 0.0765), (2, 12, 0.073), (3, 9, 0.0215), (3, 12, 0.0189), (4, 8, 0.0070)])
def test_distortion_of_a_gaussian(K, L, known):
    """At or below random Gaussian tables: .083, .080, .072 at 2 bits, .0191 at 3 (L = 12); uniform .119, .0376; bound 4^−K."""
    x, viterbi = gaussian(128, 96 if L < 12 else 48), Viterbi(K, L // K)
    c = viterbi.encode(x)
    error = float((viterbi.values[states(c.T.contiguous(), K, L // K)].T - x).square().mean())
    assert 4.0**-K < error < 1.025 * known


def test_streams_fit_the_rows():
    assert [stream_length(m, 128) for m in (384, 1024, 11008, 100, 151, 300, 1)] == [128, 128, 128, 100, 151, 100, 1]
    assert digits(2, 12, 128) == 6 and digits(5, 12, 128) == 2 and digits(2, 12, 3) == 3 and digits(6, 12, 1) == 1


# ---- rates


def test_rates_are_the_best_of_all_allocations():
    price = torch.tensor([5.0, 0.1, 1.0, 0.0, 30.0])
    d = [1.0] + [1.15 * 4.0**-K for K in RATES[1:]]
    cost = lambda rates: sum(p * d[K] for p, K in zip(price.tolist(), rates, strict=True))
    best = min(cost(r) for r in itertools.product(RATES, repeat=5) if sum(r) == 10)
    rates = allocate(price, 10)
    assert int(rates.sum()) == 10 and math.isclose(cost(rates.tolist()), best) and rates[3] == 0
    assert allocate(torch.zeros(4), 24).tolist() == [6] * 4


# ---- the method


@pytest.mark.parametrize("bits", [1, 2, 2.5, 3, 4])
def test_bits_are_what_was_asked_for_and_bytes_what_was_planned(bits):
    W, s, method = weight(48, 64), stats_of(correlated()), TrellisCoding(bits=bits, L=8)
    a, b = (method(W.clone(), s, stored=torch.bfloat16) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.tensors().values(), b.tensors().values(), strict=True))
    planned = method.planned((48, 64), torch.bfloat16, "w")
    assert planned.nbytes() == a.nbytes() and planned.meta() == a.meta() and planned.describe() == a.describe()
    assert a.nbytes() == bits * 48 * 64 / 8 + 64 + 24 + 4  # codes, exponents, rates, scale


@pytest.mark.parametrize("shape", [(5, 7), (1, 16), (24, 1), (33, 40), (130, 12)])
def test_any_shape_works(shape):
    m, n = shape
    W, s = weight(m, n), stats_of(correlated(n=n))
    fmt = TrellisCoding(bits=4, L=8)(W, s, stored=torch.bfloat16)
    assert fmt.nbytes() == TrellisCoding(bits=4, L=8).planned(shape, torch.bfloat16, "w").nbytes()
    assert s.error(W, fmt.dequantize()) < 0.05


@pytest.mark.parametrize("bits", [2, 3])
def test_it_beats_gptq_with_groups_at_fewer_bits(bits):
    W, s = weight(128, 128), stats_of(correlated(n=128, tokens=2048))
    trellis, gptq = TrellisCoding(bits=bits)(W, s, stored=torch.bfloat16), GPTQ(bits=bits, group_size=32)(W, s, stored=torch.bfloat16)
    assert trellis.bits() < gptq.bits() and s.error(W, trellis.dequantize()) < 0.7 * s.error(W, gptq.dequantize())


def test_the_loss_is_the_error_in_the_damped_norm_and_columns_solved_together_are_fed_back():
    W, s = weight(64, 96).double(), stats_of(correlated(n=96), torch.float64)
    fmt, loss = TrellisCoding(bits=2, L=8).solve(W, s)
    D = fmt.dequantize(torch.float64) - W
    Hd = s.hessian + 0.01 * s.hessian.diagonal().mean() * torch.eye(96)
    assert math.isclose(loss, float(((D @ Hd) * D).sum()), rel_tol=1e-4)


def test_without_a_hessian_it_is_the_code_alone():
    """H = I: no feedback, equal rates on columns of equal norm; the error is the code's distortion."""
    W, s = gaussian(256, 32), stats_of(correlated(n=32))
    s.hessian = torch.eye(32)
    assert s.error(W, TrellisCoding(bits=2, L=8)(W, s, stored=torch.bfloat16).dequantize()) == pytest.approx(0.083, rel=0.06)


def test_dead_inputs_get_no_bits_and_are_told():
    x, W = correlated(), weight(48)
    x[:, [3, 40]] = 0
    s = stats_of(x)
    fmt = TrellisCoding(bits=2, L=8)(W, s, stored=torch.bfloat16)
    assert (fmt.dequantize()[:, [3, 40]] == 0).all() and s.fallbacks[0]["what"] == "inputs never active"
    assert torch.isfinite(TrellisCoding(L=8)(torch.zeros_like(W), s, stored=torch.bfloat16).dequantize()).all()


def test_a_damaged_file_is_refused():
    fmt, *_ = random_trellis()
    with pytest.raises(CompressError, match=r"ask for \d+ bytes of codes, \d+ are stored"):
        build(fmt.meta(), fmt.tensors() | {"codes": fmt.codes[:-1]}).dequantize()


@pytest.mark.parametrize("bad", [{"bits": 8}, {"L": 20}, {"length": 0}])
def test_options_out_of_range_are_refused(bad):
    with pytest.raises(CompressError, match="must"):
        TrellisCoding(**bad)
