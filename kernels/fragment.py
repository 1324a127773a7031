"""Low-bit matmul on tensor cores: Y^T = W · X^T with the weight unpacked from fragment order straight into the registers that wgmma reads.

    y[m, n] = Σ_g s[n, g] · Σ_{k ∈ g} (q[n, k] − z[n, g]) · x[m, k]  +  b[n]  +  Σ_r B[n, r] · u[m, r]

Few rows of x are a narrow second operand (Y^T: the weight is the tall one), so a decoding step reads every code once, 16 bytes a thread, and
unpacks it with 1.6 to 3.5 instructions a weight (fragment_layout.py, unpack.py) where a layout of rows costs 7: on Hopper that, not bandwidth, is
the limit. Scales multiply partial sums or weights (fragment_weight.py); beyond 64 rows of x it is cheaper on the weight, in bf16, as a dense bf16
weight is rounded. K is split over `split` programs of which the last to finish adds all partial sums in one order: no atomics on data, the same bits
every run. More than 256 rows go through dense chunks (prefill.py).
"""

import functools
import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..formats import Format
from . import fragment_layout as layout
from . import ops, prefill, unpack
from .fragment_weight import Prepared, planned, prepare, supports
from .tiles import PARTIAL, handed_in, output, shares, total, workspace
from .unpack import after, copied, in_rows, joined, mul, nth, numbers, pairs, tables, twos

__all__ = ["Config", "Prepared", "matmul", "prepare", "rule", "supports", "variants"]
ROWS = 256  # of x
PROGRAMS = 132 * 5  # that keep enough loads in flight on an H200


@dataclass(frozen=True)
class Config:
    bn: int  # rows of W a program computes: 64 for each instruction of a warpgroup
    bm: int  # rows of x
    split: int  # programs that share K
    step: int  # units of 64 columns an iteration
    stages: int  # iterations in flight
    warps: int = 4  # or 8, half of the rows each


@triton.jit
def _finish(acc, row, bias, B, u, y, n, m, M, N, RANK: tl.constexpr, GATED: tl.constexpr, F32: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr):
    """Scale of the row, low-rank term, bias, activation, and the only rounding to y's dtype."""
    if row is not None:
        acc *= tl.load(row + n)[:, None]
    if RANK:
        r = tl.arange(0, RANK)
        b, ut = tl.load(B + n[:, None] * RANK + r[None, :]), tl.load(u + m[None, :] * RANK + r[:, None], m[None, :] < M, 0.0)
        if F32:
            b, ut = b.to(tl.float32), ut.to(tl.float32)
        acc = tl.dot(b, ut, acc, input_precision="ieee")
    if bias is not None:  # of a gated weight it comes in the order of the model: gate, then up
        place = n % 16 // 8 * N + n // 16 * 8 + n % 8 if GATED else n
        inside = n // 16 * 8 + n % 8 < N if GATED else n < N
        acc += tl.load(bias + place, inside, 0.0).to(tl.float32)[:, None]
    if GATED:  # rows g and g + 8 of a fragment are gate and up: one thread holds both
        gate, up = acc.reshape(BN // 16, 2, 8, BM).permute(0, 2, 3, 1).reshape(BN // 2, BM, 2).split()
        acc = gate / (1 + tl.exp(-gate)) * up
        n = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
    tl.store(y + m[None, :].to(tl.int64) * N + n[:, None], acc.to(y.dtype.element_ty), (m[None, :] < M) & (n[:, None] < N))


@triton.jit
def _matmul(x, w, s, z, t, sums, row, bias, B, u, y, partial, counter, M, N, K, stride, padded, steps, entries,
            KIND: tl.constexpr, UNITS: tl.constexpr, PLANES: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr,
            BYTE_MUL: tl.constexpr, BYTE_ADD: tl.constexpr, PER_ROW: tl.constexpr, RANK: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr,
            FULL: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, STEP: tl.constexpr, PART: tl.constexpr, SPLIT: tl.constexpr,
            ASM: tl.constexpr, F32: tl.constexpr):  # fmt: skip
    """STEP: units of 64 columns an iteration; PART: how many of them share a scale; GROUP: how many the scale has, over iterations.
    OFFSET: a pair of bf16 to subtract, where it is the same for all groups. F32: the interpreter cannot multiply bf16."""
    block, split = tl.program_id(0), tl.program_id(1)
    r, c = tl.arange(0, BN // 2), tl.arange(0, 16)  # words: 8 rows g of each 16-row block; (t, w)
    n, m, k = block * BN + tl.arange(0, BN), tl.program_id(2) * BM + tl.arange(0, BM), tl.arange(0, 64 * PART)
    n0 = block * BN + r // 8 * 16 + r % 8  # the row h = 0 of a word; h = 1 is 8 below
    units = steps * STEP
    wp = w + ((block * (BN // 16) + r // 8) * (units // UNITS * PLANES * 128) + r % 8 * 16)[:, None] + c[None, :]
    fine = ((block * (BN // 16) + r // 8) * (units * 32) + r % 8 * 4)[:, None] + (c % 4)[None, :]
    xp = x + m[None, :].to(tl.int64) * stride + k[:, None]
    table = tables(t, n0, entries, PER_ROW) if t is not None else None
    acc = tl.zeros((BN, BM), tl.float32)
    if z is None or sums is not None:
        z0 = tl.full((1, 1), OFFSET, tl.int32) if OFFSET else None
        z1 = z0
    elif SCALE == "channel":
        both = tl.load(twos(z) + block * (BN // 2) + r)[:, None]
        z0, z1 = copied(both, 0, 16, ASM), copied(both, 1, 16, ASM)
    PACK: tl.constexpr = 4 // GROUP if GROUP < 3 else 1  # scales that lie together, those of 256 columns
    LOAD: tl.constexpr = PACK * STEP // 4 if PACK > 1 else 1  # ... of which an iteration takes
    # Triton loads what has fewer numbers than the program threads once for every use, and not ahead
    WIDE: tl.constexpr = max(LOAD, 256 // BN) if SCALE == "group" else LOAD
    near = ((block * (BN // 2) + r) * PACK)[:, None] + (tl.arange(0, WIDE) % LOAD)[None, :]
    for step in range(split, steps, SPLIT):
        ws, xs = wp + step * (STEP // UNITS * PLANES * 128), xp + step * (STEP * 64)
        for j in tl.static_range(STEP):
            unit = step * STEP + j
            if j % UNITS == 0:
                p = ws + j // UNITS * (PLANES * 128)
                w0 = tl.load(p, eviction_policy="evict_first")
                w1 = tl.load(p + 128, eviction_policy="evict_first") if PLANES > 1 else w0
                w2 = tl.load(p + 256, eviction_policy="evict_first") if PLANES > 2 else w0
            if j % PART == 0:
                g = unit // GROUP
                if j % (PART * LOAD) == 0 and (SCALE == "group" or SCALE == "weight"):
                    table_row = near + (g // PACK * (padded // 2 * PACK) + g % PACK)
                    many = tl.load(twos(s) + table_row)
                    if z is not None:
                        zeros = tl.load(twos(z) + table_row)
                    if SCALE == "group":
                        w0 = after(w0, nth(many, 0, WIDE, BN // 2), ASM)
                    if sums is not None:
                        w0 = after(w0, nth(zeros, 0, WIDE, BN // 2), ASM)
                if SCALE == "group":
                    scale = in_rows(*numbers(nth(many, j // PART % LOAD, WIDE, BN // 2), s.dtype.element_ty), BN)
                    part = tl.zeros((BN, BM), tl.float32)
                    if sums is not None:
                        total_x = tl.load(sums + g * M + m, m < M * (unit % GROUP == 0), 0.0)  # a group is corrected once
                        part -= in_rows(*numbers(nth(zeros, j // PART % LOAD, WIDE, BN // 2), z.dtype.element_ty), BN) * total_x[None, :]
                if SCALE == "weight":
                    both = nth(many, j // PART % LOAD, WIDE, BN // 2)
                    s0, s1 = copied(both, 0, 16, ASM), copied(both, 1, 16, ASM)
                if (SCALE == "group" or SCALE == "weight") and z is not None and sums is None:
                    both = nth(zeros, j // PART % LOAD, WIDE, BN // 2)
                    z0, z1 = copied(both, 0, 16, ASM), copied(both, 1, 16, ASM)
            if SCALE == "fine":
                both = tl.load(s + fine + unit * 32)
                s0, s1 = copied(both, 0, 16, ASM), copied(both, 1, 16, ASM)
                if z is not None:
                    both = tl.load(z + fine + unit * 32)
                    z0, z1 = copied(both, 0, 16, ASM), copied(both, 1, 16, ASM)
            if SCALE == "byte":
                both = tl.load(s + fine + unit * 32).to(tl.int32)
                s0, s1 = copied(both, 0, 8, ASM) * BYTE_MUL + BYTE_ADD, copied(both, 1, 8, ASM) * BYTE_MUL + BYTE_ADD
            p00, p01, p10, p11 = pairs(w0, w1, w2, table, z0, z1, j % UNITS, KIND, ASM)
            if SCALE == "weight" or SCALE == "fine" or SCALE == "byte":
                p00, p01, p10, p11 = mul(p00, s0, ASM), mul(p01, s0, ASM), mul(p10, s1, ASM), mul(p11, s1, ASM)
            v = (v if j % PART else ()) + (p00, p01, p10, p11)  # noqa: F821
            if j % PART == PART - 1:
                a, start = joined(v, PART, BN), (j - PART + 1) * 64
                if EVEN and FULL:  # without a mask a copy to shared memory costs one instruction
                    xt = tl.load(xs + start)
                else:
                    xt = tl.load(xs + start, m[None, :] < M if EVEN else (m[None, :] < M) & (step * (STEP * 64) + start + k[:, None] < K), 0.0)
                if F32:
                    a, xt = a.to(tl.float32), xt.to(tl.float32)
                if SCALE == "group":
                    acc += tl.dot(a, xt, part, input_precision="ieee") * scale
                else:
                    acc = tl.dot(a, xt, acc, input_precision="ieee")
    if SPLIT == 1:
        _finish(acc, row, bias, B, u, y, n, m, M, N, RANK, GATED, F32, BN, BM)
    else:
        tile = tl.program_id(2) * tl.num_programs(0) + block
        p = shares(partial, tile, SPLIT, BN, BM)
        if handed_in(acc, p, counter + tile, split, SPLIT, BN, BM):
            _finish(total(p, counter + tile, SPLIT, BN, BM), row, bias, B, u, y, n, m, M, N, RANK, GATED, F32, BN, BM)


def widest(p: Prepared) -> int:
    """Rows of x that a program can hold: partial sums and their total are registers both, so are tables, and x is in shared memory, several times."""
    if p.scale == "group" and not p.weight_side:
        return 64
    return ROWS if p.zeros is None and p.table is None and p.scale != "fine" and layout.KINDS[p.kind].units < 4 else 128


def bucket(m: int) -> int:
    return next((edge for edge in (16, 32, 64, 128) if m <= edge), ROWS)


def rule(p: Prepared, m: int) -> Config:
    """Where nothing was measured: 64 rows a program (128 of a large matrix: fewer instructions a weight), the narrowest tile of x that holds m, and K split
    until there are enough programs."""
    N, K = layout.padded((16 * len(p.words), p.shape[1]))
    kind, bm = layout.KINDS[p.kind], min(bucket(m), widest(p))
    bn = 128 if N % 128 == 0 and (bm > 64 or (bm <= 32 and kind.bits <= 4 and N * K >= 2**25)) else 64
    eight = bm > 64 and bn == 128  # warps; one program a multiprocessor, whose registers it takes: room for long steps
    step = 4 if (bm <= 32 or (eight and bm == 128)) and kind.bits <= 4 and p.scale != "fine" else max(kind.units, 2)
    tiles = N // bn * math.ceil(m / bm)
    split = shared(max(1, min(PROGRAMS // tiles, K // 1024)), N, m, bm)
    stages = 4 if bm <= 32 else 3 if bm * step < 512 or (eight and bm == 256) else 2
    return Config(bn, bm, split, step, stages, 8 if eight else 4)


def variants(format: Format, m: int) -> dict:
    """Tilings for `compress tune` to race at m rows, {name: matmul}: neighbours of the rule's. Each is compiled, which takes seconds, so there are a dozen."""
    if m > ROWS:
        return {}
    p = planned(format)
    own, kind, (N, K) = rule(p, m), layout.KINDS[p.kind], layout.padded(p.shape)
    near = [replace(own, bn=bn, warps=warps, split=max(1, round(own.split * bn / own.bn * times)))  # as many programs, half, twice
            for bn, warps in ((64, 4), (128, 4), (128, 8)) for times in (1, 0.5, 2)]  # fmt: skip
    near += [replace(own, stages=own.stages + more, step=step) for step in (own.step, 6 - own.step) for more in (-1, 0, 1)]
    near += [replace(own, bm=own.bm // 2, stages=3, step=step) for step in (2, 4) if own.bm > 64]
    fits = [c for c in dict.fromkeys(near) if c != own and N % c.bn == 0 and c.bn * c.bm <= 2**12 * c.warps and c.stages > 1 and c.step >= kind.units
            and c.split == shared(c.split, N, m, c.bm) and c.split <= max(1, K // 512)
            and c.stages * c.step * (128 * c.bm + 8 * kind.bits * c.bn) <= 225_000]  # bytes of shared memory
    return {f"{c.bn}x{c.bm}/{c.split} step {c.step} stages {c.stages} warps {c.warps}": functools.partial(matmul, config=c) for c in fits}


def shared(split: int, N: int, m: int, bm: int) -> int:
    """`split`, or as many programs a tile as the workspace has room for: N · bm partial sums each for every bm rows of x."""
    return max(1, min(split, PARTIAL // (N * bm * math.ceil(m / bm))))


def constants(p: Prepared, m: int, config: Config) -> dict:
    """The compile-time arguments of the kernel."""
    kind, scale, units = layout.KINDS[p.kind], "weight" if m > 64 and p.weight_side else p.scale, p.group_units
    step = max(config.step, kind.units)
    part = step if scale == "channel" else math.gcd(step, units) if scale in ("group", "weight") else min(step, 2)
    bm = min(config.bm, widest(p))
    return {"KIND": p.kind, "UNITS": kind.units, "PLANES": kind.planes, "SCALE": scale, "GROUP": units, "OFFSET": p.offset, "BYTE_MUL": p.byte[0],
            "BYTE_ADD": p.byte[1], "PER_ROW": p.per_row, "RANK": 0 if p.A is None else len(p.A), "GATED": p.gated,
            "EVEN": p.shape[1] % layout.COLUMNS == 0 or ragged(p), "FULL": m % bm == 0, "BN": config.bn, "BM": bm, "STEP": step, "PART": part,
            "SPLIT": config.split, "ASM": unpack.ASM, "F32": unpack.INTERPRET}  # fmt: skip


def ragged(p: Prepared) -> bool:
    """Do rows of x begin where 16 bytes cannot be loaded at once? Then it is padded first: through registers, element by element, it would spill."""
    return p.shape[1] % 16 != 0


def values(record: Prepared | Config) -> list:
    return [getattr(record, field.name) for field in fields(record)]


def matmul(x: Tensor, p: Prepared, bias: Tensor | None = None, config: Config | None = None) -> Tensor:
    """x bf16 [m, in] → bf16 [m, out], or [m, out/2] of a gated weight; bias bf16 [out]."""
    return _op(x, bias, *values(p), [] if config is None else values(config))


def _launch(x: Tensor, bias: Tensor | None, *rest) -> Tensor:
    p, config = Prepared(*rest[:-1]), Config(*rest[-1]) if rest[-1] else None
    if len(x) > ROWS:
        return prefill.matmul(x, p, bias)
    x = x if x.stride(-1) == 1 else x.contiguous()
    M, K = x.shape
    y = output(x, p.features)
    if M:
        N, padded = layout.padded((16 * len(p.words), K))
        config = config or rule(p, M)
        bm = min(config.bm, widest(p))
        config = replace(config, split=shared(config.split, N, M, bm))  # it was chosen for other rows, perhaps
        const = constants(p, M, config)
        sums = u = None
        if p.corrected:
            sums = F.pad(x, (0, -(-padded // p.group) * p.group - K)).view(M, -1, p.group).sum(-1, dtype=torch.float32).T.contiguous()
        if p.A is not None:
            u = x @ p.A.T
        if ragged(p):
            x, K = F.pad(x, (0, padded - K)), padded
        partial, counter = workspace(x)
        grid = (N // config.bn, config.split, triton.cdiv(M, const["BM"]))
        with torch.cuda.device_of(x):
            _matmul[grid](x, p.words, p.scales, p.zeros, p.table, sums, p.row, bias, p.B, u, y, partial, counter, M, p.features, K, x.stride(0), N,
                          padded // (layout.UNIT * const["STEP"]), 8 * p.per_row, **const, num_warps=config.warps, num_stages=config.stages)  # fmt: skip
    return y.to(x.dtype)


def _fake(x: Tensor, bias: Tensor | None, *rest) -> Tensor:
    return x.new_empty(x.shape[0], Prepared(*rest[:-1]).features)


_op = ops.define("fragment_matmul", "(Tensor x, Tensor? bias, Tensor words, Tensor? scales, Tensor? zeros, Tensor? table, Tensor? row, Tensor? A, Tensor? B, "
                 "str kind, str scale, int group, int offset, int[] byte, bool corrected, bool gated, int[] shape, int layout, int[] config) -> Tensor",
                 _fake, CPU=_launch, CUDA=_launch)  # fmt: skip
