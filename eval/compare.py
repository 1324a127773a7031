"""How far a compressed model is from its original, on the same tokens, in the same pass: perplexity, KL, agreement.

    perplexity  exp of the mean over ALL targets of -log q(target): what papers print, but blunt, as gains cancel losses
    KL          mean over targets of KL(original || compressed) = sum_v p_v (log p_v - log q_v), in nats: far lower
                variance a token, monotone with damage, immune to the vocabulary; the figure to compare by
    top-1       share of targets where both models would write the same next token

A window of L tokens has L - 1 targets, all counted alike. Tokens of one window depend on each other, so a standard
error comes from the spread of windows; and figures of both models are differenced BEFORE that spread is taken, which
removes the difficulty of the text, most of the noise of a perplexity. Arithmetic is fp32 on a bounded slice of
positions at a time, sums are fp64, and a logit that is not finite is an error, never skipped.
"""
import math
from collections.abc import Iterable, Iterator
from itertools import zip_longest

import torch
from torch import Tensor

from compress.calibration.data import CalibrationSet
from compress.errors import CompressError

SLICE = 2**22       # logits in one fp32 working copy: 16 MiB, 27 positions of a vocabulary of 152k; more is slower


def divergence(log_p: Tensor, log_q: Tensor, valid: Tensor | None = None) -> Tensor:
    """KL(p || q) in nats of every token [...] from log-probabilities [..., vocab]; of those where `valid` is true alone."""
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return kl if valid is None else kl[valid.to(kl.device)]


def compare(compressed: Iterable[Tensor], reference: Iterable[Tensor] | None, data: CalibrationSet) -> dict:
    """Figures of `compressed` beside `reference`, both logits [b, seqlen, vocab] of successive rows of data.tokens:

    {"perplexity": {"token", "token_stderr", "word"}, "tokens": targets, "windows": rows of data,
     "kl": {"mean", "stderr"}, "top1": {"agreement", "stderr"},
     "delta": {"mean", "stderr"},                               log perplexity of compressed minus that of reference
     "reference": {"perplexity": {"token", "token_stderr", "word"}}}     the last four are None without a reference

    Every value is JSON: a stderr is None with one window, a perplexity past the range of a double is None.
    """
    sums, paired, row = [], reference is not None, 0      # sums: one _window a row
    for ours, theirs in zip_longest(compressed, reference if paired else ()):
        if paired and (ours is None or theirs is None or ours.shape != theirs.shape):
            shape, other = (None if batch is None else list(batch.shape) for batch in (ours, theirs))
            raise CompressError(f"logits from window {row} on: compressed {shape}, reference {other}; both models take "
                                "the same batches and the same vocabulary")
        if row + len(ours) > len(data.tokens) or ours.shape[1] != data.tokens.shape[1]:
            raise CompressError(f"logits from window {row} on are {list(ours.shape)}; the data has "
                                f"{list(data.tokens.shape)} tokens")
        for i in range(len(ours)):
            mask = None if data.mask is None else data.mask[row]
            sums.append(_window(ours[i], theirs[i] if paired else None, data.tokens[row], mask, row))
            row += 1
    if row != len(data.tokens):
        raise CompressError(f"logits for {row} windows, the data has {len(data.tokens)}; evaluate all of them")
    count, nll, reference_nll, kl, same = torch.tensor(sums, dtype=torch.float64).T
    tokens = data.tokens.numel() if data.mask is None else int(data.mask.sum())
    report = {"perplexity": _perplexity(nll, count, tokens, data.words), "tokens": int(count.sum()), "windows": row,
              "kl": None, "top1": None, "delta": None, "reference": None}
    if paired:
        report |= {"kl": dict(zip(("mean", "stderr"), _mean(kl, count))),
                   "top1": dict(zip(("agreement", "stderr"), _mean(same, count))),
                   "delta": dict(zip(("mean", "stderr"), _mean(nll - reference_nll, count))),
                   "reference": {"perplexity": _perplexity(reference_nll, count, tokens, data.words)}}
    return report


@torch.no_grad()
def logits_of(model: torch.nn.Module, data: CalibrationSet, batch: int = 4) -> Iterator[Tensor]:
    """What `compare` takes, from a model that fits in memory."""
    for i in range(0, len(data.tokens), batch):
        mask = None if data.mask is None else data.mask[i:i + batch].long().to(model.device)
        yield model(data.tokens[i:i + batch].to(model.device), attention_mask=mask, use_cache=False).logits


@torch.no_grad()
def _window(ours: Tensor, theirs: Tensor | None, tokens: Tensor, mask: Tensor | None, row: int) -> list[float]:
    """[targets, nll, reference nll, kl, same], summed over one window's targets. ours, theirs: [seqlen, vocab]"""
    totals = [0, 0.0, 0.0, 0.0, 0]
    # Position t predicts token t + 1: it counts when that token is real (padding stands on the right).
    positions = torch.arange(len(tokens) - 1) if mask is None else mask[1:].nonzero()[:, 0]
    for t in positions.split(max(1, SLICE // ours.shape[-1])):
        targets = tokens[t + 1].to(ours.device)[:, None]
        log_q = _log_softmax(ours, t, "compressed", row)                            # [t, vocab]
        totals[0] += len(t)
        totals[1] -= log_q.gather(1, targets).double().sum().item()
        if theirs is not None:
            log_p = _log_softmax(theirs, t, "reference", row).to(ours.device)
            totals[2] -= log_p.gather(1, targets).double().sum().item()
            totals[4] += (log_q.argmax(1) == log_p.argmax(1)).sum().item()
            totals[3] += divergence(log_p, log_q).double().sum().item()
    return totals


def _log_softmax(logits: Tensor, positions: Tensor, name: str, row: int) -> Tensor:
    x = logits[positions.to(logits.device)].float()
    low, high = x.aminmax()     # one pass, and NaN propagates: isfinite() would cost more than the rest together
    if not (low.isfinite() and high.isfinite()):
        bad = int(positions[int((~x.isfinite()).any(1).nonzero()[0, 0])])
        raise CompressError(f"window {row}: the {name} model's logits at position {bad} hold NaN or infinity; verify "
                            "its weights, or evaluate in a wider dtype")
    return x.log_softmax(-1)


def _mean(sums: Tensor, count: Tensor) -> tuple[float, float | None]:
    """Mean over tokens and its standard error over windows. sums, count: [windows]

    The mean is a ratio of sums; the spread of its residuals covers windows of unequal length, and equals
    std(window means) / sqrt(n) when all have the same.
    """
    n, mean = len(sums), sums.sum() / count.sum()
    if n < 2:
        return mean.item(), None
    residual = sums - mean * count
    return mean.item(), math.sqrt(n / (n - 1) * residual.square().sum().item()) / count.sum().item()


def _perplexity(nll: Tensor, count: Tensor, tokens: int, words: int) -> dict:
    """Per token, with its standard error by the delta method (d exp(m) = exp(m) dm), and per word of the text."""
    mean, stderr = _mean(nll, count)
    token = _exp(mean)
    return {"token": token, "token_stderr": None if None in (token, stderr) else token * stderr,
            "word": _exp(mean * tokens / words) if words else None}


def _exp(x: float) -> float | None:
    return math.exp(x) if x < 700 else None     # e^709 is the largest double, and JSON has no infinity
