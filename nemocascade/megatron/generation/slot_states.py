"""Mamba-2 and attention layers that read one token, or a piece, of many sequences: what they keep.

Shape letters: as `decode`, and K rows of the convolution's window, W its channels, h heads, p head
dimension, N state; g key/value heads, d their dimension.
"""

from __future__ import annotations

import torch
from nemocascade_kernels import MambaWeights
from torch import Tensor

from nemocascade.megatron.generation.cached_attention import attention_over_past
from nemocascade.megatron.generation.places import Places
from nemocascade.megatron.generation.slot_layers import MlpSlots, MoeSlots, SlotLayer, Step
from nemocascade.megatron.layers.attention import Attention
from nemocascade.megatron.layers.block import ResidualBlock
from nemocascade.megatron.layers.continued import (
    convolution,
    convolution_tails,
    final_states,
    mix_onward,
    steps_of,
)
from nemocascade.megatron.layers.mamba import MambaMixer
from nemocascade.megatron.layers.mamba_native import ONWARD, native_mamba_onward, refusal
from nemocascade.megatron.layers.mlp import MLP
from nemocascade.megatron.layers.moe import MoEMixer
from nemocascade.megatron.layers.rope import rotary_at
from nemocascade.megatron.microbatch import Microbatch


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
        mixer = self.mixer
        zxbcdt = mixer.in_proj(self.block.norm(hidden))[0].squeeze(1)
        keeps = bool(places.slot.numel())
        y = self._mix(zxbcdt, packed, places) if keeps else mixer.mix(zxbcdt, packed)
        out: Tensor = mixer.out_proj(y.unsqueeze(1))[0]
        return hidden + out

    def _mix(self, zxbcdt: Tensor, packed: Microbatch, places: Places) -> Tensor:
        """[T, h p] of the projection's rows; the states after them stay in the slots."""
        mixer, s, w = self.mixer, self.mixer.sizes, self.weights
        _, xbc, dt = zxbcdt.split([s.inner, s.channels, s.heads], dim=1)
        before = {d: self.conv[slot] for d, (slot, _) in places.past.items()}
        entering = {d: self.ssm[slot] for d, (slot, _) in places.past.items()}
        y: Tensor
        if refusal(zxbcdt, ONWARD) is None:
            y, states = native_mamba_onward(zxbcdt, w, packed, s, before, entering)
        else:
            mixed = convolution(xbc, w, packed, before)
            steps = steps_of(dt, w)
            if places.past:
                y = mix_onward(mixer, zxbcdt, mixed, steps, w, packed, entering)
            else:
                y = mixer.mix(zxbcdt, packed)
            states = final_states(mixed, steps, w, packed, self.ssm.shape[1:], entering)
        tails = convolution_tails(xbc, packed, self.conv.shape[1], before)
        self.conv[places.slot] = tails[places.document].to(self.conv.dtype)
        self.ssm[places.slot] = states[places.document]
        return y

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
        q, k, v = mixer.heads(qkv, self._rotary(packed, places))
        if places.past:
            mixed = self._over_past(q, k, v, packed, places)
        else:
            mixed = mixer.attend(q, k, v, packed)
        self._keep(k, v, packed, places)
        out: Tensor = mixer.linear_proj(mixed.flatten(1).unsqueeze(1))[0]
        return hidden + out

    def _rotary(self, packed: Microbatch, places: Places) -> tuple[Tensor, Tensor] | None:
        mixer: Attention = self.mixer
        if not places.past or not mixer.rope_dim:
            return mixer.rotary(packed)

        def make() -> tuple[Tensor, Tensor]:
            positions = packed.positions_on_host() + places.held(packed)
            cos, sin = rotary_at(positions, mixer.rope_dim, mixer.rope_base)
            return cos.to(packed.device), sin.to(packed.device)

        return packed.cached(("rotary over past", mixer.rope_dim, mixer.rope_base), make)

    def _over_past(
        self, q: Tensor, k: Tensor, v: Tensor, packed: Microbatch, places: Places
    ) -> Tensor:
        """Attention of each document over itself and what its slot holds."""
        # Documents that begin have theirs from this; the others' rows are replaced.
        out: Tensor = self.mixer.attend(q, k, v, packed)
        rows = packed.documents()
        for document, (slot, held) in places.past.items():
            here = rows[document]
            past = (cache[slot, :, :held] for cache in (self.keys, self.values))
            out[here] = attention_over_past(q[here], k[here], v[here], *past)
        return out

    def _keep(self, k: Tensor, v: Tensor, packed: Microbatch, places: Places) -> None:
        """Write keys and values [T, g, d] behind those that the slots hold."""
        rows = packed.documents()
        for document, slot in zip(places.document.tolist(), places.slot.tolist(), strict=True):
            here = rows[document]
            source, held = places.past.get(document, (slot, 0))
            behind = slice(held, held + here.stop - here.start)
            for cache, new in ((self.keys, k), (self.values, v)):
                cache[slot, :, behind] = new[here].transpose(0, 1)
                if slot != source:
                    cache[slot, :, :held] = cache[source, :, :held]

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
