"""Skeleton: a model whose blocks need not all have the same shape.

A class of transformers builds every block from one configuration. A block that lost some of its heads or neurons is described in config.json by
what differs, `compress_blocks`, one entry a block, and `reshape` gives a model on meta these shapes before its weights are read:

    {"mlp": 820}                 neurons of the MLP: rows of gate and up, columns of down
    {"heads": [4, 2]}            query heads and key-value heads (head_dim stays)
    {"without": ["self_attn"]}   sublayers that are left out; one of attention still counts the tokens that its cache would hold
    {"bias": ["mlp.down_proj"]}  linears with a bias that their class does not give them

Which tensors change together is found from the Sites of arch.py: the linears beside the one that ends a sublayer feed it. A model whose blocks
are alike in all this, in a class whose configuration can say so, needs none of it and is plain Hugging Face.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .arch import Arch, find_blocks, table_entry
from .errors import CompressError

KEY = "compress_blocks"


@dataclass(frozen=True)
class Neurons:
    """An MLP: `reader` multiplies what `makers` give; a maker with twice as many outputs holds gate and up one after the other."""

    reader: str
    makers: tuple[str, ...]
    width: int

    def rows(self, outputs: int, keep: Tensor) -> Tensor:
        """Rows of a maker with so many outputs that make the neurons `keep`."""
        return torch.cat([keep + at for at in range(0, outputs, self.width)])


@dataclass(frozen=True)
class Heads:
    """Attention: `heads` query heads of size `dim` in `groups` groups that share a key and a value each."""

    reader: str
    makers: tuple[str, ...]
    heads: int
    groups: int
    dim: int
    layout: str  # of a fused qkv: "concat" [q | k | v] or "grouped" [q… k v] group by group

    def rows(self, outputs: int, keep: Tensor) -> Tensor:
        """Rows of a maker that belong to the query heads `keep`, which lie in whole groups or as many in each group."""
        per = self.heads // self.groups
        groups = torch.unique(keep // per)
        if outputs == self.heads * self.dim:
            return self.columns(keep)
        if outputs == self.groups * self.dim:
            return self.columns(groups)
        if self.layout == "concat":
            return self.columns(torch.cat([keep, self.heads + groups, self.heads + self.groups + groups]))
        place = keep + 2 * (keep // per)  # behind each group's query heads lie its key and its value
        return self.columns(torch.cat([place, groups * (per + 2) + per, groups * (per + 2) + per + 1]).sort().values)

    def parts(self, outputs: int) -> dict[str, Tensor]:
        """Rows of a maker with so many outputs by what they make: {"": all}, or those of a fused one {"queries", "keys", "values"}."""
        if outputs != (self.heads + 2 * self.groups) * self.dim:
            return {"": torch.arange(outputs)}
        per = self.heads // self.groups
        if self.layout == "concat":
            kind = torch.tensor([0] * self.heads + [1] * self.groups + [2] * self.groups)
        else:
            kind = torch.tensor(([0] * per + [1, 2]) * self.groups)
        return {name: self.columns((kind == k).nonzero().flatten()) for k, name in enumerate(("queries", "keys", "values"))}

    def columns(self, keep: Tensor) -> Tensor:
        return (keep[:, None] * self.dim + torch.arange(self.dim)).flatten()


def neurons(arch: Arch, block: nn.Module) -> Neurons | None:
    """The neurons of a block's dense MLP; None where it has none."""
    reader = next((s.linears[0] for s in arch.sites if s.name == "mlp.output" and _has(block, s.linears[0])), None)
    return None if reader is None else Neurons(reader, _beside(arch, block, reader), shape(block.get_submodule(reader))[1])


def heads(arch: Arch, block: nn.Module) -> Heads | None:
    """The heads of a block's attention; None where it has none. Raises CompressError where heads cannot be taken out one by one."""
    reader = next((s.linears[0] for s in arch.sites if s.name == "attn.output" and _has(block, s.linears[0])), None)
    if reader is None:
        return None
    attention, makers = block.get_submodule(reader.rpartition(".")[0]), _beside(arch, block, reader)
    dim = int(getattr(attention, "head_dim", 0) or attention.head_size)
    count = shape(block.get_submodule(reader))[1] // dim
    outputs = [shape(block.get_submodule(m))[0] // dim for m in makers]
    return Heads(reader, makers, count, (outputs[0] - count) // 2 if len(makers) == 1 else min(outputs), dim, arch.qkv)


def reshape(model: nn.Module) -> nn.Module:
    """Give the blocks of a model on meta the shapes that its configuration says in `compress_blocks`. In place."""
    overrides = getattr(model.config, KEY, None) or []
    if any(overrides):
        arch = table_entry(model)
        blocks = model.get_submodule(arch.blocks if arch else find_blocks(model))
        if len(overrides) != len(blocks):
            raise CompressError(f"config.json: {KEY} describes {len(overrides)} blocks, the model has {len(blocks)}")
        for block, fields in zip(blocks, overrides, strict=True):
            _reshape(arch, block, fields)
    return model


def _reshape(arch: Arch | None, block: nn.Module, fields: dict[str, Any]) -> None:
    if arch is not None and "mlp" in fields and (mlp := neurons(arch, block)) is not None:
        for maker in mlp.makers:
            _resize(block.get_submodule(maker), outputs=shape(block.get_submodule(maker))[0] // mlp.width * fields["mlp"])
        _resize(block.get_submodule(mlp.reader), inputs=fields["mlp"])
    if arch is not None and "heads" in fields and (attn := heads(arch, block)) is not None:
        count, groups = fields["heads"]
        for maker in attn.makers:
            parts = {attn.heads: count, attn.groups: groups}.get(shape(block.get_submodule(maker))[0] // attn.dim, count + 2 * groups)
            _resize(block.get_submodule(maker), outputs=parts * attn.dim)
        _resize(block.get_submodule(attn.reader), inputs=count * attn.dim)
        _tell(block.get_submodule(attn.reader.rpartition(".")[0]), count, groups, attn.dim)
    for path in fields.get("bias", ()):
        linear = block.get_submodule(path)
        linear.bias = nn.Parameter(linear.weight.new_empty(shape(linear)[0]), requires_grad=False)
    for child in fields.get("without", ()):
        module = block.get_submodule(child)
        setattr(block, child, NoAttention(module.layer_idx) if hasattr(module, "layer_idx") else NoMLP())


def _tell(attention: nn.Module, count: int, groups: int, dim: int) -> None:
    """What an attention module knows of its heads beside the shapes of its linears, under the names that transformers uses."""
    known = {"num_heads": count, "num_attention_heads": count, "num_key_value_heads": groups, "num_kv_heads": groups,
             "num_key_value_groups": count // groups, "split_size": count * dim}  # fmt: skip
    for name, value in known.items():
        if isinstance(getattr(attention, name, None), int):
            setattr(attention, name, value)
    attention.config = copy.copy(attention.config)
    for name in ("num_attention_heads", "num_key_value_heads"):
        if hasattr(attention.config, name):
            attention.config.__dict__[attention.config.attribute_map.get(name, name)] = known[name]


class NoAttention(nn.Module):
    """In the place of attention: nothing is added to the stream, but a cache counts the tokens, for later blocks ask it where they are."""

    def __init__(self, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        if cache is not None:
            one = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
            cache.update(one, one, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class NoMLP(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)


def shape(linear: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of an nn.Linear or a Conv1D."""
    a, b = linear.weight.shape
    return (b, a) if isinstance(linear, Conv1D) else (a, b)


def _resize(linear: nn.Module, outputs: int | None = None, inputs: int | None = None) -> None:
    m, n = shape(linear)
    m, n = m if outputs is None else outputs, n if inputs is None else inputs
    linear.weight = nn.Parameter(linear.weight.new_empty((n, m) if isinstance(linear, Conv1D) else (m, n)), requires_grad=False)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.new_empty(m), requires_grad=False)
    tell_shape(linear)


def tell_shape(linear: nn.Module) -> None:
    """What a linear knows of the shape of its weight, which was replaced."""
    m, n = shape(linear)
    for name, value in {"out_features": m, "in_features": n, "nf": m, "nx": n}.items():
        if hasattr(linear, name):
            setattr(linear, name, value)


def _beside(arch: Arch, block: nn.Module, reader: str) -> tuple[str, ...]:
    """The linears with the same parent, in the order of the sites."""
    parent = reader.rpartition(".")[0]
    return tuple(p for s in arch.sites for p in s.linears if p != reader and p.rpartition(".")[0] == parent and _has(block, p))


def _has(block: nn.Module, path: str) -> bool:
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True
