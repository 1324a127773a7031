"""Context: perplexity and KL by the length of the window. Does the compressed model still use what stands far back?

    for each length L: windows of L tokens, a new one every L/2; in each, only the last L/2 tokens count

so that every token counted has at least L/2 before it. The tokens counted are the same ones for all lengths (those behind half of the longest window),
which makes the figures a curve: the original's falls with L as context helps it, and a compressed one that falls less has lost long range. A run over one
text without gaps; the mask that `compare` takes for padding says here which tokens count, while attention sees the whole window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from compress.calibration.data import CalibrationSet
from compress.errors import CompressError
from compress.eval.compare import compare, logits_of


def windows(text: Tensor, length: int, longest: int) -> CalibrationSet:
    """Windows [n, length] of a running text [tokens], their last halves counted; together those cover text[longest / 2:] once."""
    half, first = length // 2, longest // 2
    starts = range(first - half, len(text) - length + 1, half)
    mask = torch.arange(length) >= half
    return CalibrationSet(torch.stack([text[s : s + length] for s in starts]), mask.expand(len(starts), length), 0, {})


def by_length(model: nn.Module, reference: nn.Module | None, text: Tensor, lengths: Sequence[int], *, tokens: int = 2048) -> list[dict]:
    """[{"length", "perplexity", "kl", "top1", "reference", …}], shortest first: what `compare` gives for each. `tokens`: of one forward.

    Raises CompressError where a length is odd, or not a half, quarter … of the longest, or the text is shorter than the longest.
    """
    longest = max(lengths)
    if bad := [n for n in lengths if n < 4 or n % 2 or longest % n]:
        raise CompressError(f"length {bad[0]}: give even lengths that divide the longest, {longest}: 512,1024,2048")
    if (usable := len(text) // (longest // 2) * (longest // 2)) < longest:
        raise CompressError(f"the text has {len(text)} tokens, one window takes {longest}; give a longer text or smaller --lengths")
    rows = []
    for length in sorted(set(lengths)):
        data = windows(text[:usable], length, longest)
        plain, batch = replace(data, mask=None), max(1, tokens // length)
        found = compare(logits_of(model, plain, batch), None if reference is None else logits_of(reference, plain, batch), data)
        rows.append({"length": length} | found)
    return rows
