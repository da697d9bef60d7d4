"""Low-rank adapters of linears (LoRA, arXiv 2106.09685):

    y = W x + s B A x,   s = alpha / rank

W is frozen, A [r, I] starts uniform in +-1/sqrt(I), and B [O, r] at zero.

**Tensor parallelism.** A linear with sharded outputs holds all of A and its rows of B. A is applied
to the rank's own tokens, so only r values a token are gathered. One with sharded inputs holds its
columns of A and all of B. Its partial A x, r values a token, are summed while they are scattered.
Ranks apply the factor that they all hold to different tokens, so its gradient is summed over them,
like that of a norm.

Shape letters: T tokens, I inputs, O outputs, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from nemocascade.megatron.config import CascadeConfig
from nemocascade.megatron.init import Fill, Shard, generator_for, sharded_init

FACTOR_A, FACTOR_B = "lora_a", "lora_b"
"""Names of the factors, which follow that of their linear."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """The factors of a frozen weight on this rank.

    weight: [..., O, I], this rank's part. a: [..., r, I] and b: [..., O, r], with the same leading
    axis for experts. scale: alpha / rank.
    """

    weight: Tensor
    a: Tensor
    b: Tensor
    scale: float

    def delta(self, where: Sequence[slice]) -> Tensor:
        """`s B A` at a box of the weight, float32. where: a slice of each axis of the weight."""
        *lead, rows, columns = where
        left, right = self.b[(*lead, rows)].float(), self.a[(*lead, slice(None), columns)].float()
        return left @ right * self.scale


class Adapted:
    """Mixin for modules whose weights have adapters."""

    def adapters(self) -> list[Adapter]:
        """The adapters of the module's own weights."""
        raise NotImplementedError  # each kind of layer defines its own


def uniform(config: CascadeConfig, name: str, inputs: int) -> Fill:
    """Fill of A: uniform in +-1/sqrt(inputs), from the seed and the global name only."""
    bound, generator = 1 / math.sqrt(inputs), generator_for(config.seed, name)
    return lambda w: w.uniform_(-bound, bound, generator=generator)


class _AdaptedLinear(Adapted):
    """Mixin for Megatron's linears. lora_a, lora_b: the factors on this rank."""

    weight: Tensor
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_scale: float
    lora_axes: dict[str, int]
    sequence_parallel: bool
    tp_group: Any

    def adapters(self) -> list[Adapter]:
        return [Adapter(self.weight, self.lora_a, self.lora_b, self.lora_scale)]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        out, bias = super().forward(x)  # type: ignore[misc]
        low = self.exchanged(F.linear(x, self.lora_a)).flatten(0, 1)
        # B is zero at first, which adds nothing, bit for bit.
        summed = torch.addmm(out.flatten(0, 1), low, self.lora_b.t(), alpha=self.lora_scale)
        return summed.view_as(out), bias

    def exchanged(self, low: Tensor) -> Tensor:
        """A x of this rank, [T, 1, r], as the rank's part of B takes it."""
        raise NotImplementedError  # each kind of layer defines its own

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        state: dict[str, Any] = super().sharded_state_dict(  # type: ignore[misc]
            prefix, sharded_offsets, metadata
        )
        assert metadata is not None
        state |= make_sharded_tensors_for_checkpoint(
            {FACTOR_A: self.lora_a, FACTOR_B: self.lora_b},
            prefix,
            self.lora_axes,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return state


class AdaptedColumn(_AdaptedLinear):
    """Mixin for a linear with sharded outputs."""

    def exchanged(self, low: Tensor) -> Tensor:
        if self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, group=self.tp_group)
        return low


class AdaptedRow(_AdaptedLinear):
    """Mixin for a linear with sharded inputs."""

    def exchanged(self, low: Tensor) -> Tensor:
        if self.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self.tp_group)
        return low


def add_factors(linear: Any, config: CascadeConfig, name: str, shard: Shard) -> None:
    """Give an adapted linear its factors.

    name: the weight's global name. shard: of the weight, over outputs (0) or inputs (1).
    """
    rank, (outputs, inputs) = config.lora.rank, linear.weight.shape
    full_inputs = inputs * (shard.size if shard.dim == 1 else 1)
    placed = {"dtype": linear.weight.dtype, "device": linear.weight.device}
    linear.lora_a = nn.Parameter(
        sharded_init(
            (rank, full_inputs),
            uniform(config, f"{name}.{FACTOR_A}", full_inputs),
            (shard,) if shard.dim == 1 else (),
            **placed,
        )
    )
    linear.lora_b = nn.Parameter(torch.zeros(outputs, rank, **placed))
    sharded, shared = linear.lora_b, linear.lora_a
    if shard.dim == 1:
        sharded, shared = shared, sharded
    set_tensor_model_parallel_attributes(sharded, True, shard.dim, 1)
    shared.sequence_parallel = config.sequence_parallel
    linear.lora_scale = config.lora.scale
    linear.lora_axes = {FACTOR_A if shard.dim == 1 else FACTOR_B: shard.dim}
