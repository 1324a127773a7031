"""Slice: turn the residual stream into the basis in which it has the least to say in its last directions, and leave these out.

    C = Σ over all norms E[x̂ x̂ᵀ],  x̂ = x/rms(x);   C = Q Λ Qᵀ;   readers W ← √(d/k) · W diag(γ) Q_k,   writers W ← Q_kᵀ W,   embeddings E ← E Q_k

after SliceGPT (Ashkboos et al., arXiv 2401.15024): norm(x Q) = norm(x) Q for orthogonal Q, so turning costs nothing, and Q_k, the first k columns, drops the
directions of least variance. An RMSNorm of k channels divides by √(k/d) less than the one of d did: readers make up for it. The paper turns every sublayer's
stream by a Q of its own, which needs a matrix on every shortcut and a model class of its own; here one Q serves all, so that what is left is a plain model
with a smaller hidden_size. That costs quality, of which a step `refit` wins back a part. Models with LayerNorm or norms on the stream are refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..arch import table_entry
from ..checkpoint import Checkpoint, _tied
from ..errors import CompressError, at_least
from ..skeleton import heads
from ..views import Edit, Linear, _add, _along, _fold, _only_linears, _outer, _outputs, nature, parts
from .smaller import Smaller


@dataclass(frozen=True)
class Slice:
    """Turn the residual stream into its principal components and cut the last ones: a smaller hidden_size everywhere."""

    share: float = 0.25  # of the channels to cut
    multiple: int = 8  # the channels left are a multiple of it, and of the number of heads
    needs_text = True

    def __post_init__(self):
        at_least(self, share=0, multiple=1)

    def measure(self, source: Checkpoint, enter, scratch) -> dict[str, Any]:
        """{"width": channels left, "kept": their share of the variance}; Q lies in the scratch."""
        k = self._width(source)
        stream = enter(source, 0)
        width = stream.hidden.shape[-1]
        C = torch.zeros(width, width, dtype=torch.float64, device=stream.device)

        def see(x: Tensor) -> None:
            x = x.detach().flatten(0, -2).float()
            x = x if valid is None else x[valid]
            x = x * x.square().mean(1, keepdim=True).clamp(min=1e-12).rsqrt()
            C.add_((x.T @ x).double() / stream.tokens.numel())

        for i in range(source.num_blocks):
            block, prefix = source.load_block(i, stream.device), source.block_name(i) + "."
            norms = [block.get_submodule(norm.removeprefix(prefix)) for norm in parts(source, i).norms]
            handles = [norm.register_forward_pre_hook(lambda m, args: see(args[0])) for norm in norms]
            for rows, call in zip(stream.batches(), stream.calls[i], strict=True):
                valid = None if stream.mask is None else stream.mask[rows].flatten().to(stream.device)
                stream.hidden[rows] = stream.forward(block, rows, call)
            stream.at += 1
            for handle in handles:
                handle.remove()
        for rows in stream.batches():  # what the final norm reads
            valid = None if stream.mask is None else stream.mask[rows].flatten().to(stream.device)
            see(stream.hidden[rows].to(stream.device))
        values, Q = torch.linalg.eigh(C)
        scratch.tensors("slice", lambda: {"Q": Q.flip(1)})
        return {"width": k, "kept": float(values.flip(0)[:k].sum() / values.sum())}

    def guess(self, source: Checkpoint) -> dict[str, Any]:
        return {"width": self._width(source)}

    def apply(self, source: Checkpoint, plan: dict[str, Any], scratch=None) -> Checkpoint:
        """Raises CompressError where the architecture cannot express it."""
        try:
            embeddings, final, head = _outer(source)
            blocks = [parts(source, i) for i in range(source.num_blocks)]
            for i, block in enumerate(blocks):
                _only_linears(source, i, block)
        except CompressError as error:
            raise CompressError(f"{source.name}: slice needs a stream that can be turned: {error}") from error
        source = source.untied() if _tied(source.model) else source
        d, k = source.model.get_input_embeddings().weight.shape[1], plan["width"]
        basis = cache(lambda: scratch.read("slice", "Q")[:, :k].double())
        write: Edit = lambda x: x @ basis()
        read: Edit = lambda x: (x @ basis()) * math.sqrt(d / k)
        edits: dict[str, Edit] = {}
        for name in embeddings:
            _add(edits, name, _along(-1, write))
        for norms in (*(block.norms for block in blocks), {final: [Linear(head)]}):
            for norm, readers in norms.items():
                unit, centres = nature(source.model.get_submodule(norm))
                if centres:
                    raise CompressError(f"{source.name}: slice: {norm} removes the mean of all channels, and of those left it is another; use an RMSNorm model")
                _fold(source, edits, norm, readers, read)
                edits[f"{norm}.weight"] = lambda g, unit=unit: g.new_full((k,), 1 - unit)  # type: ignore[misc]
        for linear in (w for block in blocks for w in block.writers):
            _add(edits, linear.weight, _along(_outputs(linear), write))
            _add(edits, linear.bias, _along(-1, write))
        raw = source.config.attribute_map.get("hidden_size", "hidden_size")
        arch = table_entry(source.model)
        attention = heads(arch, source.model.get_submodule(source.block_name(0))) if arch else None
        view = Smaller(source, changes={raw: k} | ({"head_dim": attention.dim} if attention else {}), edits=edits)
        turned = source.basis if isinstance(source, Smaller) else None  # by an earlier step: from the whole model's channels to those of `source`
        view.basis = basis if turned is None else (lambda: turned().double() @ basis())
        odd = [n for n, t in view.model.state_dict().items() if t.numel() == source.model.state_dict()[n].numel() and n in edits]
        odd += [n for n, t in view.model.state_dict().items() if t.shape != source.model.state_dict()[n].shape and n not in edits and n in source.groups]
        if odd and k < d:
            raise CompressError(f"{source.name}: slice: {source.config.model_type} with hidden_size {k} would have {odd[0]} in another shape")
        return view

    def _width(self, source: Checkpoint) -> int:
        d, step = source.model.get_input_embeddings().weight.shape[1], math.lcm(self.multiple, source.config.num_attention_heads)
        if not (0 <= self.share < 1 and (k := round(d * (1 - self.share) / step) * step)):
            raise CompressError(f"{source.name}: slice.share = {self.share} of {d} channels: leave at least {step}, in steps of {step}")
        return k
