"""Viterbi search: the stream of digits whose trellis values lie nearest to a sequence, exactly, for many sequences at once.

    cost_t[state] = min over the digit that falls out of  cost_{t−1}[previous state]  +  (x_t − LUT[state])²

A state is its n last digits. They are kept in a ring: at step t digit t takes the place of digit t − n in memory, so a step is one minimum and one
addition along that one axis, in place, with the sequences innermost; no state is ever moved. Cost a weight: 2^L multiply-adds and about as
many bytes of traffic times 12. Streams bite their tails: a first search around the cut fixes the n − 1 digits there, a second keeps them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..formats.trellis import lut

CACHE = 1 << 16  # costs of one step that are worked on together on a CPU


class Viterbi:
    """Searches streams of K-bit digits with n digits of state. Holds the LUT in every rotation of the ring, and its working memory."""

    def __init__(self, K: int, n: int, device: torch.device | str = "cpu"):
        self.K, self.n, self.values = K, n, lut(K, n).to(device)
        self.stride = [1 << K * (n - 1 - p) for p in range(n)]  # of the digit at place p of the ring
        place = torch.arange(1 << K * n, device=device)
        rotations = []
        for newest in range(n):
            state = torch.zeros_like(place)
            for i in range(1, n + 1):  # from the oldest digit to the newest
                state = (state << K) | (place // self.stride[(newest + i) % n]) % (1 << K)
            rotations.append(self.values[state])
        table = torch.stack(rotations)
        self.branch = torch.stack([table.square(), -2 * table], -1)  # [n, states, 2]: (x − v)² − x² = (v², −2v) · (1, x)
        self.offsets = [torch.arange(1 << K, device=device)[:, None] * s for s in self.stride]
        self.costs: dict[tuple[int, int], Tensor] = {}

    def encode(self, x: Tensor, window: int = 64) -> Tensor:
        """x [T, B] fp32, B sequences → int64 digits [T, B]."""
        w = min(len(x) // 2, window)
        around = torch.cat([x[len(x) - w :], x[:w]])
        past = self.search(around)[max(0, w - self.n + 1) : w] if w else x[:0].long()
        return self.search(x, past)

    def search(self, x: Tensor, past: Tensor | None = None) -> Tensor:
        """The best digits [T, B] for x [T, B]; with `past` [n − 1, B], those that follow these digits and end in them."""
        chunk = x.shape[1] if x.is_cuda else max(1, CACHE >> self.K * self.n)
        if x.shape[1] > chunk:
            parts = [self.search(x[:, i : i + chunk], None if past is None else past[:, i : i + chunk]) for i in range(0, x.shape[1], chunk)]
            return torch.cat(parts, 1)
        (T, B), n, r, states = x.shape, self.n, 1 << self.K, 1 << self.K * self.n
        if (T, B) not in self.costs:
            self.costs = {(T, B): x.new_empty(n, -(-T // n), states, B)}
        cost = self.costs[T, B]
        pair = torch.stack([torch.ones_like(x), x], 1)  # [T, 2, B]
        for p in range(n):
            part = pair[p::n]
            torch.bmm(self.branch[p].expand(len(part), -1, -1), part, out=cost[p, : len(part)])
        steps = [cost[t % n, t // n] for t in range(T)]
        if past is not None:
            place = sum((past[i] * self.stride[i + 1] for i in range(n - 1)), torch.zeros_like(past.sum(0)))
            start = torch.full((states // r, B), math.inf, device=x.device).scatter_(0, place[None], 0)
            steps[0].view(r, -1, B).add_(start)
        for t in range(1, T):
            shape = (states // r // self.stride[t % n], r, self.stride[t % n] * B)
            steps[t].view(shape).add_(steps[t - 1].view(shape).amin(1, keepdim=True))
        if past is None:
            at = steps[T - 1].argmin(0)
        else:
            base = sum((past[i] * self.stride[(T - n + 1 + i) % n] for i in range(n - 1)), torch.zeros_like(past.sum(0)))
            at = self._nearest(steps[T - 1], base, T % n)
        path = [at]
        for t in range(T - 1, 0, -1):
            at = self._nearest(steps[t - 1], at & ~((r - 1) * self.stride[t % n]), t % n)
            path.append(at)
        places = torch.stack(path[::-1])
        stride = torch.tensor([self.stride[t % n] for t in range(T)], device=x.device)
        return places // stride[:, None] % r

    def _nearest(self, cost: Tensor, base: Tensor, p: int) -> Tensor:
        """Of the states [B] that agree with `base` but for the digit at place p, the cheapest."""
        candidates = base + self.offsets[p]
        return candidates.gather(0, cost.gather(0, candidates).argmin(0, keepdim=True))[0]
