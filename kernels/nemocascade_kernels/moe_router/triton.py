"""The router in Triton: three launches, no host synchronisation, no atomics on floats.

1. `choose_kernel`: scores, choice, weights, and each slot's rank among the earlier slots of its
   expert in the same program.
2. `scan_kernel`: the first position of each program's slots of each expert.
3. `place_kernel`: position = first position + rank; order is its inverse.

The sort is stable because programs hold consecutive tokens and ranks count in token order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from nemocascade_kernels.common.routing import RouterSettings
from nemocascade_kernels.moe_router.triton_kernels import (
    choose_kernel,
    gradient_kernel,
    place_kernel,
    scan_kernel,
)

#: Number of scores that a program holds at once.
_TILE_ELEMENTS = 2048
#: Maximum number of programs of the first kernel: the second reads a row of loads for each.
_MOST_PROGRAMS = 512
_PLACE_BLOCK = 1024
_SCAN_EXPERTS, _SCAN_ROWS = 32, 64


def _blocks(num_experts: int, top_k: int) -> dict[str, int]:
    block_e = max(triton.next_power_of_2(num_experts), 2)
    return {
        "BLOCK_T": max(4, min(64, _TILE_ELEMENTS // block_e)),
        "BLOCK_E": block_e,
        "BLOCK_K": triton.next_power_of_2(top_k),
    }


def _warps(num_experts: int) -> int:
    return 8 if num_experts > 64 else 4


#: Maximum registers of a `choose_kernel` thread: by default the assembler spills a few to increase
#: occupancy.
_CHOOSE_REGISTERS = 168


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
    blocks = _blocks(num_experts, top_k)
    tiles = max(1, triton.cdiv(tokens, blocks["BLOCK_T"] * _MOST_PROGRAMS))
    programs = max(1, triton.cdiv(tokens, blocks["BLOCK_T"] * tiles))
    integers: dict[str, Any] = {"dtype": torch.int32, "device": device}
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=device)
    if logits is None and given is not None:
        experts = given
    else:
        experts = torch.empty(tokens, top_k, **integers)
    positions = torch.empty(tokens, top_k, **integers)
    loads = torch.empty(programs, num_experts + 1, **integers)
    counts = torch.zeros(num_experts, **integers)
    offsets = torch.empty(num_experts + 1, **integers)
    order = torch.empty(slots, **integers)
    choose_kernel[(programs,)](
        logits, expert_bias, token_mask, given, weights, experts, positions, loads, counts,
        tokens, settings.scale, tiles,
        E=num_experts, K=top_k, GROUPS=settings.num_groups, TOP_GROUPS=settings.top_groups,
        SOFTMAX=settings.score == "softmax", NORMALIZE=settings.normalize,
        HAS_BIAS=expert_bias is not None, HAS_MASK=token_mask is not None,
        GIVEN=given is not None, WEIGH=logits is not None,
        BLOCK_G=triton.next_power_of_2(settings.num_groups), **blocks,
        num_warps=_warps(num_experts), maxnreg=_CHOOSE_REGISTERS,
    )  # fmt: skip
    scan_kernel[(triton.cdiv(num_experts + 1, _SCAN_EXPERTS),)](
        loads, counts, offsets, programs,
        E=num_experts, BLOCK_E=blocks["BLOCK_E"], EXPERTS=_SCAN_EXPERTS, ROWS=_SCAN_ROWS,
    )  # fmt: skip
    if slots:
        place_kernel[(triton.cdiv(slots, _PLACE_BLOCK),)](
            experts, loads, positions, order, slots, blocks["BLOCK_T"] * tiles * top_k,
            E=num_experts, BLOCK=_PLACE_BLOCK,
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
