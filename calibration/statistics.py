"""Stats: what a compressor learns of a layer's input, and the factorization that all layers of one site share.

    H = (1/T) Σ_t x_t x_tᵀ          over the T valid, finite tokens that reached the site

H is all that second-order methods need: the error of a replacement Ŵ is tr[(Ŵ−W) H (Ŵ−W)ᵀ]. It is accumulated in fp32, in a fixed order,
upper block triangle only, and mirrored at the end: same tokens, same bytes. Where a method asks for it, the same tokens on their way through the
original model give

    C = (1/T) Σ_t (x̃_t − x_t) x_tᵀ          x̃ the input that the original layer sees, x the one behind compressed layers

The means are kept too: where a layer's bias may move, what is left to explain are the moments about them (`centred`).
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field, replace

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


def _plus(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return a.T @ b if total is None else total.addmm_(a.T, b)


@dataclass(eq=False)
class Stats:
    """Second moments of one site's input. `fallbacks` collects what did not go as asked, for the manifest."""

    hessian: Tensor  # [n, n] fp32
    count: int = 0  # tokens accumulated
    dropped: int = 0  # tokens left out because a value was NaN or Inf
    total: float = 0.0  # the sum of their weights; the same number where tokens count alike
    missing: Tensor | None = None  # [out, n] fp32, (1/T) Σ_t d_t x_tᵀ with d what the residual stream already lacks where the layer adds to it
    gradient: Tensor | None = None  # [out] fp32, mean over tokens of the squared gradient of the model's loss at each output of the linear that asks
    cross: Tensor | None = None  # [n, n] fp32, C; None where no method asked, or where the two streams cannot be matched
    means: dict[str, Tensor] = field(default_factory=dict)  # fp32: of "x" [n], and where they were given "original" [n] and "missing" [out]
    fallbacks: list[dict] = field(default_factory=list)
    _factors: dict[tuple[float, bool], Factor] = field(default_factory=dict)
    _centred: Stats | None = None

    @classmethod
    def zeros(cls, n: int, device: torch.device | str = "cpu") -> Stats:
        return cls(torch.zeros(n, n, dtype=torch.float32, device=device))

    def add(self, x: Tensor, original: Tensor | None = None, missing: Tensor | None = None, weight: Tensor | None = None) -> None:
        """Accumulate tokens x [..., n] of any float dtype, what the `original` model has in their place, what the residual
        stream lacks (`missing` [..., out]) beside the layer, and what each token counts (`weight` [...]).

        Rows that hold NaN or Inf are counted and left out.
        """
        exact_in_bf16 = x.dtype == torch.bfloat16
        x = x.reshape(-1, x.shape[-1])
        parts = {"x": x, "original": original, "missing": missing, "weight": weight}
        parts = {k: t.reshape(len(x), -1).float() for k, t in parts.items() if t is not None}
        if not torch.isfinite(sum(t.sum(dim=1) for t in parts.values())).all():  # cheap; only when it trips is every element looked at
            finite = torch.stack([torch.isfinite(t).all(dim=1) for t in parts.values()]).all(0)
            self.dropped += int((~finite).sum())
            parts = {k: t[finite] for k, t in parts.items()}
        x, weight = parts["x"], parts.get("weight")
        self.count += len(x)
        self.total += len(x) if weight is None else float(weight.sum(dtype=torch.float64))
        n = x.shape[1]
        y = x if weight is None else x * weight
        with _bf16_products(exact_in_bf16 and weight is None):
            for i in range(0, n, TILE):
                self.hessian[i : i + TILE, i:].addmm_(x[:, i : i + TILE].T, y[:, i:])
            if original is not None:  # x̃ xᵀ, whose factors are exact in bf16 where those of (x̃ − x) xᵀ are not
                self.cross = _plus(self.cross, parts["original"], y)
            if missing is not None:
                self.missing = _plus(self.missing, parts["missing"], y)
        for name in parts.keys() - {"weight"}:
            value = (parts[name] if weight is None else parts[name] * weight).sum(0)
            self.means[name] = value if name not in self.means else self.means[name] + value

    def finish(self) -> Stats:
        """Mirror the upper triangle and divide by the weight of the tokens."""
        H = self.hessian.triu_()
        H += H.triu(1).T
        if self.total:
            H /= self.total
            if self.cross is not None:
                self.cross.div_(self.total).sub_(H)
            if self.missing is not None:
                self.missing /= self.total
            self.means = {name: mean / self.total for name, mean in self.means.items()}
        return self

    def rows(self, part: slice) -> Stats:
        """The same for some of the outputs of the linear that asks. Factors and fallbacks are shared."""
        cut = lambda t: None if t is None else t[part]
        means = self.means if "missing" not in self.means else self.means | {"missing": self.means["missing"][part]}
        return replace(self, missing=cut(self.missing), gradient=cut(self.gradient), means=means, _centred=None)

    def centred(self) -> Stats:
        """The same about the means: what a layer whose bias is free answers for. Fallbacks are shared."""
        if self._centred is None:
            x, moved = self.means["x"], self.means.get("original", self.means["x"]) - self.means["x"]
            about = lambda M, left: None if M is None else torch.addr(M, left, x, alpha=-1)
            self._centred = replace(self, hessian=about(self.hessian, x), cross=about(self.cross, moved),
                                    missing=about(self.missing, self.means.get("missing", x)), _factors={})  # fmt: skip
        return self._centred

    def bias(self, W: Tensor, W_hat: Tensor) -> Tensor:
        """[out]: what to add to the bias for the mean output to be the original's, once Ŵ [out, n] has taken the place of W."""
        shift = W @ self.means.get("original", self.means["x"]) - W_hat @ self.means["x"]
        return shift + self.means["missing"].to(shift) if "missing" in self.means else shift

    def note(self, what: str, detail: str) -> None:
        """Record, once, something that did not go as asked."""
        if (entry := {"what": what, "detail": detail}) not in self.fallbacks:
            self.fallbacks.append(entry)

    @property
    def dead(self) -> Tensor:
        """bool [n]: inputs that were zero on every token; their weights cannot matter."""
        return self.hessian.diagonal() == 0

    def silence(self, W: Tensor) -> Tensor:
        """W [out, in] with 0 for the weights of inputs that never were active, which is told."""
        if not self.dead.any():
            return W
        self.note("inputs never active", f"{int(self.dead.sum())} of {len(self.dead)} inputs were 0 on all {self.count} tokens: their weights are set to 0")
        return W.masked_fill(self.dead, 0)

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

    def propagated(self, W: Tensor, factor: Factor) -> Tensor:
        """(W C + D) H_d⁻¹ [out, n]: what to add to W for Ŵx to come nearest to Wx̃ + d.

        Wx̃ is what the original layer gives on its own, unharmed input; d what the residual stream has lost before this layer adds to it.
        """
        wanted = (W @ self.cross if self.missing is None else torch.addmm(self.missing.to(W.dtype), W, self.cross))[:, factor.order]
        shift = torch.empty_like(W)
        shift[:, factor.order] = wanted @ factor.U.T @ factor.U
        return shift

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
