"""pytest tests/test_views.py — views and block steps leave every architecture's logits alone, are refused where they cannot, and survive a resume."""

import json
import shutil

import pytest
import torch
from tiny import TINY, save_tiny, tiny_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import compress
from compress.arch import arch_of
from compress.calibration.statistics import Stats
from compress.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.experts import unfuse_experts
from compress.methods import METHODS
from compress.recipe import load
from compress.scaling import AWQ, Smooth, fed_by, fold, rounding_error
from compress.views import FoldNorms, Rotate, rotation

IDS = torch.randint(1, 256, (2, 24), generator=torch.Generator().manual_seed(0))
ON_THE_STREAM = "lies on the residual stream"
REFUSED = {("gemma2", "rotate"): ON_THE_STREAM, ("gemma3", "rotate"): ON_THE_STREAM, ("olmo2", "rotate"): ON_THE_STREAM,
           ("bloom", "rotate"): "word_embeddings_layernorm, transformer.ln_f: one of them lies on", ("olmo2", "fold"): "no norm of a olmo2 block"}  # fmt: skip
RTN = {"name": "r", "steps": [{"method": "rtn", "bits": 4, "group_size": 32}]}


@pytest.fixture
def exact(monkeypatch):
    """Logits with the fp32 islands of transformers (norms, softmax, rotary) in fp64."""

    def logits(model):
        with monkeypatch.context() as m:
            m.setattr(torch, "float32", torch.float64)
            m.setattr(torch.Tensor, "float", torch.Tensor.double)
            with torch.no_grad():
                return model(IDS, use_cache=False).logits

    return logits


def whole(source):
    model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float64)
    model.load_state_dict({n: t for g in source.groups.values() for n, t in source.read(g).items()}, strict=False, assign=True)
    model.tie_weights()
    unfuse_experts(model)  # torch has no grouped matmul in fp64
    return model.eval()


@pytest.mark.parametrize("name", TINY)
def test_views_leave_the_logits_alone_or_say_why_not(name, tmp_path, exact):
    tiny_model(name, dtype=torch.float64).save_pretrained(tmp_path)
    source = Checkpoint(str(tmp_path))
    expected = exact(whole(source))
    for kind, views in {"fold": [FoldNorms()], "heads": [Rotate(residual=False)], "rotate": [Rotate(untie=True)],
                        "both": [FoldNorms(), Rotate(seed=3, untie=True)]}.items():  # fmt: skip
        reason = REFUSED.get((name, kind)) or (kind == "both" and (REFUSED.get((name, "fold")) or REFUSED.get((name, "rotate"))))
        view = source
        if reason:
            with pytest.raises(CompressError, match=reason):
                [view := v(view) for v in views]
            continue
        for v in views:
            view = v(view)
        assert (exact(whole(view)) - expected).abs().max() < 1e-12 * expected.abs().max(), kind
        fused = arch_of(source.model).sites[1].previous is None  # qkv in one matrix: no values to turn
        assert [n["what"] for n in view.notes] == (["heads not rotated"] if fused and kind != "fold" else [])
        if kind == "rotate":
            assert not view.config.tie_word_embeddings and torch.equal(exact(whole(source)), expected)  # the source itself is untouched


def test_folded_norms_are_the_identity_and_turned_outliers_are_gone(tmp_path):
    for name in ("llama", "gemma2", "gpt2"):
        tiny_model(name, dtype=torch.float64).save_pretrained(tmp_path / name)
        source = Checkpoint(str(tmp_path / name))
        view = FoldNorms()(source)
        norm = next(n for n in source.groups if n.endswith(("input_layernorm.weight", "ln_1.weight")))
        assert (view.tensor(norm) == (0 if name == "gemma2" else 1)).all() and not torch.equal(view.tensor(norm), source.tensor(norm))
    x = torch.zeros(100, 384, dtype=torch.float64)
    x[:, 7] = 1
    for centres in (False, True):
        turn, one = rotation(384, 5, centres), torch.ones(384, dtype=torch.float64)
        R = turn(torch.eye(384, dtype=torch.float64))
        assert (R @ R.T - torch.eye(384)).abs().max() < 1e-13 and turn(x).abs().max() < 0.2
        assert ((turn(one) - one).abs().max() < 1e-12) == centres


def test_views_refuse_what_they_do_not_know(tmp_path):
    save_tiny("qwen2", tmp_path / "tied")
    with pytest.raises(CompressError, match=r"the head is the embedding.*untie: true}} stores both \(\+0.0 MB\)"):
        Rotate()(Checkpoint(str(tmp_path / "tied")))
    config = CONFIG_MAPPING["starcoder2"](vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "unknown")
    with pytest.raises(CompressError, match="need the sites of starcoder2"):
        FoldNorms()(Checkpoint(str(tmp_path / "unknown")))
    falcon = tiny_model("falcon")
    falcon.transformer.h[1].input_layernorm.weight.data[3] = 1e-6
    falcon.save_pretrained(tmp_path / "falcon")
    with pytest.raises(CompressError, match=r"h\.1\.input_layernorm: β/γ reaches .* no bias to take β"):
        FoldNorms()(Checkpoint(str(tmp_path / "falcon"))).load_block(1)
    for key, value, reason in (("views", "rotated", "unknown view 'rotated', did you mean rotate"), ("blocks", "awk", "unknown block step"),
                               ("views", {"rotate": {"sed": 1}}, r"unknown option rotate\.sed"), ("blocks", {"awq": {"grid": "x"}}, r"awq\.grid")):
        with pytest.raises(CompressError, match=reason):
            load(RTN | {key: [value]})


@pytest.mark.parametrize("name", ["qwen2", "mixtral", "gpt2", "gemma3"])
def test_an_artifact_of_a_view_is_a_plain_model_with_the_original_logits(name, tmp_path):
    """Nothing compressed, everything stored in fp32: what was streamed, written and loaded by transformers is the original."""
    model = save_tiny(name, tmp_path / "model", dtype=torch.float32)
    views = ["fold_norms", {"rotate": {"residual": name != "gemma3", "untie": True}}]
    report = compress.run(str(tmp_path / "model"), RTN | {"views": views, "ignore": ["*"]}, output=tmp_path / "out", show=False)
    assert compress.verify(str(tmp_path / "out")).kl < 1e-9
    with torch.no_grad():
        expected, got = model(IDS).logits, compress.load(str(tmp_path / "out"))(IDS).logits
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    kept, before = compress.load(str(tmp_path / "out")).state_dict(), model.state_dict()
    assert sum(not torch.equal(kept[n], t) for n, t in before.items() if n in kept) > 7
    assert ("heads not rotated" in [f.what for f in report.fallbacks]) == (name == "gpt2")
    assert report.manifest.totals["bytes"] == report.manifest.totals["planned_bytes"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is (name == "gemma3")


def test_weights_reach_the_method_unrounded_and_resume_knows_the_view(tmp_path, text):
    save_tiny("llama", tmp_path / "model")  # bf16
    source = Checkpoint(str(tmp_path / "model"), dtype=torch.float32)
    block, name = Rotate()(source).load_block(0), "self_attn.q_proj.weight"
    exactly = block.originals[name]
    assert exactly.dtype == torch.float32 and torch.equal(block.get_parameter(name), exactly.bfloat16().float()) and not torch.equal(
        block.get_parameter(name), exactly)  # fmt: skip
    options = {"samples": 4, "seqlen": 64, "show": False, "device": "cpu"}
    recipe = RTN | {"views": ["rotate"], "blocks": ["awq"]}
    compress.run(str(tmp_path / "model"), recipe, text, tmp_path / "out", **options)
    shutil.copytree(tmp_path / "out", tmp_path / "resumed")
    (tmp_path / "resumed" / "block-00001.safetensors").unlink()
    report = compress.run(str(tmp_path / "model"), recipe, text, tmp_path / "resumed", **options)
    assert report.resumed_layers == 7
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (tmp_path / "resumed" / file.name).read_bytes(), file.name
    assert compress.verify(str(tmp_path / "out")).kl < 1e-6
    with pytest.raises(CompressError, match=r"recipe\.views\.0\.seed: 0 → 1"):
        compress.run(str(tmp_path / "model"), recipe | {"views": [{"rotate": {"seed": 1}}]}, text, tmp_path / "out", **options)


# ---- block steps


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "calibration.txt"
    file.write_text("It was the best of times, it was the worst of times; the spring of hope, the winter of despair. " * 60)
    return f"file:{file}"


@pytest.mark.parametrize("name", TINY)
def test_folding_a_scale_is_exact_with_norms_stored_in_bf16(name, exact):
    model = tiny_model(name, dtype=torch.float64)
    unfuse_experts(model)
    generator, folded = torch.Generator().manual_seed(1), 0
    for norm in (p for p in model.parameters() if p.dim() == 1):
        norm.data = norm.data.bfloat16().double()
    expected = exact(model)
    arch = arch_of(model)
    for block in model.get_submodule(arch.blocks):
        block.originals = {}
        block.stored = {n: torch.bfloat16 if n.endswith("norm.weight") or ".ln_" in n else torch.float64 for n in block.state_dict()}
        sites = arch.sites_of(block)
        plan = {p: None for s in sites for p in s.linears}
        for site in AWQ().sites(block, sites, plan):
            outputs, reads = fed_by(block, site)
            fold(block, site, 0.5 + torch.rand(len(outputs), generator=generator), outputs, reads)
            folded += 1
    assert folded >= 2 and (exact(model) - expected).abs().max() < 1e-5 * expected.abs().max()  # weights go through fp32


def problem(seed=0, m=48, n=64):
    """A weight and inputs of which a few channels are loud."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(512, n, generator=g) @ torch.randn(n, n, generator=g).mul_(0.3).add_(torch.eye(n))
    X[:, :4] *= 15
    stats = Stats.zeros(n)
    stats.add(X)
    return torch.randn(m, n, generator=g), stats.finish()


def test_the_search_never_does_worse_than_no_scale_and_uses_loud_channels():
    model = tiny_model("llama").requires_grad_(False)
    block, method = model.model.layers[0], METHODS["rtn"](bits=3, group_size=32)
    block.originals, block.stored = {}, {n: torch.float32 for n in block.state_dict()}
    site = next(s for s in arch_of(model).sites_of(block) if s.name == "mlp.input")
    (_, stats), methods = problem(), dict.fromkeys(site.linears, method)
    before = block.mlp.up_proj.weight.clone()
    norm = block.post_attention_layernorm.weight.clone()
    AWQ(rows=1000)(block, site, stats, methods)
    s = norm / block.post_attention_layernorm.weight
    assert s[:4].min() > 2 * s[4:].max()  # loud inputs get finer steps
    torch.testing.assert_close(block.mlp.up_proj.weight / s, before)
    one = torch.ones(64)
    assert rounding_error(method, before, s, stats) < 0.5 * rounding_error(method, before, one, stats)
    gptq = METHODS["gptq"](bits=3, group_size=32, clip="none", sweeps=0)
    promised = rounding_error(gptq, before, one, stats)
    assert 0.5 < promised / stats.error(before, gptq(before, stats, stored=torch.float32).dequantize()) < 1.5
    again = block.mlp.up_proj.weight.clone()
    AWQ(grid=1)(block, site, stats, methods)  # only the power 0
    assert torch.equal(block.mlp.up_proj.weight, again)
    Smooth(alpha=0.0)(block, site, stats, methods)
    both = torch.stack([block.get_submodule(p).weight.abs().amax(0) for p in site.linears]).amax(0)
    torch.testing.assert_close(both / both.mean(), one)  # α = 0: every column reaches equally far
    with pytest.raises(CompressError, match="object has none; use rtn or gptq, or leave awq out"):
        AWQ()(block, site, stats, dict.fromkeys(site.linears, object()))


def test_layers_that_the_recipe_leaves_alone_are_not_scaled(tmp_path, text):
    model = save_tiny("llama", tmp_path / "model")
    recipe = RTN | {"blocks": ["awq"], "ignore": ["*.v_proj", "*.gate_proj"]}
    compress.run(str(tmp_path / "model"), recipe, text, tmp_path / "out", samples=4, seqlen=64, show=False)
    kept = compress.load(str(tmp_path / "out")).state_dict()
    assert compress.inspect(str(tmp_path / "out")).run["calibration"]["sha256"]  # a block step reads the text, though rounding to nearest does not
    for name, t in model.state_dict().items():
        if any(part in name for part in ("v_proj", "gate_proj", "norm", "embed")):
            assert torch.equal(kept[name], t), name


@pytest.mark.parametrize("name", ["llama", "opt", "gemma2"])
def test_auto_takes_the_transform_that_leaves_the_least_error_and_nothing_where_none_helps(name, tmp_path, capsys):
    save_tiny(name, tmp_path / "model")
    loud = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    norms = [(path, m) for path, m in loud.named_modules() if path.endswith(("input_layernorm", "self_attn_layer_norm", "pre_feedforward_layernorm"))]
    for _, norm in norms:  # two channels that a plain grid drowns in
        norm.weight.data[:2] = norm.weight.data[:2] * 40 + 30
    loud.save_pretrained(tmp_path / "model")
    (tmp_path / "t.txt").write_text("It was the best of times, it was the worst of times. " * 60)
    run = lambda out, **more: compress.run(str(tmp_path / "model"), {"name": "r", "steps": [{"method": "rtn", "bits": 3, "group_size": 32}]} | more,
                                           f"file:{tmp_path / 't.txt'}", tmp_path / out, samples=8, seqlen=64, device="cpu")  # fmt: skip
    auto = run("auto", transforms="auto")
    said = capsys.readouterr().err
    errors = {line.split()[1].rstrip(":"): float(line.split()[-1]) for line in said.splitlines() if line.startswith("transform ") and "error " in line}
    assert {"none", "awq", "smooth"} <= set(errors) and compress.verify(str(tmp_path / "auto")).ok
    best = min(errors, key=errors.get)
    assert best != "none" and ("rotate" in errors) == (name == "llama")  # opt's head is tied
    identity = auto.manifest.run["recipe"]
    assert [v["view"] for v in identity["views"]] + [b["block"] for b in identity["blocks"]] == [best]
    with pytest.raises(CompressError, match="chooses views and blocks itself"):
        run("both", transforms="auto", views=["rotate"])
