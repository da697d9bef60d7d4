"""Mamba-2 and attention layers of the decoder: recurrent states and the KV cache.

Shape letters: those of `layers`; K convolution width, W its channels, h heads, p head dimension,
N state; g key/value heads, d their dimension.
"""

from __future__ import annotations

import torch
from nemocascade_kernels import MambaWeights
from nemocascade_kernels.common.transfer import to_device
from torch import Tensor

from nemocascade.megatron.generation.chunked_prefill import chunked_prefill_attention
from nemocascade.megatron.generation.layers import DecodeStep, MlpSlotLayer, MoeSlotLayer, SlotLayer
from nemocascade.megatron.generation.slot_assignment import SlotAssignment
from nemocascade.megatron.layers.attention import Attention
from nemocascade.megatron.layers.block import ResidualBlock
from nemocascade.megatron.layers.mamba import MambaMixer
from nemocascade.megatron.layers.mlp import MLP
from nemocascade.megatron.layers.moe import MoEMixer
from nemocascade.megatron.layers.rope import rotary_at
from nemocascade.megatron.microbatch import Microbatch


class MambaSlotLayer(SlotLayer):
    """A Mamba-2 layer with its recurrent states.

    conv: [S + 1, K - 1, W], the convolution's last inputs. ssm: [S + 1, h, p, N] float32.
    """

    def __init__(self, block: ResidualBlock, slots: int) -> None:
        super().__init__(block, slots)
        mixer: MambaMixer = self.mixer
        weight = mixer.conv1d.weight
        self.conv = weight.new_zeros(slots + 1, weight.shape[-1] - 1, mixer.channels)
        self.ssm = mixer.A_log.new_zeros(
            slots + 1, mixer.heads, mixer.head_dim, mixer.state, dtype=torch.float32
        )

    def refresh(self) -> None:
        super().refresh()
        mixer: MambaMixer = self.mixer
        self.in_proj, self.out_proj = mixer.in_proj, mixer.out_proj
        self.weights = MambaWeights(
            conv_weight=mixer.conv1d.weight.squeeze(1),
            conv_bias=mixer.conv1d.bias,
            dt_bias=mixer.dt_bias.float(),
            A=-mixer.A_log.float().exp(),
            D=mixer.D.float(),
            norm_weight=mixer.norm.weight,
            groups=mixer.groups,
            dt_limit=mixer.dt_limit,
            eps=mixer.eps,
        )

    def copy(self, source: int, targets: Tensor, length: int) -> None:
        for state in (self.conv, self.ssm):
            state[targets] = state[source].clone()

    def prefill(self, hidden: Tensor, packed: Microbatch, assignment: SlotAssignment) -> Tensor:
        mixer: MambaMixer = self.mixer
        zxbcdt = mixer.in_proj(self.block.norm(hidden))[0].squeeze(1)
        initial = None
        if assignment.initial:
            initial = self._initial_states(packed.num_documents, assignment)
        # Without slots the final states are not needed.
        y, final = mixer.mix(
            zxbcdt, packed, initial, return_final_state=bool(assignment.slot.numel())
        )
        if final is not None:
            for state, value in zip((self.conv, self.ssm), final, strict=True):
                state[assignment.slot] = value[assignment.document].to(state.dtype)
        out: Tensor = mixer.out_proj(y.unsqueeze(1))[0]
        return hidden + out

    def _initial_states(self, documents: int, assignment: SlotAssignment) -> tuple[Tensor, Tensor]:
        """Initial states of all documents, [D, ...] each; zeros for new documents."""
        conv, ssm = (
            state.new_zeros(documents, *state.shape[1:]).index_copy_(
                0, assignment.initial_document, state[assignment.initial_slot]
            )
            for state in (self.conv, self.ssm)
        )
        return conv, ssm

    def step(self, hidden: Tensor, step: DecodeStep) -> Tensor:
        zxbcdt = self.project_in(self.in_proj, self.normed(hidden))
        y = self.steps.mamba(zxbcdt, self.conv, self.ssm, step.slots, self.weights)
        return self.project_out(self.out_proj, y, hidden)


class AttentionSlotLayer(SlotLayer):
    """An attention layer with the KV cache of this rank's heads.

    keys, values: [S + 1, g, L, d]; `reserve` increases L.
    """

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
            angles = rotary_at(positions, mixer.rope_dim, mixer.rope_base)
            cos, sin = to_device(angles, packed.device)
            return cos, sin

        return packed.cached(("rotary after cached tokens", mixer.rope_dim, mixer.rope_base), make)

    def _attend_to_cache(
        self, q: Tensor, k: Tensor, v: Tensor, packed: Microbatch, assignment: SlotAssignment
    ) -> Tensor:
        """Attention of each document over itself and over the tokens cached in its slot."""
        # Correct for documents without cached tokens; the other rows are overwritten below.
        out: Tensor = self.mixer.attend(q, k, v, packed)
        rows = packed.documents()
        for document, (slot, length) in assignment.initial.items():
            here = rows[document]
            cached = (cache[slot, :, :length] for cache in (self.keys, self.values))
            out[here] = chunked_prefill_attention(q[here], k[here], v[here], *cached)
        return out

    def _write(self, k: Tensor, v: Tensor, packed: Microbatch, assignment: SlotAssignment) -> None:
        """Append keys and values [T, g, d] to the KV cache of the slots."""
        rows = packed.documents()
        for document, slot in assignment.pairs:
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
        qkv = self.project_in(mixer.linear_qkv, self.normed(hidden))
        q, k, v = mixer.heads(qkv.unsqueeze(1), rotary)
        mixed = self.steps.attention(
            q, k, v, self.keys, self.values, step.slots, step.positions, step.longest
        )
        return self.project_out(mixer.linear_proj, mixed.flatten(1), hidden)


def slot_layer(block: ResidualBlock, slots: int) -> SlotLayer:
    """`block` with caches for `slots` sequences."""
    kinds: dict[type, type[SlotLayer]] = {
        MambaMixer: MambaSlotLayer,
        Attention: AttentionSlotLayer,
        MoEMixer: MoeSlotLayer,
        MLP: MlpSlotLayer,
    }
    return kinds[type(block.mixer)](block, slots)
