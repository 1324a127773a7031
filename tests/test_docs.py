"""Run: pytest tests/test_docs.py. Commands in README, docs and help are parsed as the shell would hand them over; notebooks run on the embedded model."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer
import yaml

import compress
from compress import cli, recipe
from compress.calibration.data import SPECS
from compress.export import EXPORTS

ROOT = Path(compress.__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="compress is not imported from a checkout")
PAGES = sorted(str(f.relative_to(ROOT)) for f in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))) if (ROOT / "docs").is_dir() else []
COMMANDS = typer.main.get_command(cli.app).commands


def commands(text: str) -> list[list[str]]:
    """Every `compress …` of an indented or fenced block, lines that end in a backslash joined, comments and what follows && apart."""
    found = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if not re.match(r"(\s{4,}|\$ ?)?(\.venv/bin/)?compress [a-z-]", line):
            continue
        for part in re.split(r"&&|;|\|", re.sub(r"\s#.*", "", line.strip())):
            words = shlex.split(part)
            if words and words[0].endswith("compress"):
                found.append(words[1:])
    return found


def check(words: list[str], page: str) -> None:
    """Parsed by the command line itself; its recipe, options, text and export exist."""
    name, *args = words
    if name.startswith("--"):
        assert name in ("--version", "--help", "--install-completion"), words
        return
    assert name in COMMANDS, f"{page}: compress {name}"
    if name.isupper() or any(a in ("…", "...") for a in args):
        return
    options = COMMANDS[name].make_context(name, list(args)).params  # raises on an option or a value that does not exist
    own = {f"{y['name']}.yaml": y for y in yaml_recipes(page)}
    if "recipe" in options and options["recipe"] != "RECIPE":
        chosen = recipe.load(own.get(options["recipe"], options["recipe"])) if options["recipe"] not in ("my-recipe.yaml", "mine.yaml") else None
        if chosen:
            chosen.with_options(options.get("set_") or [])
    for spec in (options.get("calibration"), options.get("data")):
        assert spec in (None, "SPEC", *SPECS) or re.match(r"(file|hf):.", spec), f"{page}: {spec}"
    if name == "export":
        assert options["to"] in EXPORTS, words


def yaml_recipes(page: str) -> list[dict]:
    text = (ROOT / page).read_text(encoding="utf-8") if page.endswith(".md") else ""
    return [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.S) if "steps:" in block]


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_the_docs(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    found = commands(text)
    for words in found:
        check(words, page)
    for data in yaml_recipes(page):
        recipe.load(data)
    assert found or page not in ("README.md", "docs/quickstart.md", "docs/cookbook.md")
    for name in re.findall(r"`((?:w\d|sparse|svd|dense|ternary)-[a-z0-9-]+)`", text):
        assert name in recipe.names(), f"{page}: recipe {name}"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_examples_of_the_help(name):
    found = commands("\n".join(f"    {line.strip()}" for line in COMMANDS[name].help.splitlines()))
    assert found and all(words[0] == name for words in found)
    for words in found:
        check(words, name)


def test_the_checks_find_what_is_wrong():
    with pytest.raises(compress.CompressError, match="unknown recipe"):
        check(["run", "M", "-o", "out", "--recipe", "w4-gptk"], "x")
    with pytest.raises(cli.UsageError):
        check(["run", "M", "-o", "out", "--recipee", "w4-gptq"], "x")
    with pytest.raises(compress.CompressError, match=r"gptq\.bitz"):
        check(["run", "M", "-o", "out", "--set", "gptq.bitz=4"], "x")
    assert commands("    .venv/bin/compress report out   # a page\n    compress run M -o out && compress verify out\ntext compress run\n") == [
        ["report", "out"], ["run", "M", "-o", "out"], ["verify", "out"]]  # fmt: skip


@pytest.mark.parametrize("notebook", sorted(f.name for f in (ROOT / "docs" / "notebooks").glob("*.ipynb")))
def test_notebooks_run(notebook, tmp_path, monkeypatch):
    """Cell after cell in one namespace, in an empty folder; an expression at the end of a cell must be able to show itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["notebook"])
    cells = json.loads((ROOT / "docs" / "notebooks" / notebook).read_text(encoding="utf-8"))["cells"]
    code, space = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"], {}
    assert len(code) >= 5 and sum(c["cell_type"] == "markdown" for c in cells) >= 5
    for cell in code:
        if re.fullmatch(r"\w+", cell):
            assert len(space[cell]._repr_html_()) > 1000
        else:
            exec(compile(cell, notebook, "exec"), space)
