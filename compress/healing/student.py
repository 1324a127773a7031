"""Student: the compressed model in memory, its linears replaced by what learns, and plain again when it has.

What learns are `masters`, fp32 by name: the adapters or scales of every compressed linear, and the norms of the blocks, whose parameters are copies of
theirs in the dtype that the model computes in. Linears are those of the manifest; of a checkpoint without one (blocks dropped, say) all of the blocks'.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from ..arch import LINEARS, routers
from ..artifact import LayerRecord
from ..checkpoint import Checkpoint
from ..errors import CompressError
from ..formats import Dense, Format, build
from ..kernels.dispatch import How
from ..linear import CompressedLinear, get_weight
from ..stream import StandIn
from ..trained import place, vectors
from ..verification import ArtifactCheckpoint
from ..walk import block_tensors
from .adapters import Whole, integral, learner
from .options import Heal
from .teacher import descent, parts


def shard_of(source: Checkpoint, i: int, solved: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, LayerRecord], dict[str, Format]]:
    """Block i as a shard holds it, the records of its layers, and the format of every linear that can learn, by path. solved: tensors in place of its own."""
    name, artifact = source.block_name(i), source if isinstance(source, ArtifactCheckpoint) and not source.manifest.plain else None
    if artifact:
        tensors = {key: source.read_stored(key) for key, t in artifact.manifest.tensors.items() if t.shard == f"block-{i:05d}.safetensors"}
        layers = {path: record for path, record in artifact.manifest.layers.items() if path.startswith(name + ".")}
        if artifact.manifest.layers:
            return tensors, layers, {path: build(r.format, {t: tensors[at] for t, at in r.places(path).items()}) for path, r in layers.items()}
    block = source.load_block(i)
    if not artifact:
        tensors = block_tensors(block, name, {}, {})
    tensors |= {key: solved[key].to(t.dtype) for key, t in tensors.items() if key in solved}
    skip = routers(block)
    linears = {f"{name}.{path}": m for path, m in block.named_modules() if isinstance(m, LINEARS) and path not in skip}
    return tensors, {}, {path: Dense(W.T.contiguous() if isinstance(m, Conv1D) else W) for path, m in linears.items() for W in [tensors[f"{path}.weight"]]}


def _like(f: Format, linear: nn.Module) -> Tensor | None:
    """The weight [out, in] of an original linear, if `f` stands for it and not for what a view made of it."""
    W = get_weight(linear)
    return W if W.shape == f.shape and float((f.dequantize() - W.cpu()).norm() / W.norm()) < 0.7 else None


class Healed(nn.Module):
    """In the place of a linear while it learns."""

    def __init__(self, inner: nn.Module, bias: Tensor | None):
        super().__init__()
        self.inner, self.bias = inner, bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y if self.bias is None else y + self.bias


class Student:
    """hear: linears of the last block whose outputs are wanted, by their paths in it, or parts of these (teacher.py). Raises CompressError where one is not
    there.

    teacher: the original, of which weights are read where codes learn (`train: weights`), each from the block that it was made of. solved: tensors of a
    plain source that are others from the start."""

    def __init__(self, options: Heal, source: Checkpoint, device: str, seed: int, hear: list[str], teacher: Checkpoint | None = None,
                 solved: dict[str, Tensor] | None = None):  # fmt: skip
        generator, solved = torch.Generator().manual_seed(seed), solved or {}
        self.device, self.model = device, source.load_outer(device)
        self.formats, self.stored = dict[str, Format](), dict[str, torch.dtype]()
        self.blocks: list[nn.Module] = [source.load_block(i, device) for i in range(source.num_blocks)]
        self.place: nn.ModuleList = self.model.get_submodule(source.blocks_path)  # type: ignore[assignment]
        for i, block in enumerate(self.blocks):
            self.place[i] = block
            for name, p in block.named_parameters(prefix=source.block_name(i)):
                if name in solved:
                    p.data.copy_(solved[name])
            tensors, _, formats = shard_of(source, i, solved)
            self.formats |= formats
            self.stored |= {name: t.dtype for name, t in tensors.items()}
        self.model.requires_grad_(False)
        linears = {path: self.model.get_submodule(path) for path in self.formats}
        self.biases: dict[str, Tensor | None] = {path: m.bias for path, m in linears.items()}  # type: ignore[misc]
        self.transposed = {path for path, m in linears.items() if isinstance(m, Conv1D)}  # kept [in, out] by a plain GPT-2
        here: dict[int, Tensor] = {}  # one copy on the device of a tensor that several linears share
        known: dict[tuple, nn.Module] = {}
        self.learners: dict[str, nn.Module] = {}
        block_of = lambda path: int(path.removeprefix(source.blocks_path + ".").partition(".")[0])
        codes = options.train == "weights" and teacher is not None and any(map(integral, self.formats.values()))
        made_of = descent(source, teacher, device) if codes else []  # type: ignore[arg-type]
        at, theirs, original = -1, None, None  # a block of the original
        for path, f in self.formats.items():
            if made_of:
                at, theirs = (at, theirs) if at == block_of(path) else (block_of(path), teacher.load_block(made_of[block_of(path)], device))  # type: ignore[union-attr]
                original = _like(f, theirs.get_submodule(path.removeprefix(source.block_name(at) + ".")))  # type: ignore[union-attr]
            f = build(f.meta(), {key: here.setdefault(id(t), t.to(device)) for key, t in f.tensors().items()})
            self.learners[path] = learner(f, options, dtype=source.dtype, kept_as=source.stored_dtype, generator=generator, known=known, original=original)
        self.head = self.model.get_output_embeddings().weight.detach()  # as it was
        self.learned_head = ""  # its path, where it learns
        if options.head:
            module = self.model.get_output_embeddings()
            if module.weight is self.model.get_input_embeddings().weight:
                raise CompressError(f"{source.name}: heal.head: its head is its input embedding, which would learn with it; leave it out")
            path = self.learned_head = next(name for name, m in self.model.named_modules() if m is module)
            self.formats[path], self.biases[path] = Dense(self.head.to(source.stored_dtype).cpu()), module.bias
            self.learners[path] = Whole(self.formats[path].to(device))
        self.norms = vectors(self.model, source.blocks_path, self.formats)
        place(self.model, [(path, Healed(inner, self.biases[path])) for path, inner in self.learners.items()])
        for p in self.norms.values():
            p.requires_grad_(True)
        self.first = {name: p.detach().float().clone() for name, p in self.norms.items()}
        learning = {p: f"{path}.{n}" for path, inner in self.learners.items() for n, p in inner.named_parameters() if p.requires_grad}
        self.adapters = {name: p for p, name in learning.items()}  # each once, by the last of the names it has
        self.masters: dict[str, Tensor] = {**self.adapters, **{name: v.clone() for name, v in self.first.items()}}
        self.seen: dict[int, Tensor] = {}  # block → its output in the last forward
        self.read: dict[str, Tensor] = {}  # "state": what the head read in the last forward
        self.model.get_output_embeddings().register_forward_pre_hook(lambda module, args: self.read.update(state=args[0]))
        self.heard: dict[str, Tensor] = {}  # linear of the last attention → its output
        last = source.num_blocks - 1
        for path in dict.fromkeys(key.partition(":")[0] for key in hear):
            try:
                module = self.blocks[-1].get_submodule(path)
            except AttributeError as error:
                raise CompressError(f"{source.name}: its last block has no {path}, whose relations were to be compared; leave relation at 0") from error
            for part, rows in parts(source, last, path).items():
                module.register_forward_hook(lambda m, args, y, key=path + part, rows=rows: self.heard.update({key: y[..., rows]}))
        for i, block in enumerate(self.blocks):
            self.place[i] = StandIn(block, partial(self._through, i, block, options.checkpointing))

    def _through(self, i: int, block: nn.Module, again: bool, args: tuple, kwargs: dict):
        out = checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, **kwargs) if again and torch.is_grad_enabled() else block(*args, **kwargs)
        self.seen[i] = out[0] if isinstance(out, tuple) else out
        return out

    def logits(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.model(input_ids=tokens.to(self.device), attention_mask=None if mask is None else mask.long().to(self.device), use_cache=False).logits

    def gradients(self) -> list[Tensor]:
        """Those of the masters, in order, and forgotten."""
        taken = []
        for p in (*self.adapters.values(), *self.norms.values()):
            taken.append(torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad.float())  # an expert may have seen no token
            p.grad = None
        return taken

    @torch.no_grad()
    def follow(self) -> None:
        """The norms' parameters take over what their masters have become."""
        for name, p in self.norms.items():
            p.copy_(self.masters[name])

    @torch.no_grad()
    def finish(self, learned: bool) -> dict[str, Format]:
        """Plain again, as the artifact will hold it, with what was learned or with what was there before; returns the formats, on the CPU."""
        for i, block in enumerate(self.blocks):
            self.place[i] = block
        formats = {path: inner.weight().to("cpu") for path, inner in self.learners.items()} if learned else self.formats  # type: ignore[operator]
        for name, p in self.norms.items():
            p.copy_((self.masters if learned else self.first)[name].to(self.stored[name]))
        place(self.model, [(path, CompressedLinear(f.to(self.device), self.biases[path], How("dense"))) for path, f in formats.items()])
        self.seen.clear()
        return formats
