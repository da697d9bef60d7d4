"""The definition of `linear_policy_loss`, in plain torch. It materialises all logits."""

from __future__ import annotations

from torch import Tensor

from nemocascade_kernels.common.linear_head.statistics import logprob_and_entropy
from nemocascade_kernels.linear_policy_loss.objectives import Objective


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    objective: Objective,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`loss = sum_t f_t(log pi(target_t | hidden_t))` over the rows whose token_weight is not 0.

    hidden [T, H], weight [V, H], target [T] int64. Returns the scalar loss, logprob [T] and
    entropy [T], in float32 (float64 for float64 inputs); logprob and entropy are 0 if the row is
    not computed. The loss is differentiable in hidden and weight by autograd.
    """
    rows = objective.token_weight.nonzero()[:, 0]
    logprob, entropy = logprob_and_entropy(hidden[rows] @ weight.T, target[rows], temperature)
    loss = objective.at(rows).token_loss(logprob).sum()
    everywhere = logprob.new_zeros(target.shape[0])
    return (
        loss,
        everywhere.index_copy(0, rows, logprob.detach()),
        everywhere.index_copy(0, rows, entropy.detach()),
    )
