"""Drift: how long two models go on writing the same text. Both continue the same prompts greedily; what counts is the first token that differs.

Top-1 agreement looks at one token at a time on text that neither has written; here every token stands on those before it, so that one flip changes all
that follows. With agreement a and independent tokens the median would be log ½ / log a; a much earlier parting says that flips gather where text is made.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def greedy(model: nn.Module, prompts: Tensor, new_tokens: int) -> Tensor:
    """[n, prompt] → [n, new_tokens], the most likely token each time, past any end of text: both models are to write equally long."""
    written: list[Tensor] = []
    out = model(prompts, use_cache=True)
    for _ in range(new_tokens):
        written.append(out.logits[:, -1:].argmax(-1))
        out = model(written[-1], past_key_values=out.past_key_values, use_cache=True)
    return torch.cat(written, 1)


def drift(ours: Tensor, theirs: Tensor) -> dict:
    """{"prompts", "new_tokens", "same_tokens": [how many until they part, a prompt], "mean", "median", "identical": share that never part}."""
    n, length = ours.shape
    parted = torch.cat([ours != theirs, torch.ones(n, 1, dtype=torch.bool, device=ours.device)], 1).int().argmax(1)
    return {"prompts": n, "new_tokens": length, "same_tokens": parted.tolist(), "mean": parted.double().mean().item(),
            "median": parted.double().quantile(0.5).item(), "identical": (parted == length).double().mean().item()}  # fmt: skip
