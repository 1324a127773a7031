"""CompressedLinear: a linear layer whose weight is a Format. Forward is whatever kernel dispatch finds, else dequantize and multiply."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .arch import table_entry
from .errors import CompressError
from .formats import Format, build, join_rows
from .kernels import dispatch, gated
from .kernels.dispatch import AUTO, How
from .kernels.gated import Gated


class CompressedLinear(nn.Module):
    """y = x · Ŵᵀ + b. The Format's tensors are buffers of this module, so state_dict, .to() and safetensors see plain tensors.

    `how` is handed to kernels.dispatch: policy "auto" takes the fastest measured path, "dense" multiplies by the dequantized matrix in a fixed
    order (evaluation and verification); memory "bounded" never keeps a dense copy; activations "int8" rounds the input, one scale a token.
    """

    def __init__(self, weight: Format, bias: Tensor | None = None, how: How = AUTO):
        super().__init__()
        self.meta = weight.meta()
        self.out_features, self.in_features = weight.shape
        self.tensor_names = list(weight.tensors())
        for name, tensor in weight.tensors().items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.borrowed: dict[str, tuple[nn.Module, str]] = {}
        self.how = how
        self.cache: dict = {}  # what the chosen kernel prepared from the tensors; never saved
        self.fused: tuple[Fused, int] | None = None  # multiplied together with others, of which it is the i-th

    def borrow(self, name: str, owner: CompressedLinear, key: str) -> None:
        """From now on tensor `name` is `key` of another layer, which stores it for both (a factor that two linears share)."""
        delattr(self, name)
        self.tensor_names.remove(name)
        self.borrowed[name] = owner, key

    @property
    def format(self) -> Format:
        own = {name: getattr(self, name) for name in self.tensor_names}
        return build(self.meta, own | {name: getattr(owner, key) for name, (owner, key) in self.borrowed.items()})

    def _weight(self) -> Format:  # building it at every call would take longer than a small matmul
        return self.format

    def _forget(self) -> None:
        """The tensors are about to change."""
        self.cache.clear()
        if self.fused:
            self.fused[0].cache.clear()

    def _apply(self, fn, recurse=True):
        """Moves between devices, but keeps the stored dtypes: .half() must not round scales that were rounded once already."""
        self._forget()
        before = {name: getattr(self, name) for name in self.tensor_names}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            if (now := getattr(self, name)).dtype != tensor.dtype:
                setattr(self, name, tensor.to(now.device))
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self):
        return {**self.__dict__, "cache": {}}  # prepared kernels are closures over this process

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return self.fused[0](self.fused[1], x)
        return dispatch.matmul(x, self._weight, self.bias, self.cache, self.how)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, weight={self.format.describe()}"


class Fused:
    """Linears that read the same input, multiplied as one weight: q, k and v; gate and up.

        [q; k; v] = x · [W_q; W_k; W_v]ᵀ

    One launch for three, and a tall weight where k and v alone are too short to fill a device. The first of them to be called multiplies for all
    and keeps the product; the others, given the very same tensor, take their rows of it. The tensors of each layer stay where they are, so
    state_dict and artifact know nothing of it; kernels that read codes as they lie on disk keep a joined copy of them.
    """

    def __init__(self, members: Sequence[CompressedLinear], gated: bool = False):
        self.members, self.rows, self.gated = list(members), [m.out_features for m in members], gated
        self.cache: dict = {}  # of the joined weight; the members' own stay empty
        self.x: Tensor | None = None
        self.parts: dict[int, Tensor] = {}  # rows of the last product that nobody has taken yet
        for i, member in enumerate(members):
            member.fused = self, i

    def __getstate__(self):
        return {**self.__dict__, "cache": {}, "x": None, "parts": {}}

    def weight(self) -> Format | Gated:
        first, *others = formats = [m.format for m in self.members]
        W: Format = join_rows(formats) if others else first  # type: ignore[assignment]
        return Gated(W) if self.gated else W

    def bias(self) -> Tensor | None:
        return None if self.members[0].bias is None else torch.cat([m.bias for m in self.members])

    def __call__(self, i: int, x: Tensor) -> Tensor:
        if self.x is not x or i not in self.parts:
            y = dispatch.matmul(x, self.weight, self.bias(), self.cache, self.members[0].how)
            self.x, self.parts = x, dict(enumerate(y.split(self.rows, -1)))
        y = self.parts.pop(i)
        if not self.parts:
            self.x = None
        return y


class GatedMLP(nn.Module):
    """down(SiLU(gate(x)) · up(x)) in the place of the model's own module, whose children it takes over by name: gate and up are one product, which
    kernels end with SiLU(gate) · up."""

    def __init__(self, mlp: nn.Module, fused: Fused, down: str):
        super().__init__()
        for name, child in mlp.named_children():
            self.add_module(name, child)
        self.fused, self.down = fused, down

    def forward(self, x: Tensor) -> Tensor:
        fused = self.fused
        return self.get_submodule(self.down)(dispatch.matmul(x, fused.weight, fused.bias(), fused.cache, fused.members[0].how))


def is_gated(mlp: nn.Module, readers: Sequence[str], down: str) -> bool:
    """Is this module down(SiLU(gate(x)) · up(x))? Asked of its own forward, with small linears in the place of its own."""
    linears = {name for name, m in mlp.named_children() if isinstance(m, CompressedLinear | nn.Linear)}
    if len(readers) > 2 or linears != {*readers, down}:
        return False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = {name: nn.Linear(8, 16 // len(readers), dtype=torch.float64) for name in readers} | {down: nn.Linear(8, 8, dtype=torch.float64)}
        x = torch.randn(1, 3, 8, dtype=torch.float64)
    probe = copy.copy(mlp)
    probe.__dict__ = {**mlp.__dict__, "_modules": {**mlp._modules, **small}}
    with torch.no_grad():
        expected = small[down](gated.apply(torch.cat([small[name](x) for name in readers], -1)))
        try:
            return torch.allclose(probe(x), expected, rtol=1e-9)
        except (RuntimeError, TypeError, AttributeError, ValueError):  # it asks for more than x, or for other widths
            return False


def fuse(model: nn.Module) -> list[Fused]:
    """Let linears that read one activation and have one kind of format be multiplied together, SiLU(gate) · up with them. In place; only of the
    architectures of arch.py."""
    made: list[Fused] = []
    if (arch := table_entry(model)) is None:
        return made
    for block in model.get_submodule(arch.blocks):
        sites = arch.sites_of(block)
        for site in sites:
            layers = [m for m in map(block.get_submodule, site.linears) if isinstance(m, CompressedLinear)]
            if len({m.bias is None for m in layers}) != 1 or (len(layers) > 1 and join_rows([m.format for m in layers]) is None):
                continue
            (parent, _, _), names = site.linears[0].rpartition("."), [path.rpartition(".")[2] for path in site.linears]
            others = [path.rpartition(".")[2] for other in sites if other is not site for path in other.linears if path.rpartition(".")[0] == parent]
            whole = parent and len(others) == 1 and len(layers) == len(names)
            if whole and is_gated(block.get_submodule(parent), names, *others):
                made.append(Fused(layers, gated=True))
                block.set_submodule(parent, GatedMLP(block.get_submodule(parent), made[-1], *others))
            elif len(layers) > 1:
                made.append(Fused(layers))
    return made


def ready(model: nn.Module, rows: Iterable[int], dtype: torch.dtype) -> None:
    """Choose every layer's kernel for these numbers of rows now: a trace (torch.compile) or a CUDA graph cannot measure."""
    rows = list(rows)
    for m in model.modules():
        if isinstance(m, CompressedLinear) and not (m.fused and m.fused[1]):
            joined = m.fused[0] if m.fused else None
            weight, cache = (joined.weight, joined.cache) if joined else (m._weight, m.cache)
            for n in rows:
                x = torch.zeros(n, m.in_features, dtype=dtype, device=next(iter(m.buffers())).device)
                with torch.no_grad():
                    dispatch.matmul(x, weight, None, cache, m.how)


def in_features(module: nn.Module) -> int:
    return module.weight.shape[0 if isinstance(module, Conv1D) else 1]


def get_weight(module: nn.Module, original: Tensor | None = None) -> Tensor:
    """The weight as [out, in] fp32, from `original` where the module holds a coarser copy. GPT-2's Conv1D stores it transposed."""
    W = module.weight.detach() if original is None else original.to(module.weight.device)
    return (W.T if isinstance(module, Conv1D) else W).float().contiguous()


def set_weight(module: nn.Module, W: Tensor) -> None:
    """Put a [out, in] matrix back, in the module's own dtype and orientation."""
    W = W.T.contiguous() if isinstance(module, Conv1D) else W
    module.weight = nn.Parameter(W.to(module.weight.dtype), requires_grad=False)


def install(model: nn.Module, layers: Mapping[str, Format]) -> None:
    """Replace the named linears of a model (or block) by CompressedLinear, keeping their biases. In place."""
    for path, weight in layers.items():
        parent, _, leaf = path.rpartition(".")
        try:
            old = model.get_submodule(path)
        except AttributeError as error:
            raise CompressError(f"{path}: in the manifest, but not in the model that config.json describes") from error
        setattr(model.get_submodule(parent), leaf, CompressedLinear(weight, old.bias))
