"""Layers of the decoder, on the training layers' weights: the base class and stateless layers.

A slot holds the convolution and state-space states of one sequence, and names the blocks of its
keys and values (`cached_layers`, `kv_cache`). The training layers prefill prompts once, packed. A
prompt's state is written to the slot of each sequence that continues it, and a decode step then
takes one token a row. A chunk that continues a slot is prefilled from the slot's states, packed
like a prompt.

Tensor-parallel ranks share the rows of a step between layers, as training's sequence parallelism
does. All exchanges of a step have fixed sizes (`rows`).

Slot S, the last of S + 1, is the spare slot of a batch's padding rows.
Shape letters: n rows of a step, S slots, H hidden size, tp tensor-parallel ranks, D documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from nemocascade_kernels import RouterSettings, SharedExpert, Steps, decode_steps
from torch import Tensor

from nemocascade.megatron.generation.rows import gather_rows, reduce_scatter_rows
from nemocascade.megatron.generation.slot_assignment import SlotAssignment
from nemocascade.megatron.layers.block import ResidualBlock
from nemocascade.megatron.layers.mlp import MLP
from nemocascade.megatron.layers.moe import MoEMixer
from nemocascade.megatron.microbatch import Microbatch
from nemocascade.megatron.replay import RouteRecorder


@dataclass(frozen=True, eq=False)
class DecodeStep:
    """The rows of one decoding step.

    table: [S + 1, W] int32, the blocks of each slot's tokens in the KV cache.
    slots: [n] int64, the slot of each row; padding rows use the spare slot.
    positions: [n] int64, tokens cached in the slot before this one.
    longest: at least the largest position + 1; cached tokens that attention may read.
    real: number of rows without padding; they come first. None: unknown on the host.
    spare: the slot of padding rows.
    recorder: records the routers' choices; None: not recorded.
    """

    table: Tensor
    slots: Tensor
    positions: Tensor
    longest: int
    real: int | None
    spare: int
    recorder: RouteRecorder | None = None
    # Replayed choices and recomputation exist only in training.
    replay: None = None
    first_pass: None = None

    def token_mask(self, rows: slice) -> Tensor | None:
        """Implements `Microbatch.token_mask`."""
        if self.real is not None and rows.stop <= self.real:
            return None
        return self.slots[rows] != self.spare


class SlotLayer:
    """A layer of the stack with its caches of all slots. The base class caches nothing.

    A step calls `decode_steps` on this rank's weights.
    """

    def __init__(self, block: ResidualBlock, slots: int) -> None:
        self.block = block
        self.mixer: Any = block.mixer
        self.slots = slots
        self.tp_group = self.mixer.tp_group

    def refresh(self) -> None:
        """Reload the weights; called before they are first used."""
        norm: Any = self.block.norm
        self.norm_weight, self.norm_eps = norm.weight, norm.eps
        self.steps: Steps = decode_steps(norm.weight)

    def allocate(self, blocks: int, size: int) -> None:
        """Allocate a KV cache of `blocks` blocks of `size` tokens, without values."""

    def copy(self, source: int, targets: Tensor) -> None:
        """Copy the Mamba states of the slot `source` to the slots `targets`."""

    def copy_blocks(self, source: Tensor, target: Tensor) -> None:
        """Copy blocks [c] of the KV cache to others."""

    def state(self, slot: int, blocks: Tensor) -> list[Tensor]:
        """Copies of a slot's Mamba states, [1, ...], and of blocks [m], [m, ...]."""
        return []

    def restore(self, slot: int, blocks: Tensor, state: Sequence[Tensor]) -> None:
        """Write what `state` returned to a slot, and its last blocks to `blocks`."""

    def prefill(self, hidden: Tensor, packed: Microbatch, assignment: SlotAssignment) -> Tensor:
        """Prefill prompts or chunks, and write their final states to the slots.

        hidden: [T/tp, 1, H].
        """
        out: Tensor = self.block(hidden, packed_seq_params=packed)
        return out

    def step(self, hidden: Tensor, step: DecodeStep) -> Tensor:
        """Decode one token of each row. hidden: [n/tp, H]."""
        raise NotImplementedError  # the base has no step; every kind of layer defines its own

    def normed(self, hidden: Tensor) -> Tensor:
        """Apply the layer's norm to [n/tp, H]."""
        return self.steps.norm(hidden, self.norm_weight, self.norm_eps)

    def project_in(self, linear: Any, x: Tensor) -> Tensor:
        """Apply a linear with sharded outputs: [n/tp, H] -> [n, ...]."""
        return self.steps.linear(gather_rows(x, self.tp_group), linear.weight, None)

    def project_out(self, linear: Any, x: Tensor, residual: Tensor) -> Tensor:
        """Apply a linear with sharded inputs: `residual + linear(x)`, [n, ...] -> [n/tp, H]."""
        if self.tp_group.size() == 1:
            return self.steps.linear(x, linear.weight, residual)
        return residual + reduce_scatter_rows(
            self.steps.linear(x, linear.weight, None), self.tp_group
        )

    def add_mlp(self, mlp: MLP, x: Tensor, residual: Tensor) -> Tensor:
        """Return `residual + mlp(x)`, [n/tp, H]."""
        weight, swiglu = mlp.linear_fc1.weight, mlp.activation == "swiglu"
        up = self.steps.up(gather_rows(x, self.tp_group), weight, swiglu)
        return self.project_out(mlp.linear_fc2, up, residual)


class MlpSlotLayer(SlotLayer):
    """A dense MLP; an unsharded one may run as a single expert."""

    def refresh(self) -> None:
        super().refresh()
        self.expert = single_expert(self.mixer, self.steps)

    def step(self, hidden: Tensor, step: DecodeStep) -> Tensor:
        if self.expert is None:
            return self.add_mlp(self.mixer, self.normed(hidden), hidden)
        return hidden + self.expert(self.normed(hidden))


class MoeSlotLayer(SlotLayer):
    """A mixture of experts.

    Ranks that share experts gather the rows of all of them, and each runs its own experts. A step
    has few rows, so this costs less than a dispatch, whose sizes the host must read.
    """

    def __init__(self, block: ResidualBlock, slots: int) -> None:
        super().__init__(block, slots)
        mixer, shape = self.mixer, self.mixer.config.shape
        self.group = mixer.experts.groups.tp_ep
        self.swiglu = shape.activation == "swiglu"
        self.settings = RouterSettings(
            top_k=shape.experts_per_token,
            score=shape.router_score,
            num_groups=shape.router_groups,
            top_groups=shape.router_top_groups,
            normalize=shape.router_normalize,
            scale=shape.router_scale,
        )

    def refresh(self) -> None:
        super().refresh()
        mixer: MoEMixer = self.mixer
        self.bias = mixer.router.expert_bias if mixer.config.shape.router_bias else None
        self.up, self.down = mixer.experts.linear_fc1, mixer.experts.linear_fc2
        if self.steps.FUSED:
            self.fused = FusedMixture(self)
            return
        # Scores are float32 at any model precision.
        self.router_weight = mixer.router.weight.float()
        self.router_steps = decode_steps(self.router_weight)
        self.shared: SingleExpert | None = None
        if mixer.shared_experts is not None:
            self.shared = single_expert(mixer.shared_experts, self.steps)

    def step(self, hidden: Tensor, step: DecodeStep) -> Tensor:
        if self.steps.FUSED:
            return self.fused(hidden, step)
        x = self.normed(hidden)
        hidden = hidden + self._routed(x, step)
        if self.shared is not None:
            return hidden + self.shared(x)
        if self.mixer.shared_experts is not None:
            return self.add_mlp(self.mixer.shared_experts, x, hidden)
        return hidden

    def _routed(self, x: Tensor, step: DecodeStep) -> Tensor:
        """The sum over the chosen experts of this rank's rows, [n/tp, H]."""
        chosen, weights = self._choose(x, self.mixer.rows(x.shape[0]), step)
        if self.group.size() == 1:
            return self._experts(x, chosen, weights)
        experts = self.mixer.experts
        x, chosen, weights = (gather_rows(t, self.group) for t in (x, chosen, weights))
        local = chosen - experts.ep_rank * experts.num_local
        is_mine = (local >= 0) & (local < experts.num_local)
        local = torch.where(is_mine, local, experts.num_local)
        partial = self._experts(x, local, torch.where(is_mine, weights, 0.0))
        # Summed over the ranks in float32, as one rank sums its experts.
        return reduce_scatter_rows(partial.float(), self.group).to(x.dtype)

    def _choose(self, x: Tensor, rows: slice, step: DecodeStep) -> tuple[Tensor, Tensor]:
        """The experts of this rank's `rows`, [n/tp, K] int32, and their weights."""
        logits = self.router_steps.linear(x.float(), self.router_weight, None)
        real = rows.stop if step.real is None else step.real
        real = min(max(real - rows.start, 0), x.shape[0])
        chosen, weights = self.router_steps.route(logits, self.bias, real, self.settings)
        if step.recorder is not None:
            step.recorder.keep(self.mixer.layer_number, rows, chosen)
        return chosen, weights

    def _experts(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Apply this rank's experts; the number of them means no expert."""
        return self.steps.experts(x, chosen, weights, self.up, self.down, self.swiglu)


class FusedMixture:
    """The step of a mixture of experts in few launches and at most two collectives.

    Ranks that share experts or the width of the shared expert gather their rows with their choices.
    A rank computes the part of its experts for the rows of the ranks that share them, and that of
    its columns of the shared expert for the rows of its tensor-parallel group.
    """

    def __init__(self, layer: MoeSlotLayer) -> None:
        self.layer, self.mixer, self.steps = layer, layer.mixer, layer.steps
        tp, experts = layer.tp_group, layer.group
        self.shared = self.mixer.shared_experts
        # One of the two groups contains the other: both are of ranks that follow each other.
        self.group = experts if self.shared is None or experts.size() > tp.size() else tp
        ranks = dist.get_process_group_ranks(self.group)
        self.routed_part, self.shared_part = (
            (ranks.index(dist.get_process_group_ranks(group)[0]), group.size())
            for group in (experts, tp if self.shared is not None else experts)
        )

    def __call__(self, hidden: Tensor, step: DecodeStep) -> Tensor:
        """hidden: [n/tp, H], which is overwritten if ranks exchange rows."""
        layer, mixer, count = self.layer, self.mixer, hidden.shape[0]
        own = mixer.rows(count)
        routed = self.steps.norm_route(
            hidden, layer.norm_weight, layer.norm_eps, mixer.router.weight, layer.bias,
            step.slots[own], step.spare, layer.settings,
        )  # fmt: skip
        if step.recorder is not None:
            step.recorder.keep(mixer.layer_number, own, routed.chosen)
        shared = None
        if self.shared is not None:
            first, ranks = self.shared_part
            weights = self.shared.linear_fc1.weight, self.shared.linear_fc2.weight
            shared = SharedExpert(*weights, first * count, ranks * count)
        alone = self.group.size() == 1
        if not alone:
            first, ranks = self.routed_part
            rows = gather_rows(routed.buffer, self.group)
            routed = routed.gathered(rows, first * count, ranks * count)
        experts = mixer.experts
        out = self.steps.mixture(
            routed, layer.up, layer.down, experts.ep_rank * experts.num_local, shared,
            hidden if alone else None, layer.swiglu,
        )  # fmt: skip
        # Summed over the ranks in float32, as one rank sums its experts.
        return out if alone else hidden.add_(reduce_scatter_rows(out, self.group))


class SingleExpert:
    """A dense MLP as a single expert that every row chooses."""

    def __init__(self, mlp: MLP, steps: Steps) -> None:
        self.steps, self.swiglu = steps, mlp.activation == "swiglu"
        self.up, self.down = mlp.linear_fc1.weight[None], mlp.linear_fc2.weight[None]
        self._rows = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the MLP: [n, H] -> [n, H]."""
        if self._rows != x.shape[0]:
            self._rows = x.shape[0]
            self._chosen = torch.zeros(self._rows, 1, dtype=torch.int32, device=x.device)
            self._weights = torch.ones(self._rows, 1, device=x.device)
        return self.steps.experts(x, self._chosen, self._weights, self.up, self.down, self.swiglu)


def single_expert(mlp: MLP, steps: Steps) -> SingleExpert | None:
    """The MLP as a single expert if it is unsharded and that is fast; None otherwise."""
    if mlp.tp_group.size() == 1 and not steps.FUSED:
        return SingleExpert(mlp, steps)
    return None
