"""pytest tests/test_structure.py — fewer blocks, heads, neurons, experts: cut equals masked, plain models load plainly, refits are least squares."""

import copy
import json
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from tiny import TINY, save_tiny, tiny_model
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import compress
from compress.arch import arch_of
from compress.calibration.data import CalibrationSet
from compress.calibration.statistics import Stats
from compress.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.recipe import load
from compress.skeleton import KEY, heads, neurons
from compress.stream import Stream
from compress.structure.drop import Drop, divergences, fewer, without
from compress.structure.eliminate import eliminate
from compress.structure.merge import merges
from compress.structure.nest import narrowed
from compress.structure.program import Option, Program, best
from compress.structure.refit import Refit
from compress.structure.scratch import Scratch
from compress.structure.smaller import Smaller, numbers, spans
from compress.structure.width import Width

IDS = torch.randint(1, 256, (2, 24), generator=torch.Generator().manual_seed(0))
TOKENS = CalibrationSet(tokens=torch.randint(1, 256, (12, 32), generator=torch.Generator().manual_seed(1)), mask=None, words=384,
                        record={"source": "test"})  # fmt: skip
MOE = ("mixtral", "qwen3_moe")
FIXED = ("bloom", "falcon_rw", "olmo2")  # no head can be cut


def run(folder, structure, out, steps=(), **options):
    recipe = {"name": "s", "structure": structure, "steps": list(steps)}
    return compress.run(str(folder), recipe, TOKENS, out, show=False, device="cpu", **options)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def close(a, b, tolerance=1e-5):
    return bool((a - b).abs().max() < tolerance * b.abs().max())


@contextmanager
def hooked(handles):
    yield
    for handle in handles:
        handle.remove()


def without_block(model, i):
    """The model's logits with block i left out, by letting its input through."""
    block = model.get_submodule(arch_of(model).blocks)[i]
    through = lambda m, args, kwargs, out: (args[0], *out[1:]) if isinstance(out, tuple) else args[0]
    with hooked([block.register_forward_hook(through, with_kwargs=True)]):
        return logits(model)


def masked(model, plan):
    """The model's logits with the inputs of down and o silenced where the plan cuts."""
    arch, handles = arch_of(model), []
    for i, block in enumerate(model.get_submodule(arch.blocks)):
        for c, kept in ((neurons(arch, block), plan["mlp"].get(str(i))), (heads(arch, block), plan["heads"].get(str(i)))):
            if kept is not None:
                keep = torch.tensor(numbers(kept))
                mask = torch.zeros(c.width if hasattr(c, "width") else c.heads * c.dim)
                mask[keep if hasattr(c, "width") else c.columns(keep)] = 1
                handles.append(block.get_submodule(c.reader).register_forward_pre_hook(lambda m, args, mask=mask: (args[0] * mask,)))
    with hooked(handles):
        return logits(model)


def generates_alike(model):
    cached, plain = (model.generate(IDS[:1, :8], max_new_tokens=12, do_sample=False, use_cache=c, pad_token_id=0) for c in (True, False))
    return torch.equal(cached, plain)


# ---- depth


@pytest.mark.parametrize("name", TINY)
def test_a_model_without_a_block_is_the_masked_one_and_plain(name, tmp_path):
    model = save_tiny(name, tmp_path / "model", dtype=torch.float32)
    report = run(tmp_path / "model", [{"drop": {"count": 1, "by": "bottom"}}], tmp_path / "out")
    loaded = compress.load(str(tmp_path / "out"))
    assert close(logits(loaded), without_block(model, 0)) and len(loaded.get_submodule(arch_of(model).blocks)) == 1
    assert generates_alike(loaded) and compress.verify(str(tmp_path / "out")).ok
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and report.manifest.plain
    assert close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), without_block(model, 0))
    if name in MOE:  # experts by the names of the class's own checkpoints
        stored = lambda folder: set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])
        (smaller := fewer(Checkpoint(str(tmp_path / "model")), [1])).config.save_pretrained(tmp_path / "own")
        AutoModelForCausalLM.from_config(smaller.config).save_pretrained(tmp_path / "own", max_shard_size="40KB")
        assert stored(tmp_path / "out") == stored(tmp_path / "own")
    totals = report.manifest.totals
    assert totals["bytes"] == totals["planned_bytes"] and totals["bytes"] < totals["source_bytes"]
    assert compress.plan(str(tmp_path / "model"), {"name": "s", "structure": [{"drop": {"count": 1, "by": "bottom"}}]}).layers
    if name in ("gemma2", "qwen3_moe", "gpt2"):
        compress.export(str(tmp_path / "out"), "dense", tmp_path / "dense")
        assert close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()), without_block(model, 0))


def test_every_way_to_choose(tmp_path):
    model = tiny_model("llama")
    model.config.num_hidden_layers = 6
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(model.config).eval()
    for p in model.parameters():
        p.data *= 5 if p.dim() == 2 else 1  # so that blocks do something
    for i in (2, 4):  # blocks that add nothing
        for linear in (model.model.layers[i].self_attn.o_proj, model.model.layers[i].mlp.down_proj):
            linear.weight.data.zero_()
    model.save_pretrained(tmp_path)
    source = Checkpoint(str(tmp_path))
    enter = lambda m, windows: Stream(m, TOKENS.tokens[: windows or None])
    chosen = {by: Drop(count=2, by=by).measure(source, enter) for by in ("top", "bottom", "alternate", "symmetric", "contribution", "angular", "greedy")}
    left_out = {by: sorted(plan["left_out"], reverse=by == "alternate") for by, plan in chosen.items()}
    assert left_out == {"top": [4, 5], "bottom": [0, 1], "alternate": [4, 2], "symmetric": [2, 3], "contribution": [2, 4], "greedy": [2, 4],
                        "angular": left_out["angular"]}  # fmt: skip
    assert max(abs(chosen["contribution"]["score"][i]) for i in (2, 4)) < 1e-6 and max(chosen["greedy"]["score"]) < 1e-9
    assert left_out["angular"][1] == left_out["angular"][0] + 1 and len(chosen["angular"]["score"]) == 5
    small = fewer(source, [0, 1, 3, 5])
    stream, whole = Stream(small, IDS), Stream(source, IDS)
    for s in (stream, whole):
        for i in range(s.source.num_blocks):
            s.advance(s.source.load_block(i))
    assert torch.equal(next(stream.logits()), next(whole.logits()))
    third = Drop(count=3).measure(source, enter)  # greedy's third is the least of what each of the rest would cost
    costs = {}
    for i in (0, 1, 3, 5):
        m = copy.deepcopy(model)
        m.model.layers = torch.nn.ModuleList(b for j, b in enumerate(m.model.layers) if j != i)
        with torch.no_grad():
            p, q = (x(TOKENS.tokens, use_cache=False).logits.log_softmax(-1) for x in (model, m))
        costs[i] = float((p.exp() * (p - q)).sum(-1).mean())
    assert third["left_out"][2] == min(costs, key=costs.get) and third["score"][2] == pytest.approx(min(costs.values()), rel=1e-4)


def test_patterns_over_layers_are_rewritten_or_refused(tmp_path):
    save_tiny("gemma2", tmp_path / "gemma2")
    view = fewer(Checkpoint(str(tmp_path / "gemma2")), [1])
    assert view.config.layer_types == ["full_attention"] and view.changes == {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    save_tiny("qwen3_moe", tmp_path / "moe")
    assert fewer(Checkpoint(str(tmp_path / "moe")), [1]).config.mlp_only_layers == []
    config = TINY["gpt2"]()
    config.scale_attn_by_inverse_layer_idx = True
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "scaled")
    with pytest.raises(CompressError, match=r"as block 0 of a smaller gpt2, block 1 would have attn\.scaling"):
        fewer(Checkpoint(str(tmp_path / "scaled")), [1])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3", "qwen3_moe", "gemma2"])
def test_one_sublayer_left_out(name, tmp_path):
    model = save_tiny(name, tmp_path / "model", dtype=torch.float32)
    for what, site in (("attention", "attn.output"), ("mlp", "mlp.output")):
        run(tmp_path / "model", [{"drop": {"count": 1, "by": "bottom", "what": what}}], tmp_path / what)
        reader = next(s.linears[0] for s in arch_of(model).sites if s.name == site).partition(".")[0]
        block = model.get_submodule(arch_of(model).blocks)[0]
        silent = lambda m, args, y: (torch.zeros_like(y[0]), *y[1:]) if isinstance(y, tuple) else torch.zeros_like(y)
        with hooked([block.get_submodule(reader).register_forward_hook(silent)]):
            expected = logits(model)
        loaded = compress.load(str(tmp_path / what))
        assert close(logits(loaded), expected) and generates_alike(loaded) and compress.verify(str(tmp_path / what)).ok
    # in two steps as in one: what is absent is not chosen again
    four = save_tiny(name, tmp_path / "four", dtype=torch.float32) if name == "llama" else None
    if four is not None:
        four.config.num_hidden_layers = 4
        AutoModelForCausalLM.from_config(four.config).save_pretrained(tmp_path / "four")
        for by in ("greedy", "top", "bottom", "alternate", "symmetric"):
            step = {"drop": {"count": 1, "by": by, "what": "attention"}}
            plans = run(tmp_path / "four", [step, step], tmp_path / by).manifest.structure
            assert plans[0]["left_out"] != plans[1]["left_out"], by
            config = json.loads((tmp_path / by / "config.json").read_text())[KEY]
            assert sum("without" in fields for fields in config) == 2
    with pytest.raises(CompressError, match=r"cannot say \{'without'"):
        run(tmp_path / "model", [{"drop": {"count": 1, "by": "bottom", "what": "mlp"}}], tmp_path / "no", uniform=True)


def test_the_dynamic_programme_is_brute_force(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for length, budget, whole in ((4, 9, True), (5, 14, True), (6, 12, True), (4, 2.1, False), (5, 2.6, False), (6, 2.9, False)):
        options = []
        for start in range(length):
            for end in range(start + 1, min(length, start + 2) + 1):
                for _ in range(3):
                    cost = int(torch.randint(0, 7, (), generator=generator)) if whole else float(torch.rand((), generator=generator))
                    options.append(Option(start, end, (), cost, float(torch.rand((), generator=generator))))

        def brute(at, left, options=options, length=length):
            if at == length:
                return 0.0
            return max((o.value + brute(o.end, left - o.cost) for o in options if o.start == at and o.cost <= left), default=-float("inf"))

        chosen = best(options, length, budget)
        assert sum(o.value for o in chosen) == pytest.approx(brute(0, budget)) and sum(o.cost for o in chosen) <= budget
        assert [o.end for o in chosen[:-1]] == [o.start for o in chosen[1:]] and chosen[0].start == 0
    with pytest.raises(CompressError, match="costs 5, the budget is 4; raise the budget"):
        best([Option(0, 1, (), 5.0, 0.0)], 1, 4.0)
    for L in (3, 4, 7, 8, 32):  # equal blocks: what fits the budget to the last digit stays
        options = [Option(i, i + 1, (), 1 / L, 0.0) for i in range(L)] + [Option(i, i + 1, ((i, ""),), 0.0, -1.0) for i in range(L)]
        for k in range(1, L + 1):
            assert sum(not o.absent for o in best(options, L, k / L)) == k, (L, k)
    save_tiny("llama", tmp_path / "model")
    report = run(tmp_path / "model", [{"program": {"budget": 0.7}}], tmp_path / "out")
    plan = report.manifest.structure[0]
    assert plan["cost"] <= 0.7 and plan["absent"] and generates_alike(compress.load(str(tmp_path / "out"))) and compress.verify(str(tmp_path / "out")).ok
    whole = Program(budget=1.0, merge=False).measure(Checkpoint(str(tmp_path / "model")), lambda m, windows: Stream(m, TOKENS.tokens))
    assert whole["absent"] == [] and whole["reached"] == 0
    plain = run(tmp_path / "model", [{"program": {"budget": 0.7}}], tmp_path / "plain", uniform=True).manifest
    assert plain.plain and [child for _, child in plain.structure[0]["absent"]] == [""] and plan["absent"] != plain.structure[0]["absent"]
    for name, told in (("bloom", "attention of bloom adds to the stream itself"), ("opt", "opt has no mlp as a module of its own")):
        save_tiny(name, tmp_path / name)
        blocks = run(tmp_path / name, [{"program": {"budget": 0.7, "merge": False}}], tmp_path / f"{name}-out").manifest
        assert blocks.plain and len(blocks.structure[0]["absent"]) == 1
        assert [f.what for f in blocks.fallbacks] == ["no sublayer can go alone"] and told in blocks.fallbacks[0].detail
    silent = {"drop": {"what": "attention", "blocks": [0]}}  # what is absent is not left out again
    plans = run(tmp_path / "model", [silent, {"program": {"budget": 0.7}}], tmp_path / "two").manifest.structure
    assert [0, "self_attn"] not in plans[1]["absent"] and plans[1]["cost"] <= 0.7
    with pytest.raises(CompressError, match="no block would stay"):
        run(tmp_path / "model", [{"program": {"budget": 1e-6}}], tmp_path / "no")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_a_block_takes_over_what_is_linear_in_its_neurons(name, tmp_path):
    """Against the least squares over the windows that do not judge; and the programme takes it, for it costs what leaving out does."""
    save_tiny(name, tmp_path / "model", dtype=torch.float32)
    source = Checkpoint(str(tmp_path / "model"))
    tokens = torch.randint(1, 256, (64, 32), generator=torch.Generator().manual_seed(1))
    weights, states, names, notes = merges(source, Stream(source, tokens), 4, 2)
    assert set(states) == {(0, 2)} and not notes
    stream = Stream(source, tokens)
    block, other = source.load_block(0), source.load_block(1)
    seen: list[torch.Tensor] = []
    path = names[0].removeprefix(source.block_name(0) + ".").removesuffix(".weight")
    linear = block.get_submodule(path)
    linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    stream.advance(block)
    before = stream.hidden.clone()
    stream.advance(other)
    A, D, first = torch.cat(seen).double(), (stream.hidden - before).flatten(0, 1).double(), 4 * 32  # tokens of the windows that judge
    H = A[first:].T @ A[first:]
    change = torch.linalg.solve(H + 0.001 * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64), A[first:].T @ D[first:])  # [in, out]
    W = linear.weight.detach() if isinstance(linear, Conv1D) else linear.weight.detach().T
    found = weights["0-2"] if isinstance(linear, Conv1D) else weights["0-2"].T
    torch.testing.assert_close(found - W, change.float(), rtol=1e-2, atol=1e-4 * float(change.abs().max()))
    torch.testing.assert_close(states[0, 2].flatten(0, 1), before[:4].flatten(0, 1) + (A[:first] @ change).float(), rtol=1e-3, atol=1e-3)
    text = CalibrationSet(tokens=tokens, mask=None, words=2048, record={"source": "test"})
    report = compress.run(str(tmp_path / "model"), {"name": "s", "structure": [{"program": {"budget": 0.6, "samples": 4}}]}, text, tmp_path / "out",
                          show=False, device="cpu")  # fmt: skip
    plan = report.manifest.structure[0]
    assert plan["merged"] == {names[0]: "0-2"} and plan["absent"] == [[1, ""]] and report.manifest.plain
    kept = compress.load(str(tmp_path / "out")).get_parameter(names[0])
    torch.testing.assert_close(kept.float(), weights["0-2"], rtol=1e-3, atol=1e-4)


def test_a_merge_that_saw_few_tokens_is_not_taken(tmp_path):
    """256 tokens for 128 neurons fit what they have seen and harm the rest: windows that were not solved on say so. With fewer nothing is tried."""
    save_tiny("llama", tmp_path / "model", dtype=torch.float32)
    source = Checkpoint(str(tmp_path / "model"))
    stream, judge = Stream(source, TOKENS.tokens), Stream(source, TOKENS.tokens[:4])
    whole = without(source, judge, {}, {})[None]
    weights, states, names, _ = merges(source, stream, 4, 2)
    seen = Stream(source, TOKENS.tokens[4:])
    unharmed, merged = without(source, seen, {}, {})[None], Smaller(source, edits={names[0]: lambda t: weights["0-2"]})
    seen_kl = divergences(seen, seen.tail(), unharmed, without(merged, seen, {1: ""}, {}))[None]
    unseen_kl = divergences(judge, judge.tail(), whole, states)[0, 2]
    left_out = divergences(judge, judge.tail(), whole, without(source, judge, {1: ""}, {}))[None]
    assert seen_kl < left_out < unseen_kl
    report = run(tmp_path / "model", [{"program": {"budget": 0.6, "samples": 4}}], tmp_path / "out")
    assert report.manifest.structure[0]["merged"] == {} and report.manifest.structure[0]["absent"] and not report.fallbacks
    report = run(tmp_path / "model", [{"program": {"budget": 0.6, "samples": 8}}], tmp_path / "few")
    told = "128 tokens beside the 8 windows that judge, 256 or more are needed for 128 neurons"
    assert [(f.what, f.where, f.detail) for f in report.fallbacks] == [("not merged", "model.layers.0", told)]
    with pytest.raises(CompressError, match="--strict: not merged at"):
        run(tmp_path / "model", [{"program": {"budget": 0.6, "samples": 8}}], tmp_path / "strict", strict=True)


def test_elimination_keeps_what_the_metric_misses(tmp_path):
    model = save_tiny("llama", tmp_path / "model", dtype=torch.float32)
    whole = logits(model)
    damage = lambda m: float((logits(m) - whole).square().mean())
    assert eliminate(model, damage, -1.0) == []
    assert eliminate(model, damage, 1e9) == [{"drop": {"what": "attention", "blocks": [0]}}, {"drop": {"what": "mlp", "blocks": [0]}},
                                             {"drop": {"what": "block", "blocks": [1]}}]  # fmt: skip
    assert torch.equal(logits(model), whole)
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    model.save_pretrained(tmp_path / "model")
    whole = logits(model)
    structure = eliminate(model, damage, 1e-9)
    assert structure == [{"drop": {"what": "mlp", "blocks": [1]}}]
    run(tmp_path / "model", structure, tmp_path / "out")
    assert close(logits(compress.load(str(tmp_path / "out"))), whole)
    with pytest.raises(CompressError, match=r"drop\.blocks: 7 is no block"):
        run(tmp_path / "model", [{"drop": {"blocks": [7]}}], tmp_path / "no")


def test_elimination_descends_to_heads_and_neurons(tmp_path):
    model = save_tiny("llama", tmp_path / "model", dtype=torch.float32)
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[0].mlp
    dim, width = attention.head_dim, mlp.down_proj.in_features
    per = attention.o_proj.in_features // dim // 2  # query heads of a key-value group
    attention.o_proj.weight.data[:, per * dim :] = 0
    idle = torch.randperm(width, generator=torch.Generator().manual_seed(0))[: width // 4].sort().values
    mlp.down_proj.weight.data[:, idle] = 0
    model.save_pretrained(tmp_path / "model")
    whole = logits(model)
    structure = eliminate(model, lambda m: float((logits(m) - whole).square().mean()), 1e-12)
    cut = structure[0]["width"]["cut"]
    assert len(structure) == 1 and [c.partition(" ")[0] for c in cut] == ["1.heads", "0.mlp"]
    assert numbers(cut[0].partition(" ")[2]) == list(range(per, 2 * per)) and numbers(cut[1].partition(" ")[2]) == idle.tolist()
    run(tmp_path / "model", structure, tmp_path / "out")
    assert close(logits(compress.load(str(tmp_path / "out"))), whole)
    for bad in ("3.mlp 1", "0.mlp", "0.experts 1", f"0.mlp 0-{width - 1}", f"0.mlp {width}", "1.heads 0"):
        with pytest.raises(CompressError, match=r"width\.cut: "):
            run(tmp_path / "model", [{"width": {"cut": [bad]}}], tmp_path / "no")


def test_plain_models_need_nothing_of_ours(tmp_path):
    """In a process that never imports compress."""
    expected = {}
    for name, kind, structure in (("llama", "drop", [{"drop": {"count": 1, "by": "top"}}]), ("llama", "slice", [{"slice": {"share": 0.25}}, "refit"]),
                                  ("gpt2", "width", [{"width": {"mlp": 0.25, "by": "magnitude", "across": "layer"}}]),
                                  ("mixtral", "experts", [{"drop": {"count": 1, "by": "top"}}])):  # fmt: skip
        save_tiny(name, tmp_path / name, dtype=torch.float32)
        run(tmp_path / name, structure, tmp_path / kind)
        expected[kind] = logits(compress.load(str(tmp_path / kind)))
    code = ("import sys, torch; from transformers import AutoModelForCausalLM\n"
            "for kind in sys.argv[1:]:\n"
            "    with torch.no_grad(): torch.save(AutoModelForCausalLM.from_pretrained(kind)(torch.load('ids')).logits, kind + '.logits')\n"
            "assert 'compress' not in sys.modules")  # fmt: skip
    torch.save(IDS, tmp_path / "ids")
    subprocess.run([sys.executable, "-c", code, *expected], cwd=tmp_path, check=True, capture_output=True)
    assert all(torch.equal(torch.load(tmp_path / f"{kind}.logits"), y) for kind, y in expected.items())


# ---- width


@pytest.mark.parametrize("name", [n for n in TINY])
def test_cut_is_masked(name, tmp_path):
    model = save_tiny(name, tmp_path / "model", dtype=torch.float32)
    cuts = {"mlp": {"mlp": 0.3}} | ({} if name in FIXED else {"queries": {"queries": 0.5}})
    cuts |= {} if name in (*FIXED, "falcon") else {"groups": {"groups": 0.5}}
    for kind, fields in cuts.items():
        if name == "mixtral" and kind == "mlp":
            continue
        if kind == "queries" and name in ("gpt2", "gpt_neox", "opt"):
            continue  # one query head a group
        for across in ("layer", "model") if kind == "mlp" or name in ("llama", "phi3", "falcon_40b") else ("layer",):
            out = tmp_path / f"{kind}-{across}"
            report = run(tmp_path / "model", [{"width": {**fields, "by": "magnitude", "across": across}}], out)
            plan = report.manifest.structure[0]
            loaded = compress.load(str(out))
            assert close(logits(loaded), masked(model, plan)), (kind, across)
            assert kind == "mlp" or (generates_alike(loaded) and compress.verify(str(out)).ok)
            totals = report.manifest.totals
            assert totals["bytes"] == totals["planned_bytes"] < totals["source_bytes"]
            guessed = compress.plan(str(tmp_path / "model"), {"name": "s", "structure": [{"width": {**fields, "by": "magnitude", "across": across}}]})
            assert guessed.bytes_after == totals["bytes"] and guessed.parameters == totals["parameters"]
            plain = across == "layer" and not (kind != "mlp" and name in ("gpt2", "gpt_neox", "opt", "falcon", "falcon_40b")) and name != "bloom"
            if across == "layer":
                assert report.manifest.plain == plain, (kind, across)
            if plain:
                assert KEY not in json.loads((out / "config.json").read_text())


def test_fewer_experts(tmp_path):
    for name, key in (("mixtral", "num_local_experts"), ("qwen3_moe", "num_experts")):
        model = save_tiny(name, tmp_path / name, dtype=torch.float32)
        report = run(tmp_path / name, [{"width": {"experts": 0.25}}], tmp_path / f"{name}-out")
        kept, config, state = report.manifest.structure[0]["experts"], copy.deepcopy(model.config), model.state_dict()
        setattr(config, key, 3)
        for i, keep in kept.items():
            for local in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
                state[f"model.layers.{i}.mlp.{local}"] = state[f"model.layers.{i}.mlp.{local}"][numbers(keep)]
        expected = AutoModelForCausalLM.from_config(config).eval()
        expected.load_state_dict(state)
        out = tmp_path / f"{name}-out"
        assert close(logits(AutoModelForCausalLM.from_pretrained(out).eval()), logits(expected)) and all(len(numbers(k)) == 3 for k in kept.values())
        assert report.manifest.plain and compress.verify(str(out)).ok
        whole = {f.name: f.read_bytes() for f in out.iterdir()}
        (out / "block-00000.safetensors").unlink()  # made again, and the other block read back
        run(tmp_path / name, [{"width": {"experts": 0.25}}], out)
        assert {f.name: f.read_bytes() for f in out.iterdir()} == whole
        compress.export(str(out), "dense", tmp_path / f"{name}-dense")
        assert close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-dense").eval()), logits(expected))
    terms = {"steps": 12, "batch": 4, "micro": 4, "every": 4, "warmup": 2, "held_out": 0.3, "lr": 3e-4}
    healed = compress.heal(str(tmp_path / "mixtral-out"), str(tmp_path / "mixtral"), TOKENS, tmp_path / "healed", options=terms, show=False, device="cpu")
    before, after = healed.manifest.training["healing"]
    assert after < before and healed.manifest.plain and compress.verify(str(tmp_path / "healed")).ok
    assert not close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "healed").eval()), logits(compress.load(str(tmp_path / "mixtral-out"))))
    with pytest.raises(CompressError, match="leaves 1 experts, and 2 are used"):
        run(tmp_path / "mixtral", [{"width": {"experts": 0.75}}], tmp_path / "no")


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_nested_models_share_their_first_neurons(name, tmp_path):
    model = save_tiny(name, tmp_path / "model", dtype=torch.float32)
    run(tmp_path / "model", ["nest"], tmp_path / "nested")
    nested = compress.load(str(tmp_path / "nested"))
    assert close(logits(nested), logits(model))
    compress.extract(str(tmp_path / "nested"), tmp_path / "half", width=0.5)
    run(tmp_path / "model", [{"width": {"mlp": 0.5, "by": "activation", "across": "layer"}}], tmp_path / "cut")
    assert close(logits(compress.load(str(tmp_path / "half"))), logits(compress.load(str(tmp_path / "cut"))))
    half_size = sum(p.numel() for p in compress.load(str(tmp_path / "half")).parameters())
    half = next(t for n, t in compress.load(str(tmp_path / "half")).state_dict().items() if "down_proj" in n or "mlp.c_proj" in n)
    whole = next(t for n, t in nested.state_dict().items() if "down_proj" in n or "mlp.c_proj" in n)
    assert torch.equal(half, whole[:64] if name == "gpt2" else whole[:, :64])
    if name == "phi3":
        with pytest.raises(CompressError, match="gate and up in one matrix"):
            narrowed(nested, 0.5)
    else:  # one copy in memory serves both, and they say what the extracted ones say
        small, loaded = narrowed(nested, 0.5), compress.load(str(tmp_path / "nested"), width=0.5)
        assert {p.data_ptr() for p in small.parameters()} <= {p.data_ptr() for p in nested.parameters()}
        assert {id(b) for b in small.buffers()} == {id(b) for b in nested.buffers()} and sum(p.numel() for p in small.parameters()) == half_size
        for m in (small, loaded):
            assert close(logits(m), logits(compress.load(str(tmp_path / "half")))) and generates_alike(m)
        small.save_pretrained(tmp_path / "saved")
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()), logits(small))
        assert close(logits(nested), logits(model))
    assert numbers(spans([0, 1, 2, 5, 7, 8])) == [0, 1, 2, 5, 7, 8] and spans([0, 1, 2, 5]) == "0-2 5"
    with pytest.raises(CompressError, match="the share of the MLP neurons that stays"):
        compress.extract(str(tmp_path / "nested"), tmp_path / "no", width=1.5)
    compress.extract(str(tmp_path / "half"), tmp_path / "quarter", width=0.5)  # what was cut out of it still is in order
    for unordered in ("model", "cut"):
        with pytest.raises(CompressError, match="in no order of importance"):
            compress.extract(str(tmp_path / unordered), tmp_path / "no", width=0.5)
        with pytest.raises(CompressError, match="in no order of importance"):
            compress.load(str(tmp_path / unordered), width=0.5)


# ---- channels


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi3", "mixtral"])
def test_slice_turns_and_cuts(name, tmp_path):
    model = save_tiny(name, tmp_path / "model", dtype=torch.float32)
    run(tmp_path / "model", [{"slice": {"share": 0.0}}], tmp_path / "turned")
    turned = compress.load(str(tmp_path / "turned"))
    assert close(logits(turned), logits(model), 1e-4)
    assert not torch.equal(turned.model.layers[0].self_attn.o_proj.weight, model.model.layers[0].self_attn.o_proj.weight)
    if name == "llama":
        with pytest.raises(CompressError, match="is 48 wide"):
            run(tmp_path / "model", [{"slice": {"share": 0.25}}], tmp_path / "narrow")
            compress.heal(str(tmp_path / "narrow"), str(tmp_path / "model"), TOKENS, tmp_path / "no", options={"hidden": 0.1, "batch": 4}, device="cpu")
    kl = {}
    for kind, then in {"cut": [], "refitted": ["refit"]}.items():
        report = run(tmp_path / "model", [{"slice": {"share": 0.25}}, *then], tmp_path / kind)
        loaded = compress.load(str(tmp_path / kind))
        assert loaded.config.hidden_size == 48 and generates_alike(loaded) and report.manifest.plain
        assert report.manifest.totals["bytes"] == report.manifest.totals["planned_bytes"] and compress.verify(str(tmp_path / kind)).ok
        with torch.no_grad():
            p, q = (m(TOKENS.tokens, use_cache=False).logits.log_softmax(-1) for m in (model, loaded))
        kl[kind] = float((p.exp() * (p - q)).sum(-1).mean())
    assert kl["refitted"] < kl["cut"]


def test_slicing_what_is_empty_costs_nothing(tmp_path):
    """A stream that lives in 48 of 64 directions keeps all of itself."""
    model = tiny_model("llama")
    Q = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(3)))[0][:, :48]
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ Q @ Q.T)
        for layer in model.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.copy_(Q @ Q.T @ linear.weight)
    model.save_pretrained(tmp_path)
    report = run(tmp_path, [{"slice": {"share": 0.25}}], tmp_path.with_name("sliced"))
    assert report.manifest.structure[0]["kept"] > 1 - 1e-6
    assert close(logits(compress.load(str(tmp_path.with_name("sliced")))), logits(model), 1e-4)
    for name, told in (("gpt2", "removes the mean"), ("gemma2", "a stream that can be turned")):
        save_tiny(name, tmp_path / name)
        with pytest.raises(CompressError, match=told):
            run(tmp_path / name, ["slice"], tmp_path / "no")


# ---- refit


def test_refit_is_the_least_squares_of_the_consumer(tmp_path):
    """One block is cut, in its MLP only: W_K must become W H_:K (H_KK)⁻¹."""
    model = save_tiny("llama", tmp_path, dtype=torch.float32)
    report = run(tmp_path, [{"width": {"mlp": 0.5, "by": "flap", "skip": [0]}}, {"refit": {"damp": 1e-8}}], tmp_path.with_name("ls"))
    kept = torch.tensor(numbers(report.manifest.structure[0]["mlp"]["1"]))
    seen = []
    with hooked([model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))]), torch.no_grad():
        model(TOKENS.tokens)
    x = seen[0].flatten(0, 1).double()
    W, H = model.model.layers[1].mlp.down_proj.weight.detach().double(), x.T @ x
    expected = W @ H[:, kept] @ torch.linalg.inv(H[kept][:, kept])
    got = compress.load(str(tmp_path.with_name("ls"))).model.layers[1].mlp.down_proj.weight.double()
    assert (got - expected).norm() < 0.02 * (got - W[:, kept]).norm()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "falcon", "gemma2", "phi3"])
def test_refit_comes_nearer_than_bias_than_nothing(name, tmp_path):
    model = save_tiny(name, tmp_path / "model", dtype=torch.float32)
    first = {"width": {"mlp": 0.4, "by": "flap"}}
    kl = {}
    ways = {"nothing": [], "bias": [{"refit": {"what": "bias"}}], "weights": ["refit"]} | ({"all": [{"refit": {"linears": "all"}}]} if name == "phi3" else {})
    for kind, then in ways.items():
        report = run(tmp_path / "model", [first, *then], tmp_path / kind)
        with torch.no_grad():
            p, q = (m(TOKENS.tokens, use_cache=False).logits.log_softmax(-1) for m in (model, compress.load(str(tmp_path / kind))))
        kl[kind] = float((p.exp() * (p - q)).sum(-1).mean())
        assert report.manifest.totals["bytes"] == report.manifest.totals["planned_bytes"]
    assert compress.verify(str(tmp_path / "bias")).ok  # the only one with tensors that its class has not
    assert kl["weights"] < kl["nothing"] and kl["weights"] < kl["bias"] * 1.02


def test_a_constant_neuron_costs_nothing_with_its_bias(tmp_path):
    model = tiny_model("gpt2")
    fc, proj = model.transformer.h[1].mlp.c_fc, model.transformer.h[1].mlp.c_proj
    fc.weight.data[:, 40:] = 0  # constant: gelu(bias)
    fc.bias.data[40:] = 2.0
    proj.weight.data[40:] *= 3
    model.save_pretrained(tmp_path)
    run(tmp_path, [{"width": {"mlp": 0.6875, "by": "flap", "skip": [0]}}, {"refit": {"what": "bias"}}], tmp_path.with_name("b"))
    assert close(logits(compress.load(str(tmp_path.with_name("b")))), logits(model), 1e-4)


def test_refit_behind_two_turns_of_the_stream_and_what_it_cannot_solve(tmp_path, monkeypatch):
    model = save_tiny("llama", tmp_path / "model", dtype=torch.float32)
    twice, kl = [{"slice": {"share": 0.125}}, {"slice": {"share": 0.15}}], {}
    for kind, then in {"cut": [], "refitted": ["refit"]}.items():
        report = run(tmp_path / "model", [*twice, *then], tmp_path / kind)
        with torch.no_grad():
            p, q = (m(TOKENS.tokens, use_cache=False).logits.log_softmax(-1) for m in (model, compress.load(str(tmp_path / kind))))
        kl[kind] = float((p.exp() * (p - q)).sum(-1).mean())
    assert kl["refitted"] < kl["cut"] and len(report.manifest.structure[2]["tensors"]) == 4 and not report.fallbacks
    assert compress.load(str(tmp_path / kind)).config.hidden_size == 48
    factor = Stats.factor
    with monkeypatch.context() as m:
        m.setattr(Stats, "factor", lambda self, *args: replace(factor(self, *args), failed=self.hessian.shape[0] != 64))  # o_proj reads 64, down_proj fewer
        report = run(tmp_path / "model", [{"width": {"mlp": 0.25, "by": "magnitude"}}, "refit"], tmp_path / "half")
        assert sorted(report.manifest.structure[1]["tensors"]) == [f"model.layers.{i}.self_attn.o_proj.weight" for i in (0, 1)]
        assert [(f.what, f.where) for f in report.fallbacks] == [("not refitted", f"model.layers.{i}.mlp.down_proj") for i in (0, 1)]
    with monkeypatch.context() as m, pytest.raises(CompressError, match="refit: nothing could be solved"):
        m.setattr(Stats, "factor", lambda self, *args: replace(factor(self, *args), failed=True))
        run(tmp_path / "model", [{"width": {"mlp": 0.25, "by": "magnitude"}}, "refit"], tmp_path / "none")
    few = CalibrationSet(tokens=TOKENS.tokens[:1, :4], mask=None, words=4, record={"source": "test"})  # too few for every expert to see one
    save_tiny("mixtral", tmp_path / "mixtral")
    recipe = {"name": "s", "structure": [{"width": {"neurons": 0.5, "by": "magnitude"}}, "refit"]}
    report = compress.run(str(tmp_path / "mixtral"), recipe, few, tmp_path / "few", show=False, device="cpu")
    assert any("experts" in f.where and f.detail == "0 tokens were routed to it" for f in report.fallbacks)


# ---- recipes, resume, errors


@pytest.mark.parametrize("structure", [[{"drop": {"count": 1, "by": "greedy"}}, "refit"], [{"width": {"mlp": 0.25, "groups": 0.5}}, "refit"]])
def test_killed_and_resumed_gives_the_same_bytes_and_repeating_is_free(structure, tmp_path, monkeypatch):
    save_tiny("llama", tmp_path / "model")
    steps = [{"method": "gptq", "bits": 4, "group_size": 8}]
    run(tmp_path / "model", structure, tmp_path / "whole", steps)
    assert not (tmp_path / "whole.structure").exists()
    from compress.structure import refit

    calls, advance = [], refit._put

    def dies(*args):
        calls.append(args[1])
        if len(calls) > 2:
            raise KeyboardInterrupt
        advance(*args)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(refit, "_put", dies)
        run(tmp_path / "model", structure, tmp_path / "killed", steps)
    assert (tmp_path / "killed.structure" / "plan-0.json").is_file()
    for step in (Drop, Width):
        monkeypatch.setattr(step, "measure", lambda *args: pytest.fail("measured again"))
    run(tmp_path / "model", structure, tmp_path / "killed", steps)
    files = lambda folder: {f.name: f.read_bytes() for f in folder.iterdir()}
    assert files(tmp_path / "killed") == files(tmp_path / "whole") and not (tmp_path / "killed.structure").exists()
    run(tmp_path / "model", structure, tmp_path / "whole", steps)
    shutil.rmtree(tmp_path / "whole")


def test_structure_composes_with_views_and_methods(tmp_path):
    save_tiny("llama", tmp_path / "model")
    recipe = {"name": "s", "structure": [{"width": {"mlp": 0.25}}, {"drop": {"count": 1, "by": "contribution"}}, "refit"],
              "views": [{"rotate": {"untie": True}}], "steps": [{"method": "gptq", "bits": 4, "group_size": 8}]}  # fmt: skip
    report = compress.run(str(tmp_path / "model"), recipe, TOKENS, tmp_path / "out", show=False, device="cpu")
    assert compress.verify(str(tmp_path / "out")).ok and len(report.manifest.layers) == 7 and len(report.manifest.structure) == 3
    assert generates_alike(compress.load(str(tmp_path / "out")))


def test_errors_are_one_line(tmp_path):
    for name in ("llama", "bloom", "falcon", "mixtral"):
        save_tiny(name, tmp_path / name)
    for name, structure, told in (
            ("llama", [{"drop": {"count": 2}}], "2 of 2 blocks cannot be left out"),
            ("llama", ["drop"], r"drop\.count = 0\.25 of 2 blocks comes to none"), ("llama", [{"drop": {"count": 1.5}}], r"drop\.count = 1\.5: a whole number"),
            ("llama", [{"fuse": {"count": 0.2}}], r"fuse\.count = 0\.2 of 2 blocks comes to none"), ("llama", [{"fuse": {"count": 2}}], "fuse: 2 of 2 blocks"),
            ("llama", [{"drop": {"what": "mlp", "blocks": [0]}}] * 2, "block 0 has no mlp left"),
            ("llama", [{"drop": {"what": "mlp", "count": 1, "by": "top"}}] * 2, "1 of 1 mlps cannot be left out"), ("llama", ["refit"], "nothing was left out"),
            ("bloom", [{"width": {"groups": 0.5}}], "ALiBi gives every head"), ("falcon", [{"width": {"groups": 0.5}}], "share one key-value group"),
            ("mixtral", [{"width": {"mlp": 0.5}}], "no block of mixtral has a dense MLP"), ("llama", [{"width": {"experts": 0.5}}], "no routed experts"),
            ("llama", [{"width": {"mlp": 1.5}}], "a share to cut"), ("llama", ["dorp"], "unknown structural step 'dorp', did you mean drop"),
            ("llama", [{"drop": {"by": "contribution", "what": "mlp", "count": 1}}], "looks at whole blocks"),
            ("bloom", [{"drop": {"count": 1, "what": "mlp", "by": "top"}}], "adds to the stream itself"),
            ("llama", [{"loraprune": {"steps": 0}}], "loraprune: steps 0 is below 1"), ("llama", [{"loraprune": {"every": 0}}], "every 0 is below 1"),
            ("llama", [{"loraprune": {"batch": 0}}], "batch 0 is below 1"), ("llama", [{"loraprune": {"skip": [-3]}}], r"skip: -3 is no block of 0 … 1"),
            ("llama", [{"fuse": {"window": 1}}], "fuse: window 1 is below 2"), ("llama", [{"fuse": {"rank": 0}}], "rank 0 is below 1"),
            ("llama", [{"width": {"mlp": 0.2, "multiple": 0}}], "multiple 0 is below 1"), ("llama", [{"slice": {"multiple": 0}}], "multiple 0 is below 1"),
            ("llama", [{"program": {"span": 0}}], "span 0 is below 1"), ("llama", [{"program": {"budget": 0}}], "the share of the cost that may stay"),
            ("llama", [{"width": {"mlp": 0.2, "skip": [9]}}], r"width\.skip: 9 is no block of 0 … 1"), ("llama", [{"drop": {"count": -1}}], "is below 0"),
            ("llama", [], "steps: required, at least one")):  # fmt: skip
        with pytest.raises(CompressError, match=told):
            run(tmp_path / name, structure, tmp_path / "out", overwrite=True)
    recipe = load("drop-25-w4").with_options(["drop.count=1", "gptq.bits=3"])
    assert recipe.structural()[0].count == 1 and recipe.steps[0].build().bits == 3 and Refit().damp > 0
    assert Conv1D is not None


def test_steps_of_a_kind_keep_their_files_apart(tmp_path):
    scratch = Scratch(tmp_path / "out", {"run": 1})
    a, b = (scratch.of(k).tensors("fuse-0", lambda k=k: {"W": torch.full((2,), float(k))})["W"] for k in (0, 1))
    assert a.tolist() == [0, 0] and b.tolist() == [1, 1] and torch.equal(scratch.of(0).read("fuse-0", "W"), a)
    scratch.remove()
    assert not scratch.folder.exists()
