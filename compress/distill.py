"""Distill: train scales, norms and rounding of the finished model, all at once, on the divergence that is the goal.

    minimise  mean_t KL(p_original(·|t) ‖ p_compressed(·|t))          over the calibration tokens

Layer-wise and block-wise objectives stand in for this one; at the end it can be asked directly. Few numbers are free to move far: a scale a group, the
norms' weights, and codes that were nearly another; the sum of all steps of a code's p is `rounding` of a cell (scales alone: the end-to-end phase of
EfficientQAT, arXiv 2407.11062). What does not improve held-out windows is undone. The compressed model is in memory as a whole, the original is not:
its last hidden states were kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .artifact import LayerRecord, Writer
from .errors import CompressError
from .eval.compare import divergence as kl_of
from .experts import unfuse_experts
from .formats import Format, IntGroup, build
from .linear import get_weight, set_weight
from .trained import Trained, place, vectors


@dataclass(frozen=True)
class Distill:
    """Options of the last phase, `distill:` in a recipe."""

    epochs: int = 2  # passes over the calibration windows
    batch_tokens: int = 4096  # tokens of one step
    scale_lr: float = 5e-3  # Adam's first step on the logarithm of scales and on norm weights, falling to 0
    rounding: float = 0.1  # sum of all steps of a code's position in its cell; 0: codes stay
    held_out: float = 0.05  # share of the windows that only judges

    def __post_init__(self):
        if self.epochs < 0 or self.batch_tokens < 1 or self.scale_lr < 0 or self.rounding < 0 or not 0 < self.held_out < 1:
            raise CompressError(f"distill: epochs {self.epochs}, scale_lr {self.scale_lr} and rounding {self.rounding} must be at least 0, "
                                f"held_out {self.held_out} between 0 and 1")  # fmt: skip


DELTA = "distilled"  # the shard that holds what was learned until every block's shard has taken it over


def finish(options: Distill, writer: Writer, headers: dict[str, dict], whole: Callable[[], nn.Module], blocks: str, tokens: Tensor, mask: Tensor | None,
           teacher: Callable[[slice], Tensor], *, seed: int, watch: Callable[[Sequence], Iterable]) -> None:  # fmt: skip
    """Distill the model whose blocks are all committed, and write every block's shard anew; `headers` is brought up to date.

    What was learned is committed once, as one shard, before the first block is rewritten: a run killed in between goes on from there.
    """
    shards = [s for s in headers if s.startswith("block-")]
    left = [s for s in shards if "model" not in headers[s]["training"]]
    if not left:
        return
    delta = writer.header(DELTA)
    if delta is None:
        model = whole()
        formats: dict[str, Format] = {}
        unfuse_experts(model)
        for s in shards:
            tensors = writer.read(s)
            records = {layer: LayerRecord.model_validate(r) for layer, r in headers[s]["layers"].items()}
            formats |= {layer: build(r.format, {t: tensors[name] for t, name in r.places(layer).items()}) for layer, r in records.items()}
            for layer, r in records.items():
                for t in r.tensors:
                    del tensors[f"{layer}.{t}"]
            model.load_state_dict(tensors, strict=False)  # biases that were corrected
        made, norms, before, after = distill(options, model, blocks, formats, tokens, mask, teacher, seed=seed, watch=watch)
        learned = {f"{layer}.{t}": value for layer, f in made.items() for t, value in f.tensors().items()} | norms
        notes = [] if after < before else [{"what": "distilling undone", "where": "model", "count": 1, "detail": f"held-out KL {before:.3e} did not fall"}]
        delta = writer.commit(DELTA, learned, {}, notes, {"model": [before, after]})
    learned = writer.read(DELTA)
    for s in left:
        tensors = writer.read(s)
        tensors |= {name: learned[name].to(t.dtype) for name, t in tensors.items() if name in learned}
        layers = {name: LayerRecord.model_validate(r) for name, r in headers[s]["layers"].items()}
        notes = delta["fallbacks"] if s == shards[0] else []
        headers[s] = writer.commit(s, tensors, layers, headers[s]["fallbacks"] + notes, headers[s]["training"] | delta["training"])
    writer.remove(DELTA)


def distill(options: Distill, model: nn.Module, blocks: str, formats: dict[str, Format], tokens: Tensor, mask: Tensor | None,
            teacher: Callable[[slice], Tensor], *, seed: int, watch: Callable[[Sequence], Iterable] = iter
            ) -> tuple[dict[str, Format], dict[str, Tensor], float, float]:  # fmt: skip
    """Better formats, better norm weights by name, and the held-out KL in nats before and after.

    model: the original with its own weights, in the dtype to compute in; it is used up. formats: the compressed linears by path. tokens [n, seqlen];
    teacher(rows) gives the original's logits of those windows. Only IntGroup weights and the blocks' norms are trained.
    """
    judges = max(1, round(options.held_out * len(tokens)))
    if judges >= len(tokens):
        raise CompressError(f"distill: {len(tokens)} windows are too few to train on some and judge on others; use more --samples")
    trained = {path: Trained(f, get_weight(model.get_submodule(path)), getattr(model.get_submodule(path), "bias", None))
               for path, f in formats.items() if isinstance(f, IntGroup)}  # fmt: skip
    model.requires_grad_(False)
    norms = vectors(model, blocks, formats)
    for path in formats:
        set_weight(model.get_submodule(path), formats[path].dequantize())
    batch = max(1, options.batch_tokens // tokens.shape[1])
    judging = [slice(i, min(i + batch, len(tokens))) for i in range(len(tokens) - judges, len(tokens), batch)]

    def divergence(rows: slice) -> Tensor:
        log_p = teacher(rows).float().log_softmax(-1)
        valid = None if mask is None else mask[rows].to(log_p.device)
        log_q = model(input_ids=tokens[rows].to(log_p.device), attention_mask=None if valid is None else valid.long(), use_cache=False).logits.float()
        return kl_of(log_p, log_q.log_softmax(-1), valid).mean()

    def judged() -> float:
        with torch.no_grad():
            return sum(float(divergence(rows)) for rows in judging) / len(judging)

    before = judged()
    originals = {path: model.get_submodule(path) for path in trained}
    place(model, trained.items())
    for p in norms.values():
        p.requires_grad_(True)
    masters = {name: p.detach().float().clone() for name, p in norms.items()}  # bf16 is too coarse for small steps
    adam = torch.optim.Adam([*(t.log_s for t in trained.values()), *masters.values()], lr=options.scale_lr, betas=(0.9, 0.95))
    steps = options.epochs * -(-(len(tokens) - judges) // batch)
    order, starts = torch.Generator().manual_seed(seed), list[int]()
    for step in watch(range(steps)):
        starts = starts or (torch.randperm(-(-(len(tokens) - judges) // batch), generator=order) * batch).tolist()
        first = starts.pop()
        with torch.enable_grad():
            divergence(slice(first, min(first + batch, len(tokens) - judges))).backward()
        left = 1 - step / steps
        for t in trained.values():
            t.p.data.add_(t.p.grad.sign_(), alpha=-2 * options.rounding * left / steps)
            t.p.grad = None
        for name, p in norms.items():
            masters[name].grad, p.grad = p.grad.float(), None
        adam.param_groups[0]["lr"] = options.scale_lr * left * min(1, (step + 1) / 5)
        adam.step()
        adam.zero_grad(set_to_none=True)
        for t in trained.values():
            t.log_s.grad = None
        for name, p in norms.items():
            p.data.copy_(masters[name])
    made = {path: t.weight() for path, t in trained.items()}
    place(model, originals.items())
    for path, f in made.items():
        set_weight(originals[path], f.dequantize())
    after = judged()
    return (formats | made, {name: p.detach() for name, p in norms.items()}, before, after) if after < before else (formats, {}, before, before)
