"""The one door: y = x · Ŵᵀ + b for any Format, by whichever route was measured to be fastest on this machine.

    dense-cached     dequantize once, keep the copy: the speed and the memory of the original weight
    dense-streamed   dequantize at every call: the memory of the compressed weight
    triton-int       codes read by the GPU kernel as they lie in the artifact
    triton-fragment  integers, tables and floats, repacked at load into the order of tensor-core registers; a low-rank term added in the same kernel
    cpu-pack         codes read by the int4 / int8 matmuls that torch ships for CPU
    parts            a combinator taken apart: x·Aᵀ + x·Bᵀ (each on its columns, for Columns), (x·Bᵀ)·Aᵀ or (x·t)·Aᵀ, every part through this same door

Routes that support a (format, dtype, device) are timed once per shape and bucket of rows (see tune.py), so a packed route runs only where
it beat dense. The choice may change how bf16 and fp16 round. There is no choice, only dense leaves dequantized in fp32, when x is fp32,
under autograd (packed routes have no backward), inside a trace (torch.compile, meta) and with policy="dense", which evaluation and
verification use.
"""

import functools
import importlib
import logging
import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import Columns, Dense, Format, IntGroup, Product, Scaled, Sum, Transformed
from . import cpu_int, reference, tune

log = logging.getLogger(__name__)
Policy = Literal["auto", "dense", "reference"]
Memory = Literal["keep", "bounded"]  # bounded: no dense copy of a compressed weight outlives a call
BUCKETS = (1, 4, 16, 64, 256)  # rows; each is timed at its upper edge, where packed routes gain least, and the last one has no end
SMALL = 2**18  # a weight of fewer elements stays in cache whatever its form: dense, nothing to measure


@dataclass(frozen=True)
class Route:
    """One way to multiply: `prepare` once a module, (Format, dtype) → anything; `run` at every call, (x [m, in], prepared, bias)."""

    name: str
    prepare: Callable
    run: Callable


def _as_is(format: Format, dtype: torch.dtype) -> Format:
    return format


CACHED = Route("dense-cached", lambda format, dtype: format.dequantize(dtype), F.linear)
STREAMED = Route("dense-streamed", _as_is, lambda x, format, bias: F.linear(x, format.dequantize(x.dtype), bias))
REFERENCE = Route("reference", _as_is, lambda x, format, bias: reference.matmul(x, format, bias).to(x.dtype))
CPU_PACK = Route("cpu-pack", lambda format, dtype: cpu_int.prepare(format), cpu_int.matmul)


def matmul(x: Tensor, format: Format, bias: Tensor | None = None, cache: dict | None = None, *,
           policy: Policy = "auto", memory: Memory = "keep") -> Tensor:  # fmt: skip
    """x [..., in] → [..., out] in x's dtype.

    `cache` belongs to one module and one Format and holds what the routes prepared. It is not state: never saved or copied, and cleared by
    whoever replaces the Format's tensors or moves them to another device.
    """
    cache = {} if cache is None else cache
    rows = x.reshape(-1, x.shape[-1])
    bias = None if bias is None else bias.to(x.dtype)
    if torch.compiler.is_compiling() or x.is_meta:  # nothing is measured or kept in a trace, but what eager calls kept is used
        route = CACHED if _slot(CACHED, x) in cache else plain(format, "dense", "bounded")
        return route.run(rows, _prepared(route, format, x, dict(cache)), bias).view(*x.shape[:-1], format.shape[0])
    if policy == "auto" and x.requires_grad and torch.is_grad_enabled():
        policy = "dense"
    choice = (bucket(rows.shape[0]), x.dtype, x.device, policy, memory)
    if choice not in cache:
        route = choose(format, rows, policy=policy, memory=memory)
        cache[choice] = route, _prepared(route, format, x, cache)
    route, prepared = cache[choice]
    return route.run(rows, prepared, bias).view(*x.shape[:-1], format.shape[0])


def _slot(route: Route, x: Tensor) -> tuple:
    return route.name, x.dtype, x.device


def _prepared(route: Route, format: Format, x: Tensor, cache: dict):
    slot = _slot(route, x)
    if slot not in cache:
        with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not serve a later backward
            cache[slot] = route.prepare(format, x.dtype)
    return cache[slot]


def bucket(m: int) -> int:
    return next((edge for edge in BUCKETS if m <= edge), BUCKETS[-1])


def choose(format: Format, x: Tensor, *, policy: Policy = "auto", memory: Memory = "keep") -> Route:
    """The route for x [m, in]: the only one there is, or the fastest at the edge of m's bucket."""
    if policy == "reference":
        return REFERENCE
    options = routes(format, x, policy, memory)
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()  # nor can a CUDA graph be captured around a measurement
    if len(options) == 1 or policy == "dense" or x.dtype in (torch.float32, torch.float64) or capturing:
        return options[0]
    if format.shape[0] * format.shape[1] < SMALL:
        return options[0]
    m = bucket(x.shape[0])
    situation = (f"{tune.machine(x.device, torch.get_num_threads())} | torch {torch.__version__} | {format.describe()} | "
                 f"{format.shape[0]}x{format.shape[1]} | {m} rows {str(x.dtype).removeprefix('torch.')}")  # fmt: skip

    def build() -> dict[str, Callable[[], Tensor]]:
        own = torch.Generator(x.device).manual_seed(0)  # the user's random numbers must not depend on what was measured
        probe = torch.randn(m, x.shape[1], device=x.device, generator=own).to(x.dtype)
        return {r.name: functools.partial(r.run, probe, r.prepare(format, x.dtype), None) for r in options}

    with torch.no_grad():
        us = tune.timings(situation, x.device, build, [route.name for route in options])
    return min(options, key=lambda route: us[route.name])


def plain(format: Format, policy: Policy, memory: Memory) -> Route:
    """The route that always works and needs no measurement."""
    if isinstance(format, (Sum, Product, Transformed)):
        return _parts(format, policy, memory)
    if isinstance(format, Scaled):
        return _scaled(policy, memory)
    if isinstance(format, Columns):
        return _columns(policy, memory)
    return CACHED if memory == "keep" else STREAMED


def routes(format: Format, x: Tensor, policy: Policy = "auto", memory: Memory = "keep") -> list[Route]:
    """Whatever can run `format` on x, the plain route first."""
    options = [plain(format, policy, memory)]
    if isinstance(format, IntGroup):
        if cpu_int.supports(format, x) is None:
            options.append(CPU_PACK)
        if x.is_cuda and (triton_int := _kernel("triton_int")) and triton_int.supports(format, x) is None:
            options.append(Route("triton-int", _as_is, triton_int.matmul))
    elif options[0] is not CACHED and memory == "keep":  # a combinator may be written out, unless its factors are the smaller matrices
        chain = [factor.shape for factor in format.factors] if isinstance(format, Product) else []
        if not chain or sum(a * b for a, b in chain) >= format.shape[0] * format.shape[1]:
            options.append(CACHED)
    if x.is_cuda and (fragment := _kernel("fragment")) and fragment.supports(format, x) is None:
        options.append(Route("triton-fragment", fragment.prepare, fragment.matmul))
    return options


def _parts(format: Format, policy: Policy, memory: Memory) -> Route:
    """Apply each part through the same door, each with a cache of its own."""

    def prepare(format: Format, dtype: torch.dtype) -> list[tuple[Format, dict]]:
        if isinstance(format, Sum):
            parts = format.terms
        elif isinstance(format, Product):
            parts = format.factors[::-1]
        else:  # A · Tᵀ is a chain too: the transform first, turned around
            parts = (Dense(format.transform.dequantize(dtype).T), format.inner)
        return [(part, {}) for part in parts]

    def chain(x: Tensor, parts: list[tuple[Format, dict]], bias: Tensor | None) -> Tensor:
        for part, cache in parts[:-1]:
            x = matmul(x, part, None, cache, policy=policy, memory=memory)
        return matmul(x, parts[-1][0], bias, parts[-1][1], policy=policy, memory=memory)

    def total(x: Tensor, parts: list[tuple[Format, dict]], bias: Tensor | None) -> Tensor:
        biases = [bias] + [None] * (len(parts) - 1)
        ys = (matmul(x, part, b, cache, policy=policy, memory=memory) for (part, cache), b in zip(parts, biases, strict=True))
        return functools.reduce(operator.add, ys)

    return Route("parts", prepare, total if isinstance(format, Sum) else chain)


def _scaled(policy: Policy, memory: Memory) -> Route:
    """Multiply the input by t, then the inner weight through this same door."""

    def run(x: Tensor, prepared: tuple[Scaled, dict], bias: Tensor | None) -> Tensor:
        format, cache = prepared
        return matmul((x * format.columns).to(x.dtype), format.inner, bias, cache, policy=policy, memory=memory)

    return Route("parts", lambda format, dtype: (format, {}), run)


def _columns(policy: Policy, memory: Memory) -> Route:
    """Either part on its share of the inputs, through this same door."""

    def prepare(format: Columns, dtype: torch.dtype) -> list[tuple[Tensor, Format, dict]]:
        return [(place, part, {}) for place, part in zip(format.places(), (format.first, format.second), strict=True)]

    def run(x: Tensor, parts: list[tuple[Tensor, Format, dict]], bias: Tensor | None) -> Tensor:
        first, second = (matmul(x[:, place], part, b, cache, policy=policy, memory=memory) for (place, part, cache), b in zip(parts, (bias, None), strict=True))
        return first + second

    return Route("parts", prepare, run)


@functools.cache
def _kernel(file: str) -> ModuleType | None:
    """A kernel's module, or None said once: triton is not everywhere that torch is."""
    try:
        return importlib.import_module(f".{file}", __package__)
    except ImportError as error:
        log.warning("no kernel %s (%s): other routes are taken", file, error)
        return None
