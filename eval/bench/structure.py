"""python -m compress.eval.bench.structure: structural steps side by side on one model, recipes beside their -heal twins, and how much faster each decodes.

    python -m compress.eval.bench.structure --model ../shared/yardstick/llama-16m --calibration ../shared/yardstick/wikitext2-valid.txt \\
        --evaluation ../shared/yardstick/wikitext2-test.txt --rows flap-bias flap drop-25 --heal --speed --folder /tmp/structure

Rows are printed as they are there, and kept in FOLDER: the same command goes on where it was. Decoding is timed by plain transformers in processes of
their own, original and smaller one in turn, against what their weights multiply by for a token (2 FLOPs a number of the blocks and the head).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import compress
from compress import recipe
from compress.checkpoint import Checkpoint
from compress.eval.bench.table import spec
from compress.eval.speed import measure

CUT = {"mlp": 0.2, "across": "layer"}  # a fifth of the neurons of every MLP
ROWS: dict[str, list[Any] | str] = {  # structural steps, or the name of a recipe, whose -heal twin `--heal` measures
    **{by: [{"drop": {"by": by}}] for by in ("top", "bottom", "alternate", "symmetric", "contribution", "angular", "greedy")},
    "contribution, refit": [{"drop": {"by": "contribution"}}, "refit"],
    "drop-25": "drop-25",
    "drop-25-w4": "drop-25-w4",
    "fuse": [{"fuse": {}}],
    "fuse-25": "fuse-25",
    "program, refit": [{"program": {"budget": 0.75}}, "refit"],
    "flap, bias": [{"width": CUT | {"by": "flap"}}, {"refit": {"what": "bias"}}],
    "width-20": "width-20",  # flap, refit
    **{f"{by}, refit": [{"width": CUT | {"by": by}}, "refit"] for by in ("activation", "magnitude", "taylor", "fisher", "trajectory")},
    "loraprune, refit": [{"loraprune": {"mlp": 0.2, "steps": 100, "batch": 2}}, "refit"],
    "slice": [{"slice": {"share": 0.25}}],
    "slice-25": "slice-25",
    "sparse-2of4": "sparse-2of4",
    "w2-gptq": "w2-gptq",
}


def flops(path: str) -> int:
    """Of one token, attention's scores apart."""
    source = Checkpoint(path)
    head = source.model.get_output_embeddings().weight.numel()
    return 2 * (head + sum(p.numel() for i in range(source.num_blocks) for p in source.model.get_submodule(source.block_name(i)).parameters() if p.dim() > 1))


def judged(path: str, a: argparse.Namespace) -> list[float]:
    e = compress.evaluate(path, a.model, spec(a.evaluation), samples=a.windows, seqlen=a.seqlen, speed=False, show=False)
    return [e["perplexity"]["token"], e["kl"]["mean"], e["kl"]["stderr"], e["top1"]["agreement"]]


def row(name: str, a: argparse.Namespace) -> dict[str, Any]:
    """What is known of a row; what is missing is worked out and kept."""
    made, stem = ROWS[name], Path(a.folder) / name.replace(", ", "-")
    file = stem.with_name(f"{stem.name}.json")
    known: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}

    def keep(key: str, value) -> None:
        known[key] = value
        file.write_text(json.dumps(known))

    if "unhealed" not in known:
        what = made if isinstance(made, str) else {"name": "row", "structure": made}
        compress.run(a.model, what, spec(a.calibration), stem, samples=a.samples, seqlen=a.seqlen, show=False)
        keep("unhealed", judged(str(stem), a))
    if a.heal and f"{made}-heal" in recipe.names() and "healed" not in known:
        options = recipe.load(f"{made}-heal").with_options([f"heal.{s}" for s in a.set]).heal
        report = compress.heal(str(stem), a.model, spec(a.calibration), f"{stem}-heal", options=options, cache=Path(a.folder) / "teacher", show=False)
        keep("seconds", report.seconds)
        keep("healed", judged(f"{stem}-heal", a))
    if a.speed and "speed" not in known and compress.inspect(str(stem)).plain:
        pairs = [[measure(path, dtype="float32", new_tokens=128)["decode_tokens_per_second"] for path in (a.model, str(stem))] for _ in range(3)]
        keep("speed", [statistics.median(p[k] for p in pairs) for k in (0, 1)] + [statistics.median(y / x for x, y in pairs)])
        keep("flops", flops(a.model) / flops(str(stem)))
    return known


def say(figures: list[float] | None) -> str:
    return "" if figures is None else f"{figures[0]:.3f} · {figures[1]:.5f} ± {figures[2]:.5f} · {figures[3]:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True, help="a file, or a SPEC; healing trains on it as well")
    parser.add_argument("--evaluation", required=True, help="a file, or a SPEC")
    parser.add_argument("--folder", required=True, help="where models and figures are kept")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(f"“{name}”" for name in ROWS))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--heal", action="store_true", help="recipes also as their -heal twins have it")
    parser.add_argument("--set", nargs="*", default=["samples=1200", "seqlen=256", "micro=8"], help="options of heal on top of the recipes'")
    parser.add_argument("--speed", action="store_true", help="decoding of plain models")
    a = parser.parse_args()
    Path(a.folder).mkdir(parents=True, exist_ok=True)
    print("| row | perplexity · KL · top-1 | healed | won back | decode tokens/s, of the original's | FLOPs |", "|---" * 6 + "|", sep="\n", flush=True)
    for name in a.rows:
        known = row(name, a)
        share = f"{1 - known['healed'][1] / known['unhealed'][1]:.0%}, {known['seconds']:.0f} s" if "healed" in known else ""
        speed = f"{known['speed'][1]:.1f}, ×{known['speed'][2]:.2f}" if "speed" in known else ""
        print(f"| {name} | {say(known['unhealed'])} | {say(known.get('healed'))} | {share} | {speed} | "
              f"{'×' + format(known['flops'], '.2f') if 'flops' in known else ''} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
