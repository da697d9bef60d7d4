"""Low-rank adapters of routed experts: a pair of factors for each expert, see `lora`.

Their products are grouped products of the kernel package, of r rows or columns. Between them, the
experts run as separate operators: `moe_experts` has no place for a term before its activation.

Expert-tensor-parallel ranks have the same tokens and a part of the width each. A of linear_fc1 and
B of linear_fc2 are whole on all of them, and each sees its part of the gradient, so it is summed.

Shape letters: those of `moe`; r rank, R rows sorted by expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from nemocascade_kernels import Routing, grouped_gemm, moe_permute, moe_unpermute
from torch import Tensor, nn

from nemocascade.megatron.config import CascadeConfig
from nemocascade.megatron.init import Shard, sharded_init
from nemocascade.megatron.layers.lora import FACTOR_A, Adapter, uniform
from nemocascade.megatron.layers.mlp import activate


def expert_factors(
    config: CascadeConfig, weight: Tensor, name: str, first: int, shard: Shard
) -> tuple[nn.Parameter, nn.Parameter]:
    """A [E, r, I] and B [E, O, r] of this rank's experts.

    weight: [E, O, I], this rank's part. name: its global name. first: number of the first expert.
    shard: of the full weight of an expert, over outputs (0) or inputs (1).
    """
    rank, (experts, outputs, inputs) = config.lora.rank, weight.shape
    full_inputs = inputs * (shard.size if shard.dim == 1 else 1)
    placed: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
    a = torch.empty(experts, rank, inputs, **placed)
    for local in range(0 if weight.is_meta else experts):
        a[local] = sharded_init(
            (rank, full_inputs),
            uniform(config, f"{name}.{first + local}.{FACTOR_A}", full_inputs),
            (shard,) if shard.dim == 1 else (),
            **placed,
        )
    factors = nn.Parameter(a), nn.Parameter(torch.zeros(experts, outputs, rank, **placed))
    for factor, is_whole in zip(factors, (shard.dim == 0, shard.dim == 1), strict=True):
        factor.allreduce = False  # type: ignore[attr-defined]
        factor.is_whole_expert_factor = is_whole  # type: ignore[attr-defined]
        if not (is_whole and shard.size > 1):
            # Every rank counts it in the gradient norm: no two hold the same part.
            set_tensor_model_parallel_attributes(factor, True, 1, 1)
    return factors


def adapted_experts(
    x: Tensor,
    routing: Routing,
    up: Tensor,
    down: Tensor,
    adapters: Sequence[Adapter | None],
    activation: str,
) -> Tensor:
    """`moe_experts` with adapters: x [T, H] -> [T, H].

    up, down: as in `moe_experts`. adapters: of the two weights, or None. Backward keeps the
    permuted rows, both hidden states and the output of every slot.
    """
    rows = moe_permute(x, routing)
    hidden = _product(rows, up, adapters[0], routing.offsets)
    out = _product(activate(hidden, activation), down, adapters[1], routing.offsets)
    return moe_unpermute(out, routing)


def _product(x: Tensor, weight: Tensor, adapter: Adapter | None, offsets: Tensor) -> Tensor:
    """`W_e x + s B_e A_e x` of the rows of each expert e: [R, I] -> [R, O]."""
    out = grouped_gemm(x, weight, offsets)
    if adapter is None:
        return out
    delta = grouped_gemm(grouped_gemm(x, adapter.a, offsets), adapter.b, offsets)
    return torch.add(out, delta, alpha=adapter.scale)


def sum_whole_factors(parameters: Iterable[nn.Parameter], group: Any) -> None:
    """Sum the main gradients of factors that all ranks of the expert-tensor-parallel `group` hold.

    Every rank of the group calls it, after its gradients are reduced over replicas.
    """
    if group.size() == 1:
        return
    grads: list[Tensor] = [
        p.main_grad  # type: ignore[attr-defined]
        for p in parameters
        if p.requires_grad and getattr(p, "is_whole_expert_factor", False)
    ]
    if not grads:
        return
    message = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(message, group=group)
    for grad, total in zip(grads, message.split([g.numel() for g in grads]), strict=True):
        grad.copy_(total.view_as(grad))
