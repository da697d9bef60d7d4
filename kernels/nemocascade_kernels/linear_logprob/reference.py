"""The definition of `linear_logprob`, in plain torch. It materialises all logits."""

from __future__ import annotations

from torch import Tensor

from nemocascade_kernels.common.linear_head.statistics import logprob_and_entropy


def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Compute `log softmax(hidden @ weight.T / temperature)[target]` and the softmax's entropy.

    hidden [T, H], weight [V, H], target [T] int64. Returns logprob [T] and entropy [T], in float32
    (float64 for float64 inputs); both differentiable in hidden and weight.
    """
    return logprob_and_entropy(hidden @ weight.T, target, temperature)
