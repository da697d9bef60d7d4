"""Megatron's tensor-parallel linears with initial values that are independent of the layout."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from nemocascade.megatron.config import CascadeConfig
from nemocascade.megatron.init import Shard, sharded_init


def _leave(weight: Tensor) -> Tensor:
    """Do nothing: Megatron's own initialisation is replaced below."""
    return weight


def tp_shard(group: Any, dim: int, blocks: tuple[int, ...] | None = None) -> Shard:
    """The sharding of dimension `dim` over the tensor-parallel `group`."""
    return Shard(dim, group.rank(), group.size(), blocks)


def _fill(
    linear: torch.nn.Module, config: CascadeConfig, name: str, shard: Shard, residual: bool
) -> None:
    weight: Any = linear.weight
    full = list(weight.shape)
    full[shard.dim] *= shard.size
    weight.data = sharded_init(
        full,
        config.init_for(name, residual=residual),
        (shard,),
        dtype=weight.dtype,
        device=weight.device,
    )


def column_linear(
    config: CascadeConfig,
    inputs: int,
    outputs: int,
    *,
    name: str,
    tp_group: Any,
    blocks: tuple[int, ...] | None = None,
    stride: int = 1,
) -> ColumnParallelLinear:
    """A linear without bias, outputs sharded over TP: [S, 1, inputs] -> [T, 1, outputs / tp].

    name: the weight's global name. blocks: parts of the outputs that are sharded separately.
    stride: number of equal blocks, for Megatron's own bookkeeping.
    """
    linear = ColumnParallelLinear(
        inputs,
        outputs,
        config=config,
        init_method=_leave,
        bias=False,
        gather_output=False,
        stride=stride,
        tp_group=tp_group,
    )
    _fill(linear, config, name, tp_shard(tp_group, 0, blocks), residual=False)
    return linear


def row_linear(
    config: CascadeConfig, inputs: int, outputs: int, *, name: str, tp_group: Any
) -> RowParallelLinear:
    """A linear without bias, inputs sharded over TP: [T, 1, inputs / tp] -> [S, 1, outputs].

    name: the weight's global name.
    """
    linear = RowParallelLinear(
        inputs,
        outputs,
        config=config,
        init_method=_leave,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=tp_group,
    )
    _fill(linear, config, name, tp_shard(tp_group, 1), residual=True)
    return linear
