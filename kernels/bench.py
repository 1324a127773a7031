"""python -m compress.kernels.bench [--device cpu|cuda] [--json FILE] [--minutes M] [--write docs/kernels.md]: every format beside a bf16 linear, in one run.

Weights come from memory, as between two decoding steps. CPU: the median of single calls that take turns, each behind a flush of the caches and a call
on another copy of the weight (tune.py). CUDA: one graph of up to 24 launches that rotate over at least 200 MB of distinct weights (an H200's L2 holds
60), the median of 5 to 20 replays divided by the launches, so neither Python nor launch latency is in the number.

A row is a layer as a model runs it: CompressedLinear beside nn.Linear, by the kernel that dispatch chose, which the row names. On CUDA there is also a row
for every kernel that supports the format (KERNELS of dispatch.py), one for every peer that is installed (peers.py), the ceilings of the device, and
the linears of an 8B model in one graph. GB/s counts bytes of the artifact; the error is relative to the fp64 product of the same codes (and the
same rounded input). Random data: speed does not depend on it, and nothing is downloaded.

A GPU is often lent for minutes. There kernels are compiled beforehand by as many processes as there are cores and room for, and with --json FILE figures are
written after every number of rows: the same command goes on from that file, and begins nothing behind --minutes. What fails, and what takes more than
5 times as long as the bf16 linear, becomes a note; neither ends the run. What a time is compared with is always of the same run.
"""

import argparse
import contextlib
import functools
import json
import math
import multiprocessing
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..formats import Dense, FloatBlock, Format, IntGroup, Lut, Sparse24, Trellis
from ..formats.trellis import stream_length
from ..linear import CompressedLinear
from . import dispatch, peers, reference, tune
from .activations import Grid, Rounded, dequantize, quantize, rounded
from .dispatch import How

SHAPES = {"cpu": [(1024, 384), (4096, 4096)],  # the yardstick's gate and up, an 8B model's o
          "cuda": [(4096, 4096), (57344, 8192), (28672, 4096), (8192, 8192), (6144, 4096), (4096, 14336), (10240, 8192), (8192, 28672)]}  # 8B and 70B
ROWS = {"cpu": (1, 4, 16, 64), "cuda": (1, 16, 64, 256, 2048, 4)}  # both in the order in which they are wanted
STACK = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]  # linears of one block of an 8B model
ROTATE = 200_000_000  # bytes
DENSE = "bf16 nn.Linear"
FAILURE = Exception  # of a kernel or peer: torch, triton, ptxas and cuBLAS have no other class in common
SLOW = 5  # times the bf16 linear: not measured, in a time that is lent
LAUNCH = 500  # us that Python may take for a call
MAKING = 40  # bytes a weight that a format takes at most while it is made and prepared


def integers(bits: int, group: int, asym: bool = False, levels: int | None = None) -> Callable:
    def make(shape: tuple[int, int], g: torch.Generator) -> IntGroup:
        n, top = 1 if group == -1 else shape[1] // group, levels or 2**bits
        draw = lambda *size: torch.randint(0, top, size, generator=g, dtype=torch.uint8, device=g.device)
        return IntGroup.pack(draw(*shape), _scales(shape[0], n, g), draw(shape[0], n) if asym else None, bits, levels)

    return make


def _scales(out: int, n: int, g: torch.Generator) -> Tensor:
    return (torch.rand(out, n, generator=g, device=g.device) + 0.5).to(torch.bfloat16)


def _nf4(shape: tuple[int, int], g: torch.Generator) -> Lut:
    codes = torch.randint(0, 16, shape, generator=g, dtype=torch.uint8, device=g.device)
    return Lut.pack(codes, torch.linspace(-1, 1, 16, device=g.device)[None].pow(3), _scales(shape[0], shape[1] // 64, g), "nf4")


def _floats(name: str) -> Callable:
    def make(shape: tuple[int, int], g: torch.Generator) -> FloatBlock:
        (out, n), draw = shape, lambda top, *size: torch.randint(0, top, size, generator=g, dtype=torch.uint8, device=g.device)
        if name == "fp8":
            return FloatBlock(draw(120, out, n), torch.rand(out, 1, generator=g, device=g.device), None, name)
        scales = draw(8, out, n // (32 if name == "mxfp4" else 16)) + (124 if name == "mxfp4" else 56)
        return FloatBlock(draw(256, out, n // 2), scales, None if name == "mxfp4" else torch.ones(1, device=g.device), name)

    return make


def _sparse(values: Callable | None) -> Callable:
    def make(shape: tuple[int, int], g: torch.Generator) -> Sparse24:
        half = shape[0], shape[1] // 2
        keep = torch.tensor([True, False, True, False], device=g.device).repeat(shape[0], shape[1] // 4)
        dense = lambda: Dense(torch.randn(half, generator=g, device=g.device).to(torch.bfloat16))
        return Sparse24.pack(keep, values(half, g) if values else dense(), 2, 4)

    return make


def _tables(bits: int) -> Callable:
    def make(shape: tuple[int, int], g: torch.Generator) -> Lut:
        table = torch.randn(shape[0], 2**bits, generator=g, device=g.device).to(torch.bfloat16)
        return Lut.pack(torch.randint(0, 2**bits, shape, generator=g, dtype=torch.uint8, device=g.device), table, None, f"lut{bits}")

    return make


def _trellis(shape: tuple[int, int], g: torch.Generator) -> Trellis:
    out, n = shape
    rates, draw = torch.arange(n, device=g.device) % 3 + 1, lambda *size: torch.randint(0, 256, size, generator=g, dtype=torch.uint8, device=g.device)
    codes = draw(n, out) & ((1 << rates) - 1).to(torch.uint8)[:, None]
    return Trellis.pack(codes, rates.to(torch.uint8), draw(n) % 32 + 112, torch.ones(1, device=g.device), 12, stream_length(out, 128), 0)


FORMATS: dict[str, tuple[Callable, Grid | None]] = {
    "int8 channel": (integers(8, -1), None), "int4 g128": (integers(4, 128), None), "int4 g128 asym": (integers(4, 128, True), None),
    "int3 g128": (integers(3, 128), None), "int2 g64 asym": (integers(2, 64, True), None), "ternary g128": (integers(2, 128, levels=3), None),
    "nf4 g64": (_nf4, None), "fp8 channel": (_floats("fp8"), None), "mxfp4": (_floats("mxfp4"), None), "nvfp4": (_floats("nvfp4"), None),
    "lut2": (_tables(2), None), "lut3": (_tables(3), None), "trellis2 L12": (_trellis, None), "2:4 bf16": (_sparse(None), None),
    "2:4 int4 g128": (_sparse(integers(4, 128)), None),
    "W8A8": (integers(8, -1), "int8"), "W4A8": (integers(4, -1), "int8"), "W4A8 g128": (integers(4, 128), "int8"),
    "W4A4": (integers(4, -1), "int4"), "fp8 A8": (_floats("fp8"), "fp8"),
}  # fmt: skip
CPU = [name for name in FORMATS if name not in ("trellis2 L12", "fp8 A8")]  # these run dense there
FRUGAL = "int4 g128, no copy"  # every other layer may keep a dense copy for long inputs (memory="keep")


class Line(NamedTuple):
    """One line of the table: the same multiplication on several copies of the weight."""

    name: str
    copies: list[Callable[[Tensor], Tensor]]
    nbytes: int
    chosen: Callable[[Tensor], str]
    exact: Callable[[Tensor], list[Tensor]] | None = None


def paths(device: str, shape: tuple[int, int], generator: torch.Generator, notes: list[str]) -> list[Line]:
    """Every path there is for a shape, its copies prepared as they are first called."""
    n, k = shape
    count = lambda nbytes: 2 if device == "cpu" else math.ceil(ROTATE / nbytes)

    def linear() -> nn.Linear:
        made = nn.Linear(k, n, bias=False, dtype=torch.bfloat16, device="meta").to_empty(device=device).requires_grad_(False)
        made.weight.copy_(torch.randn(n, k, generator=generator, device=device))
        return made

    found = [Line(DENSE, [linear() for _ in range(count(2 * n * k))], 2 * n * k, lambda x: "")]
    for name in (*(CPU if device == "cpu" else FORMATS), FRUGAL):
        made = name.removesuffix(", no copy")
        make, grid = FORMATS[made]
        try:
            format, how = make(shape, generator), How(memory="keep" if name == made else "bounded", activations=grid)
            exact = functools.partial(_exact, format, grid)
            layers = [CompressedLinear(dispatch.copied(format), how=how) for _ in range(count(format.nbytes()))]  # type: ignore[arg-type]
            found.append(Line(name, layers, format.nbytes(), functools.partial(_chosen, layers[0]), exact))
            if device != "cpu" and name == made:
                found += [Line(f"{name} {kernel}", [_kernel(copy, kernel) for copy in layers], format.nbytes(), lambda x: "", exact)
                          for kernel in dispatch.KERNELS[device]]  # fmt: skip
                found += [Line(f"{name} {peer}", copies, format.nbytes(), lambda x: "", exact)
                          for peer, copies in peers.installed(name, format, len(layers), notes).items()]  # fmt: skip
        except FAILURE as error:
            notes.append(f"{name}, {n}×{k}: {_said(error)}")
    return found


def _exact(format: Format, grid: Grid | None, x: Tensor) -> list[Tensor]:
    """The product, and that of the rounded input: dispatch does not round where that would be slower. Rows of the weight in parts: it is fp64."""
    inputs = [x.double(), *([dequantize(*quantize(x, grid), torch.float64)] if grid else [])]
    parts = reference.dense(format).split(4096)
    return [torch.cat([z @ W.double().T for W in parts], 1) for z in inputs]


def _chosen(layer: CompressedLinear, x: Tensor) -> str:
    return layer.cache[dispatch.bucket(len(x), x.is_cuda), x.dtype, False, layer.how][0].name


def _kernel(layer: CompressedLinear, name: str) -> Callable[[Tensor], Tensor]:
    """One kernel whatever dispatch would choose. Raises LookupError with its reason where it does not support the weight."""
    held: dict = {}

    def run(x: Tensor) -> Tensor:
        if not held:
            format: Format | Rounded = rounded(layer.format, layer.how.activations)
            if why := dispatch.reasons(format, x)[name]:
                raise LookupError(why)
            held["route"] = next(r for r in dispatch.routes(format, x, layer.how) if r.name == name)
            held["prepared"] = held["route"].prepare(format, x.dtype)
        return held["route"].run(x, held["prepared"], None)

    return run


def graph_us(copies: list[Callable[[Tensor], Tensor]], x: Tensor, us: float | None = None) -> float:
    """Microseconds a launch, from one CUDA graph that visits every copy. Raises TimeoutError where that is SLOW times `us`."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # measure, prepare, compile and let cuBLAS allocate before anything is captured
        for run in copies:
            run(x)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for run in copies[:8]:
            run(x)
        end.record()
        end.synchronize()
    torch.cuda.current_stream().wait_stream(side)
    once = 1e3 * start.elapsed_time(end) / len(copies[:8])
    if us is not None and once > SLOW * us + LAUNCH:
        raise TimeoutError(f"{once:.0f} us a call, the bf16 linear {us:.0f}: not measured")
    launches = max(len(copies), min(24, math.ceil(20_000 / once)))
    return capture_us(lambda: [copies[i % len(copies)](x) for i in range(launches)]) / launches


def capture_us(body: Callable[[], object], most: float = 100_000) -> float:
    """Median microseconds of a replay of everything that `body` launches, of 20 replays, or of 5 and as many more as `most` us allow."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    samples: list[float] = []
    for _ in range(23):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(1e3 * start.elapsed_time(end))
        if len(samples) >= 8 and sum(samples) > most:
            break
    return statistics.median(samples[3:])


def measure(found: list[Line], x: Tensor, notes: list[str]) -> dict[str, float]:
    """Microseconds of one call of each path."""
    works: dict[str, float | Line] = {}
    for path in found:
        try:
            for run in path.copies[:2]:
                run(x)
            works[path.name] = graph_us(path.copies, x, us=works.get(DENSE)) if x.is_cuda else path  # type: ignore[arg-type]
        except FAILURE as error:
            notes.append(f"{path.name}, {x.shape[0]} rows of {x.shape[1]}: {_said(error)}")
    if x.is_cuda:
        return works  # type: ignore[return-value]
    runs, twins = ({name: functools.partial(path.copies[i], x) for name, path in works.items()} for i in (0, 1))  # type: ignore[union-attr]
    return tune.race(runs, x.device, twins=twins)


def _said(error: Exception) -> str:
    """One line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@torch.inference_mode()
def build(device: str, shape: tuple[int, int], name: str) -> None:
    """Call every kernel of a format once for every number of rows, in a process of its own: what triton compiles stays on disk."""
    with contextlib.suppress(FAILURE):  # told where it is measured, like all that follow
        make, grid = FORMATS[name]
        layer = CompressedLinear(make(shape, torch.Generator(device).manual_seed(0)), how=How(activations=grid))
        for kernel in dispatch.KERNELS[device]:
            run = _kernel(layer, kernel)
            for m in ROWS[device]:
                with contextlib.suppress(FAILURE):
                    run(torch.zeros(m, shape[1], device=device, dtype=torch.bfloat16))
            _freed(device)
    layer = run = None
    _freed(device)


def _freed(device: str) -> None:
    """To other processes."""
    if device == "cuda":
        torch.cuda.empty_cache()


def build_all(pool: ProcessPoolExecutor, device: str, shape: tuple[int, int], free: int) -> None:
    """Every format, as many at a time as `free` bytes of the device hold."""
    room, left = max(1, free // (MAKING * shape[0] * shape[1])), list(FORMATS)
    running: set[Future] = set()
    while left or running:
        while left and len(running) < room:
            running.add(pool.submit(build, device, shape, left.pop(0)))
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()


@torch.inference_mode()
def bench(device: str, notes: list[str], records: list[dict], until: float = math.inf, keep: Callable[[], object] = lambda: None) -> list[str]:
    """Append a record for every path, shape and number of rows that `records` lacks, and tell in `notes` what did not run; `keep` is called behind each
    number of rows. Returns what is left of it when `until` (of time.monotonic) comes."""
    generator = torch.Generator(device).manual_seed(0)
    known, left = {(*r["shape"], r["m"]) for r in records}, []
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:  # starts nothing before it is given work
        for shape in SHAPES[device]:
            found: list[Line] = []
            _freed(device)
            for m in (m for m in ROWS[device] if (*shape, m) not in known):
                if time.monotonic() >= until:
                    left.append(f"{shape[0]}×{shape[1]} with {m} rows")
                    continue
                if not found:
                    if device == "cuda":
                        try:
                            build_all(pool, device, shape, torch.cuda.mem_get_info()[0])
                        except FAILURE as error:  # a process that died: then kernels are compiled as they are measured
                            notes.append(f"compiling {shape[0]}×{shape[1]} beforehand: {_said(error)}")
                    found = paths(device, shape, generator, notes)
                x = torch.randn(m, shape[1], generator=generator, device=device).to(torch.bfloat16)
                records += _records(found, shape, x, notes)
                keep()
    return left


def _records(found: list[Line], shape: tuple[int, int], x: Tensor, notes: list[str]) -> list[dict]:
    """Every path of a shape, measured on x."""
    us, records = measure(found, x, notes), []
    for path in found:
        if path.name in us and DENSE in us:
            few, error = x[:4], None
            try:
                if path.exact:
                    y = path.copies[0](x)[:4].double()
                    error = min(((y - exact).norm() / exact.norm()).item() for exact in path.exact(few))
            except FAILURE as failure:
                notes.append(f"{path.name}, error at {len(x)} rows of {x.shape[1]}: {_said(failure)}")
            records.append({"shape": list(shape), "m": len(x), "path": path.name, "kernel": path.chosen(x), "us": us[path.name],
                            "gb_s": path.nbytes / us[path.name] / 1e3, "speedup": us[DENSE] / us[path.name], "error": error})  # fmt: skip
    return records


@torch.inference_mode()
def ceilings(device: str, notes: list[str]) -> dict[str, float]:
    """What the device can do at most: read and copy GB/s, TFLOP/s of square products, on CUDA microseconds of an empty node of a graph."""
    size = 2**28 if device == "cpu" else 2**33
    a = torch.ones(size // 4, device=device)
    if device == "cpu":
        b, w = torch.empty_like(a), torch.ones(2048, 2048, dtype=torch.bfloat16)
        us = tune.race({"read": a.sum, "copy": lambda: b.copy_(a), "bf16": lambda: w @ w}, a.device, seconds=0.5)
        return {"read GB/s": size / us["read"] / 1e3, "copy GB/s": 2 * size / us["copy"] / 1e3, "bf16 TFLOP/s": 2 * 2048**3 / us["bf16"] / 1e6}
    one, half, n = a[:1], a[: len(a) // 2], 8192
    w, s = torch.randn(n, n, device=device).to(torch.bfloat16), torch.ones(n, 1, device=device)
    e, q, found = w.to(torch.float8_e4m3fn), w.to(torch.int8), {}
    flops = 2 * n**3 / 1e6
    for name, run, figure in (
        ("read GB/s", a.sum, lambda us: size / us / 1e3), ("copy GB/s", lambda: a[len(a) // 2 :].copy_(half), lambda us: size / us / 1e3),
        ("us of an empty node", lambda: [one.add_(0) for _ in range(200)], lambda us: us / 200), ("bf16 TFLOP/s", lambda: w @ w.t(), lambda us: flops / us),
        ("_scaled_mm fp8 TFLOP/s", lambda: torch._scaled_mm(e, e.t(), s, s.t(), out_dtype=torch.bfloat16), lambda us: flops / us),
        ("_int_mm TFLOP/s", lambda: torch._int_mm(q, q.t()), lambda us: flops / us)):  # fmt: skip
        try:
            run()
            found[name] = figure(capture_us(run))
        except FAILURE as error:
            notes.append(f"{name}: {_said(error)}")
    return found


@torch.inference_mode()
def stack(notes: list[str], blocks: int = 32) -> dict[str, float]:
    """Milliseconds of all linears of an 8B model's blocks, one token, in one graph."""
    generator = torch.Generator("cuda").manual_seed(0)
    times = {}
    for name in (DENSE, "int4 g128", "int3 g128", "int2 g64 asym"):
        layers: list = []
        _freed("cuda")
        try:
            for _ in range(blocks):
                for n, k in STACK:
                    dense = lambda n=n, k=k: nn.Linear(k, n, bias=False, dtype=torch.bfloat16, device="cuda")
                    made = dense() if name == DENSE else CompressedLinear(FORMATS[name][0]((n, k), generator))
                    layers.append((made, torch.randn(1, k, device="cuda", dtype=torch.bfloat16)))
            for layer, x in layers:
                layer(x)
            times[name] = capture_us(lambda layers=layers: [layer(x) for layer, x in layers]) / 1e3
        except FAILURE as error:
            notes.append(f"linears of an 8B model, {name}: {_said(error)}")
    return times


def markdown(machine: str, result: dict) -> str:
    """The tables of one run."""
    said = ", ".join(f"{name} {value:.3g}" for name, value in result["ceilings"].items())
    text = [f"{machine}, torch {torch.__version__}. Ceilings: {said}.", ""]
    records = result["rows"]
    for shape in dict.fromkeys(tuple(r["shape"]) for r in records):
        here = {(r["path"], r["m"]): r for r in records if tuple(r["shape"]) == shape}
        rows = sorted({m for _, m in here})
        text += [f"| {shape[0]}×{shape[1]} | " + " | ".join(f"{m} row{'s' * (m > 1)}" for m in rows) + " | error |", "|---" * (len(rows) + 2) + "|"]
        for path in dict.fromkeys(path for path, _ in here):
            cells = [_cell(here.get((path, m)), path == DENSE, result["ceilings"].get("read GB/s")) for m in rows]
            errors = [r["error"] for m in rows if (r := here.get((path, m))) and r["error"] is not None]
            text.append(f"| {path} | {' | '.join(cells)} | {f'{max(errors):.1e}' if errors else ''} |")
        text.append("")
    if stacked := result.get("stack"):
        text += ["| linears of an 8B model, one token | ms |", "|---|---|", *(f"| {name} | {ms:.3f} |" for name, ms in stacked.items()), ""]
    return "\n".join(text)


def _cell(r: dict | None, dense: bool, read: float | None) -> str:
    if r is None:
        return "–"
    if dense:
        return f"{r['us']:.0f} µs"
    share = f", {100 * r['gb_s'] / read:.0f} %" if read and r["m"] <= 16 else ""
    return f"**{r['speedup']:.2f}×**{share}{' ' + r['kernel'] if r['kernel'] else ''}"


MARK = "<!-- bench {} -->"


def write(file: Path, device: str, text: str) -> None:
    """Put the tables between the two marks of this device in a document, or behind its end."""
    old, mark = file.read_text() if file.exists() else "# Kernels\n", MARK.format(device)
    before, _, rest = old.partition(mark)
    after = rest.partition(mark)[2]
    file.write_text(f"{before}{mark}\n\n{text}\n{mark}{after or chr(10)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="every figure, and why a kernel or peer did not run; what it holds of this machine is not measured again")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing behind so many")
    parser.add_argument("--write", type=Path, help="put the tables into this document")
    args = parser.parse_args()
    until = time.monotonic() + 60 * args.minutes
    machine = tune.machine(torch.device(args.device), torch.get_num_threads())
    if args.device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        machine += f", CUDA {torch.version.cuda}, driver {subprocess.run(query, capture_output=True, text=True).stdout.split()[0]}"
        machine += "".join(f", {name} {version}" for name, version in peers.versions().items())
    result: dict = json.loads(args.json.read_text()) if args.json and args.json.is_file() else {"machine": machine, "torch": torch.__version__}
    if (result["machine"], result["torch"]) != (machine, torch.__version__):
        raise SystemExit(f"{args.json} holds figures of {result['machine']} with torch {result['torch']}, this is {machine} with {torch.__version__}; "
                         "name another file")  # fmt: skip
    keep = lambda: args.json and args.json.write_text(json.dumps(result, indent=1))
    notes = result.setdefault("notes", [])
    if "ceilings" not in result:
        result["ceilings"] = ceilings(args.device, notes)
        keep()
    left = bench(args.device, notes, result.setdefault("rows", []), until, keep)
    if args.device == "cuda" and "stack" not in result:  # last: its kernels are compiled by now
        if time.monotonic() < until:
            result["stack"] = stack(notes)
        else:
            left.append("linears of an 8B model")
    text = markdown(machine, result)
    print(text)
    keep()
    if args.write:
        write(args.write, args.device, text)
    if left:
        then = "the same command goes on" if args.json else "name a --json FILE to go on from"
        print(f"\nnot measured within {args.minutes:g} minutes: {', '.join(left)}; {then}")


if __name__ == "__main__":
    main()
