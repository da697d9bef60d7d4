"""The definition of the router in plain torch, differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from nemocascade_kernels.common.routing import RouterSettings, Routing, choose_experts


def sort_slots(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `(counts, order, offsets, positions)` of experts [T, K]; the id E means no expert."""
    flat = experts.reshape(-1).long()
    order = torch.argsort(flat, stable=True)
    positions = torch.empty_like(order)
    positions[order] = torch.arange(order.numel(), device=order.device)
    counts = torch.bincount(flat, minlength=num_experts + 1)[:num_experts]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return (
        counts.int(),
        order.int(),
        offsets.int(),
        positions.view(experts.shape).int(),
    )


def route(
    logits: Tensor,
    expert_bias: Tensor | None,
    token_mask: Tensor | None,
    experts: Tensor | None,
    settings: RouterSettings,
) -> Routing:
    """See `nemocascade_kernels.moe_route`."""
    weights, chosen = choose_experts(logits, expert_bias, token_mask, experts, settings)
    return Routing(weights, chosen.int(), *sort_slots(chosen, logits.shape[1]))
