"""Losses of healing, each one number a token, so that masks and batches of any shape weigh tokens alike.

    divergence   KL(p ‖ q) over the k likeliest tokens of the teacher and "any other" as one more:   Σ_k p log(p/q) + p_rest log(p_rest/q_rest)
    distance     ‖h − h_teacher‖² / ‖h_teacher‖²: hidden states behind matched blocks, and what the heads read
    relation     KL(softmax(X Xᵀ/√d) ‖ softmax(Y Yᵀ/√d)) a head, X of the teacher, Y of the student: queries, keys, values before their
                 rotation by position (MiniLM, arXiv 2002.10957 and 2012.15828)

The first never exceeds the KL over the whole vocabulary and is zero only where q agrees on all k and on the rest: leaving the tail out would reward
moving mass into it or out of it. A relation [tokens, tokens] asks only who looks like whom, so student and teacher may differ in width.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 1e-7  # what 1 − Σ q can tell from zero in fp32


def likeliest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Logits [..., vocab] → ids int32 [..., k] and their log-probabilities fp16 [..., k] (rounding them moves a KL by about 1e-6)."""
    logits = logits.float()
    top, ids = logits.topk(min(k, logits.shape[-1]), -1)
    return ids.int(), (top - logits.logsumexp(-1, keepdim=True)).half()


def divergence(ids: Tensor, log_p: Tensor, logits: Tensor) -> Tensor:
    """KL in nats [...], from what `likeliest` kept of the teacher to the student's logits [..., vocab]."""
    logits, log_p = logits.float(), log_p.float()
    log_q = logits.gather(-1, ids.long()) - logits.logsumexp(-1, keepdim=True)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    if ids.shape[-1] == logits.shape[-1]:
        return kl
    p_rest, q_rest = (1 - log_p.exp().sum(-1)).clamp(min=0), (1 - log_q.exp().sum(-1)).clamp(min=LEAST)
    return kl + torch.special.xlogy(p_rest, p_rest) - p_rest * q_rest.log()


def distance(state: Tensor, wanted: Tensor) -> Tensor:
    """Both [b, t, width] → [b, t], every token relative to what is wanted of it: some states are a hundred times as long as others."""
    wanted = wanted.float()
    return (state.float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=LEAST)


def translation(ours: Tensor, theirs: Tensor) -> Tensor:
    """Heads [vocab, width] of student and teacher → [teacher's width, student's]: from what the teacher's head reads to what the student's has to.

    argmin_s ‖W_s s − W t‖ = (W_sᵀW_s)⁻¹ W_sᵀW t: the identity where the heads are the same, and exact where the stream was turned, scaled or sliced.
    """
    W = ours.detach().double()
    return torch.linalg.solve(W.T @ W, W.T @ theirs.detach().double()).T.float()


def relation(student: Tensor, teacher: Tensor, heads: int) -> Tensor:
    """[b, t, width] each, of widths that `heads` divides → [b, t], mean over heads. Tokens look back only, as the model does."""
    later = torch.ones(student.shape[1], student.shape[1], dtype=torch.bool, device=student.device).triu(1)

    def relations(x: Tensor) -> Tensor:
        x = x.float().unflatten(-1, (heads, -1)).transpose(1, 2)  # [b, heads, t, width / heads]
        return (x @ x.mT * x.shape[-1] ** -0.5).masked_fill(later, -torch.inf).log_softmax(-1)

    log_r, log_s = relations(teacher), relations(student)
    return (log_r.exp() * (log_r - log_s).masked_fill(later, 0)).sum(-1).mean(1)
