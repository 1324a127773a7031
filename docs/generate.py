"""Writes docs/methods.md from the methods and recipes themselves: python docs/generate.py"""

from pathlib import Path

from compress import recipe
from compress.distill import Distill
from compress.methods import METHODS, describe
from compress.scaling import BLOCKS
from compress.schedule import Schedule
from compress.tune import Tune
from compress.views import VIEWS

HEAD = """# Methods

<!-- Written by `python docs/generate.py` from compress/methods/ and recipes/; a test compares. Edit the field comments there. -->

A method turns a weight and the statistics of its input into a stored format; its options are the fields of its dataclass. Set them in a recipe
(`{method: gptq, bits: 3}`), on the command line (`--set gptq.bits=3`) or in Python (`settings={"gptq.bits": 3}`). `compress methods`
prints the methods.
"""

TRAINING = """# Training

A recipe's `tune:` and `distill:` train what the methods made, the first block by block, the second at the end (`--set tune.steps=200`).
"""

VIEW = """# Views

A view rewrites the model into an equal one whose weights are easier to round, as its tensors are read; a recipe lists views under `views`, by name or with
options: `views: [fold_norms, {rotate: {untie: true}}]`. Where an architecture cannot express it, the run is refused with the reason.
"""
SCHEDULES = """# Schedule

A recipe's `schedule:` lets layers give up more or less than its steps say, together the same (`--set schedule.by=gradient`). It sets `sparsity` or
`ratio`, layer by layer, before anything is compressed.
"""

BLOCK = """# Block steps

A block step edits a block exactly before anything in it is rounded; a recipe lists them under `blocks`: `blocks: [awq]`.
"""


def page() -> str:
    cell = lambda value: str(value).replace("|", "\\|")
    lines: list[str] = []
    for head, table in ((HEAD, METHODS), (TRAINING, {"tune": Tune, "distill": Distill}), (SCHEDULES, {"schedule": Schedule}), (VIEW, VIEWS), (BLOCK, BLOCKS)):
        lines.append(head)
        for method in describe(table):
            lines += [f"## {method['name']}\n", method["about"] + "\n"]
            lines += ["| option | default | values | what it does |", "|---|---|---|---|"] if method["options"] else []
            lines += [f"| `{o['name']}` | `{cell(o['default'])}` | {cell(o['values'])} | {cell(o['help'])} |" for o in method["options"]]
            lines.append("")
    lines += ["# Recipes\n", "| recipe | what it makes |", "|---|---|"]
    lines += [f"| `{name}` | {cell(recipe.load(name).description)} |" for name in recipe.names()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "methods.md").write_text(page(), encoding="utf-8")
