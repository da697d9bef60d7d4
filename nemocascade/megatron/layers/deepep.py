"""Expert parallelism by DeepEP (github.com/deepseek-ai/DeepEP), through Megatron's fused dispatch.

A token's row is sent once to each rank that holds some of its experts, and once over the network to
each node. The weighted sum of a rank's experts returns, and DeepEP adds the sums of the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe import fused_a2a
from nemocascade_kernels import Routing, make_routing
from torch import Tensor


def dispatched_by_deepep(
    x: Tensor,
    routing: Routing,
    experts: Callable[[Tensor, Routing], Tensor],
    group: dist.ProcessGroup,
) -> Tensor:
    """`sum_k weights_k expert_k(x)` with experts on the ranks of the expert-parallel `group`.

    x: [T, H]. routing: over all experts. experts: applies this rank's experts to rows [R, H] with a
    routing over them. Returns [T, H].
    """
    dispatch: Any = fused_a2a.fused_dispatch
    combine: Any = fused_a2a.fused_combine
    local = routing.num_experts // group.size()
    # In DeepEP, -1 is not an expert.
    ids = routing.experts.long()
    ids = ids.masked_fill(ids == routing.num_experts, -1)
    rows, ids, weights, _, handle = dispatch(x, ids, routing.weights, routing.num_experts, group)
    absent = ids < 0
    own = make_routing(
        ids.masked_fill(absent, local).int(), weights.masked_fill(absent, 0.0), local
    )
    combined: Tensor = combine(experts(rows, own), group, handle)[0]
    return combined


def deepep_limitation(device: torch.device, etp: int) -> str:
    """Reason why DeepEP cannot exchange rows here; empty if it can."""
    if device.type != "cuda":
        return f"it needs GPUs, and the device is {device.type}"
    if etp > 1:
        return f"it knows no expert tensor parallelism, and etp is {etp}"
    if fused_a2a.fused_dispatch is None:
        return "the package deep_ep is not installed"
    return ""
