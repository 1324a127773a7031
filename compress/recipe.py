"""Recipe: which linears get which method with which options. A YAML file of 5 to 15 lines, or the same in Python.

    name: w4-gptq
    steps:
      - method: gptq          # a file of compress/methods/; its dataclass fields are the options below
        bits: 4
        group_size: 128
    ignore: ["*.router"]      # glob patterns of module paths, e.g. model.layers.0.self_attn.q_proj
    structure: [{drop: {count: 2}}, refit]   # the model is made smaller first: fewer blocks, heads, neurons (structure/); then steps may be empty
    views: [fold_norms, {rotate: {untie: true}}]   # the model is rewritten into an equal one before anything else (views.py)
    blocks: [awq]             # each block is prepared before its linears are compressed (scaling.py)

Every linear of the blocks takes the first step whose `match` fits its path; a linear that no step matches stays as it is.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from .checkpoint import Checkpoint
from .distill import Distill
from .errors import CompressError
from .healing.options import Heal
from .methods import METHODS
from .scaling import BLOCKS
from .schedule import Schedule
from .structure import STRUCTURE
from .tune import Tune
from .views import VIEWS

RECIPES = Path(__file__).parent / "recipes"
if not RECIPES.is_dir():  # a bare checkout: the folder lies beside the package
    RECIPES = Path(__file__).parent.parent / "recipes"


class Step(BaseModel):
    """One method with its options, for the linears whose path fits `match`."""

    model_config = ConfigDict(extra="allow", frozen=True)
    method: str
    match: str | list[str] = "*"

    def options(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})

    def build(self):
        """The method, a frozen dataclass ready to be called. Raises CompressError on unknown names and bad values."""
        return _build("method", self.method, self.options(), METHODS)

    def matches(self, path: str) -> bool:
        return any(fnmatchcase(path, p) for p in ([self.match] if isinstance(self.match, str) else self.match))


Named = str | dict[str, dict[str, Any]]  # `rotate` or `{rotate: {seed: 1}}`


class Recipe(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    description: str = ""
    structure: tuple[Named, ...] = ()  # what is taken out of the model before anything else
    steps: tuple[Step, ...] = ()
    ignore: tuple[str, ...] = ()
    tune: Tune | None = None  # train codes and scales of each block against the original block, after its linears are solved
    distill: Distill | None = None  # at the end, train scales, norms and rounding of the whole model on the KL divergence
    generated: int = Field(0, ge=0)  # windows of text that the model writes itself, added to the calibration text
    schedule: Schedule | None = None  # layers give up more or less than each step says, together the same
    restore: Heal | None = None  # before all that, give the weights what low-rank terms win over a first result, and start again (restorative.py)
    heal: Heal | None = None  # after all that, train adapters or scales of the finished artifact on the divergence from the original
    true_sequential: bool = True  # within a block, later sites see the compressed earlier ones (more passes, better fit)
    views: tuple[Named, ...] = ()  # exact rewritings of the model, applied in this order as its tensors are read
    blocks: tuple[Named, ...] = ()  # what is done to each block before its linears are compressed
    transforms: Literal["auto"] | None = None  # auto: views and blocks are chosen by the error that they leave on two blocks of the model (transforms.py)

    def viewed(self, source: Checkpoint) -> Checkpoint:
        """The model that the steps see. Raises CompressError where a view cannot be applied to it."""
        for _, view in _named("view", self.views, VIEWS):
            source = view(source)
        return source

    def structural(self) -> list:
        return [step for _, step in _named("structural step", self.structure, STRUCTURE)]

    def guessed(self, source: Checkpoint) -> Checkpoint:
        """The smaller model that the structural steps will leave, in size: found without any text."""
        for step in self.structural():
            source = step.apply(source, step.guess(source))
        return source

    def changes(self) -> list:
        return [step for _, step in _named("block step", self.blocks, BLOCKS)]

    def check(self) -> Recipe:
        """Every step and view built once, so that a bad option is told before anything is read or written."""
        if self.transforms and (self.views or self.blocks):
            raise CompressError(f"recipe {self.name}: transforms: auto chooses views and blocks itself; leave them out, or transforms")
        if self.structure and (self.transforms or self.distill):
            raise CompressError(f"recipe {self.name}: {'transforms' if self.transforms else 'distill'} needs the whole model; leave out structure, or it")
        if self.distill and (self.views or self.blocks or self.transforms):
            raise CompressError(f"recipe {self.name}: distill trains the model in its own basis; leave out views, blocks and transforms, or distill")
        if self.restore and (self.views or self.blocks or self.transforms or self.structure or self.distill):
            raise CompressError(f"recipe {self.name}: restore changes the original's own weights; leave out "
                                "views, blocks, transforms, structure and distill, or it")
        self.identity()
        return self

    def identity(self) -> dict[str, Any]:
        """Everything that decides what this recipe does, defaults included and values as the methods took them."""
        steps = [{"method": s.method, "match": s.match} | _fields(s.build()) for s in self.steps]
        views = [{"view": name} | _fields(view) for name, view in _named("view", self.views, VIEWS)]
        blocks = [{"block": name} | _fields(step) for name, step in _named("block step", self.blocks, BLOCKS)]
        structure = [{"structure": name} | _fields(step) for name, step in _named("structural step", self.structure, STRUCTURE)]
        lists = {"structure": structure, "steps": steps, "views": views, "blocks": blocks}
        return self.model_dump(mode="json", exclude=set(lists)) | lists

    def step_for(self, path: str) -> Step | None:
        """The first step that fits a module path, or None where the linear stays as it is."""
        if any(fnmatchcase(path, p) for p in self.ignore):
            return None
        return next((s for s in self.steps if s.matches(path)), None)

    def with_options(self, settings: list[str] | dict[str, Any]) -> Recipe:
        """The recipe with options replaced: `gptq.bits=3` sets it on every gptq step, `true_sequential=false` on the recipe itself."""
        data = self.model_dump()
        for key, value in _pairs(settings, "METHOD.OPTION=VALUE, e.g. gptq.bits=3"):
            method, _, option = key.rpartition(".")
            if not method:
                known = ("ignore", "generated", "true_sequential", "views", "blocks", "transforms", "structure")
                if option not in known:
                    raise CompressError(f"--set {key}: unknown recipe option{nearest(option, known)}; method options are METHOD.OPTION")
                data[option] = value
                continue
            if method in ("tune", "distill", "schedule", "restore", "heal"):
                data[method] = (data[method] or {}) | {option: value}
                continue
            if method in STRUCTURE and any(method == e or method in e for e in data["structure"]):
                data["structure"] = [{method: ({} if e == method else e[method]) | {option: value}} if e == method or method in e else e
                                     for e in data["structure"]]  # fmt: skip
                continue
            hit = [step for step in data["steps"] if step["method"] == method]
            if not hit:
                raise CompressError(f"--set {key}: recipe {self.name} has no {method!r} step{nearest(method, {s['method'] for s in data['steps']})}")
            for step in hit:
                step[option] = value
        return _validate(data, self.name).check()


def viewed_as(identity: dict[str, Any], source: Checkpoint) -> Checkpoint:
    """The model as the views of a recipe make it, from the `identity` that a manifest keeps."""
    views = tuple({v["view"]: {option: value for option, value in v.items() if option != "view"}} for v in identity.get("views", ()))
    for _, view in _named("view", views, VIEWS):
        source = view(source)
    return source


def _build(kind: str, name: str, options: dict[str, Any], table: dict[str, type]):
    """A frozen dataclass of `table` by its name. Raises CompressError on unknown names and bad values."""
    if name not in table:
        raise CompressError(f"unknown {kind} {name!r}{nearest(name, table)}")
    fields = {f.name for f in dataclasses.fields(table[name])}
    for option in options:
        if option not in fields:
            raise CompressError(f"unknown option {name}.{option}{nearest(option, fields)}")
    try:
        return TypeAdapter(table[name]).validate_python(options)
    except ValidationError as error:
        first = error.errors()[0]
        if isinstance(cause := first.get("ctx", {}).get("error"), CompressError):
            raise CompressError(f"{name}: {cause}") from error
        place = ".".join(str(p) for p in first["loc"][:1])
        raise CompressError(f"{name}.{place} = {first['input']!r}: {first['msg']}") from error


def _named(kind: str, entries: tuple[Named, ...], table: dict[str, type]) -> list[tuple[str, Any]]:
    pairs = [(entry, {}) if isinstance(entry, str) else next(iter(entry.items()), ("", {})) for entry in entries]
    return [(name, _build(kind, name, options, table)) for name, options in pairs]


def _fields(built) -> dict[str, Any]:
    return {f.name: getattr(built, f.name) for f in dataclasses.fields(built)}


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 2:4 is the pattern that it looks like; to YAML 1.1 it is 2 minutes and 4 seconds."""


_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: node.value if ":" in node.value else loader.construct_yaml_int(node))  # type: ignore


def healing(settings: list[str] | dict[str, Any]) -> Heal:
    """The options of `compress heal` from `rank=32` and the like. Raises CompressError on unknown names and bad values."""
    return _build("heal", "heal", dict(_pairs(settings, "OPTION=VALUE, e.g. rank=32")), {"heal": Heal})


def _pairs(settings: list[str] | dict[str, Any], form: str) -> list[tuple[str, Any]]:
    if isinstance(settings, dict):
        return list(settings.items())
    if bad := [s for s in settings if "=" not in s]:
        raise CompressError(f"--set {bad[0]}: expected {form}")
    return [(k.strip(), _value(k, v)) for k, v in (s.split("=", 1) for s in settings)]


def _value(key: str, text: str) -> Any:
    """The value of `--set KEY=TEXT`, read as YAML: 3, true, 1e-2, [a, b]. Text that is no YAML (a glob pattern) stands for itself."""
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        if text.startswith(("[", "{", "!", "&")):
            raise CompressError(f"--set {key}={text}: not a value ({' '.join(str(error).split())[:100]})") from error
        return text
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value) else value  # YAML 1.1 reads 1e-2 as text


def nearest(name: object, valid: Iterable[object]) -> str:
    """`; valid: a, b` and `, did you mean a?` for an error line."""
    close = difflib.get_close_matches(str(name), [str(v) for v in valid], n=1)
    return (f", did you mean {close[0]}?" if close else "") + f" (valid: {', '.join(sorted(str(v) for v in valid))})"


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(p.stem for p in RECIPES.glob("*.yaml"))


def about(recipe: Recipe) -> dict[str, Any]:
    """{"description", "bits": of a 4096 × 4096 bf16 layer, one a step, "needs": what a run of it asks for}."""
    built = [step.build() for step in recipe.steps]
    needs = frozenset[str]().union(*(method.needs for method in built))
    gradients = "guidance" in needs or (recipe.schedule is not None and recipe.schedule.by == "gradient")
    asks = ((recipe.distill, "text; gradients of the whole model, in memory"), (recipe.restore, "text; compresses twice, trains the whole model between"),
            (recipe.heal, "text; trains the whole model at the end"),
            (gradients, "text; gradients of the whole model, a block at a time"), (recipe.tune, "text; trains each block"),
            (any(step.needs_text for step in recipe.structural()), "text, through the model as often as choices are compared"),
            ("cross" in needs, "text, twice through the model"), (needs or recipe.blocks or recipe.transforms, "text, once through the model"),
            (True, "nothing: seconds"))  # fmt: skip
    bits = sorted({round(method.planned((4096, 4096), torch.bfloat16, "layer").bits(), 3) for method in built}) or [16.0]
    return {"description": recipe.description, "bits": bits, "needs": next(text for asked, text in asks if asked)}


def load(recipe: str | Path | dict | Recipe) -> Recipe:
    """A recipe by name, from a YAML file, or from a dict. Every step's options are checked here, before anything is read or written."""
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, (dict, str, Path)):
        raise CompressError(f"recipe must be a name, a path, a dict or a Recipe, not {type(recipe).__name__}")
    if isinstance(recipe, dict):
        data, where = recipe, "recipe"
    else:
        path = RECIPES / f"{recipe}.yaml"
        if not path.is_file():
            path = Path(recipe)
        if not path.is_file():
            raise CompressError(f"unknown recipe {str(recipe)!r}{nearest(recipe, names())}, or the path of a .yaml file")
        where = str(recipe)
        try:
            data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise CompressError(f"{where}: not a plain YAML recipe ({' '.join(str(error).split())[:160]})") from error
        if not isinstance(data, dict):
            raise CompressError(f"{where}: not a recipe: expected a mapping with `steps:`, found {type(data).__name__}")
        data = {"name": path.stem} | data
    return _validate(data, where).check()


def _validate(data: dict, where: str) -> Recipe:
    try:
        recipe = Recipe.model_validate(data)
        if not recipe.steps and not recipe.structure:
            raise CompressError(f"{where}: steps: required, at least one, where there is no `structure:`")
        return recipe
    except ValidationError as error:
        first = next((e for e in error.errors() if e["type"] == "extra_forbidden"), error.errors()[0])
        place = ".".join(str(p) for p in first["loc"])
        hint = nearest(first["loc"][-1], Recipe.model_fields) if first["type"] == "extra_forbidden" else ""
        raise CompressError(f"{where}: {place}: {first['msg']}{hint}") from error
