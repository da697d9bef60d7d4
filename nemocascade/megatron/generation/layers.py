"""Layers of the decoder, on the training layers' weights: the base class and stateless layers.

A slot holds the caches of one sequence: convolution and state-space states, keys and values
(`cached_layers`). The training layers prefill prompts once, packed. A prompt's state is written to
the slot of each sequence that continues it, and a decode step then takes one token a row. A chunk
that continues a slot is prefilled from the slot's states, packed like a prompt.

Tensor-parallel ranks share the rows of a step between layers, as training's sequence parallelism
does. All exchanges of a step have fixed sizes (`rows`).

Slot S, the last of S + 1, is the spare slot of a batch's padding rows.
Shape letters: n rows of a step, S slots, H hidden size, tp tensor-parallel ranks, D documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from nemocascade_kernels import RouterSettings, Steps, decode_steps, make_routing, moe_experts
from torch import Tensor

from nemocascade.megatron.generation.rows import gather_rows, reduce_scatter_rows
from nemocascade.megatron.generation.slot_assignment import SlotAssignment
from nemocascade.megatron.layers.block import ResidualBlock
from nemocascade.megatron.layers.mlp import MLP, activate
from nemocascade.megatron.layers.moe import MoEMixer
from nemocascade.megatron.microbatch import Microbatch
from nemocascade.megatron.replay import RouteRecorder


@dataclass(frozen=True, eq=False)
class DecodeStep:
    """The rows of one decoding step.

    slots: [n] int64, the slot of each row; padding rows use the spare slot.
    positions: [n] int64, tokens cached in the slot before this one.
    longest: at least the largest position + 1; cached tokens that attention may read.
    real: number of rows without padding; they come first. None: unknown on the host.
    spare: the slot of padding rows.
    recorder: records the routers' choices; None: not recorded.
    """

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

    def reserve(self, context: int) -> None:
        """Allocate caches for sequences of `context` tokens."""

    def copy(self, source: int, targets: Tensor, length: int) -> None:
        """Copy the state of `source`, of `length` cached tokens, to the slots `targets`."""

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
        up = activate(self.project_in(mlp.linear_fc1, x), mlp.activation)
        return self.project_out(mlp.linear_fc2, up, residual)


class MlpSlotLayer(SlotLayer):
    """A dense MLP; an unsharded one on a CPU runs as a single expert."""

    def refresh(self) -> None:
        super().refresh()
        self.expert = single_expert(self.mixer, self.steps)

    def step(self, hidden: Tensor, step: DecodeStep) -> Tensor:
        if self.expert is None:
            return self.add_mlp(self.mixer, self.normed(hidden), hidden)
        return hidden + self.expert(self.normed(hidden))


class MoeSlotLayer(SlotLayer):
    """A mixture of experts. On a CPU the decode operators run; on a GPU the training layer's
    grouped GEMMs are faster.

    Ranks that share experts gather the rows of all of them, and each runs its own experts. A step
    has few rows, so this costs less than a dispatch, whose sizes the host must read.
    """

    def __init__(self, block: ResidualBlock, slots: int) -> None:
        super().__init__(block, slots)
        mixer, shape = self.mixer, self.mixer.config.shape
        self.group = mixer.experts.groups.tp_ep
        self.on_cpu = mixer.router.weight.is_cpu
        self.activation = shape.activation
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
        # Scores are float32 at any model precision.
        self.router_weight = mixer.router.weight.float()
        self.router_steps = decode_steps(self.router_weight)
        self.bias = mixer.router.expert_bias if mixer.config.shape.router_bias else None
        self.up, self.down = mixer.experts.linear_fc1, mixer.experts.linear_fc2
        self.shared: SingleExpert | None = None
        if mixer.shared_experts is not None:
            self.shared = single_expert(mixer.shared_experts, self.steps)

    def step(self, hidden: Tensor, step: DecodeStep) -> Tensor:
        x = self.normed(hidden)
        hidden = hidden + self._routed(x, step)
        if self.shared is not None:
            return hidden + self.shared(x)
        if self.mixer.shared_experts is not None:
            return self.add_mlp(self.mixer.shared_experts, x, hidden)
        return hidden

    def _routed(self, x: Tensor, step: DecodeStep) -> Tensor:
        """The sum over the chosen experts of this rank's rows, [n/tp, H]."""
        rows, activation = self.mixer.rows(x.shape[0]), self.activation
        if self.on_cpu:
            chosen, weights = self._choose(x, rows, step)
            if self.group.size() == 1:
                return self._experts(x, chosen, weights)
        else:
            routing = self.mixer.route(self.mixer.router(x), step, rows)
            if self.group.size() == 1:
                return moe_experts(x, routing, self.up, self.down, activation=activation)
            chosen, weights = routing.experts, routing.weights
        experts = self.mixer.experts
        x, chosen, weights = (gather_rows(t, self.group) for t in (x, chosen, weights))
        local = chosen - experts.ep_rank * experts.num_local
        is_mine = (local >= 0) & (local < experts.num_local)
        local = torch.where(is_mine, local, experts.num_local)
        partial = self._experts(x, local, torch.where(is_mine, weights, 0.0))
        # Summed over the ranks in float32, as one rank sums its experts.
        return reduce_scatter_rows(partial.float(), self.group).to(x.dtype)

    def _choose(self, x: Tensor, rows: slice, step: DecodeStep) -> tuple[Tensor, Tensor]:
        """The experts of this rank's `rows`, [n/tp, K] int32, and their weights, on a CPU."""
        logits = self.router_steps.linear(x.float(), self.router_weight, None)
        real = rows.stop if step.real is None else step.real
        real = min(max(real - rows.start, 0), x.shape[0])
        chosen, weights = self.router_steps.route(logits, self.bias, real, self.settings)
        if step.recorder is not None:
            step.recorder.keep(self.mixer.layer_number, rows, chosen)
        return chosen, weights

    def _experts(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Apply this rank's experts; the number of them means no expert."""
        if self.on_cpu:
            swiglu = self.activation == "swiglu"
            return self.steps.experts(x, chosen, weights, self.up, self.down, swiglu)
        routing = make_routing(chosen, weights, self.up.shape[0])
        return moe_experts(x, routing, self.up, self.down, activation=self.activation)


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
    """The MLP as a single expert if it is unsharded and on a CPU; None otherwise."""
    if mlp.tp_group.size() == 1 and mlp.linear_fc1.weight.is_cpu:
        return SingleExpert(mlp, steps)
    return None
