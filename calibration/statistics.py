"""Stats: what a compressor learns of a layer's input, and the factorization that all layers of one site share.

    H = (1/T) Σ_t x_t x_tᵀ          over the T valid, finite tokens that reached the site

H is all that second-order methods need: the error of a replacement Ŵ is tr[(Ŵ−W) H (Ŵ−W)ᵀ]. It is accumulated in fp32, in a fixed order,
upper block triangle only, and mirrored at the end: same tokens, same bytes.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

TILE = 256  # columns of one block of the upper triangle


@contextmanager
def _bf16_products(exact: bool):
    """On CPU, let oneDNN multiply fp32 operands as bf16 with fp32 sums: nothing is lost when they came from bf16, and it is 2.5 times as fast."""
    knob = torch.backends.mkldnn.matmul
    before = knob.fp32_precision
    knob.fp32_precision = "bf16" if exact else before
    try:
        yield
    finally:
        knob.fp32_precision = before


@dataclass(eq=False)
class Factor:
    """The upper Cholesky factor U of (H + damp·mean(diag H)·I)⁻¹ in solving order, H_d⁻¹ = Uᵀ U."""

    U: Tensor  # [n, n] upper triangular; the identity where the Hessian could not be factored
    order: Tensor  # [n] column solved at each step
    damp: float  # what was needed, at least what was asked for
    failed: bool  # no damping up to 1 made H positive definite: U is the identity, which is plain rounding


@dataclass(eq=False)
class Stats:
    """Second moments of one site's input. `fallbacks` collects what did not go as asked, for the manifest."""

    hessian: Tensor  # [n, n] fp32
    count: int = 0  # tokens accumulated
    dropped: int = 0  # tokens left out because a value was NaN or Inf
    fallbacks: list[dict] = field(default_factory=list)
    _factors: dict[tuple[float, bool], Factor] = field(default_factory=dict)

    @classmethod
    def zeros(cls, n: int, device: torch.device | str = "cpu") -> Stats:
        return cls(torch.zeros(n, n, dtype=torch.float32, device=device))

    def add(self, x: Tensor) -> None:
        """Accumulate tokens x [..., n] of any float dtype; rows that hold NaN or Inf are counted and left out."""
        exact_in_bf16 = x.dtype == torch.bfloat16
        x = x.reshape(-1, x.shape[-1]).float()
        if not torch.isfinite(x.sum(dim=1)).all():  # cheap; only when it trips is every element looked at
            finite = torch.isfinite(x).all(dim=1)
            self.dropped += int((~finite).sum())
            x = x[finite]
        self.count += len(x)
        n = x.shape[1]
        with _bf16_products(exact_in_bf16):
            for i in range(0, n, TILE):
                self.hessian[i : i + TILE, i:].addmm_(x[:, i : i + TILE].T, x[:, i:])

    def finish(self) -> Stats:
        """Mirror the upper triangle and divide by the number of tokens."""
        H = self.hessian.triu_()
        H += H.triu(1).T
        if self.count:
            H /= self.count
        return self

    def note(self, what: str, detail: str) -> None:
        """Record, once, something that did not go as asked."""
        if (entry := {"what": what, "detail": detail}) not in self.fallbacks:
            self.fallbacks.append(entry)

    @property
    def dead(self) -> Tensor:
        """bool [n]: inputs that were zero on every token; their weights cannot matter."""
        return self.hessian.diagonal() == 0

    def factor(self, damp: float, act_order: bool) -> Factor:
        """Factor H once and share it: q, k and v (gate and up) ask with the same options and get the same object.

        act_order solves the columns of largest diag(H) first. Damping is raised tenfold, up to 1, until the factorization succeeds.
        """
        key = (damp, act_order)
        if key not in self._factors:
            diagonal, _ = self._diagonal()
            order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(diagonal), device=diagonal.device)
            self._factors[key] = self.factorize(damp, order)
        return self._factors[key]

    def ridge(self, factor: Factor) -> Tensor:
        """What the factor's damping adds to diag(H), [n], columns as the layer has them: H_d = H + diag(ridge)."""
        diagonal, mean = self._diagonal()
        return diagonal - self.hessian.diagonal() + factor.damp * mean

    def _diagonal(self) -> tuple[Tensor, Tensor]:
        """diag(H) and its mean over live inputs; dead ones get that mean, so that they change neither the damping nor each other."""
        live = self.hessian.diagonal()[~self.dead]
        mean = live.mean() if len(live) else self.hessian.new_ones(())
        return torch.where(self.dead, mean, self.hessian.diagonal()), mean

    def factorize(self, damp: float, order: Tensor) -> Factor:
        """Factor H for columns solved in `order` [n]; damping as in `factor`, nothing is kept."""
        H, n = self.hessian, len(self.hessian)
        diagonal, mean = self._diagonal()
        asked = damp
        while True:
            # chol_upper(H⁻¹) without inverting H: with J the order reversal, U = J · chol(J H J)⁻¹ · J; better conditioned, one factor less.
            reverse = order.flip(0)
            # n² each, 0.8 GB for n = 14336: L takes the place of H_d and U that of the identity. LAPACK works on columns, hence .mT.
            L = H[reverse[:, None], reverse].mT
            L.diagonal().copy_(diagonal[reverse] + damp * mean)
            probe = torch.linspace(-1, 1, n, dtype=H.dtype, device=H.device).cos()
            probed, info = (L @ probe).flip(0), torch.empty((), dtype=torch.int32, device=H.device)
            torch.linalg.cholesky_ex(L, out=(L, info))
            if info == 0:
                U = torch.eye(n, dtype=H.dtype, device=H.device).mT
                torch.linalg.solve_triangular(L, U, upper=False, out=U)
                del L
                U = U.flip(0, 1)
                if (U.T @ (U @ probed) - probe.flip(0)).abs().max() < 1e-2:
                    break
            if damp >= 1 or not torch.isfinite(mean):
                self.note("solver failed, rounded to nearest", f"Hessian not positive definite at damping {damp:g}")
                return Factor(torch.eye(n, dtype=H.dtype, device=H.device), order, damp, True)
            damp = max(10 * damp, 1e-4)
        if damp > asked:
            self.note("damping raised", f"from {asked:g} to {damp:g}")
        return Factor(U, order, damp, False)

    def error(self, W: Tensor, W_hat: Tensor) -> float:
        """Relative output error tr[(Ŵ−W) H (Ŵ−W)ᵀ] / tr[W H Wᵀ] of a replacement; 0 where W does not act at all."""
        numerator, denominator = ((D @ self.hessian).mul_(D).sum(dtype=torch.float64) for D in (W_hat - W, W))
        return float(numerator / denominator) if denominator > 0 else 0.0
