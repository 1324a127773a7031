"""The report: one page that says what was made, how far it is from the original, where the damage is and what did not go as asked.

`make_page` gathers the figures (they were measured by api.report) into plain JSON, `Page.html` lays them out with report.html.j2: one file without scripts,
fonts or links, readable on a phone, in the dark, on paper and offline. Every picture is drawn from the JSON beside it, which says the same in numbers.
"""

from __future__ import annotations

import html
import json
import os
import platform
import re
import shlex
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from . import plots
from .artifact import Manifest
from .errors import CompressError

WORST = 6  # layers that are named as the most damaged
LISTED = 1000  # rows of the table of layers; report.json has all


@dataclass(frozen=True)
class Page:
    """What `compress.report` returns: `data` is report.json, `html` the page; in a notebook it shows itself."""

    data: dict[str, Any]

    @cached_property
    def html(self) -> str:
        from jinja2 import Environment, StrictUndefined

        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        environment.filters |= {"size": _size, "sig": _sig, "pm": _pm, "duration": _duration}
        template = environment.from_string((Path(__file__).parent / "report.html.j2").read_text(encoding="utf-8"))
        return template.render(self.data, pictures=_pictures(self.data), listed=LISTED)

    def save(self, path: Path) -> None:
        """Write `path` and the same figures beside it as .json."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.html, encoding="utf-8")
            path.with_suffix(".json").write_text(json.dumps(self.data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise CompressError(f"{path}: cannot be written: {error.strerror}") from error

    def _repr_html_(self) -> str:
        """In a frame of its own, so that neither the page nor the notebook changes how the other looks."""
        return f'<iframe srcdoc="{html.escape(self.html)}" style="width:100%;height:48rem;border:1px solid #8884;border-radius:8px"></iframe>'


def make_page(folder: Path, manifest: Manifest, reference: str, history: list[dict], evaluation: dict, depth: dict, tokenizer) -> Page:
    """evaluation: what api.evaluate gives with a reference; depth: eval/depth.py's, {} where blocks cannot be mixed; history: OUT.log.jsonl's lines."""
    run, totals = manifest.run, manifest.totals
    seconds = {e["name"]: e["seconds"] for e in history if e.get("event") == "layer" and e.keys() >= {"name", "seconds"}}
    layers: list[dict[str, Any]] = [
        {"name": name, "block": _block(name, manifest.blocks), "kind": _kind(name, manifest.blocks), "method": r.method, "format": r.describe, "bits": r.bits,
         "bytes": r.bytes, "parameters": r.parameters, "error": r.error, "error_norm": r.error_norm, "tokens": r.tokens, "seconds": seconds.get(name)}
        for name, r in manifest.layers.items()]  # fmt: skip
    formats: dict[tuple[str, str], dict[str, Any]] = {}
    for row in layers:
        f = formats.setdefault((row["method"], row["format"]), {"method": row["method"], "format": row["format"], "layers": 0, "parameters": 0, "bytes": 0})
        for key, value in (("layers", 1), ("parameters", row["parameters"]), ("bytes", row["bytes"])):
            f[key] += value
    for row in depth.get("outliers", {}).get("largest", []):
        row["text"] = tokenizer.decode([row["token"]]) if tokenizer else str(row["token"])
    for row in evaluation.get("drift", {}).get("examples", []):
        row |= {key: re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\ufffd", row[key]) for key in ("prompt", "original", "compressed")}  # what no page can show
        ours, theirs = row["compressed"], row["original"]
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
        row["shared"], row["original_rest"], row["compressed_rest"] = theirs[:same], theirs[same:], ours[same:]
    return Page({
        "name": folder.resolve().name, "original": Path(reference).resolve().name, "recipe": {"name": run["recipe"]["name"], "yaml": _yaml(run["recipe"])},
        "command": _command(folder, manifest, reference, history), "made": time.strftime("%Y-%m-%d"), "compress": manifest.compress,
        "totals": totals | {"kept_bytes": totals["bytes"] - totals["linear_bytes"]}, "formats": list(formats.values()), "layers": layers,
        "worst": [r["name"] for r in sorted(layers, key=lambda r: -r["error"])[:WORST]], "evaluation": evaluation, "depth": depth,
        "calibration": run.get("calibration"), "experts": _experts(layers), "training": manifest.training,
        "fallbacks": [f.model_dump() for f in manifest.fallbacks] + evaluation["fallbacks"], "run": _last_run(history),
        "machine": {"cpu": _cpu(), "cpus": os.cpu_count(), "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                    "system": platform.platform(), "torch": torch.__version__, "threads": torch.get_num_threads(), "device": evaluation["setup"]["device"]},
        "identity": {"dtype": run["dtype"], "seed": run["seed"], "device": run["device"], "source": run["source"]},
    })  # fmt: skip


def _block(name: str, blocks: str) -> int:
    return int(name.removeprefix(blocks + ".").partition(".")[0])


def _kind(name: str, blocks: str) -> str:
    """model.layers.3.mlp.experts.7.down_proj → experts.*.down_proj"""
    path = re.sub(r"\.\d+\.", ".*.", name.removeprefix(blocks + ".").partition(".")[2])
    return ".".join(path.split(".")[-3 if ".*." in path else -1 :])


def _experts(layers: list[dict]) -> list[dict]:
    """Calibration tokens that reached the experts, one row a block that has any."""
    found: dict[int, dict[str, int]] = defaultdict(dict)
    for row in layers:
        if match := re.search(r"\.experts\.(\d+)\.", row["name"]):
            found[row["block"]][match[1]] = row["tokens"]
    return [{"block": block, "experts": len(tokens), "min": min(tokens.values()), "mean": sum(tokens.values()) / len(tokens), "max": max(tokens.values()),
             "without": sum(not t for t in tokens.values())} for block, tokens in sorted(found.items())]  # fmt: skip


def _command(folder: Path, manifest: Manifest, reference: str, history: list[dict]) -> str:
    """As it was typed, from the log; where compress was called from Python, the command that would do the same."""
    argv: list[str] = next((e.get("command", []) for e in reversed(history) if e.get("event") == "start"), [])
    if len(argv) > 1 and Path(argv[0]).name in ("compress", "__main__.py"):
        return "compress " + shlex.join(argv[1:])
    run, data = manifest.run, manifest.run.get("calibration")
    words = ["compress", "run", reference, "--recipe", run["recipe"]["name"], "-o", str(folder)]
    if data and "asked" in data:
        words += ["--calibration", data["spec"], "--samples", str(data["asked"]["samples"]), "--seqlen", str(data["asked"]["seqlen"])]
    return shlex.join(words)


def _last_run(history: list[dict]) -> dict[str, Any]:
    """Seconds and peak memory of the run that finished the artifact, None where the log does not tell."""
    starts = [e["time"] for e in history if e.get("event") == "start" and "time" in e]
    ends = [e for e in history if e.get("event") == "end" and "time" in e]
    known = bool(starts and ends)
    return {"seconds": ends[-1]["time"] - starts[-1] if known else None, "peak_rss": ends[-1].get("peak_rss") if known else None}


def _yaml(recipe: dict[str, Any]) -> str:
    return yaml.safe_dump({k: v for k, v in recipe.items() if v not in (None, [], "")}, sort_keys=False, width=10**6).strip()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)", info.read_text(), re.M) if info.is_file() else None
    return named[1] if named else platform.processor() or platform.machine()


def _pictures(data: dict[str, Any]) -> dict[str, str]:
    kinds: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in data["layers"]:
        kinds[row["kind"]][row["block"]].append(row["error"])
    mean = {kind: [(block, sum(e) / len(e)) for block, e in sorted(blocks.items())] for kind, blocks in kinds.items()}
    drawn = {"errors": plots.inline(plots.layer_errors(mean), "Relative output error of every layer, by block")} if mean else {}
    if depth := data["depth"]:
        drawn["depth"] = plots.inline(plots.depth(depth["kl"]), "KL to the original after compressing the first blocks")
        residual, sites = depth["outliers"]["residual"], depth["outliers"]["sites"]
        names = list(dict.fromkeys(name for site in sites for name in site))[:5]
        for key, label in (("kurtosis", "kurtosis"), ("max_norm", "largest |x| of a sequence")):
            lines = {"residual stream": [(i, r[key]) for i, r in enumerate(residual[1:])]}
            lines |= {name: [(i, s[name][key]) for i, s in enumerate(sites) if name in s] for name in names}
            drawn[key] = plots.inline(plots.by_block(lines, label, 3.0 if key == "kurtosis" else None), f"{label} of activations, by block")
    return drawn


# ---- how numbers are written


def _size(nbytes: float) -> str:
    unit, scale = next(((u, x) for u, x in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if nbytes >= x), ("B", 1.0))
    return f"{nbytes / scale:.3g}\u00a0{unit}" if nbytes < 100 * scale else f"{nbytes / scale:.0f}\u00a0{unit}"


def _sig(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.{digits - 1}e}".replace("e-0", "e-")


def _pm(value: float | None, stderr: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}" + (f" ± {stderr:.{digits}f}" if stderr is not None else "")


def _duration(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
