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
from nemocascade_kernels import MambaWeights, RouterSettings, Steps, decode_steps
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
    real: rows that stand for a sequence; they come first. None: the host does not know.
    spare: the slot of the others.
    recorder: where the routers leave their choices; None: nowhere.
    """

    slots: Tensor
    positions: Tensor
    longest: int
    real: int | None
    spare: int
    recorder: RouteRecorder | None = None
    # Routers replay choices in training only.
    replay: None = None

    def token_mask(self, rows: slice) -> Tensor | None:
        """As `Microbatch.token_mask`."""
        if self.real is not None and rows.stop <= self.real:
            return None
        return self.slots[rows] != self.spare


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


class SlotLayer:
    """A layer of the stack beside what its sequences have left in it. This one keeps nothing.

    Where no tensor is cut over ranks (`whole`), a step goes through `decode_steps` on the bare
    weights; elsewhere through the training modules, which know how to talk to each other.
    """

    def __init__(self, block: ResidualBlock, slots: int) -> None:
        self.block = block
        self.mixer: Any = block.mixer
        self.slots = slots
        self.whole = self.mixer.tp_group.size() == 1

    def refresh(self) -> None:
        """Look the weights up again; called before they are first used."""
        norm: Any = self.block.norm
        self.norm_weight, self.norm_eps = norm.weight, norm.eps
        self.steps: Steps = decode_steps(norm.weight)

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
        return self.steps.norm(hidden, self.norm_weight, self.norm_eps)

    def linear(self, linear: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`residual + linear(x)` of rows [n, ...], or of this rank's part of them."""
        if self.whole:
            return self.steps.linear(x, linear.weight, residual)
        y: Tensor = linear(x.unsqueeze(1))[0].squeeze(1)
        return y if residual is None else residual + y


class MlpSlots(SlotLayer):
    """A dense MLP keeps nothing; where it is whole, and on a CPU, it is a single expert."""

    def __init__(self, block: ResidualBlock, slots: int) -> None:
        super().__init__(block, slots)
        self.whole &= self.mixer.linear_fc1.weight.is_cpu

    def refresh(self) -> None:
        super().refresh()
        self.expert = SingleExpert(self.mixer, self.steps)

    def step(self, hidden: Tensor, step: Step) -> Tensor:
        if not self.whole:
            return super().step(hidden, step)
        return hidden + self.expert(self.normed(hidden))


class MoeSlots(SlotLayer):
    """A mixture of experts keeps nothing. Where all experts are here there is a shorter way; on a
    GPU the training layer's grouped products are the better one."""

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
        # Scores are made in float32 whatever the model's precision.
        self.router_weight = mixer.router.weight.float()
        self.router_steps = decode_steps(self.router_weight)
        self.bias = mixer.router.expert_bias if mixer.config.shape.router_bias else None
        self.up, self.down = mixer.experts.linear_fc1, mixer.experts.linear_fc2
        self.shared: SingleExpert | None = None
        if mixer.shared_experts is not None and self.whole:
            self.shared = SingleExpert(mixer.shared_experts, self.steps)

    def step(self, hidden: Tensor, step: Step) -> Tensor:
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
    """A dense MLP as one expert that every row chooses."""

    def __init__(self, mlp: MLP, steps: Steps) -> None:
        self.steps, self.swiglu = steps, mlp.activation == "swiglu"
        self.up, self.down = mlp.linear_fc1.weight[None], mlp.linear_fc2.weight[None]
        self._rows = 0

    def __call__(self, x: Tensor) -> Tensor:
        """[n, H] of [n, H]."""
        if self._rows != x.shape[0]:
            self._rows = x.shape[0]
            self._chosen = torch.zeros(self._rows, 1, dtype=torch.int32, device=x.device)
            self._weights = torch.ones(self._rows, 1, device=x.device)
        return self.steps.experts(x, self._chosen, self._weights, self.up, self.down, self.swiglu)


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
        super().refresh()
        mixer, s = self.mixer, self.mixer.sizes
        self.in_proj, self.out_proj = mixer.in_proj, mixer.out_proj
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
        zxbcdt = self.linear(self.in_proj, self.normed(hidden))
        y = self.steps.mamba(zxbcdt, self.conv, self.ssm, step.slots, self.weights)
        return self.linear(self.out_proj, y, hidden)


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
        rows = packed.documents()
        for document, slot in zip(places.document.tolist(), places.slot.tolist(), strict=True):
            here = rows[document]
            length = here.stop - here.start
            self.keys[slot, :, :length] = k[here].transpose(0, 1)
            self.values[slot, :, :length] = v[here].transpose(0, 1)
        mixed: Tensor = mixer.linear_proj(mixer.attend(q, k, v, packed).flatten(1).unsqueeze(1))[0]
        return hidden + mixed

    def step(self, hidden: Tensor, step: Step) -> Tensor:
        mixer: Attention = self.mixer
        rotary = None
        if mixer.rope_dim:
            rotary = rotary_at(step.positions, mixer.rope_dim, mixer.rope_base)
        qkv = self.linear(mixer.linear_qkv, self.normed(hidden))
        q, k, v = mixer.heads(qkv.unsqueeze(1), rotary)
        mixed = self.steps.attention(
            q, k, v, self.keys, self.values, step.slots, step.positions, step.longest
        )
        return self.linear(mixer.linear_proj, mixed.flatten(1), hidden)


def slot_layer(block: ResidualBlock, slots: int) -> SlotLayer:
    """`block` with room for `slots` sequences."""
    kinds: dict[type, type[SlotLayer]] = {
        MambaMixer: MambaSlots,
        Attention: AttentionSlots,
        MoEMixer: MoeSlots,
        MLP: MlpSlots,
    }
    return kinds[type(block.mixer)](block, slots)
