"""pytest tests/test_importance.py — scores of units against autograd and brute force; budgets; neurons of experts; adapters that prune; fused blocks."""

import os
from pathlib import Path

import pytest
import torch
from test_structure import TOKENS, close, generates_alike, logits, run, without_block
from tiny import save_tiny, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

import compress
from compress.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.eval.bench.structure import ROWS
from compress.formats import Dense
from compress.healing.adapters import Frozen, LowRank, Merged
from compress.skeleton import Neurons
from compress.stream import Stream
from compress.structure import loraprune, program, width
from compress.structure.cost import sublayers, units
from compress.structure.fuse import macro
from compress.structure.importance import scores
from compress.structure.loraprune import LoRAPrune
from compress.structure.program import Program
from compress.structure.smaller import numbers
from compress.structure.width import Width

YARDSTICK = Path(os.environ.get("COMPRESS_YARDSTICK") or Path(__file__).parents[2] / "shared" / "yardstick")


def enter(model, windows):
    return Stream(model, TOKENS.tokens[: windows or None], batch=4)


def test_scores_against_autograd_and_moments(tmp_path):
    model = save_tiny("llama", tmp_path, dtype=torch.float32)
    source, seen, layer = Checkpoint(str(tmp_path)), {}, model.model.layers[1]
    model.requires_grad_(True)
    handle = layer.mlp.down_proj.register_forward_pre_hook(lambda m, args: (args[0].retain_grad(), seen.update(x=args[0]))[1])
    other = layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args: (args[0].retain_grad(), seen.update(heads=args[0]))[1])
    out = model(TOKENS.tokens, use_cache=False).logits.log_softmax(-1)[:, :-1]
    (-out.gather(-1, TOKENS.tokens[:, 1:, None])).sum().backward()
    handle.remove()
    other.remove()
    x, W = seen["x"].detach().double().flatten(0, 1), layer.mlp.down_proj.weight.detach().double()
    mlp, attn = layer.mlp, layer.self_attn
    gw = lambda m, dim: (m.weight.grad * m.weight).abs().sum(dim)
    gate = lambda x: (x * x.grad).detach().double().sum(1)
    expected = {"activation": x.square().mean(0).sqrt() * W.norm(dim=0), "flap": x.var(0, unbiased=False) * W.square().sum(0),
                "fisher": gate(seen["x"]).square().sum(0), "taylor": gw(mlp.down_proj, 0) + gw(mlp.up_proj, 1) + gw(mlp.gate_proj, 1)}  # fmt: skip
    for by, score in expected.items():
        torch.testing.assert_close(scores(source, enter, by, False)[1]["mlp"], score.detach().double(), rtol=2e-3, atol=1e-6 * float(score.detach().max()))
    by_head = gw(attn.o_proj, 0).view(4, -1).sum(1) + gw(attn.q_proj, 1).view(4, -1).sum(1)
    by_head = by_head + sum(gw(m, 1).view(2, -1).sum(1) for m in (attn.k_proj, attn.v_proj)).repeat_interleave(2) / 2
    torch.testing.assert_close(scores(source, enter, "taylor", True)[1]["heads"], by_head.double(), rtol=2e-3, atol=1e-5)
    by_gate = gate(seen["heads"]).view(-1, 4, 16).sum(2).square().sum(0)
    torch.testing.assert_close(scores(source, enter, "fisher", True)[1]["heads"], by_gate, rtol=2e-3, atol=1e-9)


def test_the_trajectory_that_a_mask_changes_is_what_one_gradient_finds(tmp_path):
    """Every unit silenced in turn, as OPTIN does it, against random signs: what each does is spread over four orders of magnitude."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(torch.logspace(-1, 1, 128)[torch.randperm(128, generator=torch.Generator().manual_seed(0))])
    model.save_pretrained(tmp_path)
    found = scores(Checkpoint(str(tmp_path)), enter, "trajectory", False)[0]["mlp"]

    def trajectory(j=None):
        silent = lambda m, args: (args[0].index_fill(-1, torch.tensor([j]), 0),) if j is not None else args
        handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(silent)
        with torch.no_grad():
            states = []
            handles = [b.register_forward_hook(lambda m, a, y: states.append(nn.functional.normalize(y, dim=-1))) for b in model.model.layers]
            model(TOKENS.tokens)
        for h in (handle, *handles):
            h.remove()
        return torch.cat([(n @ n.mT).flatten() for n in states])

    whole = trajectory()
    some = range(0, 128, 5)
    exact = torch.tensor([float((trajectory(j) - whole).square().sum()) for j in some]).log()
    assert torch.corrcoef(torch.stack([exact, found[list(some)].float().log()]))[0, 1] > 0.95
    assert torch.equal(found, scores(Checkpoint(str(tmp_path)), enter, "trajectory", False)[0]["mlp"])


# ---- budgets


@pytest.mark.parametrize("cost", ["parameters", "flops", "bytes", "latency"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_a_budget_is_met_and_spent(name, cost, tmp_path):
    save_tiny(name, tmp_path / "model")
    source = Checkpoint(str(tmp_path / "model"))
    for across in ("model", "layer"):
        step = Width(budget=0.1 if cost == "latency" else 0.3, cost=cost, across=across, by="magnitude")
        plan = step.measure(source, enter)
        if cost == "latency":
            assert any(len(numbers(kept)) < 128 for kept in plan["mlp"].values()) or any(len(numbers(kept)) < 4 for kept in plan["heads"].values())
            continue
        smaller = step.apply(source, plan)
        assert across == "model" or name == "gpt2" or not getattr(smaller.config, "compress_blocks", None)  # as many in every layer: plain
        each = [(units(source, i, cost), units(smaller, i, cost)) for i in range(2)]
        for pairs in [[each]] if across == "model" else [[[pair]] for pair in each]:
            before, after = (sum(pair[k][""] for pair in pairs[0]) for k in (0, 1))
            unit = max(max(8 * a["mlp"], a["heads"]) for a, _ in pairs[0])
            assert 0.7 * before - unit < after <= 0.7 * before * (1 + 1e-9), (cost, across)
        assert step.apply(source, step.guess(source)).parameters() > 0
    if name == "llama" and cost == "bytes":
        for fields, told in (({"budget": 0.99}, r"at most 0\.\d+ can be cut"), ({"budget": 0.2, "mlp": 0.2}, "leave mlp and groups out")):
            with pytest.raises(CompressError, match=told):
                Width(by="magnitude", **fields).measure(source, enter)


def test_a_programme_counts_flops_and_bytes(tmp_path):
    save_tiny("llama", tmp_path)
    kept = {}
    for cost in ("parameters", "bytes", "flops"):
        report = run(tmp_path, [{"program": {"budget": 0.7, "cost": cost, "samples": 4}}], tmp_path / cost)
        kept[cost] = report.manifest.structure[0]["cost"]
    big = tiny_model("llama").config
    big.intermediate_size = 4096
    AutoModelForCausalLM.from_config(big).save_pretrained(tmp_path / "big")
    source = Checkpoint(str(tmp_path / "big"))
    seconds = sublayers(source, 1, "latency", enter(source, 4), {"attention": "self_attn", "mlp": "mlp"})
    assert seconds["mlp"] > max(seconds["self_attn"], 0.2 * sum(seconds.values()))  # a sublayer that is left out is not computed
    assert kept["parameters"] == pytest.approx(kept["bytes"]) and 0 < kept["flops"] <= 0.7


def test_a_budget_of_seconds_is_kept_with_what_it_was_predicted_and_timed_to_be(tmp_path, monkeypatch):
    """With the clock's answers given: attention takes all the time, so attention goes, and the plan tells what was counted on."""
    save_tiny("llama", tmp_path / "model", dtype=torch.float32)
    source, told = Checkpoint(str(tmp_path / "model")), {"self_attn": 0.5, "mlp": 0.25, "": 0.25}
    monkeypatch.setattr(program, "sublayers", lambda source, i, cost, stream, children: told)
    plan = Program(budget=0.8, cost="latency", merge=False).measure(source, enter)
    assert [child for _, child in plan["absent"]] == ["self_attn"] and plan["cost"] == 0.75
    seconds = plan["seconds"]
    assert seconds["blocks"] == [told, told] and (seconds["whole"], seconds["predicted"]) == (2.0, 1.5) and 0 < seconds["timed"] < 1
    monkeypatch.setattr(width, "units", lambda source, i, cost, stream: {"": 1.0, "mlp": 0.5 / 128, "heads": 0.125})
    plan = Width(budget=0.25, cost="latency", by="magnitude").measure(source, enter)
    seconds, kept = plan["seconds"], {kind: sum(len(numbers(k)) for k in plan[kind].values()) for kind in ("mlp", "heads")}
    assert seconds["whole"] == 2.0 and seconds["blocks"] == [{"": 1.0, "mlp": 0.5 / 128, "heads": 0.125}] * 2 and 0 < seconds["timed"] < 1
    assert seconds["predicted"] == pytest.approx(2 - (256 - kept["mlp"]) * 0.5 / 128 - (8 - kept["heads"]) / 2 * 0.125) and seconds["predicted"] <= 1.5
    monkeypatch.undo()
    save_tiny("bloom", tmp_path / "bloom")
    with pytest.raises(CompressError, match="cannot be timed apart; use cost: flops"):
        Width(budget=0.2, cost="latency", by="magnitude").measure(Checkpoint(str(tmp_path / "bloom")), enter)


# ---- what the choices are worth


@pytest.mark.slow
@pytest.mark.skipif(not YARDSTICK.is_dir(), reason=f"no yardstick at {YARDSTICK}")
def test_a_fifth_of_the_neurons_of_the_yardstick(tmp_path, request):
    """Behind any choice but that by magnitude alone, least squares beats FLAP's constants; a small edition of the table of docs/structure.md."""
    if "slow" not in request.config.option.markexpr:
        pytest.skip("takes minutes; pytest -m slow runs it")
    kl = {}
    for name in ("loraprune", "flap-bias", "flap", "magnitude", "activation", "taylor", "trajectory"):
        compress.run(str(YARDSTICK / "llama-16m"), {"name": "row", "structure": ROWS[name]}, f"file:{YARDSTICK / 'wikitext2-valid.txt'}", tmp_path / name,
                     samples=16, show=False, device="cpu")  # fmt: skip
        e = compress.evaluate(str(tmp_path / name), str(YARDSTICK / "llama-16m"), f"file:{YARDSTICK / 'wikitext2-test.txt'}", samples=12, show=False)
        kl[name] = e["kl"]["mean"]
        print(name, e["perplexity"]["token"], e["kl"], e["top1"]["agreement"], flush=True)
    assert kl["flap"] <= 0.6 * kl["flap-bias"] and max(v for k, v in kl.items() if k not in ("flap-bias", "magnitude")) < kl["flap-bias"], kl


# ---- experts


@pytest.mark.parametrize("name, option", [("mixtral", "intermediate_size"), ("qwen3_moe", "moe_intermediate_size")])
def test_neurons_of_experts(name, option, tmp_path):
    model = save_tiny(name, tmp_path / "model", dtype=torch.float32)
    for by in ("flap", "magnitude"):
        report = run(tmp_path / "model", [{"width": {"neurons": 0.5, "by": by}}], tmp_path / by)
        masked, width = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval(), getattr(model.config, option)
        for i, kept in report.manifest.structure[0]["neurons"].items():
            down = masked.model.layers[int(i)].mlp.experts.down_proj.data
            keep = torch.zeros(down.shape[0] * width)
            keep[numbers(kept)] = 1
            assert (keep.view(-1, width).sum(1) == round(width * 0.5 / 8) * 8).all()
            down.mul_(keep.view(-1, 1, width))
        loaded = compress.load(str(tmp_path / by))
        assert close(logits(loaded), logits(masked)) and getattr(loaded.config, option) == round(width * 0.5 / 8) * 8 and generates_alike(loaded)
    run(tmp_path / "model", [{"width": {"neurons": 0.5}}, "refit"], tmp_path / "refit")  # every expert's own least squares, and attention's
    with torch.no_grad():
        p, q, r = (m(TOKENS.tokens, use_cache=False).logits.log_softmax(-1) for m in (model, *(compress.load(str(tmp_path / x)) for x in ("flap", "refit"))))
    kl = lambda q: float((p.exp() * (p - q)).sum(-1).mean())
    assert kl(r) < 0.9 * kl(q)
    with pytest.raises(CompressError, match="scored by flap, activation or magnitude, not by taylor"):
        run(tmp_path / "model", [{"width": {"neurons": 0.5, "by": "taylor"}}], tmp_path / "no")


# ---- adapters that prune


def test_the_gradient_that_adapters_stand_for():
    """With A the identity and B = 0, ĝ is s² ∂L/∂W, whatever L is."""
    g = torch.Generator().manual_seed(0)
    W, x = torch.randn(6, 8, generator=g), torch.randn(5, 8, generator=g)
    a = Merged(Frozen(Dense(W), torch.float32), LowRank((6, 8), 8, 16.0, torch.float32, g, torch.device("cpu")))
    a.change.A.data = torch.cat([torch.eye(6, 8), torch.zeros(2, 8)])[:6]
    a(x).sin().sum().backward()
    V = W.clone().requires_grad_()
    (x @ V.T).sin().sum().backward()
    expected = (V.grad * V.detach()).abs()
    expected[:, 6:] = 0  # directions that A has not
    torch.testing.assert_close(LoRAPrune._each(a), expected / expected.sum())


def test_the_schedule_is_cubic_and_scores_are_moving_averages(tmp_path, monkeypatch):
    save_tiny("llama", tmp_path, dtype=torch.float32)
    source, rising = Checkpoint(str(tmp_path)), torch.arange(128, dtype=torch.float64)
    for progress, left in ((-0.125, 128), (0.0, 128), (0.5, 128 - 0.875 * 64), (1.0, 64), (1.125, 64)):  # of the steps between a tenth and nine tenths
        kept = LoRAPrune(mlp=0.5, multiple=1)._kept(source, {(i, "mlp"): rising for i in (0, 1)}, progress)
        assert all(units.tolist() == list(range(128 - int(left), 128)) for units in kept.values()) and len(kept) == (2 if left < 128 else 0)
    for second, first_half in ((-8.0, False), (-10.0, True)):  # 0.9 rising + 0.1 · second · rising: rising still for −8, falling for −10
        calls = []

        def gathered(c, each, second=second, calls=calls):
            calls.append(None)
            return torch.arange(128 if isinstance(c, Neurons) else c.heads, dtype=torch.float64) * (1.0 if len(calls) <= 4 else second)  # 2 blocks, 2 kinds

        monkeypatch.setattr(loraprune, "gathered", gathered)
        made = LoRAPrune(mlp=0.5, steps=2, every=2, batch=2)._train(source, enter(source, 0))
        assert made["kept.mlp.1"].tolist() == (list(range(64)) if first_half else list(range(64, 128))) and len(calls) == 8


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_pruned_by_adapters(name, tmp_path):
    save_tiny(name, tmp_path / "model", dtype=torch.float32)
    step = {"loraprune": {"mlp": 0.5, "groups": 0.5, "steps": 20, "every": 5, "batch": 4}}
    report = run(tmp_path / "model", [step], tmp_path / "out")
    plan, loaded = report.manifest.structure[0], compress.load(str(tmp_path / "out"))
    assert all(len(numbers(kept)) == 64 for kept in plan["mlp"].values()) and generates_alike(loaded) and plan["learned"]
    assert report.manifest.totals["bytes"] == report.manifest.totals["planned_bytes"]
    told = compress.plan(str(tmp_path / "model"), {"name": "s", "structure": [step]})
    assert told.bytes_after == report.manifest.totals["bytes"]
    run(tmp_path / "model", [step], tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), compress.load(str(tmp_path / "again")).state_dict().values(), strict=True))


def test_attention_that_is_evened_out_before_pruning(tmp_path):
    """Sparse-then-Prune: nothing is cut, the penalty falls, a magnitude step prunes what comes of it."""
    model = save_tiny("llama", tmp_path / "model", dtype=torch.float32)
    uneven = {}
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(2)  # sharp attention
    model.save_pretrained(tmp_path / "model")
    for penalty in (0.0, 1e4):
        structure = [{"loraprune": {"mlp": 0.0, "penalty": penalty, "steps": 20, "lr": 1e-2}}]
        report = run(tmp_path / "model", structure, tmp_path / str(penalty), [{"method": "magnitude", "sparsity": 0.1}])
        assert not report.manifest.structure[0]["mlp"] and len(report.manifest.layers) == 14
        compress.export(str(tmp_path / str(penalty)), "dense", tmp_path / f"{penalty}-dense")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"{penalty}-dense", attn_implementation="eager").eval()
        with torch.no_grad():
            uneven[penalty] = float(torch.stack(loaded(TOKENS.tokens, output_attentions=True).attentions).square().log1p().mean())
    assert uneven[1e4] < 0.9 * uneven[0.0]


# ---- fused blocks


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_fused_block_is_at_first_one_left_out_and_then_nearer(name, tmp_path):
    model = save_tiny(name, tmp_path / "model", dtype=torch.float32)
    plain = run(tmp_path / "model", [{"fuse": {"count": 1, "steps": 0}}], tmp_path / "plain").manifest.structure[0]
    gone = plain["left_out"][0]
    assert close(logits(compress.load(str(tmp_path / "plain"))), without_block(model, gone)) and plain["learned"] == {"0": []}
    influence = macro(Checkpoint(str(tmp_path / "model")), enter(Checkpoint(str(tmp_path / "model")), 0))
    assert gone == min(influence, key=influence.get) and plain["influence"] == [pytest.approx(influence[gone], rel=1e-4)]
    report = run(tmp_path / "model", [{"fuse": {"count": 1, "steps": 40, "lr": 1e-2}}], tmp_path / "fused")
    before, after = report.manifest.structure[0]["distance"][0]
    assert after < before == pytest.approx(plain["distance"][0][0]) and report.manifest.plain
    loaded = compress.load(str(tmp_path / "fused"))
    assert generates_alike(loaded) and compress.verify(str(tmp_path / "fused")).ok
    with torch.no_grad():
        p, q, r = (m(TOKENS.tokens, use_cache=False).logits.log_softmax(-1) for m in (model, compress.load(str(tmp_path / "plain")), loaded))
    kl = lambda q: float((p.exp() * (p - q)).sum(-1).mean())
    assert kl(r) < kl(q)
