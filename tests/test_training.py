"""pytest tests/test_training.py — the block tuner and the end-to-end phase: they help, they undo what does not, a kill loses nothing."""

import pytest
import torch
from test_methods import correlated, weight
from tiny import save_tiny
from torch.nn import functional as F

import compress
from compress.artifact import Writer
from compress.calibration.statistics import Stats
from compress.embedded import model_path
from compress.errors import CompressError
from compress.methods import RTN
from compress.trained import Trained

RTN2 = {"name": "rtn2", "steps": [{"method": "rtn", "bits": 2, "group_size": 64, "clip": "mse"}]}
OPTIONS = {"samples": 72, "seqlen": 128, "show": False, "device": "cpu"}


def kl(out):
    return compress.evaluate(str(out), model_path(), "stdlib", samples=12, seqlen=128, show=False)["kl"]["mean"]


def run(out, recipe, **extra):
    return compress.run(model_path(), recipe | extra, "stdlib", out, **OPTIONS)


def rounded(bits=3, sym=False):
    W, x = weight(24, 64), correlated()
    return W, x, RTN(bits=bits, group_size=32, sym=sym)(W, Stats(torch.eye(64)), stored=torch.bfloat16)


@pytest.mark.parametrize("bits, sym", [(2, False), (3, True), ("ternary", True), (1, True)])
def test_untrained_it_is_the_format_it_began_as(bits, sym):
    W, x, fmt = rounded(bits, sym)
    linear = Trained(fmt, W, None)
    assert torch.equal(linear.weight().codes, fmt.codes) and torch.equal(linear.weight().scales, fmt.scales)
    assert torch.equal(linear(x), F.linear(x, fmt.dequantize()))


def test_gradients_are_those_of_the_dequantized_weight_and_what_is_stored_is_what_was_trained():
    W, x, fmt = rounded()
    linear = Trained(fmt, W, None)
    W_hat = fmt.dequantize().requires_grad_()
    (F.linear(x, W_hat).square().sum()).backward()
    (linear(x).square().sum()).backward()
    expected = W_hat.grad.view(24, 2, 32) * fmt.scales.float()[..., None]
    torch.testing.assert_close(linear.p.grad, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        linear.log_s += 0.01 * torch.randn(linear.log_s.shape, generator=torch.Generator().manual_seed(0))
        linear.p += 0.3
    assert torch.equal(F.linear(x, linear.weight().dequantize()), linear(x).detach())


def test_the_tuner_rounds_better_than_rounding_and_says_by_how_much(tmp_path):
    plain, tuned = run(tmp_path / "a", RTN2), run(tmp_path / "b", RTN2, tune={"steps": 20, "scale_lr": 5e-3})
    assert kl(tmp_path / "b") < 0.7 * kl(tmp_path / "a")
    assert plain.manifest.training == {} and len(tuned.manifest.training) == 4
    assert all(after < before for before, after in tuned.manifest.training.values())
    assert compress.verify(str(tmp_path / "b")).ok


def test_no_steps_change_nothing_and_that_is_told(tmp_path):
    plain, idle = run(tmp_path / "a", RTN2), run(tmp_path / "b", RTN2, tune={"steps": 0})
    assert {n: t.sha256 for n, t in plain.manifest.tensors.items()} == {n: t.sha256 for n, t in idle.manifest.tensors.items()}
    assert {f.what for f in idle.fallbacks} == {"tuning undone"}
    with pytest.raises(CompressError, match="steps -1"):
        run(tmp_path / "c", RTN2, tune={"steps": -1})


class Killed(BaseException):
    pass


def test_distilling_lowers_the_divergence_and_a_kill_at_any_commit_loses_nothing(tmp_path, monkeypatch):
    extra = {"distill": {"epochs": 1, "batch_tokens": 1024, "held_out": 0.1, "rounding": 0.02}}
    run(tmp_path / "plain", RTN2)
    whole = run(tmp_path / "whole", RTN2, **extra)
    before, after = whole.manifest.training["model"]
    assert after < before and kl(tmp_path / "whole") < kl(tmp_path / "plain") and compress.verify(str(tmp_path / "whole")).ok
    assert not (tmp_path / "whole" / "distilled.safetensors").exists()
    commit, left = Writer.commit, [0]

    def dying(self, shard, *args):
        header = commit(self, shard, *args)
        left[0] -= 1
        if not left[0]:
            raise Killed
        return header

    monkeypatch.setattr(Writer, "commit", dying)
    for n in (6, 2, 3):  # what was learned; then blocks of the second round, one more at each resume
        left[0] = n
        with pytest.raises(Killed):
            run(tmp_path / "killed", RTN2, **extra)
    left[0] = -1
    run(tmp_path / "killed", RTN2, **extra)
    for file in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "killed" / file.name).read_bytes() == file.read_bytes(), file.name


def test_windows_that_the_model_writes_itself_join_the_calibration_text_and_its_record(tmp_path):
    save_tiny("llama", tmp_path / "model")
    (tmp_path / "t.txt").write_text("It was the best of times, it was the worst of times. " * 60)
    recipe = {"name": "r", "steps": [{"method": "gptq", "bits": 3, "group_size": 32}]}
    run = lambda out, n: compress.run(str(tmp_path / "model"), recipe | {"generated": n}, f"file:{tmp_path / 't.txt'}", tmp_path / out, samples=4, seqlen=32,
                                      show=False, device="cpu").manifest  # fmt: skip
    without, with_it, again = run("a", 0), run("b", 3), run("c", 3)
    assert "generated" not in without.run["calibration"] and with_it == again
    assert with_it.run["calibration"]["generated"]["obtained"] == {"samples": 3, "tokens": 96}
    assert {r.tokens for r in without.layers.values()} == {128} and {r.tokens for r in with_it.layers.values()} == {224}
    assert without.tensors != with_it.tensors
