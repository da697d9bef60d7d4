"""The router in Triton: one launch, no host synchronisation, no atomics on floats.

Every program of `route_kernel` chooses for consecutive tokens; then programs draw jobs that scan
and place:

1. choose: scores, choice, weights, and each slot's rank among the earlier slots of its expert in
   the same program. Each of 32 tokens sets its bit in the words of its experts; a rank is the
   number of bits below its own.
2. scan: the first position of each program's slots of each expert.
3. place: position = first position + rank; order is its inverse.

The sort is stable because programs hold consecutive tokens and ranks count in token order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from nemocascade_kernels.common.routing import RouterSettings
from nemocascade_kernels.moe_router.state import zeroed_state
from nemocascade_kernels.moe_router.triton_kernels import COUNTERS, gradient_kernel, route_kernel

#: Number of scores that a program of the gradient holds at once.
_TILE_ELEMENTS = 2048
#: Maximum number of programs that choose: the scan reads a row of loads for each.
_MOST_PROGRAMS = 512
#: Tokens that are chosen for at once: a word of 32 bits has one for each.
_TOKENS = 32
#: Maximum number of programs that place slots.
_MOST_PLACERS = 64
#: Maximum registers of a thread of `route_kernel`: two programs of 8 warps run at once. Among
#: groups some would spill.
_REGISTERS, _GROUP_REGISTERS = 128, 208
_SLOTS_OF_A_THREAD, _SCAN_EXPERTS, _SCAN_ROWS = 4, 16, 64
_WIDEST_LOAD = 16
"""Bytes that a lane loads at once."""


def _blocks(num_experts: int, top_k: int) -> dict[str, int]:
    block_e = max(triton.next_power_of_2(num_experts), 2)
    return {
        "BLOCK_T": max(4, min(64, _TILE_ELEMENTS // block_e)),
        "BLOCK_E": block_e,
        "BLOCK_K": triton.next_power_of_2(top_k),
    }


def _warps(num_experts: int) -> int:
    return 8 if num_experts > 64 else 4


def _choice_blocks(num_experts: int, settings: RouterSettings, itemsize: int) -> dict[str, int]:
    """Blocks of `route_kernel` and its warps: 4, 8 or 16 lanes a token by the number of experts."""
    block_e = max(triton.next_power_of_2(num_experts), 16)
    # More of a token's scores would not fit in a lane's registers.
    scores_of_a_lane = 32 if settings.num_groups > 1 else 64
    lanes = max(4, min(16, block_e // scores_of_a_lane))
    return {
        "BLOCK_T": _TOKENS,
        "BLOCK_E": block_e,
        "BLOCK_K": triton.next_power_of_2(settings.top_k),
        "SPAN": 8 if block_e <= 128 else 16,
        "CHUNK": min(lanes * (_WIDEST_LOAD // itemsize), block_e),
        "BINS": triton.next_power_of_2(num_experts + 1),
        "num_warps": _TOKENS * lanes // 32,
    }


def _launch(
    logits: Tensor | None,
    expert_bias: Tensor | None,
    token_mask: Tensor | None,
    given: Tensor | None,
    tokens: int,
    num_experts: int,
    settings: RouterSettings,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    top_k, slots = settings.top_k, tokens * settings.top_k
    blocks = _choice_blocks(num_experts, settings, 4 if logits is None else logits.element_size())
    tiles = triton.cdiv(tokens, blocks["BLOCK_T"] * _MOST_PROGRAMS)
    choosers = max(1, triton.cdiv(tokens, blocks["BLOCK_T"] * max(1, tiles)))
    integers: dict[str, Any] = {"dtype": torch.int32, "device": device}
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=device)
    if logits is None and given is not None:
        experts = given
    else:
        experts = torch.empty(tokens, top_k, **integers)
    positions = torch.empty(tokens, top_k, **integers)
    loads = torch.empty(choosers, num_experts + 1, **integers)
    counts = torch.empty(num_experts, **integers)
    offsets = torch.empty(num_experts + 1, **integers)
    order = torch.empty(slots, **integers)
    placed = 32 * blocks["num_warps"] * _SLOTS_OF_A_THREAD
    placers = min(triton.cdiv(slots, placed), _MOST_PLACERS)
    route_kernel[(choosers,)](
        logits, expert_bias, token_mask, given, weights, experts, positions, loads, counts,
        offsets, order, zeroed_state(device, COUNTERS.value + num_experts), tokens, slots,
        settings.scale, tiles, placers,
        E=num_experts, K=top_k, GROUPS=settings.num_groups, TOP_GROUPS=settings.top_groups,
        SOFTMAX=settings.score == "softmax", NORMALIZE=settings.normalize,
        HAS_BIAS=expert_bias is not None, HAS_MASK=token_mask is not None,
        GIVEN=given is not None, WEIGH=logits is not None,
        BLOCK_G=triton.next_power_of_2(settings.num_groups), SCAN_EXPERTS=_SCAN_EXPERTS,
        SCAN_ROWS=_SCAN_ROWS, PLACED=placed, **blocks,
        maxnreg=_GROUP_REGISTERS if settings.num_groups > 1 else _REGISTERS,
    )  # fmt: skip
    return weights, experts, counts, order, offsets, positions


def forward(
    logits: Tensor,
    expert_bias: Tensor | None,
    token_mask: Tensor | None,
    experts: Tensor | None,
    settings: RouterSettings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Routing`, in their order."""
    return _launch(
        logits.contiguous(),
        None if expert_bias is None else expert_bias.float().contiguous(),
        None if token_mask is None else token_mask.contiguous().view(torch.int8),
        None if experts is None else experts.int().contiguous(),
        logits.shape[0],
        logits.shape[1],
        settings,
        logits.device,
    )


def sort_slots(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.sort_slots`. experts: [T, K] int32."""
    settings = RouterSettings(experts.shape[1], "sigmoid", 1, 1, False, 1.0)
    fields = _launch(
        None, None, None, experts.contiguous(), experts.shape[0], num_experts, settings,
        experts.device,
    )  # fmt: skip
    return fields[2:]


def backward(
    grad_weights: Tensor, logits: Tensor, experts: Tensor, settings: RouterSettings
) -> Tensor:
    """Gradient [T, E] of the logits, in their dtype."""
    tokens, num_experts = logits.shape
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if tokens == 0:
        return grad_logits
    blocks = _blocks(num_experts, settings.top_k)
    gradient_kernel[(triton.cdiv(tokens, blocks["BLOCK_T"]),)](
        grad_weights.contiguous(), logits.contiguous(), experts, grad_logits, tokens,
        settings.scale,
        E=num_experts, K=settings.top_k, SOFTMAX=settings.score == "softmax",
        NORMALIZE=settings.normalize, **blocks, num_warps=_warps(num_experts),
    )  # fmt: skip
    return grad_logits
