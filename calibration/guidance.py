"""Guidance: how much each token of the calibration text, and each output, matters to the end of the model, layer by layer.

    s_t = mean_j (∂L/∂y_tj)² over the outputs j of a group,   a_j = mean_t (∂L/∂y_tj)²          y = Wx the output of a linear,  L = −log p(sampled next token)

Weighing the Hessian's tokens by s, H = Σ_t s_t x_t x_tᵀ, makes a layer-wise solver spend its bits where an error would change what the model says
(GuidedQuant, arXiv 2505.07004). a says the same of outputs: it decides where rows of a layer, or layers, compete (masks, low
rank, schedules). Labels are sampled from the model itself, which makes L's curvature that of the KL divergence. One forward and one backward pass, a
block at a time: the states between blocks are kept (on disk past a limit), activations never.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..stream import Stream
from . import hidden

LOGITS = 256 << 20  # bytes of fp32 logits that the pass back from the loss holds at a time (some four times over), or those of one window
GROUPS = 4  # of consecutive outputs, whose tokens are weighed apart where a method asks; fewer are means of these


@dataclass(frozen=True)
class Guidance:
    """What one linear's gradient says of its tokens and of its outputs."""

    tokens: Tensor  # s [GROUPS, tokens] fp32, mean 1: for each quarter of the outputs
    outputs: Tensor  # [out] fp32, mean over tokens of (∂L/∂y_tj)²: comparable between layers

    def of(self, groups: int) -> Tensor:
        """[groups, tokens]: for so many groups of outputs, a divisor of GROUPS."""
        return self.tokens.view(groups, -1, self.tokens.shape[1]).mean(1)


def guide(stream: Stream, seed: int = 0) -> list[dict[str, Guidance]]:
    """For every block {path of a linear: Guidance}. `stream` stands in front of block 0 and is used up.

    Linears that see other rows than the windows' tokens (routed experts) are left out.
    """
    source, device = stream.source, stream.device
    calls, states = [list(c) for c in stream.calls], []
    for i in range(source.num_blocks):
        states.append(hidden.allocate(tuple(stream.hidden.shape), stream.hidden.dtype, stream.folder).copy_(stream.hidden))
        stream.advance(source.load_block(i, device))
    gradient = _end(stream, seed)
    weights: list[dict[str, Guidance]] = []
    for i in reversed(range(source.num_blocks)):
        block = source.load_block(i, device)
        linears = [path for path, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)]
        found = {path: torch.zeros(GROUPS, stream.tokens.numel()) for path in linears}
        outputs: dict[str, Tensor] = {}
        for rows, (args, kwargs) in zip(stream.batches(), calls[i], strict=True):
            at = slice(rows.start * stream.tokens.shape[1], rows.start * stream.tokens.shape[1] + stream.tokens[rows].numel())
            handles = [block.get_submodule(path).register_forward_hook(partial(_watch, found, outputs, path, at)) for path in found]
            with torch.enable_grad():
                h = states[i][rows].to(device, copy=True).requires_grad_()
                out = block(h, *args, **kwargs)
                (passed,) = torch.autograd.grad(out[0] if isinstance(out, tuple) else out, h, gradient[rows].to(device))
            gradient[rows] = passed
            for handle in handles:
                handle.remove()
            stream.release()
        states.pop()
        weights.insert(0, {path: Guidance(s / s.mean(), outputs[path] / s.shape[1]) for path, s in found.items() if torch.isfinite(s).all() and s.mean() > 0})
    return weights


def _watch(found: dict[str, Tensor], outputs: dict[str, Tensor], path: str, at: slice, module: nn.Module, args: tuple, y: Tensor) -> None:
    def note(gradient: Tensor) -> None:
        g = gradient.float().square().flatten(0, -2)
        if path in found:
            if len(g) == at.stop - at.start:
                found[path][:, at] = torch.stack([part.mean(-1) for part in g.tensor_split(GROUPS, dim=1)]).cpu()
                outputs[path] = outputs.get(path, 0) + g.sum(0).cpu()
            else:
                del found[path]

    y.register_hook(note)


def _end(stream: Stream, seed: int) -> Tensor:
    """∂L/∂h behind the last block, [n, seqlen, width], in the dtype of the hidden states."""
    generator = torch.Generator(stream.device).manual_seed(seed)
    gradient = hidden.allocate(tuple(stream.hidden.shape), stream.hidden.dtype, stream.folder)
    tail, vocabulary = stream.tail(), stream.source.model.get_input_embeddings().num_embeddings
    few = min(stream.batch, max(1, LOGITS // (4 * stream.tokens.shape[1] * vocabulary)))
    for start in range(0, len(stream.tokens), few):
        rows = slice(start, start + few)
        with torch.enable_grad():
            h = stream.hidden[rows].to(stream.device, copy=True).requires_grad_()
            log_p = tail(h).float().log_softmax(-1)
            labels = torch.multinomial(log_p.detach().exp().flatten(0, 1), 1, generator=generator)
            loss = -log_p.flatten(0, 1).gather(1, labels)
            if stream.mask is not None:
                loss = loss[stream.mask[rows].flatten()]
            gradient[rows] = torch.autograd.grad(loss.sum(), h)[0]
    return gradient
