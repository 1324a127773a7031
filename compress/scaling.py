"""Channel scales: what a layer hears loudest is rounded most carefully. A block step: exact, before anything in the block is rounded.

    x Wᵀ = (x/s) (W diag s)ᵀ,    s_j = rms(x_j)^α                          awq: α by the smallest error after rounding, arXiv 2306.00978
                                 s_j = rms(x_j)^α / max|W_:j|^(1−α)        smooth: α given, arXiv 2211.10438

1/s goes into what makes x: the norm before, the rows of v_proj (repeated under grouped-query attention) or of up_proj. A norm's weight is rounded to
its stored type first and s is what that rounding left, so the model changes by no more than fp32's rounding. What we do differently: loudness is
rms, the diagonal of H that all methods share, and α is judged by tr[(Ŵ−W) H (Ŵ−W)ᵀ], not by running the parent module; before GPTQ, whose later
columns make up for the earlier ones, by Σ_j |ŵ_j−w_j|²/U_jj², the part that they cannot. Sites that no op exactly feeds, and layers that the recipe
does not compress, are left alone. Cost: one pass more a block, `grid` roundings of `rows` rows, and before GPTQ a factorization of H a site.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .arch import Site
from .calibration.statistics import Stats
from .errors import CompressError
from .linear import get_weight, in_features, set_weight
from .methods import GPTQ, grid
from .methods.options import IntOptions
from .views import nature

Layer = tuple[IntOptions, Tensor]  # the method that will compress a linear, its weight [out, n]


class Scaling:
    """What every choice of scales shares: where they go, and what they are chosen from."""

    def sites(self, block: nn.Module, sites: tuple[Site, ...], plan: Mapping[str, object]) -> list[Site]:
        """The sites whose scale can be folded: everything that would be edited is compressed by the recipe, norms aside."""
        return [s for s in sites if s.previous and all(p in plan for p in s.linears)
                and (s.previous in plan or block.get_submodule(s.previous).weight.dim() == 1)]  # fmt: skip

    def __call__(self, block: nn.Module, site: Site, stats: Stats, methods: Mapping[str, IntOptions]) -> None:
        """Scale one site of the resident block, in place. Raises CompressError for a method without an integer grid."""
        outputs, reads = fed_by(block, site)
        loud = stats.hessian.diagonal().sqrt()
        loud = _mean_over(reads, torch.where(loud > 0, loud, loud[loud > 0].mean() if loud.any() else 1.0))
        layers = [(methods[p], get_weight(block.get_submodule(p), block.originals.get(f"{p}.weight"))) for p in site.linears]
        s = self.choose(loud, layers, stats, reads)  # [outputs]
        if (s != 1).any():
            fold(block, site, s, outputs, reads)

    def choose(self, loud: Tensor, layers: list[Layer], stats: Stats, reads: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class AWQ(Scaling):
    """Scale the inputs of each site by a power of their loudness, searched per site by the error after rounding."""

    grid: int = 20  # powers tried: 0, 1/grid, …, 1 − 1/grid
    rows: int = 512  # rows of each weight that the search looks at, evenly spread

    def choose(self, loud: Tensor, layers: list[Layer], stats: Stats, reads: Tensor) -> Tensor:
        """The scale [outputs] of the least relative error, summed over the linears that share it; loud [outputs], reads [n]: who hears which."""
        some = [(method, W[:: -(-len(W) // self.rows)]) for method, W in layers]
        scales = [_centred(loud ** (k / self.grid)) for k in range(self.grid)]
        errors = [sum(rounding_error(method, W, s[reads], stats) for method, W in some) for s in scales]
        return scales[errors.index(min(errors))]


@dataclass(frozen=True)
class Smooth(Scaling):
    """Scale the inputs of each site so that inputs and weights share the loudness, SmoothQuant's way."""

    alpha: float = 0.5  # how much of the difference in loudness moves from the inputs into the weights

    def choose(self, loud: Tensor, layers: list[Layer], stats: Stats, reads: Tensor) -> Tensor:
        """s = rms(x)^α / max|W|^(1−α), [outputs]."""
        largest = _mean_over(reads, torch.stack([W.abs().amax(0) for _, W in layers]).amax(0))
        return _centred(loud**self.alpha / largest.clamp(min=1e-5) ** (1 - self.alpha))


BLOCKS = {"awq": AWQ, "smooth": Smooth}


def fed_by(block: nn.Module, site: Site) -> tuple[Tensor, Tensor]:
    """Which outputs of `previous` feed a site, and for each of its inputs [n] which of those. A linear feeds it with its last n; under grouped-query
    attention each of v_proj's heads feeds several."""
    path, n = str(site.previous), in_features(block.get_submodule(site.linears[0]))
    previous = block.get_submodule(path)
    out = previous.weight.shape[-1 if isinstance(previous, Conv1D) else 0]
    channels = torch.arange(n, device=previous.weight.device)
    if out >= n:
        return channels + out - n, channels
    dim = int(block.get_submodule(path.rpartition(".")[0]).head_dim)
    return channels[:out], channels // dim // (n // out) * dim + channels % dim


def fold(block: nn.Module, site: Site, s: Tensor, outputs: Tensor, reads: Tensor) -> None:
    """Divide `outputs` of `previous` by s and multiply the columns that read them, in place; the block computes what it did."""
    path, s = str(site.previous), s.double()
    previous = block.get_submodule(path)
    if previous.weight.dim() == 1:
        unit, _ = nature(previous)
        gain = _kept(block, f"{path}.weight").double() + unit
        stored = (gain / s - unit).to(block.stored[f"{path}.weight"])
        left = stored.double() + unit
        s = torch.where((gain == 0) | (left == 0), 1.0, gain / left)  # what rounding left: exact again
        _keep(block, f"{path}.weight", torch.where(s == 1, gain - unit, left - unit))
    else:
        W = get_weight(previous, block.originals.get(f"{path}.weight")).clone()
        W[outputs] = (W[outputs].double() / s[:, None]).float()
        _put(block, path, W)
    if getattr(previous, "bias", None) is not None:
        bias = _kept(block, f"{path}.bias").double()
        bias[outputs] /= s
        _keep(block, f"{path}.bias", bias)
    for reader in site.linears:
        W = get_weight(block.get_submodule(reader), block.originals.get(f"{reader}.weight"))
        _put(block, reader, (W.double() * s[reads]).float())


def _put(block: nn.Module, path: str, W: Tensor) -> None:
    """A weight [out, in] that will be compressed: the method gets it unrounded."""
    module = block.get_submodule(path)
    set_weight(module, W)
    block.originals[f"{path}.weight"] = W.T if isinstance(module, Conv1D) else W


def _kept(block: nn.Module, name: str) -> Tensor:
    return block.originals.get(name, block.state_dict()[name]).to(block.state_dict()[name].device)


def _keep(block: nn.Module, name: str, t: Tensor) -> None:
    """A tensor that is stored as it is: rounded once, here, so that the block in memory is the block on disk."""
    path, _, leaf = name.rpartition(".")
    module = block.get_submodule(path)
    t = t.to(block.stored[name])
    block.originals[name] = t
    setattr(module, leaf, nn.Parameter(t.to(getattr(module, leaf).dtype), requires_grad=False))


def _centred(s: Tensor) -> Tensor:
    s = s.clamp(min=1e-4)
    return s / (s.max() * s.min()).sqrt()


def _mean_over(reads: Tensor, values: Tensor) -> Tensor:
    """values [n] of a site's inputs → [outputs]: the mean over the inputs that read the same output."""
    total = values.new_zeros(int(reads.max()) + 1).index_add_(0, reads, values)
    return total / torch.bincount(reads)


def rounding_error(method: IntOptions, W: Tensor, s: Tensor, stats: Stats) -> float:
    """Relative error in the H-norm of rounding W diag s to the method's grid, unclipped; for GPTQ what its sweep would leave of it."""
    if not isinstance(method, IntOptions):
        raise CompressError(f"a scale is searched for integer grids, and {type(method).__name__.lower()} has none; use rtn or gptq, or leave awq out")
    groups = (W * s).view(len(W), -1, method.group_size if method.group_size > 0 else W.shape[1])
    g = grid.fit(groups, method.levels, method.code_bits, method.sym, "none", None, torch.float32)
    z, step = g.zero[..., None], g.scale[..., None]
    W_hat = (g.codes(groups, step, z) - z).mul_(step).view_as(W) / s
    if not isinstance(method, GPTQ):
        return stats.error(W, W_hat)
    factor = stats.factor(method.damp, method.act_order)
    price = torch.empty_like(s).index_copy_(0, factor.order, factor.U.diagonal() ** -2)
    return float(((W_hat - W).square() @ price).sum() / ((W @ stats.hessian) * W).sum())
