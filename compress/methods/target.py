"""Target: which weight a second-order solver should come near to, and which statistics it takes to know.

    plain        W              every layer for itself
    propagated   W + α (W C + D) H_d⁻¹

The second is the minimiser of ‖Ŵx − (Wx̃ + d)‖², x what the layer sees behind compressed layers, x̃ what the original saw in its place, d what the
residual stream lacks where the layer adds to it: any solver on that target is a solver of the asymmetric problem (GPTAQ, arXiv 2504.02692; QEP, arXiv
2504.09629; in this exact form, and with d, ours).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration.statistics import Factor, Stats
from ..errors import CompressError


def importance(weight: Tensor, stats: Stats) -> Tensor:
    """[out, 1]: √ of the mean squared gradient at each output, up to a factor; 1 where no gradient was measured, which is told."""
    if stats.gradient is None:
        stats.note("outputs not weighed", "no gradient reaches it, or it sees routed tokens")
        return torch.ones_like(weight[:, :1])
    return stats.gradient.to(weight).clamp(min=1e-6 * float(stats.gradient.mean()))[:, None].sqrt()


@dataclass(frozen=True)
class TargetOptions:
    """What every solver of this kind lets a user choose."""

    propagate: float = 0.0  # α of the target, which makes up for the errors of earlier layers; 0: every layer for itself
    bias_correction: bool = False  # solve for the layer's bias too, where it has one: weights then answer for deviations from the mean only
    guided: bool = False  # weigh tokens by the squared gradient of the model's loss at this layer's output; False: all tokens alike

    def __post_init__(self):
        if not 0 <= self.propagate <= 1:
            raise CompressError(f"propagate {self.propagate} must lie in 0 ... 1; 0.5 is safe, 1 takes 4 tokens or more per input")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"hessian"} | ({"cross"} if self.propagate else set()) | ({"guidance"} if self.guided else set()))

    def target(self, weight: Tensor, stats: Stats, factor: Factor) -> Tensor:
        """The weight [out, in] to come near to; inputs that were always zero have no say, so their weights are zeroed first."""
        weight = stats.silence(weight)
        if not self.propagate or factor.failed:
            return weight
        if stats.cross is None:
            stats.note("errors not propagated", "no matching inputs of the original model")
            return weight
        return weight + self.propagate * stats.propagated(weight, factor)
