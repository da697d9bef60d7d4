"""Megatron's tensor-parallel linears: initial values that are independent of the layout, and the
matrix product of their weight gradients."""

from __future__ import annotations

import functools
import importlib
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
    layers,
    reduce_scatter_to_sequence_parallel_region,
)
from nemocascade_kernels.common.main_grad import placeholder_gradient
from nemocascade_kernels.common.products import accumulate_product
from torch import Tensor

from nemocascade.megatron.config import CascadeConfig, leave
from nemocascade.megatron.init import Shard, sharded_init
from nemocascade.megatron.layers.lora import AdaptedColumn, AdaptedRow, add_factors
from nemocascade.recipe import UserError

APEX_WEIGHT_GRADIENT = "fused_weight_gradient_mlp_cuda"
"""Name of apex's extension for weight gradients."""
TE_LINEARS = "megatron.core.extensions.transformer_engine_spec_provider"
"""Name of Megatron's module with the layers of Transformer Engine."""
FP8_MULTIPLE = 16
"""Sizes of Transformer Engine's FP8 products are multiples of this."""


def _add_weight_gradient(inputs: Tensor, grad_outputs: Tensor, main_grad: Tensor) -> None:
    """Add the weight gradient of inputs [T, I] and grad_outputs [T, O] to main_grad [O, I]."""
    accumulate_product(main_grad, grad_outputs, inputs)


_TORCH_WEIGHT_GRADIENT = SimpleNamespace(
    wgrad_gemm_accum_fp32=_add_weight_gradient, wgrad_gemm_accum_fp16=_add_weight_gradient
)


def use_weight_gradient(*, apex: bool) -> None:
    """Make Megatron's linears with `gradient_accumulation_fusion` add weight gradients to
    `main_grad` inside the matrix product: apex's, or torch's.

    Megatron knows only apex's extension, and imports it once. Applies to the whole process.
    """
    chosen = importlib.import_module(APEX_WEIGHT_GRADIENT) if apex else _TORCH_WEIGHT_GRADIENT
    setattr(layers, APEX_WEIGHT_GRADIENT, chosen)
    layers._grad_accum_fusion_available = True


class _AccumulatedWeight(torch.autograd.Function):
    """Identity on a weight whose gradient is added to `main_grad`; its gradient is a placeholder.

    Megatron's linear marks the weight that it saved. Under recomputation that is a detached copy,
    so the parameter is marked here.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.weight = weight
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *_grads: Tensor | None) -> Tensor:
        return placeholder_gradient(ctx.weight)


class _AddsToMainGrad:
    """Mixin for Megatron's linears: `gradient_accumulation_fusion` for weights with a `main_grad`,
    also under recomputation."""

    gradient_accumulation_fusion: bool

    def _forward_impl(self, input: Tensor, weight: Any, **settings: Any) -> Any:
        fused = self.gradient_accumulation_fusion and hasattr(weight, "main_grad")
        if fused and weight.requires_grad and torch.is_grad_enabled():
            main_grad = weight.main_grad
            weight = _AccumulatedWeight.apply(weight)
            weight.main_grad = main_grad
        settings["gradient_accumulation_fusion"] = fused
        forward: Any = super()._forward_impl  # type: ignore[misc]
        return forward(input, weight, **settings)


class _ColumnParallelLinear(_AddsToMainGrad, ColumnParallelLinear):
    pass


class _RowParallelLinear(_AddsToMainGrad, RowParallelLinear):
    pass


class _AdaptedColumnLinear(AdaptedColumn, _ColumnParallelLinear):
    pass


class _AdaptedRowLinear(AdaptedRow, _RowParallelLinear):
    pass


class _SpecialInTraining:
    """Mixin for Transformer Engine's linears: FP8 and user buffers in training, also where a layer
    is recomputed.

    In evaluation, whose rows may be of any number, products are in the weight's dtype, between
    collectives. The blockwise recipe keeps no state between steps, so checkpoints hold the weight
    alone.
    """

    config: CascadeConfig
    training: bool
    weight: Tensor
    parallel_mode: str
    _tp_group: Any

    def forward(self, x: Tensor) -> Any:
        if self.training or not self.config.tp_comm_overlap:
            with get_fp8_context(self.config) if self.training else nullcontext():
                return super().forward(x)  # type: ignore[misc]
        if self.parallel_mode == "column":
            x = gather_from_sequence_parallel_region(x, group=self._tp_group)
            return F.linear(x, self.weight), None
        out = F.linear(x, self.weight)
        return reduce_scatter_to_sequence_parallel_region(out, group=self._tp_group), None

    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, state: None) -> None:
        pass


@functools.cache
def _te_linears() -> tuple[type, type]:
    """The column- and row-parallel linears of Transformer Engine, from Megatron's spec provider."""
    provider = importlib.import_module(TE_LINEARS).TESpecProvider()
    kinds = provider.column_parallel_linear(), provider.row_parallel_linear()
    column, row = (type(f"_{kind.__name__}", (_SpecialInTraining, kind), {}) for kind in kinds)
    return column, row


def _kind(
    config: CascadeConfig, plain: type, mode: Literal["column", "row"], name: str
) -> tuple[Any, dict[str, Any]]:
    """The class of a linear of the global `name`, and further arguments of it."""
    if not config.fp8 and not config.tp_comm_overlap:
        return plain, {}
    buffers = {"column": ("qkv", "fc1"), "row": ("proj", "fc2")}[mode]
    attends = name.endswith(("linear_qkv.weight", "linear_proj.weight"))
    chosen = _te_linears()[mode == "row"]
    return chosen, {"tp_comm_buffer_name": buffers[0 if attends else 1]}


def _check_fp8(name: str, inputs: int, outputs: int) -> None:
    """Raise UserError unless a rank's part of a linear has sizes that FP8 products take."""
    if inputs % FP8_MULTIPLE or outputs % FP8_MULTIPLE:
        raise UserError(
            f"engine.linears is fp8, but {name} has {inputs} inputs and {outputs} outputs on a "
            f"rank: FP8 products need multiples of {FP8_MULTIPLE}: choose another --parallel.tp, "
            "or set --engine.linears bf16"
        )


def tp_shard(group: Any, dim: int, blocks: tuple[int, ...] | None = None) -> Shard:
    """The sharding of dimension `dim` over the tensor-parallel `group`."""
    return Shard(dim, group.rank(), group.size(), blocks)


def _fill(
    linear: torch.nn.Module, config: CascadeConfig, name: str, shard: Shard, residual: bool
) -> None:
    """Replace Megatron's own initial values."""
    if not config.perform_initialization:
        return
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
    is_adapted = config.lora.adapts(name)
    if config.fp8:
        _check_fp8(name, inputs, outputs // tp_group.size())
    plain = _AdaptedColumnLinear if is_adapted else _ColumnParallelLinear
    kind, more = _kind(config, plain, "column", name)
    linear = kind(
        inputs,
        outputs,
        config=config,
        init_method=leave,
        bias=False,
        gather_output=False,
        skip_bias_add=False,
        is_expert=False,
        stride=stride,
        tp_group=tp_group,
        **more,
    )
    _fill(linear, config, name, tp_shard(tp_group, 0, blocks), residual=False)
    if is_adapted:
        add_factors(linear, config, name, tp_shard(tp_group, 0))
    return linear


def row_linear(
    config: CascadeConfig, inputs: int, outputs: int, *, name: str, tp_group: Any
) -> RowParallelLinear:
    """A linear without bias, inputs sharded over TP: [T, 1, inputs / tp] -> [S, 1, outputs].

    name: the weight's global name.
    """
    is_adapted = config.lora.adapts(name)
    if config.fp8:
        _check_fp8(name, inputs // tp_group.size(), outputs)
    plain = _AdaptedRowLinear if is_adapted else _RowParallelLinear
    kind, more = _kind(config, plain, "row", name)
    linear = kind(
        inputs,
        outputs,
        config=config,
        init_method=leave,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
        is_expert=False,
        tp_group=tp_group,
        **more,
    )
    _fill(linear, config, name, tp_shard(tp_group, 1), residual=True)
    if is_adapted:
        add_factors(linear, config, name, tp_shard(tp_group, 1))
    return linear
