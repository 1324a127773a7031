"""The one door: y = x · Ŵᵀ + b for any Format, by whichever route was measured to be fastest on this machine.

    dense-cached     dequantize once, keep the copy: the speed and the memory of the original weight
    dense-streamed   dequantize at every call: the memory of the compressed weight
    parts            a combinator taken apart: x·Aᵀ + x·Bᵀ (each on its columns, for Columns), (x·Bᵀ)·Aᵀ or (x·t)·Aᵀ, every part through this same door;
                     and SiLU(gate) · up behind the product that makes both (gated.py)
    kronecker        a transform of the input by two small matrices
    rounded          the input on its grid and back (activations.py), then one of the routes above
    unrounded        where rounding 16-bit inputs costs more than integers save: the fastest route of the weight alone, which is what is taken and named
    …                one for every kernel of KERNELS

A kernel is a file with three functions, and a line in KERNELS:

    supports(format, x) → None, or the reason why not          format: what the layer holds; Rounded(leaf) where activations are rounded
    prepare(format, dtype) → anything                          once a module and dtype: the repacked weight
    matmul(x [m, in], prepared, bias) → [m, out]               every call: no host sync, nothing allocated but the result
    variants(format, m) → {name: another matmul}               optional: other tilings of the same kernel for m rows, raced by `compress tune` only

Routes that support a (format, dtype, device) are timed once per shape and bucket of rows (see tune.py), and one that is not dense is taken only
where it beat dense by MARGIN; one that fails when it is first tried is left out. The choice may change how bf16 and fp16 round. There is no choice,
only dense leaves dequantized in fp32, when x is fp32 (unless it is rounded: integers lose nothing), under autograd (packed routes have no backward)
and with policy "dense", which evaluation and verification use. In a trace (torch.compile) or while a CUDA graph is captured nothing can be measured
and nothing is kept: what an eager call chose before (linear.ready) is traced.
"""

import functools
import hashlib
import importlib
import importlib.metadata
import logging
import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import Columns, Dense, Format, IntGroup, Kronecker, Product, Scaled, Sum, Transformed, build
from . import fragment_layout, native, reference, tune
from .activations import Grid, Rounded, dequantize, quantize, rounded
from .gated import Gated
from .gated import apply as gate

log = logging.getLogger(__name__)
Policy = Literal["auto", "dense", "reference"]
Memory = Literal["auto", "keep", "bounded"]  # dense copies of compressed weights outlive a call: where no kernel takes the codes, where fastest, never
BUCKETS = (1, 4, 16, 64, 256)  # rows; each is timed at its upper edge, where packed routes gain least, and the last one has no end
LONG = 2048  # one more on CUDA: what wins at 256 rows there is bound by memory, a prompt by tensor cores. On a CPU both are bound by arithmetic
SMALL = 2**17  # a weight of fewer elements is not worth a measurement: dense
MARGIN = 1.05  # noise must not put a layer on a route that is slower than dense
COPY = 1.25  # and a second repacked copy of a weight, for other numbers of rows, is to be worth its memory
COMBINATORS = (Sum, Product, Transformed, Scaled, Columns)
UNROUNDED = "unrounded"
Weight = Format | Gated
Seen = Format | Gated | Rounded  # a weight as kernels see it
KERNELS = {  # device → name → file
    "cpu": {"cpu-native": "cpu_native", "cpu-pack": "cpu_int", "cpu-int8": "cpu_int8", "cpu-int-mm": "cpu_int_mm"},
    "cuda": {"triton-int": "triton_int", "triton-fragment": "fragment", "triton-lut": "triton_lut", "triton-trellis": "triton_trellis",
             "triton-2:4": "triton_sparse24", "triton-a8": "triton_a8", "triton-kronecker": "triton_transform", "triton-rotated": "triton_rotated",
             "cublas-a8": "cublas_a8", "cusparselt": "cusparselt"},
}  # fmt: skip


class How(NamedTuple):
    """How a layer may be multiplied."""

    policy: Policy = "auto"
    memory: Memory = "auto"
    activations: Grid | None = None  # None: the input as it is


AUTO = How()


@dataclass(frozen=True)
class Route:
    """One way to multiply: `prepare` once a module, (Format, dtype) → anything; `run` at every call, (x [m, in], prepared, bias)."""

    name: str
    prepare: Callable
    run: Callable
    tilings: tuple["Route", ...] = ()  # of the same kernel, named KERNEL/TILING


def _as_is(format: Format, dtype: torch.dtype) -> Format:
    return format


CACHED = Route("dense-cached", lambda format, dtype: format.dequantize(dtype), F.linear)
STREAMED = Route("dense-streamed", _as_is, lambda x, format, bias: _streamed(x, format, bias))
KRONECKER = Route("kronecker", lambda format, dtype: format.T, lambda x, T, bias: T.apply(x) if bias is None else T.apply(x) + bias)
REFERENCE = Route("reference", _as_is, lambda x, format, bias: reference.matmul(x, format, bias).to(x.dtype))


def matmul(x: Tensor, format: Weight | Callable[[], Weight], bias: Tensor | None = None, cache: dict | None = None, how: How = AUTO) -> Tensor:
    """x [..., in] → [..., out] in x's dtype. `format` may be a function that makes it, called only when a route has to be prepared.

    `cache` belongs to one module and one Format and holds what the routes prepared. It is not state: never saved or copied, and cleared by
    whoever replaces the Format's tensors or moves them to another device.
    """
    cache = {} if cache is None else cache
    shape = x.shape  # a small product takes 20 us: what can be is asked once here, and a matrix is not reshaped
    key = bucket(x.numel() // shape[-1], x.is_cuda), x.dtype, x.requires_grad and torch.is_grad_enabled(), how
    route, prepared = cache.get(key) or _open(x.reshape(-1, shape[-1]), format() if callable(format) else format, cache, key)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if route is CACHED:
        return F.linear(x, prepared, bias)
    if len(shape) == 2:
        return route.run(x, prepared, bias)
    y = route.run(x.reshape(-1, shape[-1]), prepared, bias)
    return y.view(*shape[:-1], y.shape[-1])


def bucket(m: int, cuda: bool = False) -> int:
    for edge in BUCKETS:
        if m <= edge:
            return edge
    return LONG if cuda else BUCKETS[-1]


def _open(x: Tensor, format: Weight, cache: dict, key: tuple) -> tuple[Route, Any]:
    """The route and what it prepared, for a kind of call that the cache does not know yet."""
    grad, how = key[2:]
    format = leaf(format, how)  # type: ignore[assignment]
    if torch.compiler.is_compiling() or x.is_meta or _captured():  # nothing is measured or kept in a trace, but what eager calls kept is used
        route = CACHED if (CACHED.name, x.dtype) in cache else plain(format, How("dense", "bounded", how.activations))
        return route, _prepared(route, format, x, dict(cache))
    held = {slot[0] for slot in cache if slot[1:] == (x.dtype,)} if how.memory == "auto" else set()
    route = choose(format, x, how._replace(policy="dense") if grad and how.policy == "auto" else how, held)
    if route.name == UNROUNDED:
        format = format.inner  # type: ignore[attr-defined]
        route = choose(format, x, how._replace(activations=None), held)
    cache[key] = route, _prepared(route, format, x, cache)
    return cache[key]


def _captured() -> bool:
    """Is a CUDA graph being captured? What a measurement asks of the device is forbidden then, and memory that is made belongs to the graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _prepared(route: Route, format: Seen, x: Tensor, cache: dict) -> Any:
    """What `route` made of the Format, once for all buckets of rows; routes of one kernel that differ in tiling only share it."""
    slot = (route.name.partition("/")[0], x.dtype)
    if slot not in cache:
        with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not serve a later backward
            cache[slot] = route.prepare(format, x.dtype)
    return cache[slot]


def choose(format: Seen, x: Tensor, how: How = AUTO, held: Collection[str] = ()) -> Route:
    """The route for x [m, in]: the only one there is, or the fastest at the edge of m's bucket. held: routes whose weight is there already."""
    if how.policy == "reference":
        return REFERENCE
    options = routes(format, x, how)
    if not worth(format, x, options, how):
        return options[0]
    us = measured(format, x, options, how)
    return fastest(options, {name: t * (COPY if held and name.partition("/")[0] not in held else 1) for name, t in us.items()})


def worth(format: Seen, x: Tensor, options: list[Route], how: How) -> bool:
    """Is there anything to measure?"""
    exact = x.dtype in (torch.float32, torch.float64) and not isinstance(format, Rounded)
    return len(options) > 1 and how.policy != "dense" and not exact and format.shape[0] * format.shape[1] >= SMALL


@torch.no_grad()
def tuned(format: Weight, x: Tensor, how: How = AUTO) -> dict[str, Any]:
    """What `compress tune` tells: every route and tiling raced at the edge of x's bucket, the one that is taken, and why other kernels are not there."""
    seen = leaf(format, how)
    options = routes(seen, x, how)
    us = measured(seen, x, options, how, tilings=True) if worth(seen, x, options, how) else {}
    return {"route": (fastest(options, us) if us else options[0]).name, "us": us,
            "refused": {name: why for name, why in reasons(seen, x).items() if why}}


def leaf(format: Weight, how: How) -> Seen:
    """The weight as kernels see it: a leaf says how its input is rounded, behind a transform of its own too; the parts of other combinators will."""
    rotated = isinstance(format, Transformed) and isinstance(format.transform, Kronecker) and not isinstance(format.inner, (*COMBINATORS, Dense))
    return format if isinstance(format, (*COMBINATORS, Gated)) and not rotated else rounded(format, how.activations)  # type: ignore[arg-type]


def fastest(options: list[Route], us: dict[str, float]) -> Route:
    """The fastest of what was measured, tilings of kernels included, if it beats the dense route, or unrounded inputs, by MARGIN."""
    every = {route.name: route for route in options} | {route.name: route for option in options for route in option.tilings}
    best = every[min(every.keys() & us, key=lambda name: us[name])]
    ran = [route for route in options if route.name in us]
    home = next((route for route in ran if route is CACHED or route.name == UNROUNDED), ran[0])
    return best if us[best.name] * MARGIN <= us[home.name] else home


def measured(format: Seen, x: Tensor, options: list[Route], how: How = AUTO, tilings: bool = False) -> dict[str, float]:
    """Microseconds of every option at the edge of x's bucket of rows, remembered or measured now; `tilings`: of those of each kernel too."""
    m = bucket(x.shape[0], x.is_cuda)
    rounding = f", {how.activations} activations" if how.activations and not isinstance(format, Rounded) else ""
    situation = (f"{tune.machine(x.device, torch.get_num_threads())} | torch {torch.__version__}, {edition(x.device.type)} | {format.describe()}{rounding} | "
                 f"{format.shape[0]}x{format.shape[1]} | {m} rows {str(x.dtype).removeprefix('torch.')}")  # fmt: skip
    entered = {route.name: route for route in [*options, *(route for option in options if tilings for route in option.tilings)]}

    def build() -> tune.Build:
        own = torch.Generator(x.device).manual_seed(0)  # the user's random numbers must not depend on what was measured
        probe = torch.randn(m, x.shape[1], device=x.device, generator=own).to(x.dtype)
        sides: list[tuple[Seen, dict]] = [(format, {}), (copied(format), {})]
        run = lambda route, side, held: functools.partial(route.run, probe, _prepared(route, side, probe, held), None)
        return lambda name: tuple(run(entered[name], *side) for side in sides)  # type: ignore[return-value]

    with torch.no_grad():
        return tune.timings(situation, x.device, build, entered, options[-1 if isinstance(format, Gated) else 0].name)


@functools.cache
def edition(device: str) -> str:
    """Of the kernels that are compiled on this machine: no measurement outlives what it was of."""
    if device != "cuda":
        return f"native {hashlib.sha256(native.SOURCE.read_bytes()).hexdigest()[:8]}"
    try:
        return f"triton {importlib.metadata.version('triton')}, layout {fragment_layout.LAYOUT}"
    except importlib.metadata.PackageNotFoundError:
        return "no triton"


def copied(format: Seen) -> Seen:
    """The same weight elsewhere in memory."""
    if isinstance(format, Rounded | Gated):
        return replace(format, inner=copied(format.inner))  # type: ignore[arg-type]
    return build(format.meta(), {name: t.clone() for name, t in format.tensors().items()})


def routes(format: Seen, x: Tensor, how: How = AUTO) -> list[Route]:
    """Whatever can run `format` on x, first what has to be beaten: the plain route; the gate in the kernel, whose one copy serves every number of rows."""
    kernels = [_kernel_route(name, x.device.type, format, x) for name, why in reasons(format, x).items() if why is None]
    small = format.shape[0] * format.shape[1] < SMALL
    if how.memory == "auto" and (how.policy == "dense" or small or not packed(format, x)):
        how = how._replace(memory="keep")
    options = [plain(format, how)]
    if isinstance(format, Rounded) and x.element_size() == 2 and not isinstance(format.inner, Transformed):
        run = functools.partial(_within, how._replace(activations=None))
        kernels.append(Route(UNROUNDED, _inner, run))
    if isinstance(format, (*COMBINATORS, Gated)) and how.activations:  # only its leaves know where the input is rounded
        return options
    if isinstance(format, Gated):
        return options if how.policy == "dense" else kernels + options
    if isinstance(format, COMBINATORS):
        chain = [factor.shape for factor in format.factors] if isinstance(format, Product) else []
        if how.memory == "keep" and (not chain or sum(a * b for a, b in chain) >= format.shape[0] * format.shape[1]):
            options.append(CACHED)  # written out, unless its factors are the smaller matrices
    return options + kernels


def packed(format: Seen, x: Tensor) -> bool:
    """Does some kernel multiply x by the codes, here or in a part?"""
    if isinstance(format, Sum | Product):
        return any(packed(part, x) for part in (format.terms if isinstance(format, Sum) else format.factors))
    if isinstance(format, Columns):
        return packed(format.first, x) or packed(format.second, x)
    inner = isinstance(format, Transformed | Scaled | Rounded | Gated) and packed(format.inner, x)
    return inner or any(why is None for why in reasons(format, x).values())


def reasons(format: Seen, x: Tensor) -> dict[str, str | None]:
    """Kernel of x's device → None if it runs this, else the reason in words."""
    files = KERNELS.get(x.device.type, {})
    return {name: module.supports(format, x) if (module := _kernel(file)) else f"{file}.py cannot be imported here" for name, file in files.items()}


def _kernel_route(name: str, device: str, format: Seen, x: Tensor) -> Route:
    module: Any = _kernel(KERNELS[device][name])
    variants = module.variants(format, bucket(len(x), x.is_cuda)) if hasattr(module, "variants") else {}
    return Route(name, module.prepare, module.matmul, tuple(Route(f"{name}/{v}", module.prepare, run) for v, run in variants.items()))


@functools.cache
def _kernel(file: str) -> ModuleType | None:
    """A kernel's module, or None said once: triton is not everywhere that torch is."""
    try:
        return importlib.import_module(f".{file}", __package__)
    except ImportError as error:
        log.warning("no kernel %s (%s): other routes are taken", file, error)
        return None


def plain(format: Seen, how: How) -> Route:
    """The route that always works and needs no measurement."""
    if isinstance(format, Gated):
        return Route("parts", _inner, functools.partial(_gated, how))
    if isinstance(format, Rounded) and isinstance(format.inner, Transformed):
        return Route("parts", lambda rounded, dtype: _parts(rounded.inner, dtype), functools.partial(_chain, how))
    if isinstance(format, Rounded):
        return Route("rounded", lambda rounded, dtype: (rounded.inner, rounded.grid, {}), functools.partial(_rounded, how._replace(activations=None)))
    if isinstance(format, COMBINATORS):
        run = _sum if isinstance(format, Sum) else _scaled if isinstance(format, Scaled) else _columns if isinstance(format, Columns) else _chain
        return Route("parts", _parts, functools.partial(run, how))
    if isinstance(format, Kronecker):
        return KRONECKER
    return CACHED if how.memory == "keep" else STREAMED


def _streamed(x: Tensor, format: Format, bias: Tensor | None) -> Tensor:
    """Integers slice by slice: memory that is new at every call costs more time than unpacking."""
    if not isinstance(format, IntGroup):
        return F.linear(x, format.dequantize(x.dtype), bias)
    return torch.cat([F.linear(x, W, None if bias is None else bias[at]) for at, W in format.dequantize_slices(x.dtype)], -1)


def _parts(format: Format, dtype: torch.dtype) -> list[tuple]:
    """What a combinator is taken apart into, each part with a cache of its own: (format, cache), of some (tensor, format, cache)."""
    if isinstance(format, Scaled):
        return [(format.columns, format.inner, {})]
    if isinstance(format, Columns):
        return [(place, part, {}) for place, part in zip(format.places(), (format.first, format.second), strict=True)]
    if isinstance(format, Transformed):  # A · Tᵀ is a chain too: the transform first, turned around
        T = format.transform
        return [(T.T if isinstance(T, Kronecker) else Dense(T.dequantize(dtype).T), {}), (format.inner, {})]
    return [(part, {}) for part in (format.terms if isinstance(format, Sum) else format.factors[::-1])]  # type: ignore[attr-defined]


def _sum(how: How, x: Tensor, parts: list, bias: Tensor | None) -> Tensor:
    biases = [bias] + [None] * (len(parts) - 1)
    return functools.reduce(operator.add, (matmul(x, part, b, cache, how) for (part, cache), b in zip(parts, biases, strict=True)))


def _chain(how: How, x: Tensor, parts: list, bias: Tensor | None) -> Tensor:
    for part, cache in parts[:-1]:
        x = matmul(x, part, None, cache, how)
    return matmul(x, parts[-1][0], bias, parts[-1][1], how)


def _scaled(how: How, x: Tensor, parts: list, bias: Tensor | None) -> Tensor:
    [(columns, inner, cache)] = parts
    return matmul((x * columns).to(x.dtype), inner, bias, cache, how)


def _columns(how: How, x: Tensor, parts: list, bias: Tensor | None) -> Tensor:
    first, second = (matmul(x[:, place], part, b, cache, how) for (place, part, cache), b in zip(parts, (bias, None), strict=True))
    return first + second


def _rounded(how: How, x: Tensor, prepared: tuple[Format, Grid, dict], bias: Tensor | None) -> Tensor:
    inner, grid, cache = prepared
    return matmul(dequantize(*quantize(x, grid), x.dtype), inner, bias, cache, how)


def _inner(format: Rounded | Gated, dtype: torch.dtype) -> tuple[Format, dict]:
    """What a wrapper is about, and a cache of its own."""
    return format.inner, {}


def _within(how: How, x: Tensor, prepared: tuple[Format, dict], bias: Tensor | None) -> Tensor:
    inner, cache = prepared
    return matmul(x, inner, bias, cache, how)


def _gated(how: How, x: Tensor, prepared: tuple[Format, dict], bias: Tensor | None) -> Tensor:
    return gate(_within(how, x, prepared, bias))
