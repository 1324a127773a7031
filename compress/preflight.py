"""Plan: what a run will make and cost, from the configuration and the safetensors headers, before a weight is read.

Bytes are exact: each method builds its format on the meta device and weighs it. Memory and time are estimates: the largest things that are
resident together, and the floating-point work divided by what this machine does in a tenth of a second of matrix products; or, with `probe`, by what it
does when one real layer is solved by each method.
"""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase

import torch

from .arch import LINEARS, routers, table_entry
from .calibration.guidance import LOGITS
from .calibration.statistics import Stats
from .checkpoint import Checkpoint
from .errors import CompressError
from .experts import unfuse_experts
from .export import as_floats, can_export
from .healing.adapters import planned
from .healing.options import Heal
from .linear import get_weight
from .methods import GPTQ, LNQ, TrellisCoding
from .precision import mixed
from .recipe import Recipe, Step, nearest
from .walk import KEEP_LIMIT, RELEASE, STATS_LIMIT, bundles, pieces

OVERHEAD = 220 << 20  # bytes: importing compress, reading the configuration and the text (torch 2.13, transformers 5.23)
WIDTHS = 3  # times the work of a layer that comparing widths takes, about: more of them than that, but plain
EVAL_TOKENS = 2048  # tokens of one forward during evaluation: two sets of logits of that many rows are in memory
PRODUCTS = 70 << 20  # bytes of the compiled products that are kept for routed experts (calibration/hidden.py: few_kernels)
SCHEDULE_WINDOWS = 32  # what outputs and layers count is an average over so many; only tokens that are weighed each need a gradient


@dataclass(frozen=True)
class PlannedLayer:
    name: str
    shape: tuple[int, int]  # [out, in]
    method: str | None  # None: stays as it is
    describe: str
    bytes_before: int
    bytes_after: int

    @property
    def bits(self) -> float:
        return 8 * self.bytes_after / (self.shape[0] * self.shape[1])


@dataclass(frozen=True)
class Plan:
    model: str
    recipe: str
    layers: tuple[PlannedLayer, ...]
    parameters: int
    bytes_before: int  # of all tensors
    bytes_after: int
    linear_bits: float  # bits per weight of the linears that are compressed
    model_bits: float  # bits per weight of the whole model
    peak_ram: int  # bytes above an interpreter that has imported torch and transformers
    evaluation_ram: int  # bytes that `eval`, `compare` and `report` hold: both models in fp32 and two sets of logits; --stream holds a block of each
    disk: int  # bytes the artifact takes
    seconds: float  # estimate on this machine
    warnings: tuple[str, ...] = field(default=())
    consumers: dict[str, str] = field(default_factory=dict)  # `export --to` → "" where it will hold the result, else why not
    as_floats: dict[str, str] = field(default_factory=dict)  # `export --to` → the layers that it holds multiplied out, "" for none

    def to_json(self) -> dict:
        return asdict(self)


def linears(source: Checkpoint) -> list[tuple[str, int, tuple[int, int]]]:
    """(path, block, [out, in]) of every linear of the blocks that a method may touch, experts one by one."""
    arch, found = table_entry(source.model), []
    for i in range(source.num_blocks):
        block = copy.deepcopy(source.model.get_submodule(source.block_name(i)))
        unfuse_experts(block)
        left_out = set(arch.skip if arch else routers(block))
        for path, module in block.named_modules():
            if isinstance(module, LINEARS) and path not in left_out:
                shape = tuple(module.weight.shape)
                found.append((f"{source.block_name(i)}.{path}", i, shape if isinstance(module, torch.nn.Linear) else shape[::-1]))
    return found


def bundled(source: Checkpoint, recipe: Recipe, found: list[tuple[str, int, tuple[int, int]]]) -> dict[str, dict[str, int]]:
    """For every linear that is solved together with others, those and their rows. Raises CompressError where nothing says which read the same input."""
    methods = {name: step.build() for name, _, _ in found if (step := recipe.step_for(name)) is not None}
    together: dict[str, dict[str, int]] = {}
    if not any(getattr(method, "joint", False) for method in methods.values()):
        return together
    if (arch := table_entry(source.model)) is None:
        raise CompressError(f"{type(source.model).__name__} is not in the table of architectures, so a plan cannot know which of its linears read the same "
                            "input; set joint to false, or add it to compress/arch.py")  # fmt: skip
    rows = {name: shape[0] for name, _, shape in found}
    for i in range(source.num_blocks):
        block = copy.deepcopy(source.model.get_submodule(source.block_name(i)))
        unfuse_experts(block)
        for site in arch.sites_of(block):
            paths = [path for p in site.linears if (path := f"{source.block_name(i)}.{p}") in methods]
            for bundle in bundles(paths, methods):
                together |= {path: {p: rows[p] for p in bundle} for path in bundle}
    return together


def make(source: Checkpoint, recipe: Recipe, *, samples: int = 128, seqlen: int = 512, batch: int = 8, timed: bool = True, probe: bool = False) -> Plan:
    """Every layer's fate, and the totals; `timed`, also seconds and consumers.

    Raises CompressError where a method cannot be applied to a layer it is meant for."""
    samples += recipe.generated
    rows, formats = [], {}
    work, tokens, n_max, solve = 0.0, samples * seqlen, 0, 0
    solving: dict[int, dict[str, float]] = {}  # place of a step → layer → work
    block_work: dict[int, set[int]] = {}
    found = linears(source)
    together = bundled(source, recipe, found)
    for name, i, (m, n) in found:
        step, stored = recipe.step_for(name), source.dtype_of(f"{name}.weight")
        if step is None:
            rows.append(PlannedLayer(name, (m, n), None, str(stored)[6:], m * n * stored.itemsize, m * n * stored.itemsize))
            continue
        method, sizes = step.build(), together.get(name, {name: m})
        parts, own = pieces(method.planned((sum(sizes.values()), n), stored, "+".join(sizes)), list(sizes.values()))
        at = list(sizes).index(name)
        formats[name] = planned(parts[at], recipe.heal, stored) if recipe.heal else parts[at]
        grown = formats[name].nbytes() - parts[at].nbytes()
        rows.append(PlannedLayer(name, (m, n), step.method, formats[name].describe(), m * n * stored.itemsize, own[at][1] + grown))
        solving.setdefault(recipe.steps.index(step), {})[name] = solver_work(method, m, n)
        solve = max(solve, solver_bytes(method, m, n))
        if method.needs or recipe.blocks:
            n_max = max(n_max, n)
            block_work.setdefault(i, set()).add(n)
            work += 6.0 * tokens * m * n  # about three passes through the layer
    needs = frozenset[str]().union(*(step.build().needs for r in rows if r.method and (step := recipe.step_for(r.name))))
    if recipe.schedule:
        needs |= {"gradient"} if recipe.schedule.by == "gradient" else set()
        work += sum(min(tokens, SCHEDULE_WINDOWS * seqlen) * 2.0 * r.shape[0] * r.shape[1] for r in rows if r.method)
        if recipe.schedule.bits:
            work += sum(WIDTHS * solver_work(step.build(), *r.shape) for r in rows if (step := recipe.step_for(r.name)) is not None and mixed(step))
    guided = bool(needs & {"guidance", "gradient"})
    twice = "cross" in needs or recipe.tune is not None or recipe.distill is not None  # the original model's states travel along
    work *= 1 + 0.6 * twice
    work += sum(tokens * n * n * 1.2 for per in block_work.values() for n in per)  # Hessians, half of XᵀX
    before = sum(e.nbytes for e in source.entries.values())
    compressed = [r for r in rows if r.method]
    kept = source.nbytes(list(source.groups.values())) + sum(source.entries[key].nbytes for key in source.unknown)  # a view may store a tied head
    after = kept - sum(r.bytes_before - r.bytes_after for r in compressed)
    solved = sum(r.shape[0] * r.shape[1] for r in compressed)
    work += tokens * solved * (6.0 * guided + 8.0 * (recipe.distill.epochs if recipe.distill else 0))
    work += 6.0 * solved * batch * seqlen * (recipe.tune.steps if recipe.tune else 0)
    parameters = source.parameters()
    linear_parameters = sum(r.shape[0] * r.shape[1] for r in compressed)
    block_bytes = max((source.nbytes(source.block_groups(i)) for i in range(source.num_blocks)), default=0)
    largest = block_bytes // source.stored_dtype.itemsize  # weights
    block_bytes = largest * source.dtype.itemsize
    if source.edits or recipe.blocks:  # what they edit is kept in fp32 beside the block
        block_bytes += block_bytes * 4 // source.dtype.itemsize
    outer = source.nbytes(source.outer_groups())
    vocabulary, width = source.model.get_input_embeddings().weight.shape
    # the hidden states, and what attention keeps; the inputs of a block's last linear; with guidance the states behind every block
    weighed = tokens * guided if "guidance" in needs else min(tokens, SCHEDULE_WINDOWS * seqlen) * guided
    states = (2 * (1 + twice) * tokens + (source.num_blocks + 1) * weighed) * width * source.dtype.itemsize if n_max or twice else 0
    ends = 4 * max(seqlen * vocabulary * 4, min(batch * seqlen * vocabulary * 4, LOGITS)) if guided else 0  # the pass back from the loss
    by_block = [[r for r in rows if r.method and r.name.startswith(source.block_name(i) + ".")] for i in range(source.num_blocks)] if n_max else []
    last = max((tokens * r.shape[1] * source.dtype.itemsize for i, b in enumerate(by_block) for r in b[-1:] if ".experts." not in r.name
                and "." in r.name.removeprefix(source.block_name(i) + ".")), default=0)  # of a child that is finished: OPT's fc2 belongs to none
    makers = max((sum(r.shape[0] >= n_max for r in b if ".experts." not in r.name) for b in by_block), default=0)  # two where the MLP has a gate
    states += (1 + twice) * last * (last <= KEEP_LIMIT)
    # experts are views of one tensor, which stays until the last of them has been replaced
    routed = (block_bytes + PRODUCTS) * any(".experts." in r.name for b in by_block for r in b)
    experts = max((sum(4 * r.shape[1] ** 2 for r in b if ".experts." in r.name) for b in by_block), default=0)
    if recipe.blocks:  # the Hessians of a whole block at once
        experts = max((sum(4 * n * n for _, n in {(r.name.rpartition(".")[0], r.shape[1]) for r in b}) for b in by_block), default=0)
    moments = (1 + ("cross" in needs)) * 4 * n_max * n_max + min(STATS_LIMIT, experts)
    eye = max((4 * r.shape[1] ** 2 for r in compressed), default=0)  # what stands for the Hessian where there is none
    # a batch on its way through the widest part of the block, in the blocks' precision, and what is added to the moments, in fp32
    passing = (1 + 0.9 * twice) * batch * seqlen * n_max * (2 * max(1, makers) * source.dtype.itemsize + 8)
    # half of what was passing is not given back by the time of solving, nor what a small block frees
    alone = solve * (1 + (largest < RELEASE)) + eye
    working = routed + moments + int(max(passing, passing / 2 + solve) if n_max else alone)
    trained = before + 28 * solved + 6 * batch * seqlen * outer // width if recipe.distill else 0  # the model, its latents, gradients and logits
    late = ["ranks follow from the energy, once calibration has seen it: bytes are those of the recipe's ratio until then"]
    warnings = [f"pattern {p!r} matches no linear{nearest(p, {r.name for r in rows}) if len(rows) < 50 else ''}" for p in unmatched(recipe, rows)]
    warnings += late if recipe.schedule and recipe.schedule.energy else []
    if recipe.schedule and recipe.schedule.bits and any(mixed(step) for step in recipe.steps):
        warnings.append("bits and group sizes follow from the schedule, once calibration has been seen: bytes are those of the recipe's own, which are never "
                        "passed; consumers are judged by them too, schedule.bits=0 keeps them everywhere")  # fmt: skip
    if any(step.needs_text for step in recipe.structural()):
        warnings.append("time is without that of the structural steps, which send the text through the model as often as choices are compared")
    peak = max((1 if n_max else 2) * block_bytes + states + int(max(working, ends)), 2 * outer + states, trained + states)
    if recipe.restore:
        work *= 2
    for options in (o for o in (recipe.restore, recipe.heal) if o):
        more, resident = healing(options, source, [r.shape for r in rows])
        work, peak = work + more, max(peak, resident)
    return Plan(source.name, recipe.name, tuple(rows), parameters, before, after,
                8 * sum(r.bytes_after for r in compressed) / linear_parameters if compressed else 8 * after / parameters, 8 * after / parameters,
                OVERHEAD + peak, held(parameters, source.parameters(), after, vocabulary), after + (8 << 20),
                _seconds(source, recipe, work, before, solving, probe) if timed else 0.0, tuple(warnings),
                {to: "; ".join(why) for to, why in can_export(formats, source.config, source.model).items()} if timed else {},
                as_floats(formats, source.config, source.model) if timed else {})  # fmt: skip


def healing(options: Heal, source: Checkpoint, shapes: list[tuple[int, int]]) -> tuple[float, int]:
    """(operations, bytes) of training a compressed model with these linears [out, in] towards its original, about: the model in the precision to compute
    in, what learns in fp32 with gradients, Adam's moments and the best state, and what a micro-batch leaves for the way back; or both streams of a refit."""
    vocabulary, width = source.model.get_input_embeddings().weight.shape
    dense, adapters = sum(m * n for m, n in shapes), sum(options.rank * (m + n) for m, n in shapes)
    learning = {"weights": dense, "lora": adapters, "scales": dense // 64}[options.train] + options.head * vocabulary * width
    passes = 6.0 * options.steps * options.batch + 2.0 * options.samples * (1 + options.held_out * options.steps / options.every)
    passes += 12.0 * options.samples * options.refit  # a block goes three times through either model, and moments of what it reads are added up
    kept = sum(m + n for m, n in shapes) * source.dtype.itemsize // (source.num_blocks if options.checkpointing else 1)
    tokens = options.micro * options.seqlen
    model = sum(e.nbytes for e in source.entries.values()) * source.dtype.itemsize // source.stored_dtype.itemsize
    streams = options.refit * (2 * options.samples * options.seqlen * width * source.dtype.itemsize + 2 * model // source.num_blocks)  # and a block of each
    return passes * options.seqlen * (dense + vocabulary * width), max(streams, model + 20 * learning + tokens * (kept + 16 * vocabulary))


def held(compressed: int, original: int, nbytes: int, vocabulary: int, itemsize: int = 4) -> int:
    """Bytes of evaluating a model of so many parameters, stored in `nbytes`, beside its original (0 parameters: alone), about."""
    return OVERHEAD + (compressed + original) * itemsize + nbytes + (2 + 2 * (original > 0)) * EVAL_TOKENS * vocabulary * 4


def unmatched(recipe: Recipe, rows: list[PlannedLayer] | tuple[PlannedLayer, ...]) -> list[str]:
    """Patterns of the recipe that fit no linear: nearly always a mistake."""
    patterns = [p for s in recipe.steps for p in ([s.match] if isinstance(s.match, str) else s.match)] + list(recipe.ignore)
    return [p for p in patterns if not any(fnmatchcase(r.name, p) for r in rows)]


def solver_work(method, m: int, n: int) -> float:
    """Floating-point operations of solving a layer [m, n], about: the column sweep, rounds of descent or gradient steps on H, the Viterbi search."""
    option = lambda name: getattr(method, name, 0)
    work = 20.0 * m * n * (1 + option("iterations") * ("hessian" not in method.needs))
    if "hessian" in method.needs:
        rounds = option("sweeps") * (1 + option("refits") + option("rounds")) + option("iterations") * max(1, option("rounds"))
        work += 2.0 * n * n * (m + n / 3) + 2.0 * rounds * m * n * n
    return work + 180.0 * 2 ** option("L") * m * n * bool(option("L"))


def solver_bytes(method, m: int, n: int) -> int:
    """What a method takes beside the Hessian, about, as traced: fp32 copies of the weight [m, n], and with a Hessian factors of it [n, n]."""
    if "hessian" not in method.needs:
        return 40 * m * n
    return 16 * n * n + 20 * m * n if isinstance(method, GPTQ | LNQ | TrellisCoding) else 24 * n * n + 32 * m * n


def _seconds(source: Checkpoint, recipe: Recipe, work: float, nbytes: int, solving: dict[int, dict[str, float]], probe: bool) -> float:
    a = torch.ones(512, 512)
    a @ a
    start, rounds = time.perf_counter(), 0
    while time.perf_counter() - start < 0.1:
        a @ a
        rounds += 1
    rate = rounds * 2 * 512**3 / (time.perf_counter() - start)
    pace = {k: _solve_one(source, recipe.steps[k], layers) if probe else 1 / rate for k, layers in solving.items()}
    return work / rate + sum(pace[k] * sum(layers.values()) for k, layers in solving.items()) + nbytes / 2e8


def _solve_one(source: Checkpoint, step: Step, layers: dict[str, float]) -> float:
    """Seconds an operation of `solver_work`, from the largest layer of a step, solved with its own weights for inputs that are random but correlated."""
    name = max(layers, key=lambda name: layers[name])
    i = next(i for i in range(source.num_blocks) if name.startswith(source.block_name(i) + "."))
    block, path = source.load_block(i), name.removeprefix(source.block_name(i) + ".")
    W, generator = get_weight(block.get_submodule(path), block.originals.get(f"{path}.weight")), torch.Generator().manual_seed(0)
    x = torch.randn(2 * W.shape[1], W.shape[1], generator=generator)
    x += x.mean(1, keepdim=True) + 0.5 * x.roll(1, 1)
    stats = Stats.zeros(W.shape[1])
    stats.add(x, x * 1.01)
    stats.finish()
    started = time.perf_counter()
    step.build()(W, stats, stored=block.stored[f"{path}.weight"], where=name)
    return (time.perf_counter() - started) / layers[name]
