"""pytest tests/test_walk.py — the whole job on every architecture: nothing is skipped, everything is verified, GPTQ never loses to rounding."""

import copy
import os
import pickle
from pathlib import Path

import pytest
import torch
from tiny import TINY, save_tiny
from torch import nn

import compress
from compress.artifact import read_manifest
from compress.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.kernels.dispatch import How
from compress.linear import CompressedLinear
from compress.preflight import linears
from compress.recipe import Recipe
from compress.walk import stages

TEXT = "It was the best of times, it was the worst of times; the spring of hope, the winter of despair. " * 80
G32 = {"name": "g32", "steps": [{"method": "gptq", "bits": 4, "group_size": 32}]}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "calibration.txt"
    file.write_text(TEXT)
    return f"file:{file}"


def run(model, out, text, recipe=G32, **options):
    return compress.run(str(model), recipe, text, out, **{"samples": 12, "seqlen": 64, "show": False, "device": "cpu"} | options)


@pytest.mark.parametrize("name", TINY)
def test_every_linear_of_every_architecture_is_compressed_and_verified(name, tmp_path, text):
    save_tiny(name, tmp_path / "model")
    report = run(tmp_path / "model", tmp_path / "out", text)
    expected = {path: shape for path, _, shape in linears(Checkpoint(str(tmp_path / "model")))}
    assert set(report.manifest.layers) == set(expected) and len(expected) >= 8
    assert [f for f in report.fallbacks if "experts" not in f.where and f.what != "inputs never active"] == []  # OPT's ReLU leaves some silent
    for path, record in report.manifest.layers.items():
        assert record.error < 0.05 and record.bytes == record.planned_bytes and record.format["shape"] == list(expected[path])
    checked = compress.verify(str(tmp_path / "out"))
    assert checked.ok and checked.kl < 1e-4, checked.problems  # falcon adds its bias after rounding the product to bf16, CompressedLinear before
    rounded = run(tmp_path / "model", tmp_path / "rtn", text, {"name": "r", "steps": [{"method": "rtn", "bits": 4, "group_size": 32, "clip": "hessian"}]},
                  settings={"true_sequential": False})  # fmt: skip
    ours, theirs = sum(r.error for r in report.manifest.layers.values()), sum(r.error for r in rounded.manifest.layers.values())
    assert ours < theirs


@pytest.mark.parametrize("which", ["embedded", "yardstick"])
def test_gptq_beats_rounding_on_every_layer_of_a_trained_model(which, tmp_path):
    from compress.embedded import model_path

    yardstick = Path(os.environ.get("COMPRESS_YARDSTICK", Path(__file__).parents[2] / "shared" / "yardstick"))
    if which == "yardstick" and not yardstick.is_dir():
        pytest.skip(f"no yardstick at {yardstick}")
    model, text = (model_path(), "stdlib") if which == "embedded" else (yardstick / "llama-16m", f"file:{yardstick / 'wikitext2-valid.txt'}")
    options = {"samples": 16, "seqlen": 256, "show": False, "device": "cpu"}
    gptq = compress.run(str(model), "w4-gptq", text, tmp_path / "a", **options)
    rtn = compress.run(str(model), {"name": "r", "steps": [{"method": "rtn", "clip": "hessian"}]}, text, tmp_path / "b", **options)
    assert all(gptq.manifest.layers[n].error <= rtn.manifest.layers[n].error for n in gptq.manifest.layers)


def test_the_loaded_model_generates_and_matches_its_dequantized_weights(tmp_path, text):
    save_tiny("llama", tmp_path / "model")
    run(tmp_path / "model", tmp_path / "out", text)
    model = compress.load(str(tmp_path / "out"), dtype=torch.float32)
    layers = [m for m in model.modules() if isinstance(m, CompressedLinear)]
    assert len(layers) == 14
    ids = torch.arange(1, 9)[None]
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape == (1, 13)
    expected = model(ids).logits
    for policy, memory in (("dense", "keep"), ("auto", "bounded"), ("reference", "keep")):
        for m in layers:
            m.how = How(policy, memory)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.model.layers[0].mlp.up_proj.scales.dtype == torch.bfloat16 and pickle.loads(pickle.dumps(layers[0])).cache == {}
    assert model.to(torch.float16).model.layers[0].mlp.up_proj.scales.dtype == torch.bfloat16  # stored scales are never rounded again


def test_rtn_needs_no_calibration_and_no_tokenizer(tmp_path):
    save_tiny("qwen3", tmp_path / "model")
    for f in (tmp_path / "model").glob("tokenizer*"):
        f.unlink()
    report = compress.run(str(tmp_path / "model"), {"name": "r", "steps": [{"method": "rtn", "group_size": 32}]}, output=tmp_path / "out", show=False)
    assert report.manifest.run["calibration"] is None and compress.verify(str(tmp_path / "out")).ok
    assert {r.error_norm for r in report.manifest.layers.values()} == {"identity"}


def test_ignored_layers_are_kept_to_the_bit_and_patterns_without_a_match_are_told(tmp_path, text):
    original = save_tiny("llama", tmp_path / "model")
    recipe = G32 | {"ignore": ["*.layers.0.*", "*.no_such_layer"]}
    report = run(tmp_path / "model", tmp_path / "out", text, recipe)
    assert len(report.manifest.layers) == 7 and [f.where for f in report.fallbacks] == ["*.no_such_layer"]
    kept = compress.load(str(tmp_path / "out")).state_dict()
    for name, tensor in original.state_dict().items():
        if "layers.1" not in name or "norm" in name:
            assert torch.equal(kept[name], tensor.bfloat16()), name
    with pytest.raises(CompressError, match=r"--strict: pattern matches nothing at \*\.no_such_layer"):
        run(tmp_path / "model", tmp_path / "strict", text, recipe, strict=True)


def test_an_expert_that_no_token_reaches_is_rounded_and_told(tmp_path, text):
    from safetensors.torch import load_file, save_file

    save_tiny("mixtral", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    for name in weights:
        if name.endswith("block_sparse_moe.gate.weight"):
            weights[name][2:] = 0.0
            weights[name][:2] *= 50
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    report = run(tmp_path / "model", tmp_path / "out", text, samples=1, seqlen=4)
    told = {f.where for f in report.fallbacks if f.what.startswith("no calibration tokens")}
    unseen = {n for n, r in report.manifest.layers.items() if r.tokens == 0}
    assert unseen and len(told) == len(unseen) and compress.verify(str(tmp_path / "out")).ok
    with pytest.raises(CompressError, match=r"--strict: .*no calibration tokens"):
        run(tmp_path / "model", tmp_path / "strict", text, samples=1, seqlen=4, strict=True)


def test_mixed_steps_take_the_first_match(tmp_path, text):
    save_tiny("llama", tmp_path / "model")
    recipe = {"name": "mixed", "steps": [{"method": "rtn", "match": "*.down_proj", "bits": 8, "group_size": -1, "sym": True},
                                         {"method": "gptq", "bits": 3, "group_size": 32, "sym": "full"}]}  # fmt: skip
    report = run(tmp_path / "model", tmp_path / "out", text, recipe)
    assert {r.method for n, r in report.manifest.layers.items() if n.endswith("down_proj")} == {"rtn"}
    assert {r.describe for n, r in report.manifest.layers.items() if not n.endswith("down_proj")} == {"int3 g32 sym"}
    assert compress.verify(str(tmp_path / "out")).ok


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8, "ternary"])
def test_all_widths_survive_the_disk(bits, tmp_path, text):
    save_tiny("llama", tmp_path / "model")
    run(tmp_path / "model", tmp_path / "out", text, {"name": "b", "steps": [{"method": "gptq", "bits": bits, "group_size": 32, "sym": True}]})
    assert compress.verify(str(tmp_path / "out")).ok


def test_float16_checkpoints_get_float16_scales(tmp_path, text):
    save_tiny("llama", tmp_path / "model", dtype=torch.float16)
    report = run(tmp_path / "model", tmp_path / "out", text)
    assert report.manifest.run["dtype"] == "float32"  # half precision is slow on CPU: blocks compute in float32
    assert {t.dtype for n, t in report.manifest.tensors.items() if n.endswith(".scales")} == {"float16"}


def test_computing_in_bf16_never_rounds_the_weights_that_are_compressed(tmp_path, text):
    save_tiny("llama", tmp_path / "model", dtype=torch.float32)
    recipe = {"name": "r", "steps": [{"method": "rtn", "group_size": 32}]}
    for dtype in ("float32", "bfloat16"):
        compress.run(str(tmp_path / "model"), recipe, output=tmp_path / dtype, dtype=dtype, show=False, device="cpu")
    a, b = (read_manifest(tmp_path / d).tensors for d in ("float32", "bfloat16"))
    assert {n: t.sha256 for n, t in a.items() if n not in ("logits",)} == {n: t.sha256 for n, t in b.items() if n not in ("logits",)}


def test_calibration_spilled_to_a_file_gives_the_same_bytes(tmp_path, text, monkeypatch):
    from compress.calibration import hidden

    save_tiny("gemma3", tmp_path / "model")
    run(tmp_path / "model", tmp_path / "ram", text)
    monkeypatch.setattr(hidden.allocate, "__defaults__", (None, 1000))
    run(tmp_path / "model", tmp_path / "disk", text)
    for file in (tmp_path / "ram").iterdir():
        assert file.read_bytes() == (tmp_path / "disk" / file.name).read_bytes(), file.name


def test_stages_bound_the_hessians_of_one_pass(monkeypatch):
    from compress import walk
    from compress.arch import Site

    block = nn.Module()
    block.experts = nn.ModuleList(nn.Linear(100, 8) for _ in range(10))
    sites = [Site(f"experts.{e}.input", (f"experts.{e}",), None) for e in range(10)]
    assert [len(s) for s in stages(block, sites, True)] == [10]
    monkeypatch.setattr(walk, "STATS_LIMIT", 3 * 4 * 100 * 100)
    assert [len(s) for s in stages(block, sites, True)] == [3, 3, 3, 1]


def test_an_unknown_architecture_is_watched_and_compressed(tmp_path, text, monkeypatch):
    from compress import arch

    save_tiny("llama", tmp_path / "model")
    run(tmp_path / "model", tmp_path / "known", text)
    monkeypatch.delitem(arch.ARCHS, "llama")
    run(tmp_path / "model", tmp_path / "unknown", text)
    a, b = (read_manifest(tmp_path / d).tensors for d in ("known", "unknown"))
    assert {n: t.sha256 for n, t in a.items()} == {n: t.sha256 for n, t in b.items()}


def test_a_recipe_can_be_built_in_python():
    recipe = Recipe(name="mine", steps=[{"method": "gptq", "bits": 3}])
    assert recipe.step_for("model.layers.0.mlp.up_proj").build().bits == 3


