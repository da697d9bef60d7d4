"""The definitions of `mopd_advantage` and its metrics, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from nemocascade_kernels.common.mopd import mopd_terms

#: Metrics in the order of the kernels' output: the loss and the count are sums, the others are
#: means over the counted tokens.
METRICS = ("loss", "tokens", "advantage", "advantage_abs", "ratio", "gated_low", "gated_high")


def mopd_advantage(
    teacher_logprob: Tensor,
    train_logprob: Tensor,
    rollout_logprob: Tensor,
    ratio_low: float = 0.5,
    ratio_high: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """Advantage and importance of `mopd_terms`, [T] float32 each."""
    advantage, _, importance = mopd_terms(
        teacher_logprob, train_logprob, rollout_logprob, ratio_low, ratio_high
    )
    return advantage, importance


def mopd_advantage_metrics(
    teacher_logprob: Tensor,
    train_logprob: Tensor,
    rollout_logprob: Tensor,
    token_weight: Tensor,
    ratio_low: float = 0.5,
    ratio_high: float = 2.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`mopd_advantage`, 0 where token_weight is 0, and its METRICS, [7] float32.

    loss is `-sum_t weight_t w_t a_t log pi_train`, Eq. 4, with its mean by sequence in the weight.
    """
    with torch.no_grad():
        counted = token_weight != 0
        teacher, train, rollout, weight = (
            torch.where(counted, values, 0.0)
            for values in (teacher_logprob, train_logprob, rollout_logprob, token_weight)
        )
        advantage, ratio, importance = mopd_terms(teacher, train, rollout, ratio_low, ratio_high)
        importance = torch.where(counted, importance, 0.0)
        columns = (
            -weight * importance * advantage * train,
            torch.ones_like(train),
            advantage,
            advantage.abs(),
            ratio,
            (ratio < ratio_low).to(train.dtype),
            (ratio > ratio_high).to(train.dtype),
        )
        sums = torch.stack([torch.where(counted, column, 0.0).sum() for column in columns])
        sums[2:] /= sums[1].clamp(min=1)
        return advantage, importance, sums
