"""python -m compress.eval.bench.table: recipes side by side on one model, as the table of docs/quality.md.

    python -m compress.eval.bench.table --model ../shared/yardstick/llama-16m --calibration ../shared/yardstick/wikitext2-valid.txt \\
        --evaluation ../shared/yardstick/wikitext2-test.txt ../shared/yardstick/ptb-test.txt --recipes w4-gptq w4-balanced w4-rtn:rtn.bits=3

Every recipe runs in a fresh process, as a user would type it; options follow its name after a colon. Rows are printed, and added to `--markdown FILE`,
as soon as they are there. Processor seconds are those of the whole process, imports and all threads: other jobs on the machine
change them little.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path

import compress


def spec(text: str) -> str:
    return f"file:{text}" if Path(text).is_file() else text


def timed(command: list[str], **how) -> tuple[subprocess.CompletedProcess, dict[str, float]]:
    """Run a process to its end; {"seconds", "processor_seconds": user and system, of all its threads}."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    child = subprocess.run(command, capture_output=True, **how)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return child, {"seconds": seconds, "processor_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def row(recipe: str, a: argparse.Namespace, folder: Path) -> str:
    name, *settings = re.split(r":(?=[\w-]+\.\w)", recipe)  # not in NAME:admm.pattern=2:4
    out, report = folder / recipe.replace("/", "-"), folder / "report.json"
    options = ["--samples", str(a.samples), "--seqlen", str(a.seqlen), "--json", str(report), *(f"--set={s}" for s in settings)]
    _, took = timed([sys.executable, "-m", "compress", "run", a.model, "-o", str(out), "--recipe", name, "--calibration", spec(a.calibration), *options],
                    check=True)  # fmt: skip
    made = json.loads(report.read_text())
    cells = [f"`{recipe}`"]
    for text, windows in zip(a.evaluation, a.windows, strict=True):
        e = compress.evaluate(str(out), a.model, spec(text), samples=windows, seqlen=a.seqlen, show=False)
        cells.append(f"{e['perplexity']['token']:.3f} · {e['kl']['mean']:.5f} ± {e['kl']['stderr']:.5f} · {e['top1']['agreement']:.4f}")
    cells[1:1] = [f"{e['bits_per_weight']['linear']:.2f}"]
    return "| " + " | ".join([*cells, f"{made['seconds']:.0f}", f"{took['processor_seconds']:.0f}", f"{made['peak_rss'] / 1e6:.0f}"]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True, help="a file, or a SPEC")
    parser.add_argument("--evaluation", required=True, nargs="+", help="files, or SPECs")
    parser.add_argument("--recipes", required=True, nargs="+", help="NAME or NAME:METHOD.OPTION=VALUE[:…]")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, nargs="+", default=[192, 64], help="evaluation windows, one number a text")
    parser.add_argument("--markdown", type=Path)
    a = parser.parse_args()
    texts = [f"{Path(t).stem}, {n} windows: perplexity · KL · top-1" for t, n in zip(a.evaluation, a.windows, strict=True)]
    lines = ["| recipe | bits | " + " | ".join(texts) + " | seconds | processor seconds | peak RSS, MB |", "|---" * (len(texts) + 5) + "|"]
    with tempfile.TemporaryDirectory() as folder:
        for line in chain(lines, (row(recipe, a, Path(folder)) for recipe in a.recipes)):  # lazily: a row is kept as soon as it is there
            print(line, flush=True)
            if a.markdown:
                with open(a.markdown, "a", encoding="utf-8") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
