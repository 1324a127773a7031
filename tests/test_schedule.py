"""pytest tests/test_schedule.py — what each layer gives up: the budget holds, prices decide, OWL, energy, what is refused."""

import itertools

import pytest
import torch

import compress
from compress.calibration.statistics import Stats
from compress.errors import CompressError
from compress.precision import chosen, ladder
from compress.recipe import Recipe, Step, load
from compress.schedule import STEPS, Layer, Schedule, _shares


def run(checkpoint, out, recipe, **settings):
    return compress.run(str(checkpoint), recipe, f"file:{checkpoint}/text.txt", out, settings=settings, samples=8, seqlen=64, show=False, device="cpu")


def layer(name, size, prices, outliers=0.0):
    return Layer((name,), Step(method="admm"), lambda s: size * (1 - s), 0.5, torch.as_tensor(prices, dtype=torch.float64), outliers, 0.0)


def test_one_price_for_all_and_the_budget_is_spent():
    line = torch.linspace(0, 1, STEPS)
    a, b, c = layer("a", 1000, line), layer("b", 3000, line + 0.5), layer("c", 2000, line - 5)
    shares = _shares(Schedule(spread=0.2), [a, b, c])
    assert sum(x.cost(s) for x, s in shares.items()) == pytest.approx(0.5 * 6000, rel=1e-6)
    assert shares[c] == pytest.approx(0.7) and shares[a] > shares[b]  # what costs least goes first, but not beyond the spread
    assert shares[a] - shares[b] == pytest.approx(0.4 * 0.5)  # and the others end at the same price


def test_outliers_keep_more_as_owl_has_it():
    flat = [0.0] * STEPS
    layers = [layer("a", 100, flat, 0.01), layer("b", 100, flat, 0.02), layer("c", 100, flat, 0.06)]
    shares = list(_shares(Schedule(by="outliers", spread=0.08), layers).values())
    assert shares == pytest.approx([0.5 + 0.04 * 2 / 3 * 2, 0.5 + 0.08 / 3, 0.5 - 0.08], abs=1e-6) and sum(shares) == pytest.approx(1.5)


@pytest.mark.parametrize("by", ["gradient", "error", "outliers"])
@pytest.mark.parametrize("recipe", ["sparse-50", "svd-20"])
def test_layers_differ_and_all_together_cost_what_was_planned(recipe, by, checkpoint, tmp_path):
    report = run(checkpoint, tmp_path / "a", recipe, **{"schedule.by": by})
    option = "sparsity" if recipe == "sparse-50" else "ratio"
    shares = [r.options[option] for r in report.manifest.layers.values()]
    assert max(shares) - min(shares) > 0.01 and max(abs(s - (0.5 if option == "sparsity" else 0.2)) for s in shares) <= 0.2 + 1e-9
    plan = compress.plan(str(checkpoint), recipe, settings={"schedule.by": by})
    assert 0.99 * plan.bytes_after <= report.manifest.totals["bytes"] <= plan.bytes_after
    assert {f.what for f in report.fallbacks} <= {"inputs never active"}  # neurons of which no weight is left
    assert compress.verify(str(tmp_path / "a")).ok
    assert run(checkpoint, tmp_path / "b", recipe, **{"schedule.by": by}).manifest == report.manifest


def test_without_spread_a_schedule_changes_nothing(checkpoint, tmp_path):
    runs = [run(checkpoint, tmp_path / out, "sparse-50-wanda", **settings).manifest for out, settings in (("a", {}), ("b", {"schedule.spread": 0.0}))]
    assert runs[0].tensors == runs[1].tensors


def test_rank_by_energy(checkpoint, tmp_path):
    recipe = Recipe(name="energy", steps=(Step(method="svd"),), schedule=Schedule(energy=0.8))
    assert any("energy" in w for w in compress.plan(str(checkpoint), recipe).warnings)
    report = run(checkpoint, tmp_path / "a", recipe)
    assert len(report.manifest.layers) == 14 and all(r.error < 0.25 for r in report.manifest.layers.values())
    assert compress.verify(str(tmp_path / "a")).ok
    dense = {f.where for f in report.fallbacks if f.what == "kept dense"}
    assert dense == {name for name, r in report.manifest.layers.items() if r.describe == "bfloat16"} and len(dense) < 14


def test_what_a_schedule_cannot_set_is_refused(checkpoint, tmp_path):
    with pytest.raises(CompressError, match="a pattern or a rank is the same in every layer"):
        run(checkpoint, tmp_path / "a", "sparse-2of4", **{"schedule.by": "error"})
    with pytest.raises(CompressError, match="nf has neither sparsity, ratio nor whole bits"):
        run(checkpoint, tmp_path / "b", "w4-nf4", **{"schedule.by": "error"})
    with pytest.raises(CompressError, match=r"spread 2\.0"):
        load("sparse-50").with_options(["schedule.spread=2.0"])


@pytest.mark.parametrize("by", ["gradient", "error"])
def test_bits_go_where_they_count_for_the_same_bytes(checkpoint, tmp_path, by):
    settings = {"gptq.group_size": 16, "gptq.bits": 3}
    report = run(checkpoint, tmp_path / "a", "w3-balanced", **settings, **{"schedule.by": by})
    layers = {name: (r.options["bits"], r.options["group_size"]) for name, r in report.manifest.layers.items()}
    assert len(set(layers.values())) > 1 and {b for b, _ in layers.values()} <= {2, 3, 4, 5} and {g for _, g in layers.values()} <= {16, 32}
    for parts in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        for i in range(2):
            assert len({layers[f"model.layers.{i}.{p}"] for p in parts}) == 1
    uniform = run(checkpoint, tmp_path / "b", "w3-balanced", **settings)
    assert 0.95 * uniform.manifest.totals["bytes"] <= report.manifest.totals["bytes"] <= uniform.manifest.totals["bytes"]
    assert compress.verify(str(tmp_path / "a")).ok
    assert run(checkpoint, tmp_path / "c", "w3-balanced", **settings, **{"schedule.by": by}).manifest == report.manifest
    same = run(checkpoint, tmp_path / "d", "w3-balanced", **settings, **{"schedule.by": by, "schedule.bits": 0}).manifest
    assert same.tensors == uniform.manifest.tensors


def test_every_group_takes_the_choice_that_is_best_for_all(checkpoint):
    steps = Step(method="gptq", bits=3, group_size=32), Step(method="gptq", bits=4, group_size=32)
    H, make = Stats(torch.eye(64)), lambda seed, loud: [loud * torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))]
    ladders = [ladder((f"l{k}",), steps[k % 2], 1, make(k, 4.0**k), torch.bfloat16, H, [torch.ones(8, 1)]) for k in range(3)]
    budget = sum(x.nbytes[0] for x in ladders)
    options = itertools.product(*(range(len(x.choices)) for x in ladders))
    total = lambda picks, field: sum(getattr(x, field)[k] for x, k in zip(ladders, picks, strict=True))
    best = min((p for p in options if total(p, "nbytes") <= budget), key=lambda p: total(p, "damage"))
    wanted = [tuple(x.choices[k].values()) for x, k in zip(ladders, best, strict=True)]
    assert [(s.options()["bits"], s.options()["group_size"]) for s in chosen(ladders)] == wanted
    assert total(best, "damage") < 0.9 * total((0, 0, 0), "damage")
