"""The router in C++ for the CPU (csrc/moe_router/): one pass over the scores, a counting sort."""

from __future__ import annotations

import torch
from torch import Tensor

from nemocascade_kernels import native
from nemocascade_kernels.common.routing import RouterSettings, scores_of


def sort_slots(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.sort_slots`. experts: [T, K] int32."""
    experts = experts.contiguous()
    counts, offsets = experts.new_empty(num_experts), experts.new_empty(num_experts + 1)
    order, positions = experts.new_empty(experts.numel()), torch.empty_like(experts)
    native.op("moe_sort_slots")(experts, num_experts, counts, order, offsets, positions)
    return counts, order, offsets, positions


def forward(
    logits: Tensor,
    expert_bias: Tensor | None,
    token_mask: Tensor | None,
    experts: Tensor | None,
    settings: RouterSettings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Routing`, in their order."""
    scores = scores_of(logits, settings.score).contiguous()
    chosen = torch.empty(logits.shape[0], settings.top_k, dtype=torch.int32)
    weights = torch.empty(chosen.shape)
    native.op("moe_choose")(
        scores,
        None if expert_bias is None else expert_bias.float().contiguous(),
        None if token_mask is None else token_mask.contiguous(),
        None if experts is None else experts.int().contiguous(),
        settings.top_k,
        settings.num_groups,
        settings.top_groups,
        settings.normalize,
        settings.scale,
        chosen,
        weights,
    )
    return weights, chosen, *sort_slots(chosen, logits.shape[1])


def backward(
    grad_weights: Tensor, logits: Tensor, experts: Tensor, settings: RouterSettings
) -> Tensor:
    """Gradient [T, E] of the logits, in their dtype."""
    scores = scores_of(logits, settings.score).contiguous()
    grad = torch.empty_like(scores)
    native.op("moe_choose_gradient")(
        grad_weights.float().contiguous(),
        scores,
        experts,
        settings.score == "softmax",
        settings.normalize,
        settings.scale,
        grad,
    )
    return grad.to(logits.dtype)
