"""Eliminate: leave out whatever a metric of yours does not miss. Blocks first, then attention and MLP of the blocks that must stay.

    visit blocks from the last to the first; without block l:  L ≤ L₀ + δ → it goes;  else try its attention, then its MLP

AxFormer (Nagarajan et al., arXiv 2010.03688) judges by the loss on a validation set, which is finer than an accuracy. The metric is any callable of a model, a
task of lm-eval among them; what it returns is to be small. What goes stays gone while the others are tried, so the order counts, and a small set is
overfitted: confirm on another one. One evaluation a block, two more for each that stays. The model is resident and left as it was.

    structure = eliminate(model, lambda m: my_loss(m), tolerance=0.02)
    compress.run(path, {"name": "mine", "structure": [*structure, "refit"]}, "wikitext2", "out")
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..arch import find_blocks, table_entry


def eliminate(model: nn.Module, metric: Callable[[nn.Module], float], tolerance: float) -> list[dict[str, Any]]:
    """The structural steps of a recipe that leave out all that the metric does not miss: its value stays within `tolerance` of the whole model's."""
    arch = table_entry(model)
    blocks = model.get_submodule(arch.blocks if arch else find_blocks(model))
    limit = metric(model) + tolerance
    gone: dict[str, list[int]] = {"attention": [], "mlp": [], "block": []}
    handles: list[Any] = []

    def missed(module: nn.Module, hook: Callable) -> bool:
        handles.append(module.register_forward_hook(hook, with_kwargs=True))
        if metric(model) <= limit:
            return False
        handles.pop().remove()
        return True

    try:
        for i in reversed(range(len(blocks))):
            if len(gone["block"]) + 1 < len(blocks) and not missed(blocks[i], _through):
                gone["block"].append(i)
                continue
            for what, child in _sublayers(arch, blocks[i]).items():
                if not missed(child, _silent):
                    gone[what].append(i)
    finally:
        for handle in handles:
            handle.remove()
    return [{"drop": {"what": what, "blocks": found}} for what, found in gone.items() if found]  # whole blocks last: they change the numbers of the others


def _sublayers(arch, block: nn.Module) -> dict[str, nn.Module]:
    """Attention and MLP, where they are modules whose output is added to the stream."""
    children, found = dict(block.named_children()), {}
    for what, site in (("attention", "attn.output"), ("mlp", "mlp.output")):
        path = next((s.linears[0] for s in arch.sites if s.name == site), "") if arch else ""
        child = children.get(path.partition(".")[0])
        if "." in path and child is not None and "residual" not in inspect.signature(child.forward).parameters:
            found[what] = child
    return found


def _through(module, args, kwargs, out):
    state = args[0] if args else kwargs["hidden_states"]
    return (state, *out[1:]) if isinstance(out, tuple) else state


def _silent(module, args, kwargs, out):
    return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)
