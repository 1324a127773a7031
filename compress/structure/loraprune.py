"""LoRAPrune: train adapters on the text, and cut while they train: a few units at a time, by what gradients of the adapters alone tell about the weights.

    ĝ = s (∂L/∂B · A + B · ∂L/∂A)        stands for ∂L/∂W of W + s B A, which is never formed                  Zhang et al., arXiv 2305.18403
    I = Σ over a unit of |ĝ ⊙ (W + s B A)|, every linear counting alike;   I ← 0.9 I + 0.1 I_now
    r(τ) = r (1 − (1 − τ)³)              of every layer's units, the lowest, are silenced, τ from 0 to 1 between a tenth and nine tenths of the steps

Most cuts fall while many steps that can make up for them are still to come. At the end adapters are merged and silent units cut out. In the paper L is the loss
of the text, which tunes the model to it and away from the original (`text: true`). Here it is KL(original ‖ model), and the text's own loss only where that
is zero still: before the first cut, when scores are wanted and no step is taken.

With `penalty`, λ · mean log(1 + a²) over all attention probabilities a is added to L of the text: Sparse-then-Prune (Prasetyo et al., arXiv 2307.11988),
which trains so and prunes by magnitude afterwards (`loraprune: {mlp: 0, penalty: 0.01}`, then the step `magnitude`). Rows of a sum to 1 and the penalty is
convex: it evens them out.

The model is in memory as a whole, its adapters and their moments in fp32; a step costs what one of `compress heal` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..checkpoint import Checkpoint
from ..errors import CompressError, at_least
from ..formats import Dense
from ..healing.adapters import Frozen, LowRank, Merged
from ..healing.student import Healed
from ..skeleton import Heads, Neurons
from ..stream import Stream
from .importance import coupled, gathered
from .refit import instead
from .smaller import Edit, Smaller, spans
from .width import Width


@dataclass(frozen=True)
class LoRAPrune:
    """Cut neurons and key-value groups by the gradients of adapters, while the adapters train; the same share of every layer."""

    mlp: float = 0.2  # share of the MLP neurons to cut
    groups: float = 0.0  # share of the key-value groups to cut, each with its query heads
    steps: int = 200  # of training
    every: int = 10  # steps between two cuts
    batch: int = 4  # windows of a step
    rank: int = 8  # of an adapter
    lr: float = 3e-4  # Adam's
    text: bool = False  # train on the loss of the text, as the paper does, and not towards the original
    penalty: float = 0.0  # λ of Sparse-then-Prune, which uses 0.01 and trains on the text
    multiple: int = 8  # MLP widths are multiples of it
    skip: tuple[int, ...] = ()  # blocks that keep their widths; -1: the last
    needs_text = True

    def __post_init__(self):
        at_least(self, mlp=0, groups=0, steps=1, every=1, batch=1, rank=1, lr=0, penalty=0, multiple=1)

    def _width(self) -> Width:
        return Width(mlp=self.mlp, groups=self.groups, by="magnitude", across="layer", multiple=self.multiple, skip=self.skip)

    def guess(self, source: Checkpoint) -> dict[str, Any]:
        return self._width().guess(source) | {"learned": {}}

    def measure(self, source: Checkpoint, enter, scratch) -> dict[str, Any]:
        """Width's plan, and "learned": the tensors that the adapters changed, which lie in the scratch."""
        self._width().guess(source)  # refuses what cannot be cut
        made = scratch.tensors("loraprune", lambda: self._train(source, enter(source, 0)))
        plan: dict[str, Any] = {"mlp": {}, "heads": {}, "experts": {}, "learned": dict.fromkeys((n for n in made if not n.startswith("kept.")), "loraprune")}
        for _, kind, i in (name.split(".") for name in made if name.startswith("kept.")):
            plan[kind][i] = spans(made[f"kept.{kind}.{i}"].tolist())
        return plan

    def apply(self, source: Checkpoint, plan: dict[str, Any], scratch=None) -> Checkpoint:
        edits: dict[str, Edit] = {name: partial(instead, scratch, "loraprune", name) for name in plan["learned"]}
        return self._width().apply(Smaller(source, edits=edits) if edits else source, plan, scratch)

    def _train(self, source: Checkpoint, stream: Stream) -> dict[str, Tensor]:
        model, generator = source.load_outer(stream.device), torch.Generator().manual_seed(0)
        blocks: nn.ModuleList = model.get_submodule(source.blocks_path)  # type: ignore[assignment]
        parts, masks, score = list[dict[str, Neurons | Heads]](), dict[tuple[int, str], Tensor](), dict[tuple[int, str], Tensor]()
        adapters: dict[tuple[int, str], Merged] = {}
        seen: list[Tensor] = []  # attention probabilities of this forward
        for i in range(source.num_blocks):
            block = blocks[i] = source.load_block(i, stream.device)
            block.requires_grad_(False)
            parts.append(coupled(source, block))
            for kind, c in parts[i].items():
                for path in (c.reader, *c.makers):
                    linear = block.get_submodule(path)
                    stored = Dense(linear.weight.data.T if isinstance(linear, Conv1D) else linear.weight.data)
                    change = LowRank(stored.shape, self.rank, 2.0 * self.rank, source.stored_dtype, generator, stream.device)
                    adapters[i, path] = Merged(Frozen(stored, source.dtype), change)
                    block.set_submodule(path, Healed(adapters[i, path], linear.bias))
                masks[i, kind] = torch.ones(adapters[i, c.reader].frozen.stored.shape[1], device=stream.device)
                block.get_submodule(c.reader).register_forward_pre_hook(lambda m, args, key=(i, kind): (args[0] * masks[key].to(args[0].dtype),))
            if self.penalty:
                attention = block.get_submodule(parts[i]["heads"].reader.rpartition(".")[0])
                attention.register_forward_hook(lambda m, args, y: seen.append(y[1]) if isinstance(y, tuple) and isinstance(y[1], Tensor) else None)
        if self.penalty:
            for module in model.modules():
                if hasattr(module, "config"):
                    module.config._attn_implementation = "eager"  # the only one that gives its probabilities out
        adam = torch.optim.Adam([p for a in adapters.values() for p in (a.change.A, a.change.B)], lr=self.lr)
        for step in range(self.steps):
            rows = torch.randint(len(stream.tokens), (self.batch,), generator=generator)
            tokens, mask = stream.tokens[rows].to(stream.device), None if stream.mask is None else stream.mask[rows].to(stream.device)
            text = self.text or self.penalty > 0
            towards = not text and not all(bool(m.all()) for m in masks.values())
            says = partial(model, input_ids=tokens, attention_mask=None if mask is None else mask.long(), use_cache=False)
            original = _whole(says, [a.change for a in adapters.values()], list(masks.values())) if towards else None
            seen.clear()
            with torch.enable_grad():
                log_p = says().logits.float().log_softmax(-1)
                if original is None:
                    each = -log_p[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
                else:
                    each = (original.exp() * (original - log_p)).sum(-1)[:, 1:]
                loss = each.mean() if mask is None else each[mask[:, 1:]].mean()
                if self.penalty:
                    if not seen:
                        raise CompressError(f"{source.name}: loraprune.penalty: attention of {source.config.model_type} does not give its probabilities out")
                    loss = loss + self.penalty * torch.stack([a.float().square().log1p().mean() for a in seen]).mean()
                loss.backward()
            if not torch.isfinite(loss):
                raise CompressError(f"{source.name}: loraprune: the loss is not finite at step {step + 1}; try lr: {self.lr / 4:g}")
            for i, kinds in enumerate(parts):
                for kind, c in kinds.items():
                    now = gathered(c, {path: self._each(adapters[i, path]) for path in (c.reader, *c.makers)})
                    score[i, kind] = 0.9 * score[i, kind] + 0.1 * now if (i, kind) in score else now
            if towards or text:
                adam.step()
            adam.zero_grad(set_to_none=True)
            if (step + 1) % self.every == 0 or step + 1 == self.steps:
                kept = self._kept(source, score, ((step + 1) / self.steps - 0.1) / 0.8)
                for (i, kind), units in kept.items():
                    c = parts[i][kind]
                    masks[i, kind].zero_()[units if isinstance(c, Neurons) else c.columns(units)] = 1
        names = {(i, path): f"{source.block_name(i)}.{path}.weight" for i, path in adapters}
        merged = {names[key]: a.weight().weight for key, a in adapters.items()}  # type: ignore[attr-defined]
        turned = {names[i, path] for i, path in adapters if isinstance(source.model.get_submodule(names[i, path].removesuffix(".weight")), Conv1D)}
        return {n: W.T if n in turned else W for n, W in merged.items()} | {f"kept.{kind}.{i}": units for (i, kind), units in kept.items()}

    @staticmethod
    @torch.no_grad()
    def _each(a: Merged) -> Tensor:
        """|ĝ ⊙ (W + sBA)| [out, in], in sum 1."""
        A, B, s = a.change.A, a.change.B, a.change.scale
        assert a.frozen.W is not None and A.grad is not None and B.grad is not None
        each = (s * (B.grad @ A + B @ A.grad) * (a.frozen.W.float() + a.change.matrix())).abs()
        return each / each.sum().clamp(min=1e-30)

    def _kept(self, source: Checkpoint, score: dict[tuple[int, str], Tensor], progress: float) -> dict[tuple[int, str], Tensor]:
        """What is not silent when so much of the schedule has passed, in whole groups of heads and multiples of neurons."""
        share = 1 - (1 - min(1.0, max(0.0, progress))) ** 3
        found: dict[int, dict[str, Tensor]] = {}
        for (i, kind), s in score.items():
            found.setdefault(i, {})[kind] = s
        now = Width(mlp=share * self.mlp, groups=share * self.groups, by="magnitude", across="layer", multiple=self.multiple, skip=self.skip)
        return {(i, kind): torch.tensor(units) for kind, found_ in now.chosen(source, found).items() for i, units in found_.items() if kind != "experts"}


@torch.no_grad()
def _whole(says: Callable, changes: list[LowRank], masks: list[Tensor]) -> Tensor:
    """Log-probabilities of the original: adapters and masks are out of the way for this forward."""
    before, scales = [m.clone() for m in masks], [change.scale for change in changes]
    for m in masks:
        m.fill_(1)
    for change in changes:
        change.scale = 0.0
    log_p = says().logits.float().log_softmax(-1)
    for m, was in zip(masks, before, strict=True):
        m.copy_(was)
    for change, scale in zip(changes, scales, strict=True):
        change.scale = scale
    return log_p
