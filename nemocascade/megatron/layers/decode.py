"""Layers that read one token of many sequences at a time, on the training layers' own weights.

A sequence lives in a slot: its convolution and state-space states, its keys and values. A prompt is
read once, packed, by the training layers themselves, and leaves its state in as many slots as there
are continuations of it. From then on a step reads one token a row.

Slot S, the last of S + 1, belongs to nobody: rows that fill a batch up name it.
Shape letters: n rows of a step, S slots, H hidden size, tp tensor-parallel ranks, D documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nemocascade_kernels import (
    MambaWeights,
    RouterSettings,
    step_attention,
    step_experts,
    step_linear,
    step_mamba,
    step_norm,
    step_route,
)
from torch import Tensor

from nemocascade.megatron.layers.attention import Attention
from nemocascade.megatron.layers.block import ResidualBlock
from nemocascade.megatron.layers.final_states import convolution_tails, scan_final_states
from nemocascade.megatron.layers.mamba import MambaMixer
from nemocascade.megatron.layers.mlp import MLP
from nemocascade.megatron.layers.moe import MoEMixer
from nemocascade.megatron.layers.rope import rotary_at
from nemocascade.megatron.microbatch import Microbatch
from nemocascade.megatron.replay import RouteRecorder


@dataclass(frozen=True, eq=False)
class Step:
    """The rows of one decoding step.

    slots: [n] int64, the slot of each row; rows past `real` name the spare slot.
    positions: [n] int64, tokens that the slot holds before this one.
    longest: at least the largest position + 1; what attention may read of the caches.
    real: rows that stand for a sequence; they come first.
    recorder: where the routers leave their choices; None: nowhere.
    """

    slots: Tensor
    positions: Tensor
    longest: int
    real: int
    recorder: RouteRecorder | None = None
    # Routers replay choices in training only.
    replay: None = None

    def token_mask(self, rows: slice) -> Tensor | None:
        """As `Microbatch.token_mask`."""
        if rows.stop <= self.real:
            return None
        return torch.arange(rows.start, rows.stop, device=self.slots.device) < self.real


@dataclass(frozen=True, eq=False)
class Places:
    """Where the documents of a prompt pack leave their states.

    document: [m] int64, slot: [m] int64: document[i]'s state goes to slot[i]; a document may go to
    many slots or to none. On the device.
    """

    document: Tensor
    slot: Tensor

    @classmethod
    def of(cls, slots: Sequence[Sequence[int]], device: torch.device) -> Places:
        """slots: for each document, the slots that continue it."""
        pairs = [(d, s) for d, group in enumerate(slots) for s in group]
        table = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
        document, slot = table.to(device).unbind(1)
        return cls(document.contiguous(), slot.contiguous())


def apply_linear(linear: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """`residual + linear(x)`: without tensor parallelism, the bare product.

    linear: a tensor-parallel linear without bias. x: [n, ...], or this rank's rows or columns.
    """
    if linear.tp_group.size() == 1:
        return step_linear(x, linear.weight, residual)
    y: Tensor = linear(x.unsqueeze(1))[0].squeeze(1)
    return y if residual is None else residual + y


class SlotLayer:
    """A layer of the stack beside what its sequences have left in it. This one keeps nothing."""

    def __init__(self, block: ResidualBlock, slots: int) -> None:
        self.block = block
        self.mixer: Any = block.mixer
        self.slots = slots

    def refresh(self) -> None:
        """Derive again what follows from the weights; called before they are first used."""

    def reserve(self, context: int) -> None:
        """Make room for sequences of `context` tokens."""

    def copy(self, source: int, targets: Tensor, length: int) -> None:
        """Give the slots `targets` the state of `source`, which holds `length` tokens."""

    def prefill(self, hidden: Tensor, packed: Microbatch, places: Places) -> Tensor:
        """Read whole prompts, and leave their states in the slots. hidden: [T/tp, 1, H]."""
        out: Tensor = self.block(hidden, packed_seq_params=packed)
        return out

    def step(self, hidden: Tensor, step: Step) -> Tensor:
        """Read a token for each row. hidden: [n/tp, H]."""
        mixed: Tensor = self.mixer(self.normed(hidden).unsqueeze(1), step)
        return hidden + mixed.squeeze(1)

    def normed(self, hidden: Tensor) -> Tensor:
        """The layer's norm of [n/tp, H]."""
        norm: Any = self.block.norm
        return step_norm(hidden, norm.weight, norm.eps)


class MlpSlots(SlotLayer):
    """A dense MLP keeps nothing; without tensor parallelism it is a single expert."""

    def step(self, hidden: Tensor, step: Step) -> Tensor:
        if self.mixer.tp_group.size() > 1:
            return super().step(hidden, step)
        return hidden + mlp_step(self.mixer, self.normed(hidden))


class MoeSlots(SlotLayer):
    """A mixture of experts keeps nothing. Where the experts are all here, so is a shorter way."""

    def __init__(self, block: ResidualBlock, slots: int) -> None:
        super().__init__(block, slots)
        shape = self.mixer.config.shape
        self.settings = RouterSettings(
            top_k=shape.experts_per_token,
            score=shape.router_score,
            num_groups=shape.router_groups,
            top_groups=shape.router_top_groups,
            normalize=shape.router_normalize,
            scale=shape.router_scale,
        )

    def step(self, hidden: Tensor, step: Step) -> Tensor:
        mixer: MoEMixer = self.mixer
        if mixer.tp_group.size() * mixer.experts.ep_size * mixer.experts.etp_size > 1:
            return super().step(hidden, step)
        x = self.normed(hidden)
        rows = slice(0, x.shape[0])
        logits = step_linear(x.float(), mixer.router.weight.float())
        bias = mixer.router.expert_bias if mixer.config.shape.router_bias else None
        chosen, weights = step_route(logits, self.settings, bias, real=step.real)
        if step.recorder is not None:
            step.recorder.keep(mixer.layer_number, rows, chosen)
        hidden = hidden + step_experts(
            x,
            chosen,
            weights,
            mixer.experts.linear_fc1,
            mixer.experts.linear_fc2,
            activation=mixer.config.shape.activation,
        )
        if mixer.shared_experts is not None:
            hidden += mlp_step(mixer.shared_experts, x)
        return hidden


def mlp_step(mlp: MLP, x: Tensor) -> Tensor:
    """`mlp(x)`, [n, H], without tensor parallelism: one expert, chosen by every row."""
    return step_experts(
        x,
        torch.zeros(x.shape[0], 1, dtype=torch.int32, device=x.device),
        torch.ones(x.shape[0], 1, device=x.device),
        mlp.linear_fc1.weight[None],
        mlp.linear_fc2.weight[None],
        activation=mlp.activation,
    )


class MambaSlots(SlotLayer):
    """conv: [S + 1, K - 1, W], the convolution's last inputs. ssm: [S + 1, h, p, N] float32."""

    def __init__(self, block: ResidualBlock, slots: int) -> None:
        super().__init__(block, slots)
        mixer, s = self.mixer, self.mixer.sizes
        weight = mixer.conv1d.weight
        self.conv = weight.new_zeros(slots + 1, weight.shape[-1] - 1, s.channels)
        self.ssm = mixer.A_log.new_zeros(
            slots + 1, s.heads, s.head_dim, s.state, dtype=torch.float32
        )

    def refresh(self) -> None:
        mixer, s = self.mixer, self.mixer.sizes
        self.weights = MambaWeights(
            conv_weight=mixer.conv1d.weight.squeeze(1),
            conv_bias=mixer.conv1d.bias,
            dt_bias=mixer.dt_bias.float(),
            A=-mixer.A_log.float().exp(),
            D=mixer.D.float(),
            norm_weight=mixer.norm.weight,
            groups=s.groups,
            dt_limit=s.dt_limit,
            eps=s.eps,
        )

    def copy(self, source: int, targets: Tensor, length: int) -> None:
        for state in (self.conv, self.ssm):
            state[targets] = state[source].clone()

    def prefill(self, hidden: Tensor, packed: Microbatch, places: Places) -> Tensor:
        mixer, s = self.mixer, self.mixer.sizes
        zxbcdt = mixer.in_proj(self.block.norm(hidden))[0].squeeze(1)
        if places.slot.numel():
            _, xbc, dt = zxbcdt.split([s.inner, s.channels, s.heads], dim=1)
            tails = convolution_tails(xbc, packed, self.conv.shape[1])
            states = scan_final_states(xbc, dt, self.weights, packed, self.ssm.shape[1:])
            self.conv[places.slot] = tails[places.document].to(self.conv.dtype)
            self.ssm[places.slot] = states[places.document]
        mixed: Tensor = mixer.out_proj(mixer.mix(zxbcdt, packed).unsqueeze(1))[0]
        return hidden + mixed

    def step(self, hidden: Tensor, step: Step) -> Tensor:
        zxbcdt = apply_linear(self.mixer.in_proj, self.normed(hidden))
        y = step_mamba(zxbcdt, self.conv, self.ssm, step.slots, self.weights)
        return apply_linear(self.mixer.out_proj, y, hidden)


class AttentionSlots(SlotLayer):
    """keys, values: [S + 1, g, L, d], of this rank's g key/value heads; L grows as it must."""

    def __init__(self, block: ResidualBlock, slots: int) -> None:
        super().__init__(block, slots)
        mixer: Attention = self.mixer
        weight = mixer.linear_qkv.weight
        self.keys = weight.new_zeros(slots + 1, mixer.kv_heads, 0, mixer.head_dim)
        self.values = torch.zeros_like(self.keys)

    def reserve(self, context: int) -> None:
        held = self.keys.shape[2]
        if context > held:
            self.keys, self.values = (
                torch.nn.functional.pad(cache, (0, 0, 0, context - held))
                for cache in (self.keys, self.values)
            )

    def copy(self, source: int, targets: Tensor, length: int) -> None:
        for cache in (self.keys, self.values):
            cache[targets, :, :length] = cache[source, :, :length].clone()

    def prefill(self, hidden: Tensor, packed: Microbatch, places: Places) -> Tensor:
        mixer: Attention = self.mixer
        qkv = mixer.linear_qkv(self.block.norm(hidden))[0]
        q, k, v = mixer.heads(qkv, mixer.rotary(packed))
        lengths, starts = packed.lengths.tolist(), packed.starts.tolist()
        for document, slot in zip(places.document.tolist(), places.slot.tolist(), strict=True):
            rows = slice(starts[document], starts[document] + lengths[document])
            self.keys[slot, :, : lengths[document]] = k[rows].transpose(0, 1)
            self.values[slot, :, : lengths[document]] = v[rows].transpose(0, 1)
        mixed: Tensor = mixer.linear_proj(mixer.attend(q, k, v, packed).flatten(1).unsqueeze(1))[0]
        return hidden + mixed

    def step(self, hidden: Tensor, step: Step) -> Tensor:
        mixer: Attention = self.mixer
        rotary = None
        if mixer.rope_dim:
            rotary = rotary_at(step.positions, mixer.rope_dim, mixer.rope_base)
        qkv = apply_linear(mixer.linear_qkv, self.normed(hidden))
        q, k, v = mixer.heads(qkv.unsqueeze(1), rotary)
        mixed = step_attention(
            q, k, v, self.keys, self.values, step.slots, step.positions, step.longest
        )
        return apply_linear(mixer.linear_proj, mixed.flatten(1), hidden)


def slot_layer(block: ResidualBlock, slots: int) -> SlotLayer:
    """`block` with room for `slots` sequences."""
    kinds: dict[type, type[SlotLayer]] = {
        MambaMixer: MambaSlots,
        Attention: AttentionSlots,
        MoEMixer: MoeSlots,
        MLP: MlpSlots,
    }
    return kinds[type(block.mixer)](block, slots)
