"""Eliminate: leave out whatever a metric of yours does not miss. Blocks first, then attention and MLP of the blocks that must stay, then parts of these.

    visit blocks from the last to the first; without block l:  L ≤ L₀ + δ → it goes;  else try its attention, then its MLP;
    of an attention that must stay its key-value groups, one by one; of an MLP its neurons, a chunk at a time, the smallest weights first

AxFormer (Nagarajan et al., arXiv 2010.03688) judges by the loss on a validation set, which is finer than an accuracy. The metric is any callable of a model, a
task of lm-eval among them; what it returns is to be small. What goes stays gone while the others are tried, so the order counts, and a small set is
overfitted: confirm on another one. One evaluation a block, two more for each that stays, one a group and chunk. The model is resident and left as it was.

    structure = eliminate(model, lambda m: my_loss(m), tolerance=0.02)
    compress.run(path, {"name": "mine", "structure": [*structure, "refit"]}, "wikitext2", "out")
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..arch import Arch, find_blocks, table_entry
from ..linear import get_weight
from ..skeleton import Heads, heads, neurons
from .smaller import spans


def eliminate(model: nn.Module, metric: Callable[[nn.Module], float], tolerance: float, chunks: int = 8) -> list[dict[str, Any]]:
    """The structural steps of a recipe that leave out all that the metric does not miss: its value stays within `tolerance` of the whole model's.

    chunks: into how many the neurons of an MLP are divided; 0: heads and neurons are not tried.
    """
    arch = table_entry(model)
    blocks = model.get_submodule(arch.blocks if arch else find_blocks(model))
    limit = metric(model) + tolerance
    gone: dict[str, list[int]] = {"attention": [], "mlp": [], "block": []}
    cut: list[str] = []
    handles: list[Any] = []

    def missed(handle) -> bool:
        handles.append(handle)
        if metric(model) <= limit:
            return False
        handles.pop().remove()
        return True

    def parts(arch: Arch, i: int, what: str) -> None:
        """Groups of the attention or chunks of the MLP of block i, but not all of them: it was missed."""
        unit, kind = (heads(arch, blocks[i]), "heads") if what == "attention" else (neurons(arch, blocks[i]), "mlp")
        if unit is None or (kind == "heads" and arch.fixed_heads):
            return
        reader, spared = blocks[i].get_submodule(unit.reader), list[int]()
        if isinstance(unit, Heads):
            pieces = list(torch.arange(unit.heads).view(unit.groups, -1))
        else:
            pieces = list(get_weight(reader).float().norm(dim=0).cpu().argsort().split(-(-unit.width // chunks)))
        for piece in pieces:
            columns = unit.columns(piece) if isinstance(unit, Heads) else piece
            if len(spared) + len(piece) == sum(map(len, pieces)):
                break  # all of it was missed
            if not missed(reader.register_forward_pre_hook(lambda module, args, columns=columns: (args[0].index_fill(-1, columns.to(args[0].device), 0),))):
                spared += piece.tolist()
            elif kind == "mlp":
                break  # the others matter more
        cut.extend([f"{i}.{kind} {spans(sorted(spared))}"] if spared else [])

    try:
        for i in reversed(range(len(blocks))):
            if len(gone["block"]) + 1 < len(blocks) and not missed(blocks[i].register_forward_hook(_through, with_kwargs=True)):
                gone["block"].append(i)
                continue
            for what, child in _sublayers(arch, blocks[i]).items():
                if not missed(child.register_forward_hook(_silent, with_kwargs=True)):
                    gone[what].append(i)
                elif arch and chunks:
                    parts(arch, i, what)
    finally:
        for handle in handles:
            handle.remove()
    width: list[dict[str, Any]] = [{"width": {"cut": cut}}] if cut else []
    return width + [{"drop": {"what": what, "blocks": found}} for what, found in gone.items() if found]  # whole blocks last: they change the others' numbers


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
