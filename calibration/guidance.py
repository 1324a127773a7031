"""Guidance: how much each token of the calibration text matters to the end of the model, layer by layer.

    s_t = mean_j (∂L/∂y_tj)²          y = Wx the output of a linear,  L = −log p(sampled next token)

Weighing the Hessian's tokens by s, H = Σ_t s_t x_t x_tᵀ, makes a layer-wise solver spend its bits where an error would change what the model says
(GuidedQuant, arXiv 2505.07004, with one group of outputs). Labels are sampled from the model itself, which makes L's curvature that of the KL
divergence. One forward and one backward pass, a block at a time: the states between blocks are kept (on disk past a limit), activations never.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..stream import Stream
from . import hidden


def token_weights(stream: Stream, seed: int = 0) -> list[dict[str, Tensor]]:
    """For every block {path of a linear: s [tokens] fp32, mean 1}. `stream` stands in front of block 0 and is used up.

    Linears that see other rows than the windows' tokens (routed experts) are left out.
    """
    source, device = stream.source, stream.device
    calls, states = [list(c) for c in stream.calls], []
    for i in range(source.num_blocks):
        states.append(hidden.allocate(tuple(stream.hidden.shape), stream.hidden.dtype, stream.folder).copy_(stream.hidden))
        stream.advance(source.load_block(i, device))
    gradient = _end(stream, seed)
    weights: list[dict[str, Tensor]] = []
    for i in reversed(range(source.num_blocks)):
        block = source.load_block(i, device)
        found = {path: torch.zeros(stream.tokens.numel()) for path, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)}
        for rows, (args, kwargs) in zip(stream.batches(), calls[i], strict=True):
            at = slice(rows.start * stream.tokens.shape[1], rows.start * stream.tokens.shape[1] + stream.tokens[rows].numel())
            handles = [block.get_submodule(path).register_forward_hook(partial(_watch, found, path, at)) for path in found]
            with torch.enable_grad():
                h = states[i][rows].to(device, copy=True).requires_grad_()
                out = block(h, *args, **kwargs)
                (passed,) = torch.autograd.grad(out[0] if isinstance(out, tuple) else out, h, gradient[rows].to(device))
            gradient[rows] = passed
            for handle in handles:
                handle.remove()
        states.pop()
        weights.insert(0, {path: s / s.mean() for path, s in found.items() if torch.isfinite(s).all() and s.mean() > 0})
    return weights


def _watch(found: dict[str, Tensor], path: str, at: slice, module: nn.Module, args: tuple, y: Tensor) -> None:
    def note(gradient: Tensor) -> None:
        s = gradient.float().square().mean(-1).flatten().cpu()
        if path in found:
            if len(s) == at.stop - at.start:
                found[path][at] = s
            else:
                del found[path]

    y.register_hook(note)


def _end(stream: Stream, seed: int) -> Tensor:
    """∂L/∂h behind the last block, [n, seqlen, width], in the dtype of the hidden states."""
    generator = torch.Generator(stream.device).manual_seed(seed)
    gradient = hidden.allocate(tuple(stream.hidden.shape), stream.hidden.dtype, stream.folder)
    tail = stream.tail()
    for rows in stream.batches():
        with torch.enable_grad():
            h = stream.hidden[rows].to(stream.device, copy=True).requires_grad_()
            log_p = tail(h).float().log_softmax(-1)
            labels = torch.multinomial(log_p.detach().exp().flatten(0, 1), 1, generator=generator)
            loss = -log_p.flatten(0, 1).gather(1, labels)
            if stream.mask is not None:
                loss = loss[stream.mask[rows].flatten()]
            gradient[rows] = torch.autograd.grad(loss.sum(), h)[0]
    return gradient
