"""Layers of the decoder, on the training layers' weights: the base class and stateless layers.

A slot holds the caches of one sequence: convolution and state-space states, keys and values
(`cached_layers`). The training layers prefill prompts once, packed. A prompt's state is written to
the slot of each sequence that continues it, and a decode step then takes one token a row. A chunk
that continues a slot is prefilled from the slot's states, packed like a prompt.

Slot S, the last of S + 1, is the spare slot of a batch's padding rows.
Shape letters: n rows of a step, S slots, H hidden size, tp tensor-parallel ranks, D documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from nemocascade_kernels import RouterSettings, Steps, decode_steps
from torch import Tensor

from nemocascade.megatron.generation.slot_assignment import SlotAssignment
from nemocascade.megatron.layers.block import ResidualBlock
from nemocascade.megatron.layers.mlp import MLP
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

    Where no tensor is sharded (`whole`), a step calls `decode_steps` on the weights. Otherwise it
    calls the training modules, which communicate.
    """

    def __init__(self, block: ResidualBlock, slots: int) -> None:
        self.block = block
        self.mixer: Any = block.mixer
        self.slots = slots
        self.whole = self.mixer.tp_group.size() == 1

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
        mixed: Tensor = self.mixer(self.normed(hidden).unsqueeze(1), step)
        return hidden + mixed.squeeze(1)

    def normed(self, hidden: Tensor) -> Tensor:
        """Apply the layer's norm to [n/tp, H]."""
        return self.steps.norm(hidden, self.norm_weight, self.norm_eps)

    def linear(self, linear: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return `residual + linear(x)` for rows [n, ...], or for this rank's part of them."""
        if self.whole:
            return self.steps.linear(x, linear.weight, residual)
        y: Tensor = linear(x.unsqueeze(1))[0].squeeze(1)
        return y if residual is None else residual + y


class MlpSlotLayer(SlotLayer):
    """A dense MLP; an unsharded one on a CPU runs as a single expert."""

    def __init__(self, block: ResidualBlock, slots: int) -> None:
        super().__init__(block, slots)
        self.whole &= self.mixer.linear_fc1.weight.is_cpu

    def refresh(self) -> None:
        super().refresh()
        self.expert = SingleExpert(self.mixer, self.steps)

    def step(self, hidden: Tensor, step: DecodeStep) -> Tensor:
        if not self.whole:
            return super().step(hidden, step)
        return hidden + self.expert(self.normed(hidden))


class MoeSlotLayer(SlotLayer):
    """A mixture of experts. Where a CPU holds all of them, the decode operators run; on a GPU the
    training layer's grouped GEMMs are faster."""

    def __init__(self, block: ResidualBlock, slots: int) -> None:
        super().__init__(block, slots)
        mixer, shape = self.mixer, self.mixer.config.shape
        self.whole &= mixer.experts.ep_size * mixer.experts.etp_size == 1
        self.whole &= mixer.router.weight.is_cpu
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
        # Scores are float32 at any model precision.
        self.router_weight = mixer.router.weight.float()
        self.router_steps = decode_steps(self.router_weight)
        self.bias = mixer.router.expert_bias if mixer.config.shape.router_bias else None
        self.up, self.down = mixer.experts.linear_fc1, mixer.experts.linear_fc2
        self.shared: SingleExpert | None = None
        if mixer.shared_experts is not None and self.whole:
            self.shared = SingleExpert(mixer.shared_experts, self.steps)

    def step(self, hidden: Tensor, step: DecodeStep) -> Tensor:
        if not self.whole:
            return super().step(hidden, step)
        x = self.normed(hidden)
        logits = self.router_steps.linear(x.float(), self.router_weight, None)
        real = x.shape[0] if step.real is None else step.real
        chosen, weights = self.router_steps.route(logits, self.bias, real, self.settings)
        if step.recorder is not None:
            step.recorder.keep(self.mixer.layer_number, slice(0, x.shape[0]), chosen)
        hidden = hidden + self.steps.experts(x, chosen, weights, self.up, self.down, self.swiglu)
        if self.shared is not None:
            hidden += self.shared(x)
        return hidden


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
