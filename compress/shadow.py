"""Shadow: a mask that learns. Every masked weight has a dense shadow; what the mask keeps of it is the weight, what it leaves out goes on learning.

    Ŵ = S̃ ⊙ keep(|S̃|),    ∂/∂S̃ = ∂/∂Ŵ          straight through the mask, chosen anew at every step

DSFormer's straight-through factorizer trains its sparse coefficients so (arXiv 2312.13211), S-STE its 2:4 weights (arXiv 2409.09099). A weight returns
when its shadow has outgrown the least that is kept. The number kept stays, by layer, by row or N of every M, and so do the bytes.
"""

from __future__ import annotations

from torch import Tensor

from .formats import Dense, Format, Masked, Product, Sparse24, Sum
from .methods.masks import top


def masked(weight: Format) -> bool:
    """Has it a mask over plain values, itself or as a part?"""
    if isinstance(weight, (Product, Sum)):
        return any(map(masked, parts(weight)))
    return isinstance(weight, (Masked, Sparse24)) and isinstance(weight.values, Dense)


def parts(weight: Format) -> tuple[Format, ...]:
    return weight.factors if isinstance(weight, Product) else weight.terms if isinstance(weight, Sum) else ()


def cast(weight: Format) -> Format:
    """`weight` with every masked part written out, zeros included: the shadow begins as the weight itself."""
    if isinstance(weight, (Product, Sum)):
        return type(weight)(tuple(map(cast, parts(weight))))
    if isinstance(weight, (Masked, Sparse24)) and isinstance(weight.values, Dense):
        return Dense(weight.dequantize(weight.values.weight.dtype))
    return weight


def kept(S: Tensor, like: Masked | Sparse24) -> Tensor:
    """bool [out, in]: the largest of S, as many as `like` keeps and in its pattern."""
    if isinstance(like, Sparse24):
        return top(S.abs().reshape(-1, like.m), like.n).view_as(S)
    rows, k = like.values.shape
    return top(S.abs().reshape(rows, -1), k).view_as(S)


def thin(shadow: Format, like: Format) -> Format:
    """The shadow with zeros where the mask would be; gradients reach all of it."""
    if isinstance(like, (Product, Sum)):
        return type(like)(tuple(map(thin, parts(shadow), parts(like))))
    if isinstance(like, (Masked, Sparse24)) and isinstance(shadow, Dense):
        S = shadow.weight
        return Dense(S + (S * kept(S.detach(), like) - S).detach())
    return shadow


def stored(shadow: Format, like: Format) -> Format:
    """The inverse of `cast`: masks chosen for the last time."""
    if isinstance(like, (Product, Sum)):
        return type(like)(tuple(map(stored, parts(shadow), parts(like))))
    if isinstance(like, (Masked, Sparse24)) and isinstance(shadow, Dense):
        S = shadow.weight
        keep = kept(S, like)
        values = Dense(S[keep].view(like.values.shape))
        return Masked.pack(keep, values) if isinstance(like, Masked) else Sparse24.pack(keep, values, like.n, like.m)
    return shadow
