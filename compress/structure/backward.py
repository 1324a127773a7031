"""Backward: gradients through a model of which one block is in memory.

    forward   h_0 → h_1 → … → h_L        every state is kept, on disk past a limit (calibration/hidden.py)
    backward  block i computes h_i → h_{i+1} again;   ∂/∂h_i, ∂/∂x of what its linears read, ∂/∂W  from  ∂/∂h_{i+1}

A loss says what its gradient is at the state behind every block, most of them only behind the last. It costs a step of training, at the memory of inference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from ..calibration import hidden
from ..checkpoint import Checkpoint
from ..stream import Stream

Loss = Callable[[int, slice, Tensor], Tensor | None]  # block, windows, the state behind it → its gradient there, None where the loss does not look


def backward(source: Checkpoint, stream: Stream, losses: list[Loss], readers: Callable[[nn.Module], dict[str, str]], weights: Callable[[nn.Module], list[str]]
             ) -> Iterator[tuple[int, nn.Module, list[dict[str, Tensor]], dict[str, Tensor]]]:  # fmt: skip
    """(i, block, gates, gradients) from the last block to the first, all windows at once.

    gates: for each loss {key: ∂/∂m [windows, channels] fp64}, m = 1 a factor on the input of the linear that readers(block)[key] names; gradients: of the
    first loss, {path: ∂/∂W fp64, as the linear holds it} for weights(block). The stream has to stand in front of block 0.
    """
    calls, states = [list(c) for c in stream.calls], []
    for i in range(source.num_blocks):
        states.append(hidden.allocate(tuple(stream.hidden.shape), stream.hidden.dtype, stream.folder).copy_(stream.hidden))
        stream.advance(source.load_block(i, stream.device))
    states.append(stream.hidden)
    gradients = [torch.zeros_like(stream.hidden) for _ in losses]
    for i in reversed(range(source.num_blocks)):
        block, seen = source.load_block(i, stream.device), dict[str, Tensor]()
        learn = {path: block.get_submodule(path).weight.requires_grad_(True) for path in weights(block)}
        handles = [block.get_submodule(path).register_forward_pre_hook(partial(_keep, seen, key)) for key, path in readers(block).items()]
        gates: list[dict[str, list[Tensor]]] = [{key: [] for key in readers(block)} for _ in losses]
        summed = {path: torch.zeros_like(w, dtype=torch.float64) for path, w in learn.items()}
        for rows, (args, kwargs) in zip(stream.batches(), calls[i], strict=True):
            ends = [loss(i, rows, states[i + 1][rows].to(stream.device)) for loss in losses]
            with torch.enable_grad():
                h = states[i][rows].to(stream.device, copy=True).requires_grad_()
                out = block(h, *args, **kwargs)
                out = out[0] if isinstance(out, tuple) else out
            for k, end in enumerate(ends):
                behind = gradients[k][rows].to(stream.device)
                wanted = [h, *seen.values(), *(learn.values() if k == 0 else ())]
                first, *rest = torch.autograd.grad(out, wanted, behind if end is None else behind + end.to(behind.dtype), retain_graph=k + 1 < len(ends))
                gradients[k][rows] = first.to(gradients[k].dtype)
                for (key, x), g in zip(seen.items(), rest, strict=False):
                    gates[k][key].append((x.detach().double() * g.double()).view(len(h), -1, x.shape[-1]).sum(1))
                for path, g in zip(learn, rest[len(seen):], strict=False):  # fmt: skip
                    summed[path] += g
        for handle in handles:
            handle.remove()
        block.requires_grad_(False)
        states.pop()
        yield i, block, [{key: torch.cat(pieces) for key, pieces in gate.items()} for gate in gates], summed


def _keep(seen: dict[str, Tensor], key: str, module: nn.Module, args: tuple) -> None:
    seen[key] = args[0]


def likelihood(stream: Stream, sampled: bool = False) -> Loss:
    """−log p of the text's next tokens, summed, or of tokens drawn from the model itself, whose squared gradient is the Fisher information."""
    last, tail, generator = stream.source.num_blocks - 1, None, torch.Generator().manual_seed(0)

    def loss(i: int, rows: slice, state: Tensor) -> Tensor | None:
        nonlocal tail
        if i < last:
            return None
        tail = tail or stream.tail()
        with torch.enable_grad():
            h = state.requires_grad_()
            log_p = tail(h).float().log_softmax(-1)[:, :-1]
            text = stream.tokens[rows][:, 1:].to(h.device)
            if sampled:
                text = torch.multinomial(log_p.detach().exp().flatten(0, 1).cpu(), 1, generator=generator).view(text.shape).to(h.device)
            nll = -log_p.gather(-1, text[..., None])[..., 0]
            if stream.mask is not None:
                nll = nll * stream.mask[rows][:, 1:].to(h.device)
            return torch.autograd.grad(nll.sum(), h)[0]

    return loss


def trajectory(stream: Stream) -> Loss:
    """v·M/t behind every block, M the cosines of all pairs of tokens of a window and v random signs, drawn anew for every block and batch."""
    generator = torch.Generator().manual_seed(0)

    def loss(i: int, rows: slice, state: Tensor) -> Tensor:
        t = state.shape[1]
        v = torch.randint(0, 2, (t, t), generator=generator, device="cpu").mul_(2).sub_(1).to(state.device, torch.float32)
        with torch.enable_grad():
            h = state.requires_grad_()
            n = nn.functional.normalize(h.float(), dim=-1)
            if stream.mask is not None:
                n = n * stream.mask[rows][..., None].to(h.device)
            return torch.autograd.grad((n * (v @ n)).sum() / t, h)[0]

    return loss
