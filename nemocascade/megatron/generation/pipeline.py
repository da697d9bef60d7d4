"""The layers of a model as a pipeline: each stage receives hidden states and sends them on.

Shape letters: T rows of a call, H hidden size, tp tensor-parallel ranks, which share the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nemocascade.megatron.generation.cached_layers import slot_layer
from nemocascade.megatron.generation.layers import SlotLayer
from nemocascade.megatron.generation.rows import reduce_scatter_rows
from nemocascade.megatron.model import CascadeModel
from nemocascade.runtime.world import World

LayerCall = Callable[[SlotLayer, Tensor], Tensor]
"""Applies a layer to hidden states [T/tp, H]."""


class Pipeline:
    """The layers of this rank's chunks with caches for `slots` sequences, and the embedding."""

    def __init__(self, world: World, chunks: Sequence[CascadeModel], slots: int) -> None:
        self.world, self.chunks, self.config = world, list(chunks), chunks[0].config
        self._layers = [
            [slot_layer(block, slots) for block in chunk.decoder.layers] for chunk in chunks
        ]

    @property
    def layers(self) -> list[SlotLayer]:
        """The layers of all chunks."""
        return [layer for layers in self._layers for layer in layers]

    def run(self, tokens: Tensor, apply: LayerCall) -> Tensor | None:
        """Hidden states [T/tp, H] after the last layer on the last stage, None on the others.

        tokens: [T]. Stages send in the order of the chunks: with interleaved chunks, the last
        stage sends them back to the first.
        """
        hidden: Tensor | None = None
        for chunk, layers in zip(self.chunks, self._layers, strict=True):
            if chunk.pre_process:
                hidden = self.embed(tokens)
            elif self.world.parallel.pp > 1:
                hidden = self.empty_hidden(tokens.numel())
                self.receive(hidden)
            assert hidden is not None
            for layer in layers:
                hidden = apply(layer, hidden)
            if chunk.post_process:
                return hidden
            self.send(hidden)
        return None

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings [T/tp, H] of tokens [T], on the first stage."""
        weight, group = self.chunks[0].embedding.word_embeddings.weight, self.world.groups.tp
        if group.size() == 1:
            return torch.nn.functional.embedding(tokens, weight)
        local = tokens.long() - group.rank() * weight.shape[0]
        is_mine = (local >= 0) & (local < weight.shape[0])
        found = torch.nn.functional.embedding(torch.where(is_mine, local, 0), weight)
        return reduce_scatter_rows(torch.where(is_mine[:, None], found, 0.0), group)

    def empty_hidden(self, rows: int) -> Tensor:
        """[rows/tp, H], without values."""
        return torch.empty(
            rows // self.world.parallel.tp,
            self.config.hidden_size,
            dtype=self.config.params_dtype,
            device=self.world.device,
        )

    def send(self, hidden: Tensor) -> None:
        """Send hidden states to the next stage."""
        dist.send(hidden.contiguous(), self._neighbour(1), group=self.world.groups.pp)

    def receive(self, hidden: Tensor) -> None:
        """Receive hidden states of the stage before into `hidden`."""
        dist.recv(hidden, self._neighbour(-1), group=self.world.groups.pp)

    def _neighbour(self, distance: int) -> int:
        """The rank that is so many stages further."""
        stage = (self.world.pp_rank + distance) % self.world.parallel.pp
        return int(dist.get_global_rank(self.world.groups.pp, stage))
