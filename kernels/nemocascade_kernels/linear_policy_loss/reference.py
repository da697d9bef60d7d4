"""The definition of `linear_policy_loss`, in plain torch. It materialises all logits."""

from __future__ import annotations

import torch
from torch import Tensor

from nemocascade_kernels.common.linear_head.statistics import logprob_and_entropy
from nemocascade_kernels.common.linear_head.truncation import Truncation, kept_tokens
from nemocascade_kernels.linear_policy_loss.objectives import Objective


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    objective: Objective,
    temperature: float = 1.0,
    truncation: Truncation | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`loss = sum_t f_t(log pi(target_t | hidden_t))` over the rows whose token_weight is not 0.

    hidden [T, H], weight [V, H], target [T] int64. Returns the scalar loss, logprob [T] and
    entropy [T], in float32 (float64 for float64 inputs); logprob and entropy are 0 if the row is
    not computed. The loss is differentiable in hidden and weight by autograd. A target that the
    truncation does not keep has logprob -inf and no part in the loss.
    """
    rows = objective.token_weight.nonzero()[:, 0]
    logits = hidden[rows] @ weight.T
    inside = torch.ones_like(rows, dtype=torch.bool)
    if truncation is not None:
        kept = kept_tokens(logits, 1 / temperature, truncation)
        inside = kept.gather(1, target[rows, None])[:, 0]
        # exp(-1e30) is 0, and 0 times -1e30 is 0 in the entropy. float16 has no such number.
        logits = torch.where(
            kept, logits.to(torch.promote_types(logits.dtype, torch.float32)), -1e30
        )
    logprob, entropy = logprob_and_entropy(logits, target[rows], temperature)
    losses = objective.at(rows[inside]).token_loss(logprob[inside])
    loss = losses.sum()
    everywhere = logprob.new_zeros(target.shape[0])
    return (
        loss,
        everywhere.index_copy(0, rows, logprob.detach().masked_fill(~inside, -torch.inf)),
        everywhere.index_copy(0, rows, entropy.detach()),
    )
