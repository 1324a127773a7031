"""Heal: low-rank adapters (or scales) and norms of the finished artifact are trained on the divergence from the original; merged or kept as a low-rank term.

An adapter costs nothing where it can be merged (dense weights, dense values on a mask, factors) and 16·rank·(in + out) bits where it is kept (integers).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import CompressError


@dataclass(frozen=True)
class Heal:
    """Options of healing: `heal:` in a recipe, `--set` of `compress heal`."""

    steps: int = 300  # optimizer steps
    train: Literal["lora", "scales", "weights"] = "lora"  # beside the norms: adapters of every linear, scales of its integer groups, or all that it stores
    rank: int = 16  # of an adapter
    alpha: float = 32.0  # an adapter counts alpha / rank
    merge: bool = True  # adapters become part of weights that can take them; False: each stays a term of its own
    lr: float = 1e-3  # Adam's step for adapters, at its peak
    weight_lr: float = 2e-3  # the same for whole weights, as a share of their root mean square, and for integer codes, in steps of their grid
    scale_lr: float = 1e-3  # the same for norm weights and the logarithm of scales
    refit: bool = False  # first solve what writes to the residual stream by least squares, on all windows that train (a plain model: blocks dropped, sliced)
    head: bool = False  # the output head learns too, as a whole, where it is a tensor of its own: a sliced stream was cut under it
    warmup: int = 20  # steps until the peak, then a cosine down to 0
    batch: int = 16  # windows of an optimizer step, all processes together
    micro: int = 2  # windows of one forward and backward; the gradients of a step's are accumulated
    kl: float = 1.0  # weight of the divergence from the original's predictions
    states: float = 10.0  # weight of the distance between what the heads read: every number of a token's last state, where predictions show but a few
    hidden: float = 0.0  # weight of the distance between hidden states
    relation: float = 0.0  # weight of the attention relations of the last block (MiniLM)
    top_k: int = 64  # likeliest tokens of the original that are kept; all others count as one
    layers: int = 4  # with hidden: how many blocks are compared, evenly spaced, the last one among them
    heads: int = 8  # with relation: heads that queries, keys and values are split into, at most
    every: int = 25  # steps between two looks at the held-out windows, after which the state is saved
    held_out: float = 0.05  # share of the windows that only judges
    samples: int = 512  # windows of the text
    seqlen: int = 512  # tokens of a window
    checkpointing: bool = False  # compute each block again on the way back: less memory, a third more time
    bounded: bool = False  # keep no dense copy of frozen weights and no scales that learn (QLoRA's memory), dequantize at every use

    def __post_init__(self):
        low = {"steps": 0, "warmup": 0, "lr": 0, "weight_lr": 0, "scale_lr": 0, "states": 0, "hidden": 0, "relation": 0, "seqlen": 2, "samples": 2,
               "rank": 1, "batch": 1, "micro": 1, "top_k": 1, "layers": 1, "heads": 1, "every": 1}  # fmt: skip
        bad = [f"{name} {getattr(self, name)} is below {least}" for name, least in low.items() if getattr(self, name) < least]
        bad += [f"{name} {value} lies outside 0 ... 1" for name, value in (("held_out", self.held_out),) if not 0 < value < 1]
        bad += ["kl must be more than 0: it also judges"] if self.kl <= 0 else []
        if bad:
            raise CompressError("; ".join(bad))
