"""The terms of multi-domain on-policy distillation in torch; `mopd_triton` is for Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class MopdTerms(NamedTuple):
    """Advantage a, ratio r and importance w of each token, [T], without a gradient."""

    advantage: Tensor
    ratio: Tensor
    importance: Tensor


@torch.no_grad()
def mopd_terms(
    teacher_logprob: Tensor,
    train_logprob: Tensor,
    rollout_logprob: Tensor,
    ratio_low: float,
    ratio_high: float,
) -> MopdTerms:
    """Nemotron-Cascade 2, Eq. 2-3, by token:

        a_t = log pi_teacher - log pi_train
        r_t = pi_train / pi_rollout
        w_t = r_t if ratio_low <= r_t <= ratio_high else 0

    All are [T] of one dtype. Eq. 4 applies a stop-gradient to the terms.
    """
    advantage = teacher_logprob - train_logprob
    ratio = torch.exp(train_logprob - rollout_logprob)
    inside = (ratio >= ratio_low) & (ratio <= ratio_high)
    return MopdTerms(advantage, ratio, torch.where(inside, ratio, 0.0))
