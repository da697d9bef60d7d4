"""Mamba-2 and attention layers of the decoder: recurrent states and the KV cache.

Shape letters: those of `layers`; K convolution width, W its channels, h heads, p head dimension,
N state; g key/value heads, d their dimension; P blocks of B tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from nemocascade_kernels import MambaWeights
from nemocascade_kernels.common.transfer import to_device
from torch import Tensor

from nemocascade.megatron.generation.chunked_prefill import chunked_prefill_attention
from nemocascade.megatron.generation.layers import DecodeStep, MlpSlotLayer, MoeSlotLayer, SlotLayer
from nemocascade.megatron.generation.rows import gather_rows
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

    def copy(self, source: int, targets: Tensor) -> None:
        for state in (self.conv, self.ssm):
            state[targets] = state[source].clone()

    def state(self, slot: int, blocks: Tensor) -> list[Tensor]:
        return [state[slot : slot + 1].clone() for state in (self.conv, self.ssm)]

    def restore(self, slot: int, blocks: Tensor, state: Sequence[Tensor]) -> None:
        for mine, value in zip((self.conv, self.ssm), state, strict=True):
            mine[slot : slot + 1] = value

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

    keys, values: [P + 1, g, B, d], P blocks of B tokens and the spare one, which padding writes to.
    """

    def __init__(self, block: ResidualBlock, slots: int) -> None:
        super().__init__(block, slots)
        self.allocate(0, 1)

    def refresh(self) -> None:
        super().refresh()
        mixer: Attention = self.mixer
        self.own_heads: Tensor | None = None
        """The projection to this rank's heads, whose parts need no copy; None: they are rotated or
        normed."""
        if self.steps.FUSED and not mixer.rope_dim and mixer.q_layernorm is None:
            self.own_heads = mixer.linear_qkv.weight
            if mixer.sharing > 1:
                # Each rank that shares a key/value head keeps all of its projection.
                parts = mixer.grouped_heads(mixer.linear_qkv.weight.t().unsqueeze(1))
                self.own_heads = torch.cat([p.flatten(1) for p in parts], 1).t().contiguous()

    def allocate(self, blocks: int, size: int) -> None:
        mixer: Attention = self.mixer
        # Freed before the new ones are allocated.
        self.keys = self.values = mixer.linear_qkv.weight.new_empty(0)
        self.keys, self.values = (
            self.keys.new_empty(blocks + 1, mixer.kv_heads, size, mixer.head_dim) for _ in range(2)
        )

    def copy_blocks(self, source: Tensor, target: Tensor) -> None:
        for cache in (self.keys, self.values):
            cache[target] = cache[source]

    def state(self, slot: int, blocks: Tensor) -> list[Tensor]:
        return [cache[blocks] for cache in (self.keys, self.values)]

    def restore(self, slot: int, blocks: Tensor, state: Sequence[Tensor]) -> None:
        for cache, value in zip((self.keys, self.values), state, strict=True):
            cache[blocks] = value[value.shape[0] - blocks.shape[0] :]

    def prefill(self, hidden: Tensor, packed: Microbatch, assignment: SlotAssignment) -> Tensor:
        mixer: Attention = self.mixer
        qkv = mixer.linear_qkv(self.block.norm(hidden))[0]
        q, k, v = mixer.heads(qkv, self._rotary(packed, assignment))
        block, row = assignment.cache_indices
        for cache, new in ((self.keys, k), (self.values, v)):
            cache[block, :, row] = new
        mixed = mixer.attend(q, k, v, packed)
        if assignment.initial:
            # Without cached tokens, `mixed` is right for new documents only.
            self._attend_to_cache(q, k, v, packed, assignment, mixed)
        if assignment.source.numel():
            self.copy_blocks(assignment.source, assignment.target)
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
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        packed: Microbatch,
        assignment: SlotAssignment,
        out: Tensor,
    ) -> None:
        """Attention of each document with cached tokens over these and over itself."""
        rows = packed.documents()
        for (document, (_, cached)), blocks in zip(
            assignment.initial.items(), assignment.attended, strict=True
        ):
            here = rows[document]
            out[here] = chunked_prefill_attention(
                q[here], k[here], v[here], self.keys, self.values, blocks, cached
            )

    def step(self, hidden: Tensor, step: DecodeStep) -> Tensor:
        mixer: Attention = self.mixer
        rotary = None
        if mixer.rope_dim:
            rotary = rotary_at(step.positions, mixer.rope_dim, mixer.rope_base)
        if self.own_heads is not None:
            qkv = self.steps.linear(
                gather_rows(self.normed(hidden), self.tp_group), self.own_heads, None
            )
            q, k, v = qkv.view(qkv.shape[0], mixer.kv_heads, -1, mixer.head_dim).tensor_split(
                (-2, -1), 2
            )
            k, v = k.squeeze(2), v.squeeze(2)
        else:
            qkv = self.project_in(mixer.linear_qkv, self.normed(hidden))
            q, k, v = mixer.heads(qkv.unsqueeze(1), rotary)
        mixed = self.steps.attention(
            q, k, v, self.keys, self.values, step.table, step.slots, step.positions, step.longest
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
