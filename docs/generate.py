"""Writes docs/methods.md from the methods and recipes themselves: python docs/generate.py"""

from pathlib import Path

from compress import recipe
from compress.distill import Distill
from compress.methods import describe, describe_options
from compress.tune import Tune

HEAD = """# Methods

<!-- Written by `python docs/generate.py` from compress/methods/ and recipes/; a test compares. Edit the field comments there. -->

A method turns a weight and the statistics of its input into a stored format; its options are the fields of its dataclass. Set them in a recipe
(`{method: gptq, bits: 3}`), on the command line (`--set gptq.bits=3`) or in Python (`settings={"gptq.bits": 3}`). `compress inspect --methods`
prints the methods. A recipe's `tune:` and `distill:` train what the methods made, under the same rules (`--set tune.steps=200`).
"""


def page() -> str:
    cell = lambda value: str(value).replace("|", "\\|")
    lines = [HEAD]
    for method in [*describe(), describe_options("tune", Tune), describe_options("distill", Distill)]:
        lines += [f"## {method['name']}\n", method["about"] + "\n", "| option | default | values | what it does |", "|---|---|---|---|"]
        lines += [f"| `{o['name']}` | `{cell(o['default'])}` | {cell(o['values'])} | {cell(o['help'])} |" for o in method["options"]]
        lines.append("")
    lines += ["## Recipes\n", "| recipe | what it makes |", "|---|---|"]
    lines += [f"| `{name}` | {cell(recipe.load(name).description)} |" for name in recipe.names()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "methods.md").write_text(page(), encoding="utf-8")
