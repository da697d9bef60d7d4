"""Mamba-2 and attention layers of the decoder: recurrent states and the KV cache.

Shape letters: those of `layers`, and K rows of the convolution's window, W its channels, h heads,
p head dimension, N state; g key/value heads, d their dimension.
"""

from __future__ import annotations

import torch
from nemocascade_kernels import MambaWeights
from torch import Tensor

from nemocascade.megatron.generation.chunked_prefill import chunked_prefill_attention
from nemocascade.megatron.generation.layers import DecodeStep, MlpSlotLayer, MoeSlotLayer, SlotLayer
from nemocascade.megatron.generation.slot_assignment import SlotAssignment
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


class MambaSlotLayer(SlotLayer):
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

    def prefill(self, hidden: Tensor, packed: Microbatch, assignment: SlotAssignment) -> Tensor:
        mixer = self.mixer
        zxbcdt = mixer.in_proj(self.block.norm(hidden))[0].squeeze(1)
        keeps = bool(assignment.slot.numel())
        y = self._mix(zxbcdt, packed, assignment) if keeps else mixer.mix(zxbcdt, packed)
        out: Tensor = mixer.out_proj(y.unsqueeze(1))[0]
        return hidden + out

    def _mix(self, zxbcdt: Tensor, packed: Microbatch, assignment: SlotAssignment) -> Tensor:
        """[T, h p] of the projection's rows; the states after them stay in the slots."""
        mixer, s, w = self.mixer, self.mixer.sizes, self.weights
        _, xbc, dt = zxbcdt.split([s.inner, s.channels, s.heads], dim=1)
        before = {d: self.conv[slot] for d, (slot, _) in assignment.initial.items()}
        entering = {d: self.ssm[slot] for d, (slot, _) in assignment.initial.items()}
        y: Tensor
        if refusal(zxbcdt, ONWARD) is None:
            y, states = native_mamba_onward(zxbcdt, w, packed, s, before, entering)
        else:
            mixed = convolution(xbc, w, packed, before)
            steps = steps_of(dt, w)
            if assignment.initial:
                y = mix_onward(mixer, zxbcdt, mixed, steps, w, packed, entering)
            else:
                y = mixer.mix(zxbcdt, packed)
            states = final_states(mixed, steps, w, packed, self.ssm.shape[1:], entering)
        tails = convolution_tails(xbc, packed, self.conv.shape[1], before)
        self.conv[assignment.slot] = tails[assignment.document].to(self.conv.dtype)
        self.ssm[assignment.slot] = states[assignment.document]
        return y

    def step(self, hidden: Tensor, step: DecodeStep) -> Tensor:
        zxbcdt = self.linear(self.in_proj, self.normed(hidden))
        y = self.steps.mamba(zxbcdt, self.conv, self.ssm, step.slots, self.weights)
        return self.linear(self.out_proj, y, hidden)


class AttentionSlotLayer(SlotLayer):
    """keys, values: [S + 1, g, L, d], the KV cache of this rank's heads; L grows by `reserve`."""

    def __init__(self, block: ResidualBlock, slots: int) -> None:
        super().__init__(block, slots)
        mixer: Attention = self.mixer
        weight = mixer.linear_qkv.weight
        self.keys = weight.new_zeros(slots + 1, mixer.kv_heads, 0, mixer.head_dim)
        self.values = torch.zeros_like(self.keys)

    def reserve(self, context: int) -> None:
        allocated = self.keys.shape[2]
        if context > allocated:
            self.keys, self.values = (
                torch.nn.functional.pad(cache, (0, 0, 0, context - allocated))
                for cache in (self.keys, self.values)
            )

    def copy(self, source: int, targets: Tensor, length: int) -> None:
        for cache in (self.keys, self.values):
            cache[targets, :, :length] = cache[source, :, :length].clone()

    def prefill(self, hidden: Tensor, packed: Microbatch, assignment: SlotAssignment) -> Tensor:
        mixer: Attention = self.mixer
        qkv = mixer.linear_qkv(self.block.norm(hidden))[0]
        q, k, v = mixer.heads(qkv, self._rotary(packed, assignment))
        if assignment.initial:
            mixed = self._attend_to_cache(q, k, v, packed, assignment)
        else:
            mixed = mixer.attend(q, k, v, packed)
        self._write(k, v, packed, assignment)
        out: Tensor = mixer.linear_proj(mixed.flatten(1).unsqueeze(1))[0]
        return hidden + out

    def _rotary(
        self, packed: Microbatch, assignment: SlotAssignment
    ) -> tuple[Tensor, Tensor] | None:
        mixer: Attention = self.mixer
        if not assignment.initial or not mixer.rope_dim:
            return mixer.rotary(packed)

        def make() -> tuple[Tensor, Tensor]:
            positions = packed.positions_on_host() + assignment.cached_tokens(packed)
            cos, sin = rotary_at(positions, mixer.rope_dim, mixer.rope_base)
            return cos.to(packed.device), sin.to(packed.device)

        return packed.cached(("rotary after cached tokens", mixer.rope_dim, mixer.rope_base), make)

    def _attend_to_cache(
        self, q: Tensor, k: Tensor, v: Tensor, packed: Microbatch, assignment: SlotAssignment
    ) -> Tensor:
        """Attention of each document over itself and over the tokens cached in its slot."""
        # Right for documents without cached tokens; the others' rows are replaced.
        out: Tensor = self.mixer.attend(q, k, v, packed)
        rows = packed.documents()
        for document, (slot, length) in assignment.initial.items():
            here = rows[document]
            cached = (cache[slot, :, :length] for cache in (self.keys, self.values))
            out[here] = chunked_prefill_attention(q[here], k[here], v[here], *cached)
        return out

    def _write(self, k: Tensor, v: Tensor, packed: Microbatch, assignment: SlotAssignment) -> None:
        """Append keys and values [T, g, d] to those cached in the slots."""
        rows = packed.documents()
        for document, slot in zip(
            assignment.document.tolist(), assignment.slot.tolist(), strict=True
        ):
            here = rows[document]
            source, length = assignment.initial.get(document, (slot, 0))
            appended = slice(length, length + here.stop - here.start)
            for cache, new in ((self.keys, k), (self.values, v)):
                cache[slot, :, appended] = new[here].transpose(0, 1)
                if slot != source:
                    cache[slot, :, :length] = cache[source, :, :length]

    def step(self, hidden: Tensor, step: DecodeStep) -> Tensor:
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
    """`block` with caches for `slots` sequences."""
    kinds: dict[type, type[SlotLayer]] = {
        MambaMixer: MambaSlotLayer,
        Attention: AttentionSlotLayer,
        MoEMixer: MoeSlotLayer,
        MLP: MlpSlotLayer,
    }
    return kinds[type(block.mixer)](block, slots)
