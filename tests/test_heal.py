"""pytest tests/test_heal.py — healing: adapters are no-ops at first and come out in the format's own form; losses; a kill; what it wins back."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from torch.nn import functional as F

import compress
from compress.calibration.data import CalibrationSet, load_calibration
from compress.calibration.statistics import Stats
from compress.checkpoint import Checkpoint
from compress.embedded import model_path
from compress.errors import CompressError
from compress.formats import Dense, Masked, Product, Scaled, Sparse24, Sum
from compress.healing.adapters import LowRank, learner
from compress.healing.losses import LEAST, distance, divergence, likeliest, relation, translation
from compress.healing.options import Heal
from compress.healing.teacher import attending, descent, matched, parts
from compress.methods import RTN
from compress.restorative import restored
from compress.verification import ArtifactCheckpoint

RANDOM = lambda *shape, seed=0: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
KEEP = (RANDOM(24, 16, 4, seed=5).argsort(-1) < 2).view(24, 64)  # 2 of every 4
HALF = RANDOM(24, 64, seed=6) > 0


def int4(out=24, n=64):
    return RTN(bits=4, group_size=16)(RANDOM(out, n), Stats(torch.eye(n)), stored=torch.bfloat16)


def dense(*shape, dtype=torch.float32):
    return Dense(RANDOM(*shape, seed=2).to(dtype))


FORMATS = {
    "dense": lambda: dense(24, 64),
    "masked": lambda: Masked.pack(HALF, dense(1, int(HALF.sum()))),
    "2of4": lambda: Sparse24.pack(KEEP, dense(24, 32), 2, 4),
    "2of4 int4": lambda: Sparse24.pack(KEEP, int4(24, 32), 2, 4),
    "product": lambda: Product((dense(24, 8), dense(8, 64))),
    "int4": int4,
    "int4 + rank 4": lambda: Sum((int4(), Product((dense(24, 4), dense(4, 64))))),
    "scaled int4": lambda: Scaled(int4(), RANDOM(64).abs()),
    "scaled dense": lambda: Scaled(dense(24, 64), RANDOM(64).abs()),
}
KEPT = {"int4", "scaled int4", "2of4 int4"}  # nothing in them can take an adapter up


def made(name, **options):
    f = FORMATS[name]()
    return f, learner(f, Heal(rank=4, **options), dtype=torch.float32, kept_as=torch.float32, generator=torch.Generator().manual_seed(0), known={})


def stirred(module):
    """Every learning tensor moved by something."""
    with torch.no_grad():
        for i, p in enumerate(p for p in module.parameters() if p.requires_grad):
            p += 0.1 * RANDOM(*p.shape, seed=10 + i)
    return module


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_untrained_nothing_changes_and_trained_it_is_what_is_stored(name, merge, bounded):
    f, module = made(name, merge=merge, bounded=bounded)
    x = RANDOM(5, 64, seed=3)
    torch.testing.assert_close(module(x), F.linear(x, f.dequantize()), rtol=1e-5, atol=1e-5)
    assert torch.equal(module.weight().dequantize(), f.dequantize())
    stored = stirred(module).weight()
    torch.testing.assert_close(module(x), F.linear(x, stored.dequantize()), rtol=1e-4, atol=1e-4)
    assert (stored.nbytes() > f.nbytes()) == (name in KEPT or not merge)
    assert isinstance(stored, Sum if name in KEPT or not merge else type(f))


@pytest.mark.parametrize("name, keep", [("masked", HALF), ("2of4", KEEP)])
def test_zeros_stay_and_get_no_gradient(name, keep):
    f, module = made(name)
    low_rank = module.change
    x = RANDOM(7, 64, seed=3)
    module(x).square().sum().backward()
    W = f.dequantize().requires_grad_()
    F.linear(x, W).square().sum().backward()
    torch.testing.assert_close(low_rank.B.grad, low_rank.scale * (W.grad * keep) @ low_rank.A.detach().T, rtol=1e-4, atol=1e-4)
    stored = stirred(module).weight()
    assert torch.equal(stored.keep(), keep) and not stored.dequantize()[~keep].any() and not torch.equal(stored.dequantize(), f.dequantize())


def test_frozen_without_a_copy_has_the_gradient_of_the_dense_weight():
    f, module = made("int4", bounded=True)
    assert module.base.W is None
    x = RANDOM(5, 64, seed=3).requires_grad_()
    module(x).sin().sum().backward()
    other = x.detach().clone().requires_grad_()
    F.linear(other, f.dequantize()).sin().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


@pytest.mark.parametrize("name", ["int4", "2of4 int4", "int4 + rank 4", "scaled int4"])
def test_scales_learn_and_codes_stay(name):
    f, module = made(name, train="scales")
    x = RANDOM(5, 64, seed=3)
    torch.testing.assert_close(module(x), F.linear(x, f.dequantize()), rtol=1e-5, atol=1e-5)
    assert {n.rpartition(".")[2] for n, p in module.named_parameters() if p.requires_grad} == {"log_s"}
    stored = stirred(module).weight()
    torch.testing.assert_close(module(x), F.linear(x, stored.dequantize()), rtol=1e-4, atol=1e-4)
    assert stored.nbytes() == f.nbytes()
    for key, t in f.tensors().items():
        assert torch.equal(stored.tensors()[key], t) != key.endswith("scales")


@pytest.mark.parametrize("name", ["dense", "masked", "2of4", "product", "int4", "2of4 int4", "int4 + rank 4", "scaled dense"])
def test_every_number_learns_in_the_format_it_is_stored_in(name):
    f = FORMATS[name]()
    module = learner(f, Heal(rank=4, train="weights"), dtype=torch.float32, kept_as=torch.float32, generator=torch.Generator().manual_seed(0), known={},
                     original=f.dequantize() + 0.01 * RANDOM(24, 64, seed=9))  # fmt: skip
    x = RANDOM(5, 64, seed=3)
    torch.testing.assert_close(module(x), F.linear(x, f.dequantize()), rtol=1e-5, atol=1e-5)
    assert torch.equal(module.weight().dequantize(), f.dequantize())
    module(x).square().sum().backward()
    learning = [p for p in module.parameters() if p.requires_grad]
    assert all(p.grad.abs().sum() > 0 for p in learning)
    for p in learning:
        p.data += (0.6 if f is not None and p.dim() == 3 else 0.1) * RANDOM(*p.shape, seed=7)  # codes have half a step to go
    stored = module.weight()
    torch.testing.assert_close(module(x), F.linear(x, stored.dequantize()), rtol=1e-4, atol=1e-4)
    assert type(stored) is type(f) and stored.nbytes() == f.nbytes() and not torch.equal(stored.dequantize(), f.dequantize())
    if name in ("masked", "2of4"):
        assert torch.equal(stored.keep(), f.keep()) and not stored.dequantize()[~f.keep()].any()


def test_low_rank_against_the_product():
    low_rank = stirred(LowRank((24, 64), 100, 8.0, torch.float32, torch.Generator().manual_seed(0), torch.device("cpu")))
    assert low_rank.A.shape == (24, 64)  # no more rank than there is
    x = RANDOM(3, 64)
    torch.testing.assert_close(low_rank(x), x @ (8 / 24 * low_rank.B @ low_rank.A).T, rtol=1e-4, atol=1e-4)


# ---- losses


def test_divergence_over_all_tokens_is_the_divergence_and_over_some_a_lower_bound():
    teacher, student = 3 * RANDOM(2, 5, 40), 3 * RANDOM(2, 5, 40, seed=1)
    p, q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    full = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(divergence(*likeliest(teacher, 40), student).double(), full, rtol=0, atol=0.02)  # log-probabilities are kept in fp16
    last = torch.zeros_like(full)
    for k in (1, 4, 16, 39):
        ids, log_p = likeliest(teacher, k)
        some = divergence(ids, log_p, student).double()
        a = log_p.double().exp()
        b = q.gather(-1, ids.long()).exp()
        rest_a, rest_b = (1 - a.sum(-1)).clamp(min=0), (1 - b.sum(-1)).clamp(min=LEAST)
        slow = (a * (a / b).log()).sum(-1) + torch.special.xlogy(rest_a, rest_a) - rest_a * rest_b.log()
        torch.testing.assert_close(some, slow, rtol=1e-4, atol=1e-4)
        assert (some <= full + 0.02).all() and (some >= last - 0.02).all()
        last = some
        assert divergence(ids, log_p, teacher).abs().max() < 3e-3


def test_divergence_sees_mass_that_moves_into_the_tail():
    teacher = torch.tensor([4.0, 3.0, 0.0, 0.0, 0.0])
    student = torch.tensor([4.0, 3.0, 2.0, 2.0, 2.0], requires_grad=True)
    kl = divergence(*likeliest(teacher, 2), student)
    kl.backward()
    assert kl > 0.1 and (student.grad[2:] > 0).all()


def test_relation_against_a_loop_and_zero_for_itself():
    x, y = RANDOM(2, 6, 8), RANDOM(2, 6, 4, seed=1)
    found = relation(y, x, 2)
    for b in range(2):
        for t in range(6):
            total = 0.0
            for h in range(2):
                r, s = ((z[b, : t + 1].view(t + 1, 2, -1)[:, h] @ z[b, t].view(2, -1)[h] / (z.shape[-1] / 2) ** 0.5).double().log_softmax(0) for z in (x, y))
                total += float((r.exp() * (r - s)).sum()) / 2
            assert found[b, t].item() == pytest.approx(total, abs=1e-5)
    assert relation(x, x, 4).abs().max() == 0 and distance(x, x).abs().max() == 0
    y.requires_grad_()
    relation(y, x, 2).sum().backward()
    assert torch.isfinite(y.grad).all()


def test_what_another_head_has_to_read():
    W, A = RANDOM(50, 8), torch.linalg.qr(RANDOM(8, 8, seed=1))[0][:, :5] * 3  # the stream turned, sliced and scaled
    states = RANDOM(4, 5, seed=2)
    torch.testing.assert_close(translation(W @ A, W), torch.linalg.pinv((W @ A).double()).matmul(W.double()).T.float())
    torch.testing.assert_close((states @ A.T) @ translation(W @ A, W), states, rtol=1e-4, atol=1e-4)  # W A s = W t for t = A s
    torch.testing.assert_close(translation(W, W), torch.eye(8), rtol=0, atol=1e-6)


# ---- whole


SMALL = {"samples": 40, "seqlen": 64, "batch": 4, "micro": 2, "every": 5, "steps": 10, "warmup": 2, "rank": 8, "lr": 5e-3}
QUIET = {"show": False, "device": "cpu"}


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """The embedded model rounded to 2 bits."""
    out = tmp_path_factory.mktemp("heal") / "bad"
    compress.run(model_path(), {"name": "rtn2", "steps": [{"method": "rtn", "bits": 2, "group_size": 64}]}, "stdlib", out, **QUIET)
    return out


def heal(path, out, teacher=None, dtype="auto", **options):
    return compress.heal(str(path), str(teacher or model_path()), "stdlib", out, options=SMALL | options, dtype=dtype, **QUIET)


def test_it_wins_back_and_keeps_adapters_over_integers(bad, tmp_path, capsys):
    report = heal(bad, tmp_path / "a", checkpointing=True)
    before, after = report.manifest.training["healing"]
    assert after < 0.95 * before and len(report.manifest.training["healing loss"]) == 10 and report.fallbacks == []
    kl = lambda path: compress.evaluate(str(path), model_path(), "stdlib", samples=6, seqlen=64, show=False)["kl"]["mean"]
    assert kl(tmp_path / "a") < 0.95 * kl(bad)
    assert compress.verify(str(tmp_path / "a")).problems == []
    records = report.manifest.layers.values()
    assert all(r.method == "rtn + heal" and r.describe.startswith("int2 g64 asym + rank 8") and r.error_norm == "healing" for r in records)
    assert not (tmp_path / "a" / "healing.safetensors").exists() and not (tmp_path / "a.teacher").exists()
    assert report.manifest.run["recipe"]["name"] == "rtn2-heal"
    recipe = {"name": "rtn2", "steps": [{"method": "rtn", "bits": 2, "group_size": 64}], "heal": {"rank": SMALL["rank"]}}
    assert compress.plan(model_path(), recipe).bytes_after == report.manifest.totals["bytes"]
    plain = heal(bad, tmp_path / "b")  # the option above spends time for memory and changes nothing
    assert plain.manifest.training["healing loss"] == pytest.approx(report.manifest.training["healing loss"], rel=1e-3)


def test_codes_and_scales_learn_at_not_a_byte_more(bad, tmp_path):
    report = heal(bad, tmp_path / "a", train="weights", weight_lr=0.01, steps=20)
    before, after = report.manifest.training["healing"]
    was = compress.inspect(str(bad))
    assert after < 0.95 * before and report.manifest.totals["bytes"] == was.totals["bytes"] and report.fallbacks == []
    key = next(n for n in was.tensors if n.endswith("gate_proj.codes"))
    assert report.manifest.tensors[key].sha256 != was.tensors[key].sha256 and compress.verify(str(tmp_path / "a")).ok


def test_scales_alone_and_all_losses(bad, tmp_path):
    report = heal(bad, tmp_path / "a", train="scales", hidden=0.5, relation=0.5, layers=2)
    before, after = report.manifest.training["healing"]
    assert after < before and {r.describe for r in report.manifest.layers.values()} == {"int2 g64 asym"}
    assert compress.verify(str(tmp_path / "a")).ok


def test_no_steps_are_undone_and_told(bad, tmp_path):
    report = heal(bad, tmp_path / "a", steps=0)
    assert [f.what for f in report.fallbacks] == ["healing undone"]
    same = {n: t.sha256 for n, t in compress.inspect(str(bad)).tensors.items() if n not in ("tokens", "logits")}
    assert {n: t.sha256 for n, t in report.manifest.tensors.items() if n not in ("tokens", "logits")} == same
    assert compress.verify(str(tmp_path / "a")).ok
    with pytest.raises(CompressError, match="--strict: healing undone"):
        compress.heal(str(bad), model_path(), "stdlib", tmp_path / "b", options=SMALL | {"steps": 0}, strict=True, **QUIET)


@pytest.fixture(scope="module")
def dropped(tmp_path_factory):
    """The embedded model without its second block, as plain transformers save it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path_factory.mktemp("dropped") / "model"
    model = AutoModelForCausalLM.from_pretrained(model_path())
    del model.model.layers[1]
    model.config.num_hidden_layers -= 1
    if getattr(model.config, "layer_types", None):
        del model.config.layer_types[1]
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(model_path()).save_pretrained(out)
    return out


def test_a_plain_checkpoint_with_a_block_removed(dropped, tmp_path):
    blocks = Checkpoint(str(model_path())).num_blocks
    tokens = torch.arange(32)[None]
    assert matched(Checkpoint(str(dropped), dtype=torch.float32), Checkpoint(str(model_path()), dtype=torch.float32), tokens, "cpu") == [0, *range(2, blocks)]
    assert descent(Checkpoint(str(dropped)), Checkpoint(str(model_path())), "cpu") == [0, *range(2, blocks)]
    with pytest.raises(CompressError, match=f"its {blocks} blocks cannot be told to be any of the {blocks - 1}"):
        descent(Checkpoint(str(model_path())), Checkpoint(str(dropped)), "cpu")
    report = heal(dropped, tmp_path / "a", hidden=0.1, layers=2)
    before, after = report.manifest.training["healing"]
    assert after < before and report.manifest.layers == {}
    assert compress.verify(str(tmp_path / "a")).ok
    compress.export(str(tmp_path / "a"), "dense", tmp_path / "plain")
    healed, plain = compress.load(str(tmp_path / "a"), policy="dense"), compress.load(str(tmp_path / "plain"))
    assert torch.equal(healed(tokens).logits, plain(tokens).logits)
    with pytest.raises(CompressError, match=f"has {blocks} blocks, its teacher .* only {blocks - 1}"):
        heal(model_path(), tmp_path / "b", teacher=dropped, hidden=1.0)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3", "falcon", "falcon_40b", "bloom", "llama"])
def test_relations_are_those_of_queries_of_keys_and_of_values(name, tmp_path):
    """Against what the model's own cache holds: values, and in GPT-2, which does not turn them, keys; the rest are queries."""
    model = tiny.save_tiny(name, tmp_path / "model", dtype=torch.float32)
    source = Checkpoint(str(tmp_path / "model"))
    paths, heard = attending(source, 1), dict[str, torch.Tensor]()
    for path in paths:
        model.get_submodule(f"{source.block_name(1)}.{path}").register_forward_hook(lambda m, args, y, path=path: heard.update({path: y}))
    with torch.no_grad():
        cache = model(torch.arange(12)[None], use_cache=True).past_key_values.layers[1]
    flat = lambda t: t.transpose(1, 2).flatten(2)  # [b, heads, t, dim] → [b, t, heads · dim]
    if name == "llama":
        assert len(paths) == 3 and all(list(parts(source, 1, path)) == [""] for path in paths) and torch.equal(heard[paths[2]], flat(cache.values))
        return
    found = parts(source, 1, paths[0])
    if name == "falcon_40b":  # its cache holds a value once a query head
        cache.values = cache.values[:, ::2]
    assert len(paths) == 1 and list(found) == [":queries", ":keys", ":values"] and torch.equal(heard[paths[0]][..., found[":values"]], flat(cache.values))
    assert name != "gpt2" or torch.equal(heard[paths[0]][..., found[":keys"]], flat(cache.keys))
    assert torch.cat(list(found.values())).sort().values.tolist() == list(range(heard[paths[0]].shape[-1]))
    if name == "gpt_neox":  # both sides of a training hear the three apart
        (tmp_path / "text.txt").write_text(Path(os.__file__).read_text())
        compress.run(str(tmp_path / "model"), {"name": "s", "steps": [{"method": "rtn", "bits": 2, "group_size": 32}]}, output=tmp_path / "bad", **QUIET)
        options = SMALL | {"seqlen": 32, "steps": 2, "samples": 20, "relation": 0.5}
        report = compress.heal(str(tmp_path / "bad"), str(tmp_path / "model"), f"file:{tmp_path / 'text.txt'}", tmp_path / "healed", options=options, **QUIET)
        assert len(report.manifest.training["healing loss"]) == 2


@pytest.mark.parametrize("cut", [{"drop": {"blocks": [2]}}, {"slice": {"share": 0.25}}, {"width": {"mlp": 0.25, "across": "layer"}}], ids=str)
def test_refit_is_the_recipes_on_the_windows_that_train(cut, tmp_path):
    """Least squares of healing against the step `refit` of a recipe, which knows what was taken out; healing finds it out from the two models."""
    data = load_calibration("stdlib", Checkpoint(model_path()).tokenizer(), samples=160, seqlen=64)
    seen = CalibrationSet(data.tokens[:152], None, 0, data.record)
    go = lambda out, *steps: compress.run(model_path(), {"name": "row", "structure": [cut, *steps]}, seen, tmp_path / out, dtype="float32", **QUIET)
    asked = go("asked", "refit")
    go("bare")
    options = SMALL | {"steps": 0, "refit": True}
    report = compress.heal(str(tmp_path / "bare"), model_path(), data, tmp_path / "healed", options=options, dtype="float32", **QUIET)
    before, after = report.manifest.training["healing"]
    assert after < before and [f.what for f in report.fallbacks] == ["healing undone"] and report.manifest.plain
    healed, wanted, bare = (ArtifactCheckpoint(tmp_path / out, compress.inspect(str(tmp_path / out))) for out in ("healed", "asked", "bare"))
    names = [n for n in asked.manifest.tensors if n.endswith("proj.weight")]
    assert compress.verify(str(tmp_path / "healed")).ok and names
    for name in names:
        W, found, was = (c.read_stored(name).float() for c in (wanted, healed, bare))
        assert torch.equal(was, W) or (found - W).norm() < 0.1 * (W - was).norm()  # what was cut and then stored is rounded, and so is the basis that it tells
        assert not torch.equal(was, W) or torch.equal(found, W)
    assert not list((tmp_path / "healed").glob("refit-*")) and not (tmp_path / "healed.teacher").exists()


def test_a_head_learns_where_it_is_a_tensor_of_its_own(dropped, tmp_path):
    with pytest.raises(CompressError, match="its head is its input embedding"):
        heal(dropped, tmp_path / "a", head=True)
    compress.run(model_path(), {"name": "row", "structure": [{"slice": {"share": 0.25}}]}, "stdlib", tmp_path / "sliced", samples=8, seqlen=64, **QUIET)
    without, report = (heal(tmp_path / "sliced", tmp_path / f"b{head}", train="weights", head=head) for head in (False, True))
    assert report.manifest.training["healing"][1] < without.manifest.training["healing"][1] and report.manifest.plain
    assert compress.verify(str(tmp_path / "bTrue")).ok and report.manifest.totals["bytes"] == without.manifest.totals["bytes"]
    changed = {n for n, t in report.manifest.tensors.items() if t.shard.startswith("outer") and t.sha256 != without.manifest.tensors[n].sha256}
    assert changed == {"lm_head.weight"}
    shutil.rmtree(tmp_path / "bFalse")
    for name in ("compress.json", "probe.safetensors"):  # a plain checkpoint
        (tmp_path / "sliced" / name).unlink(missing_ok=True)
    again = heal(tmp_path / "sliced", tmp_path / "c", train="weights", head=True)
    assert again.manifest.training["healing loss"] == report.manifest.training["healing loss"]
    assert again.manifest.tensors["lm_head.weight"].sha256 == report.manifest.tensors["lm_head.weight"].sha256


def test_refit_is_undone_where_it_wins_nothing_and_refused_where_there_is_nothing_to_solve(bad, tmp_path):
    with pytest.raises(CompressError, match="refit solves the dense weights of a plain model"):
        heal(bad, tmp_path / "a", refit=True)
    report = heal(model_path(), tmp_path / "b", refit=True, steps=0)  # the original itself has nothing to make up for
    assert [f.what for f in report.fallbacks] == ["refit undone", "healing undone"]


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_other_architectures(name, tmp_path):
    tiny.save_tiny(name, tmp_path / "model")
    (tmp_path / "text.txt").write_text(Path(os.__file__).read_text())
    small = SMALL | {"seqlen": 32, "steps": 4, "samples": 20}
    for recipe in ("sparse-2of4", "svd-20", "w2-hqq"):
        compress.run(str(tmp_path / "model"), recipe, f"file:{tmp_path / 'text.txt'}", tmp_path / recipe, samples=8, seqlen=32, **QUIET,
                     settings={"hqq.group_size": 32} if recipe == "w2-hqq" else {})  # fmt: skip
        report = compress.heal(str(tmp_path / recipe), str(tmp_path / "model"), f"file:{tmp_path / 'text.txt'}", tmp_path / f"{recipe}-heal",
                               options=small | {"relation": 0.1, "lr": 1e-3, "scale_lr": 1e-3}, **QUIET)  # fmt: skip
        before, after = report.manifest.training["healing"]
        assert after <= before and compress.verify(str(tmp_path / f"{recipe}-heal")).problems == []
        if recipe == "svd-20":  # a factor that linears share is still stored once; kept adapters leave it where it was, a level down
            was = compress.inspect(str(tmp_path / recipe))
            assert report.manifest.totals["bytes"] == was.totals["bytes"] and {n: r.shared for n, r in report.manifest.layers.items()} == {
                n: r.shared for n, r in was.layers.items()}  # fmt: skip
            compress.heal(str(tmp_path / recipe), str(tmp_path / "model"), f"file:{tmp_path / 'text.txt'}", tmp_path / "kept",
                          options=small | {"merge": False}, **QUIET)  # fmt: skip
            assert compress.verify(str(tmp_path / "kept")).problems == []


def test_one_command_for_a_recipe_that_heals(tmp_path):
    recipe = {"name": "rtn2-heal", "steps": [{"method": "rtn", "bits": 2, "group_size": 64}], "heal": SMALL | {"steps": 5, "bounded": True}}
    report = compress.run(model_path(), recipe, "stdlib", tmp_path / "a", samples=4, seqlen=64, settings={"heal.rank": 4}, **QUIET)
    before, after = report.manifest.training["healing"]
    assert after < before and report.manifest.run["recipe"]["name"] == "rtn2-heal" and report.manifest.run["heal"]["options"]["rank"] == 4
    assert compress.inspect(str(tmp_path / "a.unhealed")).training == {}


ONE_BIT = {"name": "one", "steps": [{"method": "rtn", "bits": 2, "group_size": 64}]}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_restored_weights_are_the_original_ones_plus_what_healing_added(name, tmp_path):
    tiny.save_tiny(name, tmp_path / "model")
    (tmp_path / "text.txt").write_text(Path(os.__file__).read_text())
    model, text = str(tmp_path / "model"), f"file:{tmp_path / 'text.txt'}"
    compress.run(model, ONE_BIT | {"steps": [{"method": "rtn", "bits": 2, "group_size": 32}]}, text, tmp_path / "q", samples=8, seqlen=32, **QUIET)
    options = SMALL | {"seqlen": 32, "merge": False, "lr": 0.02, "scale_lr": 0.0}
    report = compress.heal(str(tmp_path / "q"), model, text, tmp_path / "h", options=options, **QUIET)
    before, healed = (ArtifactCheckpoint(tmp_path / out, compress.inspect(str(tmp_path / out))) for out in "qh")
    source, q, h = Checkpoint(model), before.load_block(0), healed.load_block(0)
    view = restored(source, healed)
    paths = [path for path, m in h.named_modules() if hasattr(m, "format")]
    assert paths and report.fallbacks == []
    for path in paths:
        added = h.get_submodule(path).format.dequantize() - q.get_submodule(path).format.dequantize()
        W, V = (c.tensor(f"{source.block_name(0)}.{path}.weight").float() for c in (source, view))
        assert added.norm() > 0
        torch.testing.assert_close(V, W + (added if name == "llama" else added.T), rtol=1e-4, atol=1e-6)


def test_one_command_restores_and_compresses_again(tmp_path):
    recipe = ONE_BIT | {"restore": SMALL | {"steps": 20}}
    go = lambda r, out, **settings: compress.run(model_path(), r, "stdlib", tmp_path / out, samples=40, seqlen=64, settings=settings, **QUIET)
    bare, same, other = go(ONE_BIT, "bare"), go(recipe, "same", **{"restore.steps": 0}), go(recipe, "other")
    tensors = lambda r: {n: t.sha256 for n, t in r.manifest.tensors.items()}
    assert tensors(same) == tensors(bare) and [f.what for f in same.fallbacks] == ["nothing restored"]
    assert tensors(other) != tensors(bare) and other.fallbacks == [] and other.manifest.totals["bytes"] == bare.manifest.totals["bytes"]
    assert compress.verify(str(tmp_path / "other")).ok and go(recipe, "other").resumed_layers == len(other.manifest.layers)
    with pytest.raises(CompressError, match="recipe one: restore changes the original's own weights; leave out views"):
        go(recipe | {"views": ["fold_norms"]}, "refused")


@pytest.mark.parametrize("name", ["drop-25-heal", "width-20-heal", "slice-25-heal", "drop-25-w4-heal"])
def test_a_smaller_model_stays_plain_when_healed(name, tmp_path):
    settings = {f"heal.{key}": value for key, value in (SMALL | {"steps": 4, "samples": 20}).items()} | ({"gptq.group_size": 64} if "w4" in name else {})
    report = compress.run(model_path(), name, "stdlib", tmp_path / "a", samples=8, seqlen=64, settings=settings, **QUIET)
    before, after = report.manifest.training["healing"]
    assert after <= before and compress.verify(str(tmp_path / "a")).problems == []
    was = compress.inspect(str(tmp_path / "a.unhealed"))
    assert report.manifest.plain == was.plain and report.manifest.structure == was.structure and compress.load(str(tmp_path / "a"))
    assert was.plain == ("w4" not in name)


# ---- kill -9


def command(bad, out, steps=20, **more):
    settings = [f"--set={k}={v}" for k, v in (SMALL | more).items() if k not in ("steps", "samples", "seqlen")]
    return [sys.executable, "-m", "compress", "heal", str(bad), "--teacher", str(model_path()), "-o", str(out), "--samples", "40", "--seqlen", "64",
            "--steps", str(steps), *settings, "--device", "cpu"]  # fmt: skip


def test_killed_it_resumes_with_the_same_curve_and_the_same_bytes(bad, tmp_path, capsys):
    whole = heal(bad, tmp_path / "whole", steps=20)
    out = tmp_path / "killed"
    for state in (1, 2):  # once among the teacher's answers or shortly after, once after a state was saved
        process = subprocess.Popen(command(bad, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        moment = (lambda: (tmp_path / "killed.teacher").is_dir()) if state == 1 else (lambda: (out / "healing.safetensors").exists())
        while process.poll() is None and not moment():
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert process.returncode == -signal.SIGKILL and not (out / "compress.json").exists()
    resumed = lambda: compress.heal(str(bad), str(model_path()), "stdlib", out, options=SMALL | {"steps": 20}, device="cpu")
    report = resumed()
    assert "resumed at" in capsys.readouterr().err
    assert report.manifest.training == whole.manifest.training and len(whole.manifest.training["healing loss"]) == 20
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {f.name: f.read_bytes() for f in (tmp_path / "whole").iterdir()}
    resumed()
    assert "healing" not in capsys.readouterr().err


def test_killed_while_it_refits_it_comes_to_the_same_bytes(dropped, tmp_path):
    options = {"refit": True, "steps": 5, "train": "weights"}
    whole, out = heal(dropped, tmp_path / "whole", **options), tmp_path / "killed"
    process = subprocess.Popen(command(dropped, out, **options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out / "refit-00000.safetensors").exists():
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (out / "healing.safetensors").exists()
    report = heal(dropped, out, **options)
    assert report.manifest.training == whole.manifest.training
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {f.name: f.read_bytes() for f in (tmp_path / "whole").iterdir()}


@pytest.mark.slow
def test_accelerate_launch_shares_a_step_between_two_processes(bad, tmp_path):
    """`accelerate launch` itself; --multi_gpu is what makes it start more than one process, which find no GPU and meet over gloo."""
    one = heal(bad, tmp_path / "one", dtype="float32")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
              "--dynamo_backend=no", "--main_process_port=0", *command(bad, tmp_path / "two", steps=10)[1:], "--dtype", "float32"]  # fmt: skip
    said = subprocess.run(launch, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("won back") == 1 and compress.verify(str(tmp_path / "two")).ok
    two = compress.inspect(str(tmp_path / "two")).training
    assert two["healing loss"] == pytest.approx(one.manifest.training["healing loss"], rel=1e-3)


# ---- refused


@pytest.mark.parametrize("options, said", [
    ({"rank": 0}, "rank 0 is below 1"), ({"held_out": 1.0}, "held_out 1.0 lies outside"), ({"ranks": 3}, "did you mean rank"),
    ({"train": "all"}, "train = 'all'"), ({"kl": 0}, "kl must be more"), ({"batch": 64}, "a batch of 64 windows, 1 processes, 40 windows of which 2"),
])  # fmt: skip
def test_what_is_refused(options, said, bad, tmp_path):
    with pytest.raises(CompressError, match=said):
        heal(bad, tmp_path / "a", **options)


def test_another_vocabulary_and_another_run(bad, tmp_path):
    tiny.save_tiny("llama", tmp_path / "other")
    with pytest.raises(CompressError, match="not a compressed version of it"):
        heal(bad, tmp_path / "a", teacher=tmp_path / "other")
    heal(bad, tmp_path / "b", steps=1)
    with pytest.raises(CompressError, match=r"heal.options.lr: 0.005 → 0.002"):
        heal(bad, tmp_path / "b", steps=1, lr=0.002)


def test_a_loss_that_is_not_finite(bad, tmp_path):
    with pytest.raises(CompressError, match="not finite at step"):
        heal(bad, tmp_path / "a", lr=1e30, scale_lr=1e30, warmup=0)
