"""Orthogonal Hadamard matrices of almost every width, as Kronecker products: transforms that spread outliers over all channels.

    H_n = (H_K ⊗ H_2 ⊗ … ⊗ H_2) / √n,   n = K·2^k,      H Hᵀ = I,   every entry ± 1/√n

K comes from the Paley constructions (1933): for a prime power q ≡ 3 mod 4 the quadratic character of a − b over GF(q) gives order q + 1, for q ≡ 1
mod 4 order 2(q + 1). That covers the widths of today's models (11008 = 344·32, 14336 = 28·512, 18944 = 148·128). Where n has no such order,
H is block-diagonal with blocks of the largest divisor that has one; `order(n)` says which. x·H costs n·(K + 8k) multiply-adds a row.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from math import isqrt

import torch
from torch import Tensor

LARGEST = 1024  # largest K that is multiplied as a dense matrix
RADIX = 64  # powers of two are applied that many at once: a matrix product is faster than log2 passes over memory


def order(n: int) -> int:
    """The order of the Hadamard blocks that `transform` uses for width n: n itself, or its largest divisor that has a construction."""
    return next(d for d in range(n, 0, -1) if n % d == 0 and _factors(d))


def matrix(n: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """H [n, n], orthogonal, with transform(x) = x @ H."""
    return transform(torch.eye(n, dtype=dtype, device=device))


def transform(x: Tensor, signs: Tensor | None = None, inverse: bool = False) -> Tensor:
    """x·diag(signs)·H along the last axis of x [..., n], in x's own float dtype; inverse: x·Hᵀ·diag(signs), which undoes it."""
    n = x.shape[-1]
    factors = _factors(block := order(n))
    y = x if signs is None or inverse else x * signs
    after = block
    for f in factors:
        after //= f
        F = _factor(f).to(y) / f**0.5
        F = F.T if inverse else F
        y = y.reshape(-1, f) @ F if after == 1 else F.T @ y.reshape(-1, f, after)
    y = y.reshape(x.shape)
    return y * signs if signs is not None and inverse else y


def pair(n: int) -> tuple[Tensor, Tensor]:
    """fp64 (P [a, a], Q [b, b]) with transform(x) = x · (P ⊗ Q), a and b as near as powers of two allow: for kernels, which multiply twice."""
    block = order(n)
    K = next((f for f in _factors(block) if f & (f - 1)), 1)
    tail = block // K
    b = min(tail, 1 << isqrt(n).bit_length() - 1)
    P = torch.kron(_factor(K), _factor(tail // b)) / (block // b) ** 0.5
    return torch.block_diag(*[P] * (n // block)), _factor(b) / b**0.5


def signs(n: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """fp32 [n] of ±1: the same on every machine and in every version, so that a format need only store the seed."""
    return 1 - 2 * (mix(torch.arange(n, dtype=torch.int64, device=device) + seed * 0x9E3779B1) & 1).float()


def mix(x: Tensor) -> Tensor:
    """A bijective hash of the low 32 bits of int64 x; products stay below 2^63."""
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97), (15, 1)):
        x = x & 0xFFFFFFFF
        x = (x ^ (x >> shift)) * factor
    return x & 0xFFFFFFFF


@cache
def _factors(n: int) -> tuple[int, ...]:
    """Orders whose Kronecker product is n, the Paley order first; empty: there is none."""
    power = n & -n
    for b in range(power.bit_length()):
        K = n // power << b
        if K == 1 or (K % 4 == 0 and K <= LARGEST and _paley(K)):
            k = power.bit_length() - 1 - b
            parts = [K] + [RADIX] * (k // 6) + [1 << k % 6]
            return tuple(f for f in parts if f > 1) or (1,)
    return ()


def _paley(K: int) -> tuple[int, int, int] | None:
    """(p, k, kind) of the field GF(p^k), k ≤ 3, that gives a matrix of order K by the first or second construction."""
    for q, residue, kind in ((K - 1, 3, 1), (K // 2 - 1, 1, 2)):
        for k in (1, 2, 3):
            p = round(q ** (1 / k))
            if p > 2 and p**k == q and q % 4 == residue and all(p % d for d in range(2, isqrt(p) + 1)):
                return p, k, kind
    return None


@cache
def _factor(n: int) -> Tensor:
    """The matrix of ±1 of order n: Sylvester's for a power of two, else Paley's. fp64 [n, n]."""
    if n & (n - 1) == 0:
        H = torch.ones(1, 1, dtype=torch.float64)
        while len(H) < n:
            H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
        return H
    p, k, kind = _paley(n)  # type: ignore[misc]
    Q = _character(p, k)
    border = torch.ones(1, len(Q), dtype=torch.float64)
    S = torch.cat([torch.cat([torch.zeros(1, 1), border], 1), torch.cat([-border.T if kind == 1 else border.T, Q], 1)])
    eye = torch.eye(len(S), dtype=torch.float64)
    if kind == 1:
        return S + eye
    return torch.kron(S, torch.tensor([[1.0, 1], [1, -1]])) + torch.kron(eye, torch.tensor([[1.0, -1], [-1, -1]]))


def _character(p: int, k: int) -> Tensor:
    """χ(a − b) over GF(p^k), fp64 [q, q]: 1 for squares, −1 for the others, 0 on the diagonal. Elements are their base-p digits."""
    digits = torch.tensor(list(product(range(p), repeat=k)))  # [q, k], constant term last
    # tᵏ = a·t + b irreducible over GF(p), which for k ≤ 3 is having no root; for k = 1 it is not used
    irreducible = ((a, b) for a in range(p) for b in range(1, p) if all((x**k - a * x - b) % p for x in range(p)))
    a, b = next(irreducible) if k > 1 else (0, 0)
    c = torch.zeros(len(digits), 2 * k - 1, dtype=torch.int64)  # x², highest power first
    for i in range(k):
        for j in range(k):
            c[:, i + j] += digits[:, i] * digits[:, j]
    for i in range(k - 1):  # t^(2k−2−i) = t^(k−2−i)·(a·t + b)
        c[:, i + k - 1] += c[:, i] * a
        c[:, i + k] += c[:, i] * b
    place = p ** torch.arange(k - 1, -1, -1)
    chi = -torch.ones(len(digits), dtype=torch.float64)
    chi[(c[:, k - 1 :] % p * place).sum(1)] = 1
    chi[0] = 0
    return chi[((digits[:, None] - digits[None]) % p * place).sum(-1)]
