"""Mixture-of-experts weights back as one nn.Linear per expert.

transformers 5 stores a layer's experts as two 3-D parameters, gate_up_proj [E, 2I, H] and down_proj [E, H, I], so that
one grouped matmul serves them all. Whoever looks for nn.Linear (a hook, H = E[x xT], a kernel) then walks past most of
the model without a word. `unfuse_experts` puts a module with the same arithmetic in their place: expert e computes

    down_e( act(g) * u ),    [g; u] = gate_up_e(x),    x = the tokens routed to e

in the op order of transformers' eager implementation, so the outputs are equal bit for bit. Nothing is copied: the new
weights are views of the 3-D parameters, or meta tensors when a skeleton is unfused before its weights are read. The
price is a Python loop over the experts that were hit instead of a grouped matmul, which is what calibration wants
anyway: each expert sees only its own tokens.
"""
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations import moe

from compress.errors import CompressError

# What a stack of expert matrices is called across transformers.
PROJECTIONS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj", "weight")
# What transformers' `use_experts_implementation` declares about a layout. Every class that declares these values and
# keeps the default gate (48 of them in 5.23, their syntax trees compared) has the forward that UnfusedExperts repeats.
CONVENTION = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}


class Expert(nn.Module):
    def __init__(self, gate_up_proj: nn.Linear, down_proj: nn.Linear, act_fn: nn.Module):
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn = gate_up_proj, down_proj, act_fn

    def forward(self, x: Tensor) -> Tensor:  # [tokens, H] -> [tokens, H]
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)


class UnfusedExperts(nn.ModuleList):
    """Experts "0", "1", ...; signature and result of the fused module under `experts_implementation="eager"`."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)  # [T, H]; the other two are [T, k]
        for e in top_k_index.unique().tolist():  # ascending: a token's sum over its experts rounds in this order
            k, token = torch.where((top_k_index == e).T)
            y = self[e](hidden_states[token]) * top_k_weights[token, k, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


def fused_experts(module: nn.Module) -> list[str]:
    """Paths of the modules that hold projections as 3-D parameters."""
    return [name for name, child in module.named_modules() if _stacks(child)]


def unfuse_experts(module: nn.Module) -> int:
    """Replace the fused experts inside `module`, in place; returns how many modules that were. Experts stored in any
    other 3-D layout are an error, never skipped."""
    names = fused_experts(module)
    for name in names:
        module.set_submodule(name, _unfused(name, module.get_submodule(name)))
    return len(names)


def spelling(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Tensor of a model, experts by their unfused names → tensors of a checkpoint: one, or two where gate and up of an
    expert are stored apart.

    Every tensor is a label, experts one label a matrix, sent through the reversal that transformers applies when it
    saves. Raises CompressError where that does more than rename and split.
    """
    fused, labels, owners = set(fused_experts(model)), dict[str, Tensor](), list[str]()
    for name, tensor in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        stacked = module in fused and tensor.dim() == 3
        parts = [f"{module}.{e}.{leaf}.weight" for e in range(len(tensor))
                 for _ in range(1 + (leaf == "gate_up_proj"))] if stacked else [name]
        label = torch.arange(len(owners), len(owners) + len(parts))
        labels[name] = label.view(len(tensor), -1, 1) if stacked else label
        owners += parts
    found: dict[str, dict[int, str]] = {}
    for name, label in revert_weight_conversion(model, labels).items():
        if label.numel() != 1:
            raise CompressError(f"{type(model).__name__}: transformers reshapes {name} when it saves, which is not known "
                                "how to follow; save it with transformers instead")
        found.setdefault(owners[int(label)], {})[int(label)] = name
    return {owner: tuple(names[i] for i in sorted(names)) for owner, names in found.items()}


def spelled(tensors: Mapping[str, Tensor], spelling: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """Tensors under the names of a checkpoint, cut where it stores them apart."""
    return {name: part for owner, t in tensors.items() for names in [spelling.get(owner, (owner,))]
            for name, part in zip(names, t.chunk(len(names)), strict=True)}


def unspelled(tensors: Mapping[str, Tensor], spelling: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """The way back."""
    found = {owner: torch.cat([tensors[n] for n in names]) for owner, names in spelling.items() if names[0] in tensors}
    known = {n for names in spelling.values() for n in names}
    return found | {name: t for name, t in tensors.items() if name not in known}


def _stacks(module: nn.Module) -> dict[str, nn.Parameter]:
    """The 3-D projections a module itself holds. A convolution's kernel is none, nor is a [1, 1, H] mixing vector."""
    if isinstance(module, _ConvNd):
        return {}
    own = module.named_parameters(recurse=False)
    return {name: p for name, p in own if name in PROJECTIONS and p.dim() == 3 and min(p.shape) > 1}


def _unfused(name: str, fused: nn.Module) -> UnfusedExperts:
    declared = {flag: getattr(fused, flag, "undeclared") for flag in CONVENTION}
    odd = [f"{flag}={declared[flag]}" for flag in CONVENTION if declared[flag] is not CONVENTION[flag]]
    odd += [f"parameter {p}" for p, _ in fused.named_parameters() if p not in ("gate_up_proj", "down_proj")]
    if getattr(fused, "has_post_expert_norm", False):
        odd.append("has_post_expert_norm=True")
    if getattr(getattr(fused, "_apply_gate", None), "__module__", None) != moe.__name__ or not hasattr(fused, "act_fn"):
        odd.append("a gate of its own")
    if not odd and fused.gate_up_proj.shape[1:] != (2 * fused.down_proj.shape[2], fused.down_proj.shape[1]):
        odd.append("shapes that do not match")
    if odd:
        shapes = ", ".join(f"{p} {list(w.shape)}" for p, w in _stacks(fused).items())
        raise CompressError(f"{name} ({type(fused).__name__}: {shapes}) has {', '.join(odd)}; only gate_up_proj "
                            "[E, 2I, H] and down_proj [E, H, I] with down(act(gate) * up) can be unfused: choose "
                            "another model, or add this layout to compress/experts.py")
    pairs = zip(_linears(fused.gate_up_proj), _linears(fused.down_proj), strict=True)
    return UnfusedExperts(Expert(gate_up, down, fused.act_fn) for gate_up, down in pairs)


def _linears(stack: nn.Parameter) -> Iterator[nn.Linear]:  # [E, out, in]
    for weight in stack.detach():
        # on meta, or nn.Linear would allocate and initialise a weight only to lose it
        linear = nn.Linear(stack.shape[2], stack.shape[1], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=stack.requires_grad)
        yield linear
