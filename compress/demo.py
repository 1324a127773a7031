"""The demonstration: the whole job on the model that comes with the package, in a minute, with its baseline beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import api
from .embedded import model_path
from .errors import CompressError
from .recipe import load

WINDOWS = 32  # evaluation windows of 512 tokens, from modules of the standard library that the model has not seen


def demo(output: Path, recipe: str, out: Console) -> dict[str, Any]:
    """Round to nearest, then `recipe`, on the embedded model; verify and evaluate both. Returns the figures as JSON."""
    model = str(model_path())
    load(recipe)  # a name that is none is told before the baseline is made
    result: dict[str, Any] = {}
    table = Table("", "weights", "bits/weight", "perplexity", "KL to original", "top-1", "seconds")
    for name, folder in (("w4-rtn", output.with_name(output.name + "-rtn")), (recipe, output)):
        out.print(f"compress run {model} --recipe {name} -o {folder}", style="bold", highlight=False, soft_wrap=True)
        report = api.run(model, name, "stdlib", folder, samples=64, overwrite=True)
        checked = api.verify(str(folder))
        if not checked.ok:
            raise CompressError(f"{folder}: verification failed: {checked.problems[0]}")
        figures = api.evaluate(str(folder), model, "stdlib", samples=WINDOWS)
        if not result:
            ref = figures["reference"]
            table.add_row("original (bf16)", f"{ref['bytes'] / 1e6:.2f} MB", "16", f"{ref['perplexity']['token']:.3f}", "0", "1", "")
        table.add_row(name, f"{figures['bytes'] / 1e6:.2f} MB", f"{figures['bits_per_weight']['linear']:.2f}",
                      f"{figures['perplexity']['token']:.3f}", f"{figures['kl']['mean']:.5f} ± {figures['kl']['stderr']:.5f}",
                      f"{figures['top1']['agreement']:.4f}", f"{report.seconds:.1f}")  # fmt: skip
        result[name] = {"run": report.to_json(), "eval": figures, "verify_kl": checked.kl}
    out.print(table)
    out.print(f"verified: every tensor's SHA-256, and the logits of the model on disk; evaluated on {WINDOWS} windows of 512 tokens of held-out modules.\n"
              f"bits/weight counts the compressed linears with their scales; embeddings stay bf16.\n"
              f"next: compress report {output}   ·   compress run YOUR_MODEL --recipe {recipe} -o out", highlight=False, soft_wrap=True)  # fmt: skip
    return result
