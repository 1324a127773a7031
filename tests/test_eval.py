"""OMP_NUM_THREADS=1 python -m pytest tests/test_eval.py"""
import json
import math
import os
import statistics
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from compress.calibration.data import CalibrationSet, load_calibration
from compress.errors import CompressError
from compress.eval import compare as compare_module
from compress.eval import speed
from compress.eval.compare import compare, logits_of

N, SEQLEN, VOCAB = 5, 9, 23
YARDSTICK = Path(os.environ.get("COMPRESS_YARDSTICK") or Path(__file__).parents[2] / "shared" / "yardstick")


def example(padded: bool, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (N, SEQLEN), generator=g)
    mask = torch.arange(SEQLEN) < torch.tensor([9, 2, 5, 8, 3])[:, None] if padded else None
    theirs = 3 * torch.randn(N, SEQLEN, VOCAB, generator=g)
    ours = theirs + 0.3 * torch.randn(N, SEQLEN, VOCAB, generator=g)
    return CalibrationSet(tokens, mask, 11, {}), ours.to(dtype), theirs.to(dtype)


def slow(data, ours, theirs) -> tuple[list[list[float]], int]:
    """Per window, the [nll, reference nll, kl, same] of each target, in fp64 with plain loops; and the real tokens."""
    def log_softmax(row):
        row = [float(x) for x in row]
        total = max(row) + math.log(math.fsum(math.exp(x - max(row)) for x in row))
        return [x - total for x in row]
    windows, real = [], 0
    for w in range(N):
        targets = []
        for t in range(SEQLEN):
            if data.mask is not None and not data.mask[w, t]:
                continue
            real += 1
            if t > 0:
                q, p = log_softmax(ours[w, t - 1]), log_softmax(theirs[w, t - 1])
                y = int(data.tokens[w, t])
                kl = math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q))
                targets.append([-q[y], -p[y], kl, float(q.index(max(q)) == p.index(max(p)))])
        windows.append(targets)
    return windows, real


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", [1, 3, 100])
def test_against_plain_loops(monkeypatch, padded, dtype, positions):
    monkeypatch.setattr(compare_module, "SLICE", positions * VOCAB)
    data, ours, theirs = example(padded, dtype)
    report = compare(iter(ours.split(2)), iter(theirs.split(2)), data)
    windows, real = slow(data, ours, theirs)
    targets = [target for window in windows for target in window]
    nll, reference, kl, same = (statistics.fmean(column) for column in zip(*targets))
    assert report["tokens"] == len(targets) == (17 + 5 if padded else N * (SEQLEN - 1)) and report["windows"] == N
    assert report["perplexity"]["token"] == pytest.approx(math.exp(nll), rel=1e-6)
    assert report["perplexity"]["word"] == pytest.approx(math.exp(nll * real / 11), rel=1e-5)
    assert report["reference"]["perplexity"]["token"] == pytest.approx(math.exp(reference), rel=1e-6)
    assert report["reference"]["perplexity"]["word"] == pytest.approx(math.exp(reference * real / 11), rel=1e-5)
    assert report["kl"]["mean"] == pytest.approx(kl, rel=1e-4)
    assert report["top1"]["agreement"] == pytest.approx(same, rel=1e-12) and 0 < same < 1
    assert report["delta"]["mean"] == pytest.approx(nll - reference, abs=1e-6)

    def stderr(value) -> float:      # of a mean over tokens, from windows of unequal length: a ratio's residuals
        mean = statistics.fmean(value(target) for target in targets)
        residual = [math.fsum(value(target) - mean for target in window) for window in windows]
        return math.sqrt(N / (N - 1) * math.fsum(r * r for r in residual)) / len(targets)
    assert report["perplexity"]["token_stderr"] == pytest.approx(math.exp(nll) * stderr(lambda t: t[0]), rel=1e-5)
    assert report["kl"]["stderr"] == pytest.approx(stderr(lambda t: t[2]), rel=1e-4)
    assert report["top1"]["stderr"] == pytest.approx(stderr(lambda t: t[3]), rel=1e-9)
    assert report["delta"]["stderr"] == pytest.approx(stderr(lambda t: t[0] - t[1]), rel=1e-4)
    if not padded:      # equal windows: the spread of their means
        means = [statistics.fmean(target[2] for target in window) for window in windows]
        assert report["kl"]["stderr"] == pytest.approx(statistics.stdev(means) / math.sqrt(N), rel=1e-4)
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_small_divergences_keep_their_digits():
    """8-bit weights leave a KL of 1e-5: fp32 log-softmax has to resolve it over a real vocabulary."""
    g = torch.Generator().manual_seed(0)
    theirs = 3 * torch.randn(4, 33, 8192, generator=g)
    ours = theirs + 5e-3 * torch.randn(theirs.shape, generator=g)
    data = CalibrationSet(torch.randint(8192, (4, 33), generator=g), None, 1, {})
    p, q = theirs[:, :-1].double().log_softmax(-1), ours[:, :-1].double().log_softmax(-1)
    exact = (p.exp() * (p - q)).sum(-1).mean().item()
    assert exact < 2e-5 and compare([ours], [theirs], data)["kl"]["mean"] == pytest.approx(exact, rel=1e-2)


def test_identical_models_and_no_reference():
    data, ours, _ = example(True)
    report = compare([ours], [ours.clone()], data)
    assert report["kl"] == {"mean": 0.0, "stderr": 0.0} and report["top1"] == {"agreement": 1.0, "stderr": 0.0}
    assert report["delta"] == {"mean": 0.0, "stderr": 0.0}
    assert report["reference"]["perplexity"] == report["perplexity"]
    alone = compare(ours.split(3), None, data)
    assert alone["perplexity"] == report["perplexity"] and alone["tokens"] == report["tokens"]
    assert alone["kl"] is alone["top1"] is alone["delta"] is alone["reference"] is None


def test_one_window_has_no_stderr_and_a_broken_model_no_perplexity():
    data, ours, theirs = example(False)
    data = CalibrationSet(data.tokens[:1], None, 11, {})
    report = compare([ours[:1]], [theirs[:1]], data)
    assert report["perplexity"]["token_stderr"] is report["kl"]["stderr"] is report["top1"]["stderr"] is None
    assert report["delta"]["stderr"] is None and report["kl"]["mean"] > 0
    broken = compare([1e6 * ours], [theirs], example(False)[0])
    assert broken["perplexity"] == {"token": None, "token_stderr": None, "word": None}
    json.dumps([report, broken], allow_nan=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_name_model_and_window(value):
    data, ours, theirs = example(True)
    bad = ours.clone()
    bad[3, 4, 7] = value
    with pytest.raises(CompressError, match="window 3: the compressed model's logits at position 4"):
        compare(bad.split(2), theirs.split(2), data)
    with pytest.raises(CompressError, match="window 3: the reference model's logits at position 4"):
        compare(theirs.split(2), bad.split(2), data)
    bad = ours.clone()
    bad[1, 5] = value       # padding: predicts nothing
    assert compare([bad], [theirs], data) == compare([ours], [theirs], data)


def test_streams_that_do_not_match_the_data():
    data, ours, theirs = example(False)
    for compressed, reference, message in (
            ([ours[:3]], None, "logits for 3 windows, the data has 5"), ([ours, ours], None, "the data has \\[5, 9\\]"),
            ([ours[:, :4]], None, "the data has \\[5, 9\\]"),
            ([ours], [theirs[..., :20]], "\\[5, 9, 23\\].*\\[5, 9, 20\\]"),
            (ours.split(2), [theirs[:2]], "window 2 on: compressed \\[2, 9, 23\\], reference None")):
        with pytest.raises(CompressError, match=message):
            compare(compressed, reference, data)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                        num_attention_heads=4, max_position_embeddings=128)).eval()


@pytest.mark.parametrize("padded", [False, True])
def test_a_model_batch_by_batch(padded):
    data, _, _ = example(padded)
    model = tiny_llama()
    one, many = (compare(logits_of(model, data, batch), None, data) for batch in (1, 4))
    assert one["perplexity"]["token"] == pytest.approx(many["perplexity"]["token"], rel=1e-6)
    assert many == compare(logits_of(model, data, 4), None, data)
    losses = []
    for w in range(N):
        row = data.tokens[w] if data.mask is None else data.tokens[w][data.mask[w]]
        logits = model(row[None]).logits[0, :-1]
        losses += torch.nn.functional.cross_entropy(logits, row[1:], reduction="none").tolist()
    assert one["perplexity"]["token"] == pytest.approx(math.exp(statistics.fmean(losses)), rel=1e-5)


@pytest.mark.skipif(not YARDSTICK.is_dir(), reason=f"no yardstick at {YARDSTICK}")
def test_yardstick_convention():
    """Its README: tokenised once without special tokens, windows of 512 from the start, mean over 511 targets each."""
    tokenizer = AutoTokenizer.from_pretrained(YARDSTICK / "llama-16m")
    model = AutoModelForCausalLM.from_pretrained(YARDSTICK / "llama-16m", dtype=torch.float32).eval()
    file = YARDSTICK / "wikitext2-test.txt"
    data = load_calibration(f"file:{file}", tokenizer, samples=4, seqlen=512, split="evaluation")
    ids = tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    assert data.tokens.flatten().tolist() == ids[:4 * 512] and data.words > 1000
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss.item() for row in torch.tensor(ids[:4 * 512]).view(4, 512)]
    report = compare(logits_of(model, data), logits_of(model, data), data)
    assert report["perplexity"]["token"] == pytest.approx(math.exp(statistics.fmean(losses)), rel=1e-5)
    assert report["tokens"] == 4 * 511 and report["kl"]["mean"] == 0 and report["top1"]["agreement"] == 1


def test_speed_in_a_fresh_process(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    ballast = bytearray(2**30)      # the parent's memory is not the model's
    result = speed.measure(str(tmp_path), new_tokens=4, prompt_tokens=8, dtype=torch.bfloat16)
    assert set(result) == {"decode_tokens_per_second", "prefill_tokens_per_second", "peak_bytes", "load_seconds"}
    assert result["decode_tokens_per_second"] > 1 and result["prefill_tokens_per_second"] > 1
    assert 0 < result["peak_bytes"] < len(ballast) // 2 and result["load_seconds"] > 0
    with pytest.raises(CompressError, match="nowhere: speed on cpu not measured") as error:
        speed.measure(str(tmp_path / "nowhere"))
    assert "\n" not in str(error.value)
