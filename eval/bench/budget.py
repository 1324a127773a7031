"""python -m compress.eval.bench.budget: `compress auto` beside the uniform recipes of the same bytes, as the table of docs/budget.md.

    python -m compress.eval.bench.budget --model ../shared/yardstick/llama-16m --calibration ../shared/yardstick/wikitext2-valid.txt \\
        --evaluation ../shared/yardstick/wikitext2-test.txt --uniform 3:-1 3:128 3:64 --bits 3.0 3.5

Every BITS:GROUP_SIZE runs as w4-balanced with these options, then `auto` gets exactly its bytes; `--bits` adds budgets of their own. Same solver
options, calibration and evaluation windows throughout; --folder keeps sensitivities between calls.
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
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=24, help="evaluation windows")
    parser.add_argument("--judged", type=int, default=4, help="calibration windows that auto measures on")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--tries", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "compress-budget")
    a = parser.parse_args()
    a.folder.mkdir(parents=True, exist_ok=True)
    source = {"calibration": f"file:{a.calibration}", "samples": a.samples, "overwrite": True, "show": False}

    def row(label: str, report, started: float, note: str = "") -> float:
        seconds = time.perf_counter() - started
        e = compress.evaluate(report.path, a.model, f"file:{a.evaluation}", samples=a.windows, speed=False, show=False)
        print(f"| {label} | {report.manifest.totals['linear_bits']:.4f} | {e['kl']['mean']:.5f} ± {e['kl']['stderr']:.5f} | {e['top1']['agreement']:.4f} | "
              f"{note} | {seconds:.0f} |", flush=True)  # fmt: skip
        return e["kl"]["mean"]

    def auto(bits: float) -> float:
        started = time.perf_counter()
        found = compress.auto(a.model, output=a.folder / "auto", bits=bits, windows=a.judged, rounds=a.rounds, tries=a.tries, **source)
        note = f"predicted {found.predicted:.5f}, swapped in {found.before:.5f} → {found.kl:.5f}, artifact {found.artifact_kl:.5f}"
        return row(f"auto, {bits:.4f} bits", found.report, started, note)

    print("| | bits | KL | top-1 | KL on the calibration windows | seconds |\n|---|---|---|---|---|---|")
    for uniform in a.uniform:
        bits, size = uniform.split(":")
        started = time.perf_counter()
        report = compress.run(a.model, "w4-balanced", output=a.folder / "uniform", settings=[f"gptq.bits={bits}", f"gptq.group_size={size}"], **source)
        same = row(f"{bits} bits, {'a row' if size == '-1' else f'g{size}'}", report, started)
        mixed = auto(report.manifest.totals["linear_bits"])
        print(f"| at equal bytes | | {mixed / same - 1:+.1%} | | | |", flush=True)
    for bits in a.bits:
        auto(bits)


if __name__ == "__main__":
    main()
