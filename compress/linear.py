"""CompressedLinear: a linear layer whose weight is a Format. Forward is whatever kernel dispatch finds, else dequantize and multiply."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .errors import CompressError
from .formats import Format, build
from .kernels import dispatch
from .kernels.dispatch import AUTO, How


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

    def _apply(self, fn, recurse=True):
        """Moves between devices, but keeps the stored dtypes: .half() must not round scales that were rounded once already."""
        self.cache.clear()
        before = {name: getattr(self, name) for name in self.tensor_names}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            if (now := getattr(self, name)).dtype != tensor.dtype:
                setattr(self, name, tensor.to(now.device))
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        self.cache.clear()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self):
        return {**self.__dict__, "cache": {}}  # prepared kernels are closures over this process

    def forward(self, x: Tensor) -> Tensor:
        return dispatch.matmul(x, self._weight, self.bias, self.cache, self.how)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, weight={self.format.describe()}"


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
