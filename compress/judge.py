"""Judge: the divergence of the whole model when some of its weights are replaced, measured, for those who search by it.

    KL(original ‖ changed) = mean_t Σ_v p_v(t) (log p_v(t) − log q_v(t))          over a few windows of text, in nats a token

The blocks stay in memory, and so do the hidden states in front of each, so a trial runs only the blocks behind the first change. Cost of one: the
forward passes of those blocks and the head over the windows. Memory: the model, its hidden states, and the original's log p (in a file past 4 GB).
Give it a checkpoint in fp32: the rounding of bf16 alone is some 1e-4 nats, more than a layer at 4 bits does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from .arch import LINEARS
from .calibration import hidden
from .checkpoint import Checkpoint
from .eval.compare import divergence
from .linear import set_weight
from .stream import Stream

Weight: TypeAlias = Tensor | Literal[0] | None  # of a linear: [out, in], None for its original, 0 where it is to give nothing at all
Weights = Mapping[str, Weight]  # path of a linear → what to put in its place


class Judge:
    """judge(weights) → KL with these in the place of what is there now; judge.put(weights) leaves them there."""

    @torch.no_grad()
    def __init__(self, source: Checkpoint, tokens: Tensor, mask: Tensor | None = None, *, batch: int = 8, device: str = "cpu", folder: Path | None = None):
        """tokens [windows, seqlen] int64, mask [windows, seqlen] bool of those that count (None: all); folder takes what does not fit in RAM."""
        stream = Stream(source, tokens, mask, batch=batch, device=device, folder=folder)
        self.source, self.mask, self.device = source, mask, torch.device(device)
        self.rows, self.calls = list(stream.batches()), [list(c) for c in stream.calls]
        self.blocks: list[nn.Module] = []
        self.states: list[Tensor] = []  # in front of each block
        for i in range(source.num_blocks):
            self.blocks.append(source.load_block(i, device))
            self.states.append(hidden.allocate(tuple(stream.hidden.shape), stream.hidden.dtype, folder).copy_(stream.hidden))
            stream.advance(self.blocks[-1])
        self.tail = stream.tail()
        vocabulary = self.tail(stream.hidden[:1].to(device)).shape[-1]
        self.log_p = hidden.allocate((*tokens.shape, vocabulary), torch.float32, folder)
        for rows in self.rows:
            self.log_p[rows] = self.tail(stream.hidden[rows].to(device)).float().log_softmax(-1)
        self.originals = {f"{source.block_name(i)}.{path}": (m.weight, m.bias) for i, block in enumerate(self.blocks)
                          for path, m in block.named_modules() if isinstance(m, LINEARS)}  # fmt: skip
        self.trials = 0

    @torch.no_grad()
    def __call__(self, weights: Weights) -> float:
        now = {path: ((m := self._module(path)).weight, m.bias) for path in weights}
        self._set(weights)
        total, count = 0.0, 0
        for b, rows in enumerate(self.rows):
            for _, h in self._forward(b, self._first(weights)):  # noqa: B007
                pass
            log_p = self.log_p[rows].to(self.device)
            kl = divergence(log_p, self.tail(h).float().log_softmax(-1), None if self.mask is None else self.mask[rows])
            total, count = total + float(kl.sum(dtype=torch.float64)), count + kl.numel()
        self._restore(now)
        self.trials += 1
        return total / count

    @torch.no_grad()
    def put(self, weights: Weights) -> None:
        """Replace weights for good, and bring the states in front of later blocks up to date."""
        self._set(weights)
        for b, rows in enumerate(self.rows):
            for i, h in self._forward(b, self._first(weights)):
                if i < len(self.blocks):
                    self.states[i][rows] = h

    def beside(self, stream: Stream) -> float:
        """KL of another model on the same windows: `stream` has gone through all of its blocks."""
        total, count = 0.0, 0
        for rows, logits in zip(self.rows, stream.logits(), strict=True):
            kl = divergence(self.log_p[rows].to(self.device), logits.to(self.device).float().log_softmax(-1), None if self.mask is None else self.mask[rows])
            total, count = total + float(kl.sum(dtype=torch.float64)), count + kl.numel()
        return total / count

    def _set(self, weights: Weights) -> None:
        for path, W in weights.items():
            module = self._module(path)
            module.weight, module.bias = self.originals[path]
            if isinstance(W, Tensor):
                set_weight(module, W.to(self.device))
            elif W == 0:
                module.weight, module.bias = (None if t is None else nn.Parameter(torch.zeros_like(t), requires_grad=False) for t in self.originals[path])

    def _restore(self, before: Mapping[str, tuple[nn.Parameter, nn.Parameter | None]]) -> None:
        for path, (weight, bias) in before.items():
            module = self._module(path)
            module.weight, module.bias = weight, bias

    def _block(self, path: str) -> int:
        return int(path.removeprefix(self.source.blocks_path + ".").partition(".")[0])

    def _first(self, weights: Weights) -> int:
        return min(map(self._block, weights), default=len(self.blocks) - 1)

    def _module(self, path: str) -> nn.Module:
        i = self._block(path)
        return self.blocks[i].get_submodule(path.removeprefix(self.source.block_name(i) + "."))

    def _forward(self, b: int, first: int) -> Iterator[tuple[int, Tensor]]:
        """(block behind it, hidden states) of batch b, from block `first` on."""
        h = self.states[first][self.rows[b]].to(self.device, copy=True)
        for i in range(first, len(self.blocks)):
            args, kwargs = self.calls[i][b]
            out = self.blocks[i](h, *args, **kwargs)
            h = out[0] if isinstance(out, tuple) else out
            yield i + 1, h
