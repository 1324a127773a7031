"""python -m compress.eval.bench.budget: `compress auto` beside the uniform recipes of the same bytes, as the table of docs/budget.md.

    python -m compress.eval.bench.budget --model ../shared/yardstick/llama-16m --calibration ../shared/yardstick/wikitext2-valid.txt \\
        --evaluation ../shared/yardstick/wikitext2-test.txt --uniform w3-balanced w3-balanced,gptq.group_size=-1 --bits 3.0 3.5

Every RECIPE[,SETTING…] of --uniform gives all layers the same; `auto` spends each of --bits, from its own menu or --menu. Same calibration and evaluation
windows throughout; --folder keeps sensitivities between calls, so that a table may be made in several.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import compress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--uniform", nargs="*", default=[])
    parser.add_argument("--bits", nargs="*", type=float, default=[])
    parser.add_argument("--menu", help="choices in the place of auto's own: a name, or a YAML file with a list of steps")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=24, help="evaluation windows")
    parser.add_argument("--judged", type=int, default=8, help="calibration windows that auto measures on")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--tries", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "compress-budget")
    a = parser.parse_args()
    a.folder.mkdir(parents=True, exist_ok=True)
    source = {"calibration": f"file:{a.calibration}", "samples": a.samples, "overwrite": True, "show": False}

    def row(label: str, report, started: float, note: str = "") -> None:
        seconds = time.perf_counter() - started
        e = compress.evaluate(report.path, a.model, f"file:{a.evaluation}", samples=a.windows, speed=False, show=False)
        print(f"| {label} | {report.manifest.totals['linear_bits']:.4f} | {e['kl']['mean']:.5f} ± {e['kl']['stderr']:.5f} | {e['top1']['agreement']:.4f} | "
              f"{note} | {seconds:.0f} |", flush=True)  # fmt: skip

    print("| | bits | KL | top-1 | KL on the calibration windows | seconds |\n|---|---|---|---|---|---|")
    for uniform in a.uniform:
        name, *settings = uniform.split(",")
        started = time.perf_counter()
        row(uniform, compress.run(a.model, name, output=a.folder / "uniform", settings=settings, **source), started)
    for bits in a.bits:
        started = time.perf_counter()
        found = compress.auto(a.model, output=a.folder / "auto", bits=bits, menu=a.menu, windows=a.judged, rounds=a.rounds, tries=a.tries, **source)
        note = f"predicted {found.predicted:.5f}, swapped in {found.before:.5f} → {found.kl:.5f}, artifact {found.artifact_kl:.5f}"
        row(f"auto{f' --menu {a.menu}' if a.menu else ''}, {bits:g} bits", found.report, started, note)


if __name__ == "__main__":
    main()
