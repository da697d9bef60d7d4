"""The router in CUDA (csrc/moe_router/): one warp a token, choice and stable sort in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from nemocascade_kernels import native
from nemocascade_kernels.common.routing import RouterSettings
from nemocascade_kernels.moe_router.state import zeroed_state

#: Sizes of the largest instantiation; a sort of given experts may have more of them than a choice.
MOST_EXPERTS, MOST_SORTED, MOST_CHOICES, MOST_GROUPS = 512, 1024, 32, 32


def _route(
    logits: Tensor | None,
    expert_bias: Tensor | None,
    token_mask: Tensor | None,
    given: Tensor | None,
    num_experts: int,
    settings: RouterSettings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    faults = [
        f"{name}={value}, at most {most}"
        for name, value, most in (
            ("experts", num_experts, MOST_SORTED if logits is None else MOST_EXPERTS),
            ("top_k", settings.top_k, MOST_CHOICES),
            ("num_groups", settings.num_groups, MOST_GROUPS),
        )
        if value > most
    ]
    if faults:
        raise ValueError(f"the CUDA router does not take {', '.join(faults)}: use backend='triton'")
    like = logits if logits is not None else given
    assert like is not None
    tokens, top_k = like.shape[0], settings.top_k
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=like.device)
    experts = torch.empty(tokens, top_k, dtype=torch.int32, device=like.device)
    scratch = experts.new_empty(native.op("moe_route_scratch")(tokens, num_experts))
    counts, offsets = experts.new_empty(num_experts), experts.new_empty(num_experts + 1)
    order, positions = experts.new_empty(tokens * top_k), torch.empty_like(experts)
    native.op("moe_route")(
        logits,
        expert_bias,
        token_mask,
        given,
        num_experts,
        settings.score == "softmax",
        settings.num_groups,
        settings.top_groups,
        settings.normalize,
        settings.scale,
        weights,
        experts,
        scratch,
        zeroed_state(like.device, native.op("moe_route_state")(num_experts)),
        counts,
        order,
        offsets,
        positions,
    )
    return weights, experts, counts, order, offsets, positions


def forward(
    logits: Tensor,
    expert_bias: Tensor | None,
    token_mask: Tensor | None,
    experts: Tensor | None,
    settings: RouterSettings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Routing`, in their order."""
    return _route(
        _supported(logits),
        None if expert_bias is None else expert_bias.float().contiguous(),
        None if token_mask is None else token_mask.contiguous(),
        None if experts is None else experts.int().contiguous(),
        logits.shape[1],
        settings,
    )


def sort_slots(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.sort_slots`. experts: [T, K] int32."""
    settings = RouterSettings(experts.shape[1], "sigmoid", 1, 1, False, 1.0)
    return _route(None, None, None, experts.contiguous(), num_experts, settings)[2:]


def backward(
    grad_weights: Tensor, logits: Tensor, experts: Tensor, settings: RouterSettings
) -> Tensor:
    """Gradient [T, E] of the logits, in their dtype."""
    supported = _supported(logits)
    grad = torch.empty_like(supported)
    native.op("moe_route_gradient")(
        grad_weights.float().contiguous(),
        supported,
        experts,
        settings.score == "softmax",
        settings.normalize,
        settings.scale,
        grad,
    )
    return grad.to(logits.dtype)


def _supported(logits: Tensor) -> Tensor:
    """Return float32 and bfloat16 unchanged, float16 widened to float32."""
    return (logits if logits.dtype == torch.bfloat16 else logits.float()).contiguous()
