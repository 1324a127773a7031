"""Outliers: how far activations are from a Gaussian, which is what a grid of few levels is made for.

    kurtosis         κ = E[(x − μ)⁴] / σ⁴ over a whole tensor: 3 for a Gaussian, thousands where a few channels hold everything
    max_norm         max |x| of a sequence, averaged over sequences      Quantizable Transformers, arXiv 2306.12929
    excess_kurtosis  mean over tokens of relu(E[x⁴] / std⁴ − 3), x not centred, std unbiased     Outlier-Safe Pre-Training, arXiv 2506.19697
    channels, tokens that hold a value more than 6σ from the mean
    massive          tokens with a value above 100 and above 1000 medians of |x|       Massive Activations, arXiv 2402.17762

They say what will hurt: channels want a rotation or per-channel scales, massive tokens (most often the first of a text) want to be kept out of a
shared scale. Sums of powers are gathered in fp64; one pass, and nothing larger than one number a token and a channel is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

SIGMAS = 6.0
MASSIVE, MEDIANS = 100.0, 1000.0


@dataclass(eq=False)
class Outliers:
    """Gathers activations x [sequences, tokens, width] batch by batch (`add`); `figures()` is JSON."""

    powers: Tensor = field(default_factory=lambda: torch.zeros(5, dtype=torch.float64))  # [count, Σx, Σx², Σx³, Σx⁴]
    peaks: list[Tensor] = field(default_factory=list)  # max |x| of every token, [sequences, tokens] a batch
    excess: list[Tensor] = field(default_factory=list)
    channel: Tensor = field(default_factory=lambda: torch.zeros(0))  # [width] max |x|
    median: float = 0.0  # of |x|, of the first batch

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        x = x.detach().float()
        if x.dim() == 2:  # an expert's tokens: one row of sequences
            x = x[None]
        if not x.numel():  # none was routed to it
            self.channel = x.new_zeros(x.shape[-1]).cpu() if not len(self.channel) else self.channel
            return
        square = x * x
        sums = (torch.ones_like(x[..., :1]).sum() * x.shape[-1], x.sum(dtype=torch.float64), square.sum(dtype=torch.float64),
                (square * x).sum(dtype=torch.float64), (square * square).sum(dtype=torch.float64))  # fmt: skip
        self.powers += torch.stack([s.double().cpu() for s in sums])
        size = x.abs()
        if not self.peaks:
            self.median = size.median().item()
        self.peaks.append(size.amax(-1).cpu())
        self.excess.append(((square * square).mean(-1) / x.std(-1) ** 4 - 3).clamp(min=0).flatten().cpu())
        top = size.flatten(0, -2).amax(0).cpu()
        self.channel = top if not len(self.channel) else torch.maximum(self.channel, top)

    def tokens(self) -> Tensor:
        """max |x| of every token, [sequences, tokens]."""
        return torch.cat(self.peaks) if self.peaks else torch.zeros(1, 1)

    def figures(self) -> dict[str, float | int]:
        count, *sums = self.powers.tolist()
        m, e2, e3, e4 = (s / max(count, 1) for s in sums)
        variance = max(e2 - m * m, 1e-150)
        limit = abs(m) + SIGMAS * variance**0.5
        tokens = self.tokens()
        kurtosis = (e4 - 4 * m * e3 + 6 * m * m * e2 - 3 * m**4) / variance**2 if self.peaks else 0.0
        excess = torch.cat(self.excess).mean().item() if self.peaks else 0.0
        return {"kurtosis": kurtosis, "excess_kurtosis": excess, "max_norm": tokens.amax(-1).mean().item(), "max": tokens.max().item(),
                "std": variance**0.5, "median": self.median, "width": len(self.channel), "channels": int((self.channel > limit).sum()),
                "tokens": int((tokens > limit).sum()), "massive": int(((tokens > MASSIVE) & (tokens > MEDIANS * self.median)).sum())}  # fmt: skip
