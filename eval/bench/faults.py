"""python -m compress.eval.bench.faults [--model PATH] [--kills 20] [--seed 0]: is a killed and resumed run the same run, byte for byte?

One undisturbed `compress run` gives the reference. Then, N times: the same command into a new folder, kill -9 at a moment drawn uniformly from
the time between the folder's first file and the end of the undisturbed run, the same command again, and SHA-256 of every file against the
reference's. (Moments before the first file are left out: a kill while Python imports torch tests nothing.) Exit code 1 on any difference.
"""

import argparse
import hashlib
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import compress
from compress.embedded import model_path


def digests(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


def start(command: list[str], out: Path) -> subprocess.Popen:
    """The command in a process of its own, returned when it has begun to write."""
    root = str(Path(compress.__file__).parent.parent)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    with open(f"{out}.err", "ab") as err:
        process = subprocess.Popen([*command, "-o", str(out)], env=env, stdout=subprocess.DEVNULL, stderr=err)
    while process.poll() is None and not out.is_dir():
        time.sleep(0.001)
    return process


def finish(process: subprocess.Popen, out: Path) -> None:
    if process.wait():
        sys.exit(f"{out}: the run failed with exit code {process.returncode}: {Path(f'{out}.err').read_text().strip().splitlines()[-1]}")


def main(model: str, recipe: str, samples: int, seqlen: int, kills: int, seed: int, folder: Path | None) -> int:
    rng, different = random.Random(seed), 0
    command = [sys.executable, "-m", "compress", "run", model, "-r", recipe, "-c", "stdlib", "--samples", str(samples), "--seqlen", str(seqlen)]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        process = start(command, whole := Path(scratch, "whole"))
        began = time.perf_counter()
        finish(process, whole)
        seconds, expected = time.perf_counter() - began, digests(whole)
        print(f"{model}, {recipe}, {samples}×{seqlen} tokens: {len(expected)} files in {seconds:.1f} s; torch {torch.__version__}, seed {seed}")
        print("kill  at s   shards  half-written  resume s  result")
        for k in range(kills):
            out, moment = Path(scratch, f"kill-{k}"), rng.uniform(0, seconds)
            process = start(command, out)
            while True:
                try:
                    process.wait(moment)
                except subprocess.TimeoutExpired:
                    break
                out = Path(scratch, f"{out.name}-early")  # this time the run was faster than its moment: once more, a little earlier
                process, moment = start(command, out), 0.9 * moment
            process.kill()
            process.wait()
            shards, halves = len(list(out.glob("*.safetensors"))), len(list(out.glob("*.tmp")))
            began = time.perf_counter()
            finish(start(command, out), out)
            found = digests(out)
            wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
            different += bool(wrong)
            print(f"{k + 1:4d}  {moment:5.2f}  {shards:6d}  {halves:12d}  {time.perf_counter() - began:8.1f}  "
                  f"{'identical' if not wrong else 'DIFFERS: ' + ', '.join(wrong)}", flush=True)  # fmt: skip
    print(f"{kills - different} of {kills} resumed runs are byte-identical to the undisturbed one")
    return different


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(model_path()), help="the embedded model")
    parser.add_argument("--recipe", default="w4-gptq")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the artifacts go while it runs")
    sys.exit(min(1, main(**vars(parser.parse_args()))))
