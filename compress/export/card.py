"""The model card: README.md with the YAML front matter that the hub reads, written from the manifest, nothing typed by hand."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

import yaml

if TYPE_CHECKING:
    from .base import Source

TAGS = {"dense": "bfloat16", "gptq-v2": "gptq", "compressed-tensors-w8a8": "compressed-tensors"}
LIBRARIES = {"gguf": "gguf", "mlx": "mlx", "onnx": "onnx"}


def card(source: Source, to: str, load: str, base_model: str | None, evaluation: dict | None) -> str:
    """base_model: the original's hub id; evaluation: what `compress eval --json` wrote."""
    manifest, totals, run = source.manifest, source.manifest.totals, source.manifest.run
    front = {"library_name": LIBRARIES.get(to, "transformers"), "pipeline_tag": "text-generation", "tags": ["compress", TAGS.get(to, to)]}
    if base_model:
        front |= {"base_model": base_model, "base_model_relation": "quantized"}
    formats = Counter(r.describe for r in manifest.layers.values())
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "",
             f"# {base_model or source.config.model_type}, {to}, by recipe {run['recipe']['name']}", "",
             f"Made by compress {manifest.compress} and exported as {to}: codes and scales are those of the artifact, nothing was rounded again."
             if to not in ("dense", "onnx") else f"Made by compress {manifest.compress}; the weights are multiplied out.", "",
             "| layers | format |", "|---|---|", *(f"| {count} | {name} |" for name, count in sorted(formats.items())), "",
             f"{totals['linear_bits']:.3f} bits per compressed weight and {totals['model_bits']:.3f} over the model, as the artifact stores them.", "",
             "## Recipe", "", "```yaml", yaml.safe_dump(run["recipe"], sort_keys=False).strip(), "```", ""]  # fmt: skip
    if data := run.get("calibration"):
        lines += [f"Calibrated on `{data.get('spec', 'tokens')}`, SHA-256 of the tokens `{data['sha256']}`.", ""]
    else:
        lines += ["No calibration data.", ""]
    if evaluation:
        lines += ["## Evaluation", "", *_table(evaluation), ""]
    if source.notes:
        lines += ["## Notes", "", *(f"- {n.what}, {n.where}: {n.detail}" for n in source.notes), ""]
    if manifest.fallbacks:
        lines += ["## What did not go as asked", "", *(f"- {f.what} at {f.where} ×{f.count}: {f.detail}" for f in manifest.fallbacks), ""]
    lines += ["## Loading", "", "```", load, "```", "", "## Source", "", "```json", json.dumps(run["source"], indent=1), "```", ""]
    return "\n".join(lines)


def _table(e: dict) -> list[str]:
    reference = e.get("reference") or {}
    rows = [("perplexity (token)", e["perplexity"]["token"], reference.get("perplexity", {}).get("token"))]
    if e.get("kl"):
        rows += [("KL(original ‖ compressed), nats a token", e["kl"]["mean"], 0), ("top-1 agreement", e["top1"]["agreement"], 1)]
    cell = lambda v: "–" if v is None else f"{v:.5g}"
    return [f"{e['windows']} windows, {e['tokens']} tokens of `{e['data'].get('spec', 'text')}`.", "", "| | compressed | original |", "|---|---|---|",
            *(f"| {name} | {cell(value)} | {cell(original)} |" for name, value, original in rows)]  # fmt: skip
