"""The dense MLP mixer: relu^2 or SwiGLU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.utils import _split_tensor_factory
from megatron.core.transformer.module import MegatronModule
from nemocascade_kernels import PackedSeq
from torch import Tensor

from nemocascade.megatron.config import CascadeConfig
from nemocascade.megatron.layers.linear import column_linear, row_linear
from nemocascade.megatron.layers.lora import FACTOR_B


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply relu2, `relu(x)^2` (arXiv 2109.08668), or swiglu, `silu(a) * b` with x = [a, b] (arXiv
    2002.05202), which halves the last dimension."""
    if activation == "relu2":
        squared: Tensor = _SquaredRelu.apply(x)
        return squared
    if activation == "swiglu":
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
    raise ValueError(f"activation {activation!r} is unknown: use relu2 or swiglu")


class _SquaredRelu(torch.autograd.Function):
    """`relu(x)^2`, with fewer passes over memory in backward than the two operators."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = x.clamp_min(0)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return torch.mul(grads[0], positive).mul_(2)


class MLP(MegatronModule):
    """`W_2 act(W_1 u)` without biases; `config.shape` gives the activation.

    width: hidden layer's width; default, `config.shape.mlp_width`. name: global name; default,
    that of the layer's mixer.
    """

    def __init__(
        self,
        config: CascadeConfig,
        *,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        width: int | None = None,
        name: str | None = None,
        **_unused: Any,
    ) -> None:
        super().__init__(config)
        self.tp_group = pg_collection.tp
        self.activation = config.shape.activation
        width, gated = width or config.shape.mlp_width, config.shape.activation == "swiglu"
        name = name or f"layers.{layer_number - 1}.mixer"
        self.linear_fc1 = column_linear(
            config,
            config.hidden_size,
            2 * width if gated else width,
            name=f"{name}.linear_fc1.weight",
            tp_group=self.tp_group,
            blocks=(width, width) if gated else None,
            stride=2 if gated else 1,
        )
        self.linear_fc2 = row_linear(
            config,
            width,
            config.hidden_size,
            name=f"{name}.linear_fc2.weight",
            tp_group=self.tp_group,
        )

    def forward(self, hidden: Tensor, packed: PackedSeq | None = None) -> Tensor:
        """Apply the MLP to [T, 1, H], or [T / tp, 1, H] if sequence-parallel; same shape."""
        return self.contract(self.expand(hidden))

    def expand(self, hidden: Tensor) -> Tensor:
        """`act(W_1 u)`: [T, 1, H], or [T / tp, 1, H] if sequence-parallel -> [T, 1, width / tp]."""
        return activate(self.linear_fc1(hidden)[0], self.activation)

    def contract(self, wide: Tensor) -> Tensor:
        """`W_2 h`: the output of `expand` -> the shape of the MLP's input."""
        out: Tensor = self.linear_fc2(wide)[0]
        return out

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Store gate and up projections separately, so that TP may change."""
        sharded: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.activation == "swiglu":
            half = self.linear_fc1.weight.shape[0] // 2
            for name in ("weight", FACTOR_B):
                key = f"{prefix}linear_fc1.{name}"
                if key in sharded:
                    sharded[key] = _split_tensor_factory(
                        sharded[key], [half, half], ["gate", "up"], 0
                    )
        return sharded
