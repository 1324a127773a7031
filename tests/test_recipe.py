"""Run: pytest tests/test_recipe.py. Recipes: those that ship, how a step is chosen, --set, and what is refused."""

import pytest
import yaml

from compress import CompressError, Recipe, Step
from compress.methods import METHODS
from compress.methods.gptq import GPTQ
from compress.methods.rtn import RTN
from compress.recipe import RECIPES, load, names, nearest

SHIPPED = sorted(RECIPES.glob("*.yaml"), key=lambda f: f.stem)
Q, DOWN, ROUTER = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.0.mlp.router"
MIXED = """
name: mixed
description: the MLP at 3 bits, everything else rounded
steps:
  - {method: gptq, match: ["*.mlp.down_proj", "*.mlp.up_proj"], bits: 3, group_size: 64}
  - {method: gptq, match: "*.mlp.*", bits: 2, sym: full}
  - {method: rtn, bits: 8}
ignore: ["*.router"]
true_sequential: false
"""


def mixed() -> Recipe:
    return load(yaml.safe_load(MIXED))


# ---- what ships


@pytest.mark.parametrize("file", SHIPPED, ids=lambda f: f.stem)
def test_every_shipped_recipe(file):
    recipe = load(file.stem)
    data = yaml.safe_load(file.read_text())
    assert recipe.name == data["name"] == file.stem and recipe == load(file) == load(data)
    assert 20 < len(recipe.description) < 120 and len(file.read_text().splitlines()) <= 15
    for step in recipe.steps:
        assert isinstance(step.build(), METHODS[step.method])
    assert recipe.structure or recipe.step_for(Q) is not None


def test_names_are_the_files():
    assert names() == [f.stem for f in SHIPPED] and {"w4-rtn", "w4-gptq"} <= set(names())


# ---- which step


def test_the_first_step_that_matches_wins():
    recipe = mixed()
    assert recipe.step_for(DOWN).build() == GPTQ(bits=3, group_size=64)
    assert recipe.step_for("model.layers.0.mlp.gate_proj").build() == GPTQ(bits=2, sym="full")
    assert recipe.step_for(Q).build() == RTN(bits=8)


def test_ignore_goes_before_every_step():
    assert mixed().step_for(ROUTER) is None
    assert load({"name": "x", "steps": [{"method": "rtn"}], "ignore": ["*"]}).step_for(Q) is None


def test_a_linear_that_no_step_matches_stays():
    recipe = load({"name": "x", "steps": [{"method": "rtn", "match": ["*.down_proj", "*.up_proj"]}]})
    assert recipe.step_for(DOWN) is not None and recipe.step_for(Q) is None


def test_patterns_are_case_sensitive_globs_of_the_whole_path():
    step = lambda *patterns: Step(method="rtn", match=list(patterns))
    assert step("model.layers.[01].*").matches(Q) and step("*.q_pro?").matches(Q) and step(Q).matches(Q)
    assert not step("q_proj").matches(Q) and not step("*.Q_PROJ").matches(Q) and not step().matches(Q)


# ---- yaml, dict and Python are the same


def test_a_file_a_dict_and_python_give_the_same_recipe(tmp_path):
    (tmp_path / "mine.yaml").write_text(MIXED)
    python = Recipe(name="mixed", description="the MLP at 3 bits, everything else rounded", steps=(
        Step(method="gptq", match=["*.mlp.down_proj", "*.mlp.up_proj"], bits=3, group_size=64),
        Step(method="gptq", match="*.mlp.*", bits=2, sym="full"),
        Step(method="rtn", bits=8)), ignore=("*.router",), true_sequential=False)  # fmt: skip
    assert load(tmp_path / "mine.yaml") == load(str(tmp_path / "mine.yaml")) == mixed() == load(python) == python
    assert load(python.model_dump(mode="json")) == python


def test_a_file_without_a_name_has_its_own(tmp_path):
    (tmp_path / "mine.yaml").write_text("steps: [{method: rtn}]")
    assert load(tmp_path / "mine.yaml").name == "mine"


def test_a_folder_named_like_a_recipe_is_not_in_the_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w4-gptq").mkdir()
    assert load("w4-gptq").name == "w4-gptq"


# ---- --set


@pytest.mark.parametrize(("setting", "option", "value"), [
    ("gptq.bits=3", "bits", 3), ("gptq.bits=ternary", "bits", "ternary"), ("gptq.sym=full", "sym", "full"), ("gptq.sym=true", "sym", True),
    ("gptq.damp=0.05", "damp", 0.05), ("gptq.damp=1e-3", "damp", 1e-3), ("gptq.act_order=no", "act_order", False), ("gptq.clip=none", "clip", "none"),
    (" gptq.group_size = -1", "group_size", -1),
])  # fmt: skip
def test_set_reads_the_type_of_the_option(setting, option, value):
    built = load("w4-gptq").with_options([setting, "gptq.sym=full"] if value == "ternary" else [setting]).steps[0].build()
    assert getattr(built, option) == value and type(getattr(built, option)) is type(value)


def test_set_changes_all_steps_of_that_method_and_no_other():
    changed = mixed().with_options(["gptq.group_size=32", "gptq.damp=0.1"])
    assert [s.options().get("group_size") for s in changed.steps] == [32, 32, None]
    assert [getattr(s.build(), "damp", None) for s in changed.steps] == [0.1, 0.1, None]
    assert [s.build().bits for s in changed.steps] == [3, 2, 8]


def test_the_last_setting_wins_and_a_dict_is_the_same():
    a = load("w4-gptq").with_options(["gptq.bits=2", "gptq.bits=3", "true_sequential=false", "ignore=['*.router']"])
    b = load("w4-gptq").with_options({"gptq.bits": 3, "true_sequential": False, "ignore": ["*.router"]})
    assert a == b and a.ignore == ("*.router",) and a.true_sequential is False and a.steps[0].build().bits == 3


def test_with_options_leaves_the_original_unchanged():
    recipe = mixed()
    changed = recipe.with_options(["gptq.bits=4", "ignore=[]"])
    assert recipe == mixed() and changed != recipe and recipe.with_options([]) == recipe.with_options({}) == recipe


@pytest.mark.parametrize(("setting", "told"), [
    ("gptq.group_sise=64", ["gptq.group_sise", "did you mean group_size?", "act_order"]),
    ("gtpq.bits=3", ["gtpq.bits", "did you mean gptq?"]),
    ("rtn.bits=3", ["recipe w4-gptq has no 'rtn' step"]),
    ("true_sequental=false", ["did you mean true_sequential?", "METHOD.OPTION"]),
    ("steps=[]", ["unknown recipe option", "blocks, generated, ignore, structure"]),
    ("gptq.bits", ["expected METHOD.OPTION=VALUE", "gptq.bits=3"]),
    ("gptq.bits=9", ["gptq.bits = 9", "1, 2, 3, 4, 5, 6, 7, 8 or 'ternary'"]),
    ("gptq.bits=4.5", ["gptq.bits = 4.5"]),
    ("gptq.bits=", ["gptq.bits = None"]),
    ("gptq.bits=1", ["bits 1", "set sym to true"]),
    ("gptq.group_size=64.5", ["gptq.group_size = 64.5"]),
    ("gptq.damp=-1", ["damp -1"]),
    ("gptq.static_groups=false", ["act_order without static_groups", "set one of the two"]),
    ("gptq.clip=mean", ["gptq.clip = 'mean'", "'none', 'mse', 'hessian' or 'asymmetric'"]),
    ("true_sequential=maybe", ["true_sequential", "boolean"]),
    ("ignore=router", ["ignore"]),
    ("gptq.method=gpqt", ["unknown method 'gpqt'", "did you mean gptq?"]),
])  # fmt: skip
def test_set_refuses(setting, told):
    with pytest.raises(CompressError) as error:
        load("w4-gptq").with_options([setting])
    assert "\n" not in str(error.value) and all(t in str(error.value) for t in told), error.value


# ---- what is no recipe


@pytest.mark.parametrize(("text", "told"), [
    ("", ["expected a mapping", "NoneType"]),
    ("- rtn", ["expected a mapping", "list"]),
    ("steps: [{method: rtn}", ["not a plain YAML recipe"]),
    ("steps:\n\t- {method: rtn}", ["not a plain YAML recipe"]),
    ("description: none", ["steps", "required"]),
    ("steps: [rtn]", ["steps.0"]),
    ("steps: [{bits: 4}]", ["steps.0.method", "required"]),
    ("steps: [{method: rtm}]", ["unknown method 'rtm'", "did you mean rtn?"]),
    ("steps: [{method: rtn, bit: 4}]", ["unknown option rtn.bit", "did you mean bits?"]),
    ("steps: [{method: rtn, match: 3}]", ["steps.0.match"]),
    ("steps: [{method: rtn}]\nignored: [x]", ["ignored", "did you mean ignore?"]),
    ("steps: [{method: rtn}]\nignore: '*.router'", ["ignore"]),
])  # fmt: skip
def test_files_that_are_no_recipe(text, told, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(CompressError) as error:
        load(tmp_path / "r.yaml")
    assert "\n" not in str(error.value) and all(t in str(error.value) for t in told), error.value


@pytest.mark.parametrize("value", [
    "!!python/object/apply:os.mkdir [{0}]", "!!python/object/new:os.mkdir [{0}]", "!!python/name:os.mkdir ''", "!!python/module:os ''",
    "!!python/object:compress.recipe.Step {{method: rtn}}",
])  # fmt: skip
def test_yaml_that_constructs_objects_is_refused(value, tmp_path):
    made = tmp_path / "made"
    (tmp_path / "r.yaml").write_text(f"name: {value.format(made)}\nsteps: [{{method: rtn}}]")
    with pytest.raises(CompressError, match="not a plain YAML recipe"):
        load(tmp_path / "r.yaml")
    assert not made.exists()


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CompressError, match="not a plain YAML recipe"):
        load(tmp_path / "r.yaml")


@pytest.mark.parametrize("name", ["w4-gtpq", "", "nope.yaml", "/tmp"])
def test_unknown_names_list_the_valid_ones(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CompressError, match=r"unknown recipe.*w4-rtn.*path of a \.yaml"):
        load(name)


def test_nearest():
    assert nearest("group_sise", ["bits", "group_size"]) == ", did you mean group_size? (valid: bits, group_size)"
    assert nearest("zzz", {"bits", "act_order"}) == " (valid: act_order, bits)"


def test_distilling_a_rewritten_model_is_refused():
    with pytest.raises(CompressError, match="distill trains the model in its own basis"):
        load({"name": "r", "steps": [{"method": "gptq"}], "views": ["fold_norms"], "distill": {"epochs": 1}})
