"""How long does each way take here? Measured once, remembered in `tune.json`: {situation: {option: microseconds}}.

The situation is a sentence: machine, threads, torch, format, shape, rows, dtype. The file lives in $COMPRESS_CACHE, else
$XDG_CACHE_HOME/compress, else ~/.cache/compress; it is replaced whole, merged with what other processes wrote meanwhile, and a file that
cannot be read costs one warning and a new measurement. Tables in kernels/tune/*.json, of the same form, are measurements that come with the
package: what `compress tune` wrote on a machine of that name. A situation in no table is measured when it is met; kernels that have several
tilings use the one of their own rule of thumb until `compress tune` has raced the others. What fails when it is first tried, a kernel that does not
compile here or needs memory that is not there, is told once, left out, and tried again by the next process.
"""

import functools
import itertools
import json
import logging
import operator
import os
import platform
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

log = logging.getLogger(__name__)
SHIPPED = Path(__file__).parent / "tune"
Runs = Mapping[str, Callable[[], object]]
Build = Callable[[str], tuple[Callable[[], object], Callable[[], object]]]  # a name's run and its twin
FLUSH = 2**27  # bytes written before each run: more than any last-level cache, so weights come from memory as between two decoding steps


def race(runs: Runs, device: torch.device, seconds: float = 0.2, twins: Runs | None = None) -> dict[str, float]:
    """Median microseconds of each run. They take turns, so a neighbour's load slows all of them alike.

    twins: the same on other copies of the weights. On CPU each timed run comes behind its twin, and that behind a flush of the caches: code and
    allocator are warm, weights are not, as between two layers of a model. Without it the overhead of a small op would be counted tenfold.
    """
    flush = torch.empty(FLUSH, dtype=torch.uint8, device=device)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in (*runs.values(), *(twins or {}).values()):
        run()
    deadline = time.perf_counter() + seconds * len(runs) * (0.25 if flush.is_cuda else 1)  # a GPU's clock is its own, and the wait is not
    pairs, order = {name: [run, twins[name]] if twins else [run, None] for name, run in runs.items()}, random.Random(0)
    for turn in itertools.count():
        if turn >= 5 and time.perf_counter() > deadline:
            return {name: statistics.median(us) for name, us in samples.items()}
        for name in order.sample(list(runs), len(runs)):  # what ran before has its share in a time: it is another every turn
            samples[name].append(_once_us(*pairs[name], flush))  # type: ignore[arg-type]
            if twins:
                pairs[name].reverse()  # and so has where the copy lies in memory


def _once_us(run: Callable[[], object], twin: Callable[[], object] | None, flush: torch.Tensor) -> float:
    if flush.is_cuda:
        with torch.cuda.device(flush.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(8):  # long enough that the launch below is queued while the device still writes
                flush.zero_()
            start.record()
            run()
            end.record()
            end.synchronize()
            return 1e3 * start.elapsed_time(end)
    flush.zero_()
    if twin:
        twin()
    begin = time.perf_counter()
    run()
    return 1e6 * (time.perf_counter() - begin)


@functools.cache
def machine(device: torch.device, threads: int) -> str:
    """The processor's name; a CPU's with its vector width and the threads it may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    name = model[1] if model else platform.processor() or platform.machine()
    return f"{name} {torch.backends.cpu.get_cpu_capability()} x{threads}"


def table_file() -> Path:
    folder = os.environ.get("COMPRESS_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compress"
    return Path(folder) / "tune.json"


def read(file: Path) -> dict[str, dict[str, float]]:
    try:
        table = json.loads(file.read_text())
        return {situation: {option: float(us) for option, us in row.items()} for situation, row in table.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log.warning("ignoring %s (%s: %s); it is measured and written again", file, type(error).__name__, error)
        return {}


@functools.cache
def memory(file: Path) -> dict[str, dict[str, float]]:
    """What is known on this machine: one dict a file and process, updated in place by `timings`."""
    return functools.reduce(operator.or_, map(read, (*sorted(SHIPPED.glob("*.json")), file)), {})


@functools.cache
def unusable(file: Path) -> set[tuple[str, str]]:
    """(situation, option) that failed in this process."""
    return set()


def timings(situation: str, device: torch.device, build: Callable[[], Build], names: Iterable[str], needed: str) -> dict[str, float]:
    """Microseconds by name: remembered, or from a race between what `build` makes, which is dropped after it. `needed`: the option that must work."""
    file = table_file()
    table, failed = memory(file), unusable(file)
    names = [name for name in names if (situation, name) not in failed]
    if not set(names) <= table.get(situation, {}).keys():
        runs, twins = working(situation, device, build(), names, needed)
        us = race(runs, device, twins=twins)
        table[situation] = table.get(situation, {}) | us
        log.info("measured %s: %s", situation, ", ".join(f"{name} {t:.0f} us" for name, t in us.items()))
        write(file, read(file) | {situation: table[situation]})
    return {name: us for name, us in table[situation].items() if (situation, name) not in failed}


def working(situation: str, device: torch.device, build: Build, names: Iterable[str], needed: str) -> tuple[Runs, Runs]:
    """Runs and twins of whatever can be made and called once."""
    runs, twins = {}, {}
    for name in names:
        try:
            run, twin = build(name)
            for once in (run, twin):
                once()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:  # of torch, triton, ptxas, a driver: an option that fails is no reason for a model to
            if name == needed:
                raise
            unusable(table_file()).add((situation, name))
            log.warning("%s: %s does not run here (%s: %s); other routes are taken", situation, name, type(error).__name__, str(error).partition("\n")[0])
        else:
            runs[name], twins[name] = run, twin
    return runs, twins


def write(file: Path, table: dict) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False) as new:
            json.dump(table, new, indent=1, sort_keys=True)
        os.replace(new.name, file)
    except OSError as error:
        log.warning("cannot write %s (%s): the next process measures again; set COMPRESS_CACHE to a writable folder", file, error)
