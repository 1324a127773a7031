"""python -m compress.kernels.bench [--device cpu|cuda] [--json]: microseconds of every route, next to F.linear bf16 in the same run.

Weights come from memory, as between two decoding steps. CPU: the median of single runs that take turns, the caches overwritten before each.
CUDA: one graph of at least 24 launches rotating over at least 200 MB of distinct weights (an H200's L2 holds 60), the median of 20 replays
divided by the launches, so neither Python nor launch latency is in the number. GB/s counts the bytes of the artifact (codes, scales,
zeros); the error is relative to the fp64 product of the same codes. Random data: speed does not depend on it, and nothing is downloaded.
"""

import argparse
import functools
import json
import math
import statistics

import torch
from torch import Tensor

from ..formats import Dense, Format, IntGroup, build
from . import dispatch, reference, tune

FORMATS = {"int8 channel": (8, -1), "int4 g128": (4, 128), "int4 g128 asym": (4, 128), "int3 g128": (3, 128), "int2 g64 asym": (2, 64),
           "ternary g128": (2, 128)}  # fmt: skip
SHAPES = {"cpu": [(2048, 2048), (5632, 2048)],
          "cuda": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]}  # an 8B model's qkv, o, gate and up, down  # fmt: skip
ROWS = {"cpu": (1, 4, 16), "cuda": (1, 4, 16, 64, 256, 2048)}
ROTATE = 200_000_000  # bytes


def random_format(name: str, shape: tuple[int, int], generator: torch.Generator) -> IntGroup:
    bits, group = FORMATS[name]
    levels, groups = 3 if "ternary" in name else 2**bits, 1 if group == -1 else shape[1] // group
    codes = torch.randint(0, levels, shape, generator=generator, dtype=torch.uint8, device=generator.device)
    scales = (torch.rand(shape[0], groups, generator=generator, device=generator.device) + 0.5).to(torch.bfloat16)
    zeros = torch.randint(0, levels, (shape[0], groups), generator=generator, dtype=torch.uint8, device=generator.device)
    return IntGroup.pack(codes, scales, zeros if "asym" in name else None, bits, levels)


def graph_us(route: dispatch.Route, x: Tensor, weights: list) -> float:
    """Microseconds a launch, from one CUDA graph that visits every weight."""
    launches = max(24, len(weights))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compile and let cuBLAS allocate before anything is captured
        route.run(x, weights[0], None)
        route.run(x, weights[-1], None)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            route.run(x, weights[i % len(weights)], None)
    samples = []
    for replay in range(23):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 3:
            samples.append(1e3 * start.elapsed_time(end) / launches)
    return statistics.median(samples)


def clones(format: Format, count: int) -> list[Format]:
    return [build(format.meta(), {name: t.clone() for name, t in format.tensors().items()}) for _ in range(count)]


def measure(entries: dict[str, tuple[dispatch.Route, Format]], x: Tensor) -> dict[str, float]:
    """Microseconds of one call of each entry."""
    if x.is_cuda:
        return {name: graph_us(route, x, [route.prepare(copy, x.dtype) for copy in clones(format, math.ceil(ROTATE / format.nbytes()))])
                for name, (route, format) in entries.items()}  # fmt: skip
    return tune.race({name: functools.partial(route.run, x, route.prepare(format, x.dtype), None) for name, (route, format) in entries.items()},
                     x.device, seconds=1.0)  # fmt: skip


@torch.no_grad()
def bench(device: str) -> list[dict]:
    generator = torch.Generator(device).manual_seed(0)
    rows = []
    for N, K in SHAPES[device]:
        dense = Dense(torch.randn(N, K, generator=generator, device=device).to(torch.bfloat16))
        formats = {name: random_format(name, (N, K), generator) for name in FORMATS}
        for M in ROWS[device]:
            x = torch.randn(M, K, generator=generator, device=device).to(torch.bfloat16)
            entries = {"bf16 F.linear": (dispatch.CACHED, dense)}
            for name, format in formats.items():  # routes()[0] is the dense one, which is the line above
                entries |= {f"{name} {route.name}": (route, format) for route in dispatch.routes(format, x)[1:]}
            us = measure(entries, x)
            for name, (route, format) in entries.items():
                y, exact = route.run(x, route.prepare(format, x.dtype), None), reference.matmul(x, format, dtype=torch.float64)
                rows.append({"shape": [N, K], "m": M, "path": name, "us": us[name], "gb_s": format.nbytes() / us[name] / 1e3,
                             "speedup": us["bf16 F.linear"] / us[name],
                             "error": ((y.double() - exact).norm() / exact.norm()).item()})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args()
    machine = tune.machine(torch.device(args.device), torch.get_num_threads())
    rows = bench(args.device)
    if args.json:
        print(json.dumps({"machine": machine, "torch": torch.__version__, "rows": rows}, indent=1))
        return
    print(f"{machine}, torch {torch.__version__}\n{'shape':>12} {'m':>5} {'path':<26} {'us':>8} {'GB/s':>7} {'x bf16':>7} {'error':>8}")
    for r in rows:
        print(f"{r['shape'][0]:>6}x{r['shape'][1]:<5} {r['m']:>5} {r['path']:<26} "
              f"{r['us']:>8.1f} {r['gb_s']:>7.1f} {r['speedup']:>7.2f} {r['error']:>8.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
