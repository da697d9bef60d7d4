"""The definition of `linear_distill_loss`, in plain torch. It materialises all logits."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Divergence = Literal["reverse_kl", "forward_kl", "jensen_shannon"]
"""The divergence of the student's distribution p and the teacher's q; see `divergence_of`."""
DIVERGENCES: tuple[Divergence, ...] = ("reverse_kl", "forward_kl", "jensen_shannon")


def divergence_of(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:
    """Divergence of each row, [R], from log-probabilities [R, V].

    `reverse_kl`: KL(p || q) = sum_j p_j (log p_j - log q_j). `forward_kl`: KL(q || p).
    `jensen_shannon`: (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2; at most log 2. They are
    those of on-policy distillation (Agarwal et al., arXiv 2306.13649, section 2).
    """
    if divergence == "reverse_kl":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if divergence == "forward_kl":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    of_p = log_p.exp() * (log_p - log_m)
    return 0.5 * (of_p + log_q.exp() * (log_q - log_m)).sum(-1)


def linear_distill_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_weight: Tensor,
    divergence: Divergence,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`loss = sum_t w_t D(softmax(x_t / temperature), softmax(z_t / temperature))` over the rows
    whose w_t is not 0; x are the student's logits, z the teacher's.

    hidden [T, H], weight [V, H], teacher_hidden [T, G], teacher_weight [V, G], token_weight [T].
    Returns the scalar loss and the divergence [T], in float32 (float64 for float64 inputs); the
    latter is 0 where the row is not computed; and the student's log-probabilities of the computed
    rows, [R, V]. The loss is differentiable in hidden and weight by autograd.
    """
    rows = token_weight.nonzero()[:, 0]

    def log_softmax(states: Tensor, head: Tensor) -> Tensor:
        logits = states @ head.T
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return torch.log_softmax(logits.to(dtype) / temperature, dim=-1)

    log_p = log_softmax(hidden[rows], weight)
    log_q = log_softmax(teacher_hidden[rows], teacher_weight).detach()
    found = divergence_of(log_p, log_q, divergence)
    loss = (token_weight[rows] * found).sum()
    everywhere = found.new_zeros(token_weight.shape[0])
    return loss, everywhere.index_copy(0, rows, found.detach()), log_p
