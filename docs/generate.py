"""Writes docs/methods.md from the methods and recipes themselves, and the table of docs/export.md: python docs/generate.py"""

from pathlib import Path

import torch
from transformers import LlamaConfig

from compress import recipe
from compress.distill import Distill
from compress.export import EXPORTS
from compress.export.base import Layers
from compress.healing import adapters
from compress.healing.options import Heal
from compress.methods import METHODS, describe
from compress.scaling import BLOCKS
from compress.schedule import Schedule
from compress.structure import STRUCTURE
from compress.tune import Tune
from compress.views import VIEWS

HEAD = """# Methods

<!-- Written by `python docs/generate.py` from compress/methods/ and recipes/; a test compares. Edit the field comments there. -->

A method turns a weight and the statistics of its input into a stored format; its options are the fields of its dataclass. Set them in a recipe
(`{method: gptq, bits: 3}`), on the command line (`--set gptq.bits=3`) or in Python (`settings={"gptq.bits": 3}`). `compress methods`
prints the methods.
"""

TRAINING = """# Training

A recipe's `tune:` and `distill:` train what the methods made, the first block by block, the second at the end (`--set tune.steps=200`); `heal:` trains the
finished artifact, as `compress heal` does ([healing.md](healing.md)). `restore:`, with the fields of `heal`, comes before all of them: the model is compressed
once, low-rank terms are trained over the result and added to the original's weights, and that is compressed in their place (PTQ1.61's preprocessing).
"""

SMALLER = """# Structure

A structural step makes the model smaller before anything else. A recipe lists them under `structure`, in order, by name or with options:
`structure: [{drop: {count: 2}}, refit]`; `steps` may then be empty. What they do and what they cost: [structure.md](structure.md).
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
    training = {"tune": Tune, "distill": Distill, "heal": Heal}
    for head, table in ((HEAD, METHODS), (SMALLER, STRUCTURE), (TRAINING, training), (SCHEDULES, {"schedule": Schedule}),
                        (VIEW, VIEWS), (BLOCK, BLOCKS)):  # fmt: skip
        lines.append(head)
        for method in describe(table):
            lines += [f"## {method['name']}\n", method["about"] + "\n"]
            lines += ["| option | default | values | what it does |", "|---|---|---|---|"] if method["options"] else []
            lines += [f"| `{o['name']}` | `{cell(o['default'])}` | {cell(o['values'])} | {cell(o['help'])} |" for o in method["options"]]
            lines.append("")
    lines += ["# Recipes\n", "| recipe | what it makes |", "|---|---|"]
    lines += [f"| `{name}` | {cell(recipe.load(name).description)} |" for name in recipe.names()]
    return "\n".join(lines) + "\n"


EXPORT = Path(__file__).parent / "export.md"
MARKS = ("<!-- recipes: written by `python docs/generate.py`; a test compares -->\n", "<!-- end of recipes -->\n")


def exports() -> str:
    """docs/export.md with its table of recipes and consumers as `can_export` judges them, on a Llama of two blocks that no tensor is made of."""
    config = LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=2, num_attention_heads=8, vocab_size=256, dtype=torch.bfloat16)
    model = Layers({}, config).model
    linears = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    numbers: dict[str, int] = {}
    rows = []
    for name in recipe.names():
        chosen, cells = recipe.load(name), []
        planned = {n: step.build().planned(shape, torch.bfloat16, n) for n, shape in linears.items() if (step := chosen.step_for(n)) is not None}
        if chosen.heal:
            planned = {n: adapters.planned(f, chosen.heal, torch.bfloat16) for n, f in planned.items()}
        source = Layers(planned, config, model)
        for consumer in EXPORTS.values():
            if refused := consumer.refusals(source):
                reasons = dict.fromkeys(r.reason.replace(planned[r.layer].describe(), "this") for r in refused)
                cells.append("no: " + ", ".join(str(numbers.setdefault(reason, len(numbers) + 1)) for reason in reasons))
            else:
                cells.append("multiplied out" if consumer.widened(source) else "yes")
        rows.append(f"| `{name}` | {' | '.join(cells)} |")
    table = [f"| recipe | {' | '.join(f'`{to}`' for to in EXPORTS)} |", "|---" * (len(EXPORTS) + 1) + "|", *rows, "",
             *(f"{number}. {reason}" for reason, number in numbers.items()), ""]  # fmt: skip
    before, rest = EXPORT.read_text(encoding="utf-8").split(MARKS[0])
    return before + MARKS[0] + "\n" + "\n".join(table) + "\n" + MARKS[1] + rest.split(MARKS[1])[1]


if __name__ == "__main__":
    (Path(__file__).parent / "methods.md").write_text(page(), encoding="utf-8")
    EXPORT.write_text(exports(), encoding="utf-8")
