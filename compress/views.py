"""Views: a model rewritten into an equal one whose weights are easier to round. Nothing is copied: tensors change as they are read, block by block.

    fold_norms   norm(x)·diag(γ) Wᵀ  =  norm(x) (W diag γ)ᵀ            FlashNorm, arXiv 2407.09577: γ becomes 1, β moves into biases
    rotate  R1   norm(x R) = norm(x) R for orthogonal R                 QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406:
                 readers of the residual stream W R, its writers RᵀW, so that the stream carries x R and no channel stands out
            R2   v ← R2ᵀ v and o ← o R2 in every head                   attention mixes tokens, not channels, so R2 passes through it

R is random signs times a Hadamard matrix. LayerNorm also removes the mean: there R gets a reflection behind it that makes it keep the vector of
ones, and mean(x R) = mean(x); the model stays of its own class, no norm has to be exchanged. Who reads and writes the stream is found from the
Sites of compress/arch.py, what a norm does by asking the norm. Arithmetic is fp64, one cast at the end; cost: reading takes n log n more a row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import hadamard
from .arch import table_entry
from .checkpoint import Checkpoint, _fused, _tied
from .errors import CompressError
from .experts import unfuse_experts

Edit = Callable[[Tensor], Tensor]
PIECE = 1 << 22  # numbers that are in fp64 at a time
DROWNED = 64  # β/γ from which on a norm's own output is lost in its bias


@dataclass(frozen=True)
class Linear:
    """The tensors of a linear by their names in the model; `axis` is that of its inputs: −1, or −2 where a Conv1D keeps its weight transposed."""

    weight: str
    bias: str | None = None
    axis: int = -1


@dataclass(frozen=True)
class Parts:
    """How a block hangs on the residual stream: norms read it, each for some linears; writers add to it."""

    norms: dict[str, list[Linear]]  # norm → everything that reads its output
    writers: list[Linear]
    heads: list[tuple[Linear, Linear, int]]  # v_proj, o_proj, head_dim


@dataclass(frozen=True)
class FoldNorms:
    """Move the weights of the norms that open a sublayer into the linears that read them."""

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """Raises CompressError where no norm of any block feeds linears only."""
        edits: dict[str, Edit] = {}
        for i in range(source.num_blocks):
            for norm, readers in parts(source, i).norms.items():
                _fold(source, edits, norm, readers)
        if not edits:
            raise CompressError(f"{source.name}: fold_norms: no norm of a {source.config.model_type} block feeds linears and nothing else; leave it out")
        return edited(source, edits)


@dataclass(frozen=True)
class Rotate:
    """Rotate the residual stream and the values inside each head by random Hadamard matrices; folds the norms first."""

    residual: bool = True  # R1: embeddings, everything that reads or writes the residual stream, head
    heads: bool = True  # R2: v_proj and o_proj, head by head
    untie: bool = False  # give a model with tied embeddings a head of its own, which R1 needs and which takes its bytes
    seed: int = 0  # of the signs

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """Raises CompressError where the architecture cannot express it: a norm on the stream itself, a tied head without `untie`."""
        edits: dict[str, Edit] = {}
        blocks = [parts(source, i) for i in range(source.num_blocks)]
        if self.residual:
            source = self._stream(source, blocks, edits)
        if self.heads:
            for i, block in enumerate(blocks):
                for v, o, dim in block.heads:
                    turn = _by_head(dim, hadamard.signs(dim, self.seed + 1 + i))
                    for name, axis in ((v.weight, _outputs(v)), (v.bias, -1), (o.weight, o.axis)):
                        _add(edits, name, _along(axis, turn))
        view = edited(source, edits)
        if self.heads and not all(block.heads for block in blocks):
            view.notes = [*view.notes, {"what": "heads not rotated", "where": source.blocks_path, "count": 1,
                                        "detail": f"{source.config.model_type} has no v_proj of its own"}]  # fmt: skip
        return view

    def _stream(self, source: Checkpoint, blocks: list[Parts], edits: dict[str, Edit]) -> Checkpoint:
        embeddings, final, head = _outer(source)
        for i, block in enumerate(blocks):
            _only_linears(source, i, block)
        if _tied(source.model):
            if not self.untie:
                more = source.nbytes([source.groups[embeddings[0]]]) / 1e6
                _refuse(source, f"the head is the embedding, and rotated they differ; {{rotate: {{untie: true}}}} stores both (+{more:.1f} MB)")
            source = source.untied()
        width = source.model.get_input_embeddings().weight.shape[1]
        centres = any(nature(source.model.get_submodule(norm))[1] for block in blocks for norm in block.norms) or nature(source.model.get_submodule(final))[1]
        turn = rotation(width, self.seed, centres)
        for name in embeddings:
            _add(edits, name, _along(-1, turn))
        for norms in (*(block.norms for block in blocks), {final: [Linear(head)]}):
            for norm, readers in norms.items():
                _fold(source, edits, norm, readers, turn)
        for linear in (w for block in blocks for w in block.writers):
            _add(edits, linear.weight, _along(_outputs(linear), turn))
            _add(edits, linear.bias, _along(-1, turn))
        return source


VIEWS = {"fold_norms": FoldNorms, "rotate": Rotate}


def rotation(n: int, seed: int, centres: bool) -> Edit:
    """x [..., n] → x R, R orthogonal: signs times Hadamard and, for a norm that removes the mean, a reflection that brings 1·R back to 1."""
    signs = hadamard.signs(n, seed)
    if not centres:
        return lambda x: hadamard.transform(x, signs)
    u = torch.full((n,), n**-0.5, dtype=torch.float64)
    v = hadamard.transform(u, signs) - u
    v = v / v.norm().clamp(min=1e-300)

    def turn(x: Tensor) -> Tensor:
        y = hadamard.transform(x, signs)
        return y - 2 * (y @ v.to(y))[..., None] * v.to(y)

    return turn


# ---- what is where


def parts(source: Checkpoint, i: int) -> Parts:
    """Who reads and writes the residual stream in block i. Raises CompressError for an architecture that is not in the table."""
    arch = table_entry(source.model)
    if arch is None:
        raise CompressError(f"{source.name}: views need the sites of {source.config.model_type} in the table of compress/arch.py: watching a model does "
                            "not tell what a norm feeds")  # fmt: skip
    prefix = source.block_name(i)
    block = copy.deepcopy(source.model.get_submodule(prefix))
    names = {f"{prefix}.{name}" for name in block.state_dict()}
    unfuse_experts(block)

    def linear(path: str) -> Linear:
        module = block.get_submodule(path)
        weight = f"{prefix}.{path}.weight"
        return Linear(weight if weight in names else _fused(weight), f"{prefix}.{path}.bias" if getattr(module, "bias", None) is not None else None,
                      -2 if isinstance(module, Conv1D) else -1)  # fmt: skip

    norms: dict[str, list[Linear]] = {}
    for norm, weight in arch.also:
        if f"{prefix}.{weight}" in names:
            norms.setdefault(f"{prefix}.{norm}", []).append(Linear(f"{prefix}.{weight}"))
    writers: dict[Linear, None] = {}
    heads: list[tuple[Linear, Linear, int]] = []
    for site in arch.sites_of(block):
        readers = [linear(path) for path in site.linears]
        if site.previous is not None and block.get_submodule(site.previous).weight.dim() == 1:
            norms.setdefault(f"{prefix}.{site.previous}", []).extend(readers)
        elif not any(r in known for r in readers for known in norms.values()):
            writers |= dict.fromkeys(readers)
        if site.name == "attn.output" and site.previous is not None:
            heads.append((linear(site.previous), readers[0], block.get_submodule(site.previous.rpartition(".")[0]).head_dim))
    return Parts(norms, list(writers), heads)


def _outer(source: Checkpoint) -> tuple[list[str], str, str]:
    """What lies outside the blocks: weights of the embeddings that open the stream, the final norm, the weight of the head."""
    modules = [(name, m) for name, m in source.model.named_modules()
               if not name.startswith(source.blocks_path) and any(True for _ in m.parameters(recurse=False))]  # fmt: skip
    embeddings = [f"{name}.weight" for name, m in modules if isinstance(m, nn.Embedding)]
    norms = [name for name, m in modules if m.weight.dim() == 1]
    head = [f"{name}.weight" for name, m in modules if m is source.model.get_output_embeddings()]
    if len(norms) != 1:
        _refuse(source, f"{', '.join(norms)}: one of them lies on the residual stream, and no rotation passes through the weight of a norm")
    if len(head) != 1 or (rest := {name for name, _ in modules} - {n.removesuffix(".weight") for n in (*embeddings, *norms, *head)}):
        _refuse(source, f"{', '.join(sorted(rest)) if head else 'a model without a head'} outside the blocks is neither embedding, norm nor head")
    return embeddings, norms[0], head[0]


def _only_linears(source: Checkpoint, i: int, block: Parts) -> None:
    """Refuse a block in which anything but the known readers and writers touches the stream."""
    prefix, width = source.block_name(i), source.model.get_input_embeddings().weight.shape[1]
    module = source.model.get_submodule(prefix)
    if odd := [name for name, child in module.named_children()
               if f"{prefix}.{name}" not in block.norms and (w := getattr(child, "weight", None)) is not None and w.dim() == 1]:  # fmt: skip
        _refuse(source, f"{prefix}.{odd[0]} lies on the residual stream, and no rotation passes through the weight of a norm")
    shapes = {f"{prefix}.{name}": t.shape for name, t in module.state_dict().items()}
    readers = [w for ws in block.norms.values() for w in ws]
    known = {w.weight for w in (*readers, *block.writers)}
    if odd := [n for n, s in shapes.items() if len(s) > 1 and n not in known] + [w.weight for w in readers if shapes[w.weight][w.axis] != width] + [
            w.weight for w in block.writers if shapes[w.weight][_outputs(w)] != width]:  # fmt: skip
        _refuse(source, f"{odd[0]} {list(shapes[odd[0]])} is not known to read or write the residual stream of width {width}")


def _refuse(source: Checkpoint, why: str) -> None:
    raise CompressError(f"{source.name}: rotate: {why}; {{rotate: {{residual: false}}}} turns the heads only")


def nature(norm: nn.Module) -> tuple[int, bool]:
    """(1 where a norm multiplies by 1 + weight, else 0; whether it removes the mean): asked of the norm itself."""
    module = copy.deepcopy(norm).to_empty(device="cpu").double()
    x = torch.linspace(-1, 1, module.weight.shape[0], dtype=torch.float64)[None].exp()  # [1, n], mean not 0
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
        unit = int(bool(module(x).any()))
        module.weight.fill_(1 - unit)
        return unit, bool(module(x).mean().abs() < 1e-3)


# ---- edits


def _fold(source: Checkpoint, edits: dict[str, Edit], norm: str, readers: list[Linear], turn: Edit = lambda x: x) -> None:
    """γ into the weights that read a norm, β into their biases; then `turn` what they read. Where a reader has no bias, β stays as β/γ, turned."""
    unit, _ = nature(source.model.get_submodule(norm))
    gain = lambda: source.tensor(f"{norm}.weight").double() + unit  # read where a tensor is edited, not while a run is planned
    shift = lambda: source.tensor(f"{norm}.bias").double()
    has_shift = f"{norm}.bias" in source.model.state_dict()
    moves = has_shift and all(r.bias for r in readers)

    def left(beta: Tensor) -> Tensor:
        over = torch.where(beta == 0, 0.0, beta.double() / gain())
        if not over.abs().max() <= DROWNED:
            raise CompressError(f"{source.name}: {norm}: β/γ reaches {over.abs().max():.3g}, and its readers have no bias to take β; leave the view out")
        return turn(over)

    def scaled(r: Linear, W: Tensor) -> Tensor:
        g = gain()
        return _along(r.axis, lambda x: turn(x * g))(W)

    def shifted(r: Linear, b: Tensor) -> Tensor:
        W = source.tensor(r.weight).movedim(r.axis, -1)
        return (b.double() + W.double() @ shift()).to(_wide(b))

    for r in readers:
        _add(edits, r.weight, partial(scaled, r))
        if moves:
            _add(edits, r.bias, partial(shifted, r))
    _add(edits, f"{norm}.weight", lambda g: torch.full_like(g, 1 - unit))
    if has_shift:
        _add(edits, f"{norm}.bias", (lambda b: torch.zeros_like(b)) if moves else (lambda b: left(b).to(_wide(b))))


def _along(axis: int, f: Edit) -> Edit:
    """Apply f: [rows, n] → [rows, n] (fp64) along one axis of a tensor, a few rows at a time; the result is fp32, or fp64 where the tensor was."""

    def edit(W: Tensor) -> Tensor:
        x = W.movedim(axis, -1)
        flat = x.reshape(-1, x.shape[-1])
        done = torch.cat([f(piece.double()).to(_wide(W)) for piece in flat.split(max(1, PIECE // x.shape[-1]))])
        return done.view(*x.shape[:-1], -1).movedim(-1, axis).contiguous()

    return edit


def _by_head(dim: int, signs: Tensor) -> Edit:
    return lambda x: hadamard.transform(x.unflatten(-1, (-1, dim)), signs).flatten(-2)


def _outputs(linear: Linear) -> int:
    return -3 - linear.axis  # the other one of the last two axes


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _add(edits: dict[str, Edit], name: str | None, edit: Edit) -> None:
    if name is not None:
        before = edits.get(name)
        edits[name] = edit if before is None else lambda t: edit(before(t))


def edited(source: Checkpoint, edits: dict[str, Edit]) -> Checkpoint:
    """`source` whose tensors go through these edits as they are read, after those that it has."""
    view = copy.copy(source)
    view.edits = dict(source.edits)
    for name, edit in edits.items():
        _add(view.edits, name, edit)
    return view
