"""pytest tests/test_propagation.py — two streams: targets that make up for what went wrong before (algorithms.md §2), weighed tokens (§46)."""

import pytest
import torch
from test_methods import correlated, weight
from test_stream import TOKENS
from tiny import TINY, save_tiny, tiny_model

import compress
from compress.calibration.guidance import guide
from compress.calibration.statistics import Stats
from compress.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.methods.gptq import GPTQ
from compress.methods.lnq import LNQ
from compress.methods.trellis import TrellisCoding
from compress.stream import Stream
from compress.walk import _by_rows, sites_of

WRITERS = {"llama": {"o_proj": "post_attention_layernorm", "down_proj": ""}, "opt": {"out_proj": "final_layer_norm", "fc2": ""},
           "gpt_neox": {"dense": "", "dense_4h_to_h": ""}, "gpt2": {"attn.c_proj": "ln_2", "mlp.c_proj": ""},
           "olmo2": {"o_proj": None, "down_proj": None}, "gemma2": {"o_proj": None, "down_proj": None}}  # fmt: skip


def two_streams(tokens=4096, n=48, m=32, noise=0.1):
    """Inputs of the original and of the compressed model, what the residual stream lacks, and a weight."""
    g = torch.Generator().manual_seed(5)
    original = correlated(n=n, tokens=tokens)
    x = original @ (0.9 * torch.eye(n) + 0.1 * torch.randn(n, n, generator=g) / n**0.5) + noise * torch.randn(tokens, n, generator=g)
    return original, x, 0.1 * torch.randn(tokens, m, generator=g) + 0.05 * x[:, :m], weight(m, n)


def stats_of(x, *pieces):
    s = Stats.zeros(x.shape[1])
    s.add(x, *pieces)
    return s.finish()


def loss(Q, x, original, missing, W):
    """‖Qx − Wx̃ − d‖², the slow way."""
    return float((x.double() @ Q.double().T - original.double() @ W.double().T - missing.double()).square().mean())


SOLVERS = {f"gptq{b}": lambda alpha, b=b: GPTQ(bits=b, group_size=16, propagate=alpha) for b in (2, 3, 4)}
SOLVERS |= {"lnq": lambda alpha: LNQ(bits=3, propagate=alpha), "trellis": lambda alpha: TrellisCoding(bits=3, L=8, propagate=alpha)}


@pytest.mark.parametrize("solver", SOLVERS)
def test_propagated_targets_come_nearer_to_the_original_output_also_on_tokens_they_have_not_seen(solver):
    original, x, missing, W = two_streams()
    fit, unseen = slice(0, 2048), slice(2048, 4096)
    losses = {}
    for alpha in (0.0, 0.5, 1.0):
        Q = SOLVERS[solver](alpha)(W, stats_of(x[fit], original[fit], missing[fit]), stored=torch.bfloat16).dequantize()
        losses[alpha] = loss(Q, x[unseen], original[unseen], missing[unseen], W)
    assert losses[1.0] < losses[0.5] < losses[0.0]


def test_with_8_bits_the_target_is_the_least_squares_solution():
    original, x, missing, W = two_streams()
    Q = GPTQ(bits=8, group_size=-1, propagate=1.0, damp=1e-6)(W, stats_of(x, original, missing), stored=torch.bfloat16).dequantize()
    best = torch.linalg.lstsq(x.double(), original.double() @ W.double().T + missing.double()).solution.T
    assert loss(Q, x, original, missing, W) < 1.02 * loss(best, x, original, missing, W)


def test_equal_streams_and_alpha_0_change_no_bit():
    original, x, missing, W = two_streams()
    plain = GPTQ(bits=3, group_size=16)(W, stats_of(x), stored=torch.bfloat16)
    for s, alpha in ((stats_of(x, original, missing), 0.0), (stats_of(x), 1.0)):
        assert torch.equal(GPTQ(bits=3, group_size=16, propagate=alpha)(W, s, stored=torch.bfloat16).codes, plain.codes)
    assert stats_of(x, x).cross.abs().max() < 1e-5 * stats_of(x).hessian.abs().max()
    s = stats_of(x)
    GPTQ(bits=3, group_size=16, propagate=1.0)(W, s, stored=torch.bfloat16)
    assert [f["what"] for f in s.fallbacks] == ["errors not propagated"]


def test_weighed_moments_are_those_of_the_formula_and_equal_weights_change_nothing():
    original, x, missing, _ = two_streams(tokens=300)
    s = torch.rand(300, generator=torch.Generator().manual_seed(1)) + 0.1
    ours, total = stats_of(x, original, missing, s), float(s.double().sum())
    X, O, D, w = x.double(), original.double(), missing.double(), s.double()[:, None]
    for got, expected in ((ours.hessian, (w * X).T @ X), (ours.cross, (w * (O - X)).T @ X), (ours.missing, (w * D).T @ X)):
        torch.testing.assert_close(got.double(), expected / total, rtol=1e-4, atol=1e-5 * float(expected.abs().max()) / total)
    torch.testing.assert_close(stats_of(x, None, None, torch.full((300,), 2.0)).hessian, stats_of(x).hessian, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", WRITERS)
def test_the_reader_of_the_residual_stream_is_found_without_a_table(name, tmp_path):
    save_tiny(name, tmp_path, dtype=torch.float32)
    stream = Stream(Checkpoint(str(tmp_path), dtype=torch.float32), TOKENS, batch=2)
    block = stream.source.load_block(0)
    paths = [p for s in sites_of(stream.source, block, stream) for p in s.linears]
    for tail, reader in WRITERS[name].items():
        assert stream._reader(block, next(p for p in paths if p.endswith(tail))) == reader
    inner = next(p for p in paths if any(p.endswith(t) for t in ("q_proj", "query_key_value", "c_attn")))
    assert stream._reader(block, inner) is None


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_token_weights_equal_those_of_one_backward_pass_through_the_whole_model(name, tmp_path):
    save_tiny(name, tmp_path, dtype=torch.float32)
    source = Checkpoint(str(tmp_path), dtype=torch.float32)
    streamed = guide(Stream(source, TOKENS, batch=5), seed=3)
    model, seen = tiny_model(name), {}
    blocks = model.get_submodule(source.blocks_path)

    def watch(key):
        def keep(module, args, y):
            y.register_hook(lambda g: seen.__setitem__(key, g.square().flatten(0, 1)))

        return keep

    for i, block in enumerate(blocks):
        for path in streamed[i]:
            block.get_submodule(path).register_forward_hook(watch((i, path)))
    model.get_input_embeddings().weight.requires_grad_(True)
    log_p = model(TOKENS, use_cache=False).logits.log_softmax(-1).flatten(0, 1)
    labels = torch.multinomial(log_p.detach().exp(), 1, generator=torch.Generator().manual_seed(3))
    (-log_p.gather(1, labels)).sum().backward()
    for (i, path), s in seen.items():
        for k in (1, 2, 4):
            wanted = torch.stack([part.mean(1) for part in s.tensor_split(k, dim=1)])
            torch.testing.assert_close(streamed[i][path].of(k), wanted / wanted.mean(), rtol=1e-3, atol=1e-4)
    assert len(seen) == sum(map(len, streamed)) >= 8


@pytest.mark.parametrize("name, groups", [("llama", 1), ("llama", 4), ("mixtral", 1), ("mixtral", 2), ("olmo2", 1)])
def test_a_guided_and_propagated_run_verifies_and_gives_the_same_bytes_twice(name, groups, tmp_path):
    save_tiny(name, tmp_path / "model")
    (tmp_path / "t.txt").write_text("It was the best of times, it was the worst of times. " * 60)
    recipe = {"name": "r", "steps": [{"method": "gptq", "bits": 3, "group_size": 32, "propagate": 1.0, "guided": True, "output_groups": groups, "refits": 1}]}
    reports = [compress.run(str(tmp_path / "model"), recipe, f"file:{tmp_path / 't.txt'}", tmp_path / out, samples=12, seqlen=64, show=False, device="cpu")
               for out in ("a", "b")]  # fmt: skip
    assert compress.verify(str(tmp_path / "a")).ok
    assert reports[0].manifest == reports[1].manifest
    routed = {f.what for f in reports[0].fallbacks}
    assert (routed >= {"errors not propagated", "tokens not weighed"}) if name == "mixtral" else not routed
    assert TINY[name]


def test_parts_of_the_outputs_are_solved_with_statistics_of_their_own():
    tokens, W = torch.randn(300, 32, generator=torch.Generator().manual_seed(1)), torch.randn(10, 32, generator=torch.Generator().manual_seed(2))
    weights = torch.rand(4, 300, generator=torch.Generator().manual_seed(3)) ** 4
    stats = []
    for w in weights:
        s = Stats.zeros(32)
        s.add(tokens @ torch.randn(32, 32, generator=torch.Generator().manual_seed(4)), weight=w)
        stats.append(s.finish())
    method = GPTQ(bits=3, group_size=16, guided=True, output_groups=4)
    whole = _by_rows(method, W, stats, torch.bfloat16, "w")
    assert whole.meta() == method.planned((10, 32), torch.bfloat16, "w").meta() and whole.nbytes() == method.planned((10, 32), torch.bfloat16, "w").nbytes()
    parts = [method(w.contiguous(), s, stored=torch.bfloat16) for w, s in zip(W.tensor_split(4), stats, strict=True)]
    assert torch.equal(whole.dequantize(), torch.cat([p.dequantize() for p in parts]))
    assert not torch.equal(whole.dequantize(), method(W, stats[0], stored=torch.bfloat16).dequantize())
    with pytest.raises(CompressError, match="output_groups 2 weighs tokens apart"):
        GPTQ(output_groups=2)


def test_a_free_bias_and_8_bits_reach_the_least_squares_solution_with_an_intercept():
    original, x, missing, W = two_streams()
    shift = torch.linspace(-1, 2, x.shape[1])
    original, x, missing = original + 0.5 * shift, x + shift, missing + 0.3
    s = stats_of(x, original, missing)
    Q = GPTQ(bits=8, group_size=-1, propagate=1.0, damp=1e-6)(W, s.centred(), stored=torch.bfloat16).dequantize()
    off = (original @ W.T + missing - x @ Q.T - s.bias(W, Q)).double()
    ones = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    target = original.double() @ W.double().T + missing.double()
    best = target - ones @ torch.linalg.lstsq(ones, target).solution
    assert off.mean(0).abs().max() < 1e-4
    assert off.square().mean() < 1.02 * best.square().mean()
    plain = stats_of(x)  # one stream: the mean of the layer's own output is kept
    assert ((x @ (Q - W).T).mean(0) + plain.bias(W, Q)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama"])
def test_corrected_biases_come_nearer_to_the_original_and_are_read_back(name, tmp_path):
    save_tiny(name, tmp_path / "model")
    (tmp_path / "t.txt").write_text("It was the best of times, it was the worst of times. " * 60)
    kl = {}
    for corrects in (False, True):
        recipe = {"name": "r", "steps": [{"method": "gptq", "bits": 2, "group_size": 32, "propagate": 1.0, "bias_correction": corrects}]}
        out = tmp_path / str(corrects)
        compress.run(str(tmp_path / "model"), recipe, f"file:{tmp_path / 't.txt'}", out, samples=12, seqlen=64, show=False, device="cpu")
        assert compress.verify(str(out)).ok
        kl[corrects] = compress.evaluate(str(out), str(tmp_path / "model"), f"file:{tmp_path / 't.txt'}", samples=12, seqlen=64, show=False)["kl"]["mean"]
    assert kl[True] == kl[False] if name == "llama" else kl[True] < kl[False]
