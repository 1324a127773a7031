"""Run: pytest tests/test_preflight.py. The plan: every linear, its exact bytes before a weight is read, and what is refused."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY, save_tiny, tiny_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import compress
from compress import CompressError, preflight, recipe
from compress.checkpoint import Checkpoint
from compress.embedded import model_path
from compress.experts import unfuse_experts
from compress.export import EXPORTS

RTN32 = {"rtn.group_size": 32}  # the tiny models are 64 wide


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """checkpoint(name): the folder of a tiny model, written once."""
    root = tmp_path_factory.mktemp("models")

    def make(name: str) -> str:
        if not (root / name).exists():
            save_tiny(name, root / name)
        return str(root / name)

    return make


# ---- every linear, once


@pytest.mark.parametrize("name", TINY)
def test_linears_are_those_that_a_forward_calls(name, checkpoint):
    """Shapes are read off the activations of the real model: [last of the output, last of the input]."""
    model, called = tiny_model(name), {}
    unfuse_experts(model)
    source = Checkpoint(checkpoint(name))
    for path, module in model.named_modules():
        if path.startswith(source.blocks_path + ".") and isinstance(module, (torch.nn.Linear, Conv1D)):
            module.register_forward_hook(lambda m, x, y, path=path: called.update({path: (y.shape[-1], x[0].shape[-1])}))
    with torch.no_grad():
        model(torch.randint(0, 256, (4, 48), generator=torch.Generator().manual_seed(0)))
    found = preflight.linears(source)
    assert len({path for path, _, _ in found}) == len(found)
    assert {path: shape for path, _, shape in found} == called
    assert all(path.startswith(source.block_name(block) + ".") for path, block, _ in found) and {block for _, block, _ in found} == {0, 1}


def test_linears_of_an_architecture_that_is_not_in_the_table(tmp_path):
    config = CONFIG_MAPPING["stablelm"](hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    found = {path: shape for path, _, shape in preflight.linears(Checkpoint(str(tmp_path)))}
    assert len(found) == 2 * 7 and found["model.layers.1.mlp.down_proj"] == (64, 96) and found["model.layers.0.self_attn.k_proj"] == (32, 64)


# ---- bytes


RECIPES = {
    "w4": {"rtn.group_size": 32},
    "per row, symmetric": {"rtn.group_size": -1, "rtn.sym": True},
    "3 bits": {"rtn.group_size": 32, "rtn.bits": 3},
    "ternary": {"rtn.group_size": 32, "rtn.bits": "ternary", "rtn.sym": True},
    "attention kept": {"rtn.group_size": 32, "ignore": ["*attn*", "*.attention.*"]},
    "block 0 and one expert kept": {"rtn.group_size": 32, "ignore": ["*.0.*attn*", "*.0.mlp.*", "*.1.mlp.experts.2.*"]},
    "everything kept": {"rtn.group_size": 32, "ignore": ["*"]},
}


@pytest.mark.parametrize("settings", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "mixtral", "qwen3_moe"])  # qwen2: tied embeddings
def test_planned_bytes_are_the_bytes_on_disk(name, settings, checkpoint, tmp_path):
    plan = compress.plan(checkpoint(name), "w4-rtn", settings=settings)
    report = compress.run(checkpoint(name), "w4-rtn", output=tmp_path / "out", settings=settings, show=False)
    stored = {t: v.numel() * v.element_size() for f in (tmp_path / "out").glob("*[0-9].safetensors") for t, v in load_file(f).items()}
    assert sum(stored.values()) == plan.bytes_after == report.manifest.totals["bytes"]
    for layer in plan.layers:
        mine = sum(size for t, size in stored.items() if t.startswith(layer.name + ".") and not t.endswith(".bias"))
        assert mine == layer.bytes_after and layer.bits == 8 * mine / (layer.shape[0] * layer.shape[1]), layer.name
        assert (layer.name in report.manifest.layers) == (layer.method is not None) == (layer.bytes_after < layer.bytes_before)
    source = Checkpoint(checkpoint(name))
    assert plan.bytes_before == source.nbytes(list(source.groups.values())) and plan.parameters == plan.bytes_before / 2  # bf16
    totals = report.manifest.totals
    assert (plan.linear_bits, plan.model_bits) == (totals["linear_bits"], totals["model_bits"]) and plan.model_bits == 8 * plan.bytes_after / plan.parameters
    on_disk = sum(f.stat().st_size for f in (tmp_path / "out").iterdir())
    assert on_disk <= plan.disk


def test_a_plan_has_a_layer_for_every_linear_and_costs_something(checkpoint):
    source = Checkpoint(checkpoint("llama"))
    plan = preflight.make(source, recipe.load("w4-gptq").with_options({"gptq.group_size": 32}))
    assert [(r.name, r.shape) for r in plan.layers] == [(path, shape) for path, _, shape in preflight.linears(source)]
    assert {(r.method, r.describe) for r in plan.layers} == {("gptq", "int4 g32 asym")}
    more = preflight.make(source, recipe.load("w4-gptq").with_options({"gptq.group_size": 32}), samples=256)
    assert more.peak_ram > plan.peak_ram > 0 and plan.seconds > 0 and more.bytes_after == plan.bytes_after


# ---- nothing is read, and what is wrong is said


@pytest.fixture
def unread(monkeypatch):
    """Any weight that is read fails the test."""
    def refuse(self, key):
        raise AssertionError(f"{key} was read")

    monkeypatch.setattr(Checkpoint, "read_stored", refuse)


def test_a_plan_reads_no_weight(unread, checkpoint):
    assert len(compress.plan(checkpoint("mixtral"), "w4-rtn", settings=RTN32).layers) == 2 * (4 + 4 * 2)


@pytest.mark.parametrize(("size", "told"), [(48, "64 is not a multiple of group_size 48; use 16, 32, 64 or -1"), (0, "group_size 0"), (-2, "group_size -2")])
def test_a_group_size_that_does_not_divide_is_refused_before_a_weight_is_read(size, told, unread, checkpoint, tmp_path):
    for verb in (lambda s: compress.plan(checkpoint("llama"), "w4-rtn", settings=s),
                 lambda s: compress.run(checkpoint("llama"), "w4-rtn", output=tmp_path / "out", settings=s, show=False)):  # fmt: skip
        with pytest.raises(CompressError, match=rf"model\.layers\.0\.self_attn\.q_proj: .*{told}"):
            verb({"rtn.group_size": size})
    assert not (tmp_path / "out").exists()


def test_a_group_size_that_fits_all_but_an_ignored_layer_is_fine(checkpoint):
    settings = {"rtn.group_size": 64, "ignore": ["*.experts.*.down_proj"]}  # 96 columns
    with pytest.raises(CompressError, match=r"experts\.0\.down_proj: in_features 96"):
        compress.plan(checkpoint("qwen3_moe"), "w4-rtn", settings={"rtn.group_size": 64})
    assert any(r.method is None for r in compress.plan(checkpoint("qwen3_moe"), "w4-rtn", settings=settings).layers)


def test_patterns_that_match_nothing_are_warned_of(checkpoint):
    steps = [{"method": "rtn", "group_size": 32, "match": ["*.q_proj", "*.qkv_proj"]}, {"method": "rtn", "group_size": 32, "match": "*.mlp.*"}]
    given = {"name": "x", "steps": steps, "ignore": ["*.router", "model.layers.1.self_attn.q_prj", "*.up_proj"]}
    warnings = compress.plan(checkpoint("llama"), given).warnings
    assert [w.split("'")[1] for w in warnings] == ["*.qkv_proj", "*.router", "model.layers.1.self_attn.q_prj"]
    assert "did you mean model.layers.1.self_attn.q_proj?" in warnings[2]
    assert compress.plan(checkpoint("llama"), "w4-rtn", settings=RTN32).warnings == ()


def test_patterns_that_match_nothing_are_fallbacks_of_a_run(checkpoint, tmp_path):
    settings = RTN32 | {"ignore": ["*.router"]}
    report = compress.run(checkpoint("llama"), "w4-rtn", output=tmp_path / "out", settings=settings, show=False)
    assert [(f.what, f.where, f.count) for f in report.fallbacks] == [("pattern matches nothing", "*.router", 1)]
    with pytest.raises(CompressError, match=r"--strict: pattern matches nothing at \*\.router"):
        compress.run(checkpoint("llama"), "w4-rtn", output=tmp_path / "strict", settings=settings, strict=True, show=False)
    assert not (tmp_path / "strict").exists()


# ---- consumers, time, and the hub


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_is_judged(name, checkpoint):
    consumers = compress.plan(checkpoint(name), "w4-rtn", settings=RTN32 | {"rtn.sym": True}).consumers
    assert consumers["dense"] == "" and set(consumers) == set(EXPORTS)
    assert (consumers["compressed-tensors"] == "") == (name != "gpt2")


def test_layers_that_a_consumer_gets_as_floats_are_told(checkpoint, capsys):
    p = compress.plan(checkpoint("llama"), "w4-nf4", settings={"nf.group_size": 32})
    assert p.consumers["gguf"] == "" and p.as_floats["gguf"].startswith("14 of 14 layers as bfloat16, model.layers.0.") and p.as_floats["dense"]
    held = compress.plan(checkpoint("llama"), "w4-rtn", settings=RTN32 | {"rtn.sym": True})
    assert held.as_floats["gguf"] == held.as_floats["awq"] == "" and p.as_floats.keys().isdisjoint({"awq", "gptq"})
    from test_cli import main

    assert main("plan", checkpoint("llama"), "-r", "w4-nf4", "--set", "nf.group_size=32") == 0
    assert "gguf: loads it, but 14 of 14 layers as bfloat16" in capsys.readouterr().out


def test_tensors_that_the_model_makes_itself_are_no_fallback(checkpoint, tmp_path):
    shutil.copytree(checkpoint("llama"), tmp_path / "old")
    tensors = load_file(tmp_path / "old" / "model.safetensors")
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    report = compress.run(str(tmp_path / "old"), "w4-rtn", output=tmp_path / "out", settings=RTN32, strict=True, show=False)
    assert not report.fallbacks and "inv_freq" not in " ".join(report.manifest.tensors) and compress.verify(str(tmp_path / "out")).ok
    assert compress.plan(str(tmp_path / "old"), "w4-rtn", settings=RTN32).bytes_after == report.manifest.totals["bytes"]


def test_the_viterbi_search_and_a_probe_count(checkpoint):
    source, long = Checkpoint(checkpoint("llama")), recipe.load("w2-trellis").with_options({"trellis.length": 32})
    slow, fast = (preflight.solver_work(recipe.load(r).steps[0].build(), 4096, 4096) for r in ("w2-trellis", "w4-gptq"))
    assert slow > 3 * fast > 3 * preflight.solver_work(recipe.load("w4-rtn").steps[0].build(), 4096, 4096)
    assert preflight.make(source, long.with_options({"trellis.L": 6}), probe=True).seconds > 0


def test_a_hub_id_is_planned_from_its_headers_alone(unread, checkpoint, monkeypatch):
    from compress import checkpoint as module

    folder, entries = Path(checkpoint("llama")), module.read_headers(Path(checkpoint("llama")))
    names = {v: k for k, v in module.SAFETENSORS_DTYPES.items()}
    tensors = {n: SimpleNamespace(dtype=names[e.dtype], shape=list(e.shape)) for n, e in entries.items()}
    asked = []
    monkeypatch.setattr(module, "resolve", lambda model, *, weights=True: asked.append(weights) or folder)
    files = {"model.safetensors": SimpleNamespace(tensors=tensors)}
    monkeypatch.setattr(module, "get_safetensors_metadata", lambda model: SimpleNamespace(files_metadata=files))
    assert compress.plan("some/model", "w4-rtn", settings=RTN32).bytes_after == compress.plan(str(folder), "w4-rtn", settings=RTN32).bytes_after
    assert asked[0] is False

    def offline(model):
        raise OSError("no route\nto the hub")

    monkeypatch.setattr(module, "get_safetensors_metadata", offline)
    with pytest.raises(CompressError, match=r"headers cannot be read from the hub .OSError: no route.$"):
        compress.plan("some/model", "w4-rtn")


def test_healing_and_restoring_are_planned_too():
    plan = lambda heal, **more: compress.plan(model_path(), {"name": "w", "steps": [{"method": "gptq", "bits": 2, "group_size": 64}]} | heal | more)
    bare, lora, whole = plan({}), plan({"heal": {"steps": 100}}), plan({"heal": {"micro": 64, "train": "weights"}})
    assert bare.peak_ram <= lora.peak_ram < whole.peak_ram and whole.bytes_after == bare.bytes_after < lora.bytes_after
    assert all(plan({name: {"steps": 5000}}).seconds > 5 * bare.seconds for name in ("heal", "restore"))
    assert not bare.warnings and any("structural steps" in w for w in compress.plan(model_path(), "drop-25").warnings)
