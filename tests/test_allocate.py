"""pytest tests/test_allocate.py: the knapsack against brute force, the judge against evaluation, `auto` from budget to artifact, `diagnose`."""

import itertools
import json

import pytest
import torch
import yaml
from tiny import save_tiny, tiny_model

import compress
from compress import allocate, latency, omit, preflight, recipe
from compress.calibration.data import CalibrationSet
from compress.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.eval import speed
from compress.eval.compare import compare, logits_of
from compress.eval.outliers import Outliers
from compress.export import EXPORTS
from compress.judge import Judge
from compress.omit import Node, Omit, Option
from compress.stream import Stream
from compress.structure.smaller import numbers
from compress.structure.width import Width

WATCH = lambda todo, what: iter(todo)
MENU = [{"method": "gptq", "bits": b, "group_size": 32} for b in (2, 3, 4)]


def brute_force(nbytes, damage, budget):
    fits = [p for p in itertools.product(*(range(len(b)) for b in nbytes)) if sum(b[k] for b, k in zip(nbytes, p, strict=True)) <= budget]
    return min((sum(d[k] for d, k in zip(damage, p, strict=True)) for p in fits), default=None)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 256, (6, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def text(tokens):
    return CalibrationSet(tokens=tokens, mask=None, record={"source": "test", "samples": 6, "seqlen": 32}, words=1, fallbacks=[])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_tiny("llama", folder)
    return str(folder)


# ---- the knapsack


@pytest.mark.parametrize("seed", range(5))
def test_the_knapsack_is_brute_force_on_three_layers_at_every_budget(seed):
    g = torch.Generator().manual_seed(seed)
    nbytes = [torch.randint(1, 40, (4,), generator=g).tolist() for _ in range(3)]
    damage = [(torch.randn(4, generator=g) + 1).tolist() for _ in range(3)]  # some below 0: noise of a measurement
    front = allocate.knapsack(nbytes, damage)
    for budget in range(sum(map(min, nbytes)), sum(map(max, nbytes)) + 1):
        at = front.within(budget)
        picks = front.picks[at].tolist()
        assert sum(b[k] for b, k in zip(nbytes, picks, strict=True)) == int(front.cost[at]) <= budget
        assert sum(d[k] for d, k in zip(damage, picks, strict=True)) == pytest.approx(float(front.damage[at]))
        assert float(front.damage[at]) == pytest.approx(brute_force(nbytes, damage, budget))
    with pytest.raises(CompressError, match="smallest allocation"):
        front.within(sum(map(min, nbytes)) - 1)


def test_a_thinned_front_stays_within_every_budget_and_near_the_exact_one(monkeypatch):
    g = torch.Generator().manual_seed(0)
    nbytes = [torch.randint(1000, 90000, (4,), generator=g).tolist() for _ in range(12)]
    damage = [(1e6 / torch.tensor(b)).tolist() for b in nbytes]
    exact = allocate.knapsack(nbytes, damage)
    monkeypatch.setattr("compress.knapsack.SUMS", 200)
    thin = allocate.knapsack(nbytes, damage)
    assert len(thin.cost) <= 200 < len(exact.cost)
    for budget in range(int(exact.cost[0]), int(exact.cost[-1]), 20000):
        a, b = thin.within(budget), exact.within(budget)
        assert int(thin.cost[a]) == sum(x[k] for x, k in zip(nbytes, thin.picks[a].tolist(), strict=True)) <= budget
        assert float(exact.damage[b]) <= float(thin.damage[a]) <= 1.05 * float(exact.damage[b])


# ---- the judge


def test_the_judge_is_evaluation_and_leaves_the_model_as_it_was(llama, tokens):
    source, model = Checkpoint(llama, dtype=torch.float32), tiny_model("llama", dtype=torch.bfloat16).float()
    judge = Judge(source, tokens, batch=4)
    g = torch.Generator().manual_seed(0)
    paths = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    weights = {p: model.get_submodule(p).weight.detach() + 0.05 * torch.randn(model.get_submodule(p).weight.shape, generator=g) for p in paths}
    assert judge({}) == pytest.approx(0, abs=1e-9)
    whole = judge(weights)
    assert judge({}) == pytest.approx(0, abs=1e-9)
    judge.put({paths[0]: weights[paths[0]]})
    assert judge({paths[1]: weights[paths[1]]}) == pytest.approx(whole, rel=1e-4)
    judge.put({paths[1]: weights[paths[1]]})
    assert judge({}) == pytest.approx(whole, rel=1e-4) and judge(dict.fromkeys(paths)) == pytest.approx(0, abs=1e-9)
    original, data = list(logits_of(model, text_of(tokens))), text_of(tokens)
    for p in paths:
        model.get_submodule(p).weight.data = weights[p]
    every = sum(float((p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum()) for p, q in zip(original, logits_of(model, data), strict=True))
    assert whole == pytest.approx(every / tokens.numel(), rel=1e-3)  # the last position of a window counts here: it has no target, but a distribution
    assert compare(logits_of(model, data), original, data)["kl"]["mean"] == pytest.approx(whole, rel=0.2)


def text_of(tokens):
    return CalibrationSet(tokens=tokens, mask=None, record={}, words=1, fallbacks=[])


def test_padding_does_not_count(llama, tokens):
    source, mask = Checkpoint(llama, dtype=torch.float32), torch.arange(32) < torch.tensor([[32], [20], [7], [32], [32], [11]])
    W = {"model.layers.1.mlp.down_proj": torch.zeros(64, 128)}
    kl = Judge(source, tokens, mask, batch=4)(W)
    other = torch.where(mask, tokens, 7)
    assert Judge(source, other, mask, batch=4)(W) == pytest.approx(kl, rel=1e-4) != Judge(source, tokens, batch=4)(W)


# ---- the search


@pytest.fixture(scope="module")
def surveyed(llama, tokens, tmp_path_factory):
    source, folder = Checkpoint(llama, dtype=torch.float32), tmp_path_factory.mktemp("survey")
    menu = allocate.menu_for("ours", MENU)
    groups = allocate.survey(source, menu, Stream(source, tokens), folder, WATCH)
    judge = Judge(source, tokens, batch=8)
    allocate.probe(groups, judge, folder / "kl.json", WATCH)
    return source, menu, folder, groups, judge


def test_three_layers_end_where_brute_force_on_the_true_kl_does(surveyed, tokens):
    source, _, _, groups, _ = surveyed
    three = [g for g in groups if g.name in ("model.layers.0.self_attn.v_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj")]
    judge = Judge(source, tokens, batch=8)
    size = sum(g.choices[-1].nbytes for g in three)
    for budget in (size * 3.6 // 16, size * 4.6 // 16):
        fits = [p for p in itertools.product(range(4), repeat=3) if sum(g.choices[k].nbytes for g, k in zip(three, p, strict=True)) <= budget]
        best = min(judge(allocate.weights_of(three, p)) for p in fits)
        front = allocate.front_of(three)
        picks = front.picks[front.within(int(budget))].tolist()
        judge.put(allocate.weights_of(three, picks))
        picks, kl = allocate.improve(three, picks, int(budget), judge, rounds=2, tries=20, watch=WATCH)
        assert tuple(picks) in fits and kl == pytest.approx(best, rel=1e-4)
        judge.put({path: None for g in three for path in g.linears})


def test_damages_fall_with_bytes_and_follow_what_was_measured(surveyed):
    *_, groups, judge = surveyed
    for g in groups:
        assert [c.nbytes for c in g.choices] == sorted(c.nbytes for c in g.choices) and g.choices[-1].damage == 0
        assert all(a.damage >= b.damage for a, b in itertools.pairwise(g.choices)) and g.hull()[0] == 0 and g.hull()[-1] == len(g.choices) - 1
        assert judge(g.weights(2)) == pytest.approx(g.choices[2].damage, rel=0.5)  # 4 bits were not measured
    assert judge(groups[0].weights(3)) == pytest.approx(0, abs=1e-9)


def test_a_second_survey_reads_what_the_first_one_wrote(surveyed, tokens, monkeypatch):
    source, menu, folder, groups, _ = surveyed
    monkeypatch.setattr(allocate, "get_weight", None)
    again = allocate.survey(source, menu, Stream(source, tokens), folder, WATCH)
    allocate.probe(again, None, folder / "kl.json", WATCH)
    assert [(g.name, [(c.nbytes, c.error, c.damage) for c in g.choices]) for g in again] == [
        (g.name, [(c.nbytes, c.error, c.damage) for c in g.choices]) for g in groups]  # fmt: skip


def test_fused_linears_and_experts_share_a_group():
    paths = ["b.0.attn.q_proj", "b.0.attn.k_proj", "b.0.attn.v_proj", "b.0.attn.o_proj", "b.0.mlp.experts.0.gate_up_proj", "b.0.mlp.experts.1.gate_up_proj",
             "b.0.mlp.experts.0.down_proj", "b.0.mlp.experts.1.down_proj", "b.0.mlp.gate_proj", "b.0.mlp.up_proj"]  # fmt: skip
    assert [len(v) for v in allocate.grouped(paths, True).values()] == [3, 1, 4, 2]
    assert [len(v) for v in allocate.grouped(paths, False).values()] == [1, 1, 1, 1, 2, 2, 1, 1]


# ---- auto


def test_auto_keeps_the_budget_and_its_recipe_is_an_ordinary_one(llama, text, tmp_path):
    a = compress.auto(llama, text, tmp_path / "out", bits=3.9, menu=MENU, dtype="float32", tries=4, show=False)
    assert a.bits <= 3.9 < a.bits + 0.3 and a.nbytes <= a.budget and a.kl <= a.before + 1e-9 and a.artifact_kl > 0
    totals = a.report.manifest.totals
    assert totals["linear_bytes"] == a.nbytes and totals["linear_bits"] == pytest.approx(a.bits)
    written = json.loads((tmp_path / "out.plan.json").read_text())
    assert {name: r.options["bits"] for name, r in a.report.manifest.layers.items()} == {name: s["bits"] for name, s in written["layers"].items()}
    assert compress.plan(llama, str(tmp_path / "out.recipe.yaml")).linear_bits == pytest.approx(a.bits)
    assert recipe.load(yaml.safe_load((tmp_path / "out.recipe.yaml").read_text())).identity() == a.recipe.identity()
    assert (tmp_path / "out.pareto.png").read_bytes()[:4] == b"\x89PNG"
    again = compress.auto(llama, text, tmp_path / "other", bits=3.9, menu=MENU, dtype="float32", tries=4, plan_only=True, show=False)
    assert again.layers == a.layers and again.trials < a.trials + 1 and not (tmp_path / "other").exists()
    assert len(list(tmp_path.glob("sensitivities-*"))) == 1
    more = compress.auto(llama, text, tmp_path / "more", bits=4.4, menu=MENU, dtype="float32", tries=4, plan_only=True, show=False)
    assert more.kl < a.kl and more.bits > a.bits


def test_a_size_is_that_of_the_whole_artifact(llama, text, tmp_path):
    size = 100_000
    a = compress.auto(llama, text, tmp_path / "out", size=size, menu=MENU, dtype="float32", rounds=0, tries=0, show=False)
    assert 0.95 * size < a.report.manifest.totals["bytes"] <= size


@pytest.mark.parametrize("consumer", ["vllm", "gptq", "awq", "gguf"])
def test_what_a_consumer_is_to_load_it_loads(consumer, llama, text, tmp_path):
    menu = [s | {"group_size": 32} for s in allocate.CONSUMERS[consumer].steps if s["bits"] in (4, 8)]
    a = compress.auto(llama, text, tmp_path / "out", bits=7, consumer=consumer, menu=menu, dtype="float32", rounds=0, tries=0, show=False)
    assert not compress.loads_in(str(tmp_path / "out"))[allocate.CONSUMERS[consumer].export]
    assert len({tuple(sorted(s.items())) for s in a.layers.values() if s}) == 1 or not allocate.CONSUMERS[consumer].uniform


@pytest.mark.parametrize(("options", "told"), [
    ({}, "give a budget"), ({"bits": 3, "size": "1GB"}, "one of the three"), ({"latency": "fast"}, "give a share"),
    ({"bits": 1.5}, r"smallest choices take 2\.\d+ bits"),
    ({"size": "many"}, "give bytes like 4GB"), ({"bits": 3, "consumer": "vlm"}, "did you mean vllm"), ({"bits": 3, "menu": "mlorg"}, "neither one of"),
    ({"bits": 3, "menu": [{"bits": 4}]}, "a menu is a list"), ({"bits": 3, "menu": [{"method": "gptq", "bitz": 4}]}, "did you mean bits"),
    ({"bits": 17}, "nothing to compress")])  # fmt: skip
def test_what_is_wrong_is_told(options, told, llama, text, tmp_path):
    with pytest.raises(CompressError, match=told):
        compress.auto(llama, text, tmp_path / "out", **({"menu": MENU} | options), dtype="float32", rounds=0, tries=0, show=False)
    assert not (tmp_path / "out").exists()


def test_sizes_are_read():
    assert [allocate.parse_size(s) for s in ("4GB", "1.5 MiB", "700m", 12, "3K")] == [4 * 10**9, 1572864, 7 * 10**8, 12, 3000]


# ---- what may be left out


def test_the_tree_is_brute_force_on_three_blocks_at_every_budget():
    g = torch.Generator().manual_seed(0)
    number = lambda n: torch.randint(1, 30, (n,), generator=g).tolist()
    groups, blocks, plans = [], [], []  # plans: of every block all (cost, damage)
    for i in range(3):
        children, parts = [], []
        for kind in ("attention", "mlp"):
            damages = (torch.rand(2, generator=g) * 0.1).tolist()
            groups.append(allocate.Group(f"{i}.{kind}", (), [allocate.Choice({}, "", 1, 0.0, {}, 0, d) for d in damages], None))
            options = [Option("whole", [[(c, 0) for c in number(2)]], *number(1))]
            options += [Option("narrow", [[(c // 2 + 1, 0) for c, _ in options[0].costs[0]]], *number(1), damage=0.05)] * (kind == "mlp")
            options.append(Option("absent", None, damage=float(torch.rand(1, generator=g)) * 0.3))
            children.append(Node(f"{i}.{kind}", kind, [len(groups) - 1], options, [f"{i}.{kind}.writer"]))
            parts.append([(o.base + c, o.damage + d) for o in options for (c, _), d in (zip(o.costs[0], damages, strict=True) if o.costs else [((0, 0), 0.0)])])
        whole, absent = Option("whole", [], *number(1)), Option("absent", None, damage=0.4)
        blocks.append(Node(f"{i}", "block", [], [whole, absent], [], children))
        plans.append([(0, 0.4)] + [(whole.base + a + b, x + y) for (a, x), (b, y) in itertools.product(*parts)])
    tree = Omit(blocks, 8)
    front = tree.front(groups)
    every = [(sum(c for c, _ in p), sum(d for _, d in p)) for p in itertools.product(*plans)]
    assert len(every) == (1 + 3 * 5) ** 3
    every = every[1:]  # the first has no block left
    for budget in range(min(c for c, _ in every), max(c for c, _ in every) + 1, 3):
        at = front.within(budget)
        found = tree.solution(groups, front.picks[at].tolist())
        assert float(front.damage[at]) == pytest.approx(min(d for c, d in every if c <= budget))
        assert found.cost() == int(front.cost[at]) <= budget
        assert found.damage + sum(x.choices[k].damage for x, k in zip(found.groups, found.picks, strict=True)) == pytest.approx(float(front.damage[at]))
        for node in found.taken:
            other = tree.front(groups, frozenset([node]))
            assert node not in tree.solution(groups, other.picks[-1].tolist()).taken


def test_an_mlp_is_cut_as_the_recipes_step_cuts_it_and_solved_by_least_squares(llama, tokens, tmp_path):
    source = Checkpoint(llama, dtype=torch.float32)
    enter = lambda model, windows: Stream(model, tokens)
    plan = Width(mlp=0.25, by="activation", across="layer", multiple=8).measure(source, enter)
    stream, path = Stream(source, tokens), "mlp.down_proj"
    block = source.load_block(0)
    seen = []
    block.get_submodule(path).register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().flatten(0, 1)))
    H, W = stream.collect(block, {"": path})[""].hessian, block.get_submodule(path).weight
    keep = omit.kept(W, H, 0.25, 8)
    assert keep.tolist() == numbers(plan["mlp"]["0"]) and len(keep) == 96
    found, X = omit.refitted(W, H, keep), torch.cat(seen).double()
    best = torch.linalg.lstsq(X[:, keep], X @ W.double().T).solution.T
    off = lambda V: float((X[:, keep] @ V.T - X @ W.double().T).square().sum())
    assert off(best) <= off(found["weight"][:, keep].double()) < 1.05 * off(best) < 0.9 * off(W[:, keep].double())
    gone = [j for j in range(128) if j not in keep.tolist()]
    assert not found["weight"][:, gone].any() and torch.allclose(found["move"][:, keep], found["weight"][:, keep] - W[:, keep], atol=1e-6)


@pytest.fixture
def steady(monkeypatch):
    """A machine on which everything takes as long as it has weights; nothing else is timed."""
    def race(runs, device, seconds=0.0):
        return {name: run.args[1].nbytes() / 100 if len(run.args) > 2 else 1000.0 if name else 2000.0 for name, run in runs.items()}

    monkeypatch.setattr("compress.kernels.tune.race", race)
    monkeypatch.setattr(speed, "measure", lambda path, device: {"decode_tokens_per_second": 1.0})


def test_a_budget_of_time_leaves_out_what_is_least_missed(steady, llama, text, tmp_path):
    a = compress.auto(llama, text, tmp_path / "out", latency="0.6x", menu=MENU, dtype="float32", tries=2, show=False)
    assert a.latency <= 0.6 and a.cost <= a.budget and a.omitted and a.kl <= a.before + 1e-9 and 0 < a.artifact_kl < 3 * a.kl + 1
    assert compress.verify(str(tmp_path / "out")).ok and a.speed == {"original": 1.0, "artifact": 1.0}
    assert a.recipe.structure[-1] == "refit" and recipe.load(str(tmp_path / "out.recipe.yaml")).identity() == a.recipe.identity()
    left = {name for name, step in a.layers.items() if step}
    assert len(a.report.manifest.layers) == len(left) and {g["name"] for g in a.groups if g["format"] == "left out"}.isdisjoint(left)
    whole = compress.auto(llama, text, tmp_path / "whole", latency="0.9x", omit=False, menu=MENU, dtype="float32", tries=2, plan_only=True, show=False)
    assert not whole.omitted and whole.latency <= 0.9 and not whole.recipe.structure
    with pytest.raises(CompressError, match="the fastest choices take"):
        compress.auto(llama, text, tmp_path / "no", latency="0.01x", omit=False, menu=MENU, dtype="float32", plan_only=True, show=False)


def test_for_another_program_only_whole_blocks_go(steady, llama, text, tmp_path):
    menu = [{"method": "gptq", "bits": 4, "group_size": 32, "sym": True}]
    a = compress.auto(llama, text, tmp_path / "out", latency="0.6x", consumer="vllm", menu=menu, dtype="float32", tries=0, show=False)
    assert [(o["what"], o["kind"]) for o in a.omitted] == [("absent", "block")]
    assert not compress.loads_in(str(tmp_path / "out"))["compressed-tensors"] and compress.load(str(tmp_path / "out")).config.num_hidden_layers == 1


def test_a_latency_is_read():
    assert [latency.parse_latency(t) for t in ("0.5x", 0.25, "8ms")] == [(0.5, True), (0.25, True), (8.0, False)]
    for bad in ("2x", "fast", "-1ms", ""):
        with pytest.raises(CompressError, match="give a share"):
            latency.parse_latency(bad)


def test_what_was_timed_is_not_timed_again(tmp_path, monkeypatch):
    clock = latency.Clock(tmp_path / "ns.json", torch.bfloat16, "cpu")
    first = clock.dense((64, 96))
    monkeypatch.setattr("compress.kernels.tune.race", None)
    assert first > 0 and latency.Clock(tmp_path / "ns.json", torch.bfloat16, "cpu").dense((64, 96)) == first


# ---- plan: consumers


@pytest.mark.parametrize(("name", "settings"), [("llama", {"group_size": 32}), ("llama", {"group_size": 32, "sym": True}), ("gpt2", {"group_size": 32}),
                                                ("qwen3_moe", {"group_size": 32, "sym": True}), ("llama", {"bits": 3, "group_size": -1})])  # fmt: skip
def test_planned_consumers_are_those_that_take_the_artifact(name, settings, tmp_path):
    save_tiny(name, tmp_path / "model")
    options = {f"rtn.{k}": v for k, v in settings.items()}
    planned = compress.plan(str(tmp_path / "model"), "w4-rtn", settings=options).consumers
    compress.run(str(tmp_path / "model"), "w4-rtn", output=tmp_path / "out", settings=options, show=False)
    assert {to: bool(why) for to, why in planned.items()} == {to: bool(why) for to, why in compress.loads_in(str(tmp_path / "out")).items()}
    assert set(planned) == set(EXPORTS)


# ---- diagnose


def test_an_expert_without_tokens_has_no_outliers():
    m = Outliers()
    m.add(torch.zeros(0, 64))
    assert m.figures()["kurtosis"] == m.figures()["max_norm"] == 0 and len(m.channel) == 64


def test_diagnose_finds_a_planted_channel_and_a_sensitive_layer(text, tmp_path):
    model = tiny_model("llama", dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[5] = 200
        model.model.layers[1].self_attn.q_proj.weight[:, 5] /= 200
        model.model.layers[1].self_attn.k_proj.weight[:, 5] /= 200
        model.model.layers[1].self_attn.v_proj.weight[:, 5] /= 200
    model.save_pretrained(tmp_path)
    d = compress.diagnose(str(tmp_path), text, dtype="float32", show=False)
    loud = max(d.sites, key=lambda s: s.loudest)
    assert loud.name == "model.layers.1.attn.input" and loud.loudest > 50 and any("model.layers.1.attn.input" in line for line in d.advice)
    assert d.total[2] > d.total[3] > d.total[4] > 0 and len(d.sensitivity) == 2 * 4 and len(d.blocks) == 2 and all(0 < b.influence < 1 for b in d.blocks)
    json.dumps(d.to_json())
    assert preflight.linears(Checkpoint(str(tmp_path)))  # nothing was written into the model's folder


# ---- the command line


def test_auto_and_diagnose_on_the_command_line(llama, tmp_path, capsys):
    from test_cli import main

    (tmp_path / "text.txt").write_text("".join(chr(65 + i * i % 26) for i in range(4000)))
    (tmp_path / "menu.yaml").write_text(yaml.safe_dump(MENU))
    common = ("-c", f"file:{tmp_path / 'text.txt'}", "--samples", 4, "--seqlen", 32, "--json", tmp_path / "x.json")
    assert main("auto", llama, "--bits", 3.5, "-o", tmp_path / "out", "--menu", tmp_path / "menu.yaml", "--tries", 2, *common) == 0
    assert json.loads((tmp_path / "x.json").read_text())["report"]["totals"]["linear_bits"] <= 3.5 and "after the search" in capsys.readouterr().out
    assert main("diagnose", llama, *common) == 0
    assert {"sites", "blocks", "sensitivity", "advice"} <= json.loads((tmp_path / "x.json").read_text()).keys()
    assert main("auto", llama, "-o", tmp_path / "no", *common) == 1 and "give a budget" in capsys.readouterr().err
