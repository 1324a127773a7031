"""Tasks: lm-eval (EleutherAI's harness, `pip install "compress[tasks]"`) around a model that we have loaded, original and compressed with the same prompts.

A task's accuracy moves in steps of one question: its standard error on a thousand questions is 1.5 points, so a KL on the same budget tells two recipes
apart long before a task does. What a task shows is that nothing broke. A name is one of lm-eval's (`lm-eval ls tasks`) or the path of a task's .yaml.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from compress.errors import CompressError


def run(model: nn.Module, tokenizer, names: Sequence[str], *, limit: int | None = None, batch: int = 8) -> dict[str, dict[str, dict[str, float | None]]]:
    """{task: {metric: {"value", "stderr"}}}; `limit` takes the first questions of each. Raises CompressError for unknown tasks and missing data."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise CompressError(f"--tasks needs lm-eval ({error}): pip install 'compress[tasks]'") from error
    try:
        known = TaskManager(include_defaults=any(not n.endswith((".yaml", ".yml")) for n in names))
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, device=str(model.device))
        with torch.random.fork_rng([]):  # lm-eval seeds the global generators
            found = simple_evaluate(wrapped, tasks=list(names), limit=limit, task_manager=known, bootstrap_iters=0, log_samples=False)
    except Exception as error:  # lm-eval and datasets raise a dozen kinds; a user needs the first line of any of them
        raise CompressError(f"--tasks {','.join(names)}: {type(error).__name__}: {(str(error).splitlines() or ['?'])[0][:300]}; `lm-eval ls tasks` lists "
                            "the names, and a task's data comes from the hub unless it is cached") from error  # fmt: skip
    result = {}
    for task, row in found["results"].items():
        metrics = {key.partition(",")[0] for key in row if "," in key and "_stderr" not in key}
        value = lambda key, row=row: next((float(v) for k, v in row.items() if k.partition(",")[0] == key and isinstance(v, int | float)), None)
        result[task] = {m: {"value": value(m), "stderr": value(f"{m}_stderr")} for m in sorted(metrics)}
    return result
