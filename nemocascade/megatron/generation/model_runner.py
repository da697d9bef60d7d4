"""The model as a decoder: packed prefill, then decode steps of one token for each slot.

It runs the training model's own chunks on any parallel layout. All ranks of a model replica make
the same calls. Replicas that share experts make calls of the same kind at the same time, and a rank
without work calls with no rows.

Shape letters: n rows of a step, H hidden size, V vocabulary, tp tensor-parallel ranks, D documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from nemocascade_kernels import SampleSettings, decode_steps
from nemocascade_kernels.common.transfer import to_device
from torch import Tensor

from nemocascade.megatron.generation.decode_graph import DecodeGraphs
from nemocascade.megatron.generation.kv_cache import BlockTable, block_size, blocks_of
from nemocascade.megatron.generation.layers import DecodeStep, SlotLayer
from nemocascade.megatron.generation.pipeline import Pipeline
from nemocascade.megatron.generation.rows import gather_rows
from nemocascade.megatron.generation.slot_assignment import SlotAssignment
from nemocascade.megatron.microbatch import Microbatch
from nemocascade.megatron.model import CascadeModel
from nemocascade.megatron.replay import RouteRecorder
from nemocascade.runtime.world import World
from nemocascade.types import Document, pack_documents

Saved = list[list[Tensor]]
"""The state of a sequence in host memory, by layer."""


class ModelRunner:
    """The live model with Mamba states for `slots` sequences, and a blocked KV cache.

    Slot `slots`, the additional last one, is for padding rows. The KV cache is empty until
    `allocate`; a slot's tokens are in the blocks that `table` names.
    chunks: from `build_model`, not wrapped in DDP. The weights are read in place; call `refresh`
    when they change. Calls run without gradients and put the modules in evaluation mode.
    record_routing: record the experts of each call's tokens in `choices`, [T or n, L, K] as
    `RouteRecorder` has them, on every rank; None without it.
    """

    choices: Tensor | None

    def __init__(
        self,
        world: World,
        chunks: Sequence[CascadeModel],
        slots: int,
        *,
        record_routing: bool = False,
    ) -> None:
        self.world, self.chunks, self.slots = world, list(chunks), slots
        self.config = chunks[0].config
        self.vocabulary: int = self.config.shape.vocab_size
        self.table = BlockTable(slots, block_size(world.device.type), world.device)
        self.most_rows = 0
        """Maximum rows of a decode step in this run; 0: the number of slots."""
        self._pipeline = Pipeline(world, chunks, slots)
        self.record_routing, self.choices = record_routing, None
        self._graphs: DecodeGraphs | None = None
        # Interleaved chunks send within a step, which a graph does not contain.
        if not record_routing and world.device.type == "cuda" and len(chunks) == 1:
            self._graphs = self._new_graphs()

    def _new_graphs(self) -> DecodeGraphs:
        """Graphs of this rank's part of a step."""
        rows = self._padded(self.slots)
        if not self.chunks[0].pre_process:
            self._inbox = self._pipeline.empty_hidden(rows).zero_()
            """Hidden states [n/tp, H] from the stage before, which the graphs read."""
        return DecodeGraphs(
            self._captured_step,
            most_rows=rows,
            spare=self.slots,
            device=self.world.device,
            multiple=self.world.parallel.tp,
        )

    def refresh(self) -> None:
        """Reload the weights, which may have changed since the last call."""
        for chunk in self.chunks:
            chunk.eval()
        self._drop_graphs()
        with torch.no_grad():
            for layer in self._pipeline.layers:
                layer.refresh()
        # At any model precision, draws use float32.
        self._draws = decode_steps(torch.empty(0, device=self.world.device))
        if self.chunks[-1].post_process:
            norm = self.chunks[-1].decoder.final_norm
            self._norm_weight, self._norm_eps = norm.weight, norm.eps
            self._head = self.chunks[-1].lm_head()
            self._steps = decode_steps(self._head)

    @contextmanager
    def graphs(self) -> Iterator[None]:
        """Keep the captured decode steps of a run up to its end, and no longer."""
        try:
            yield
        finally:
            self._drop_graphs()

    def _drop_graphs(self) -> None:
        """Free the memory of the captured decode steps; the next steps capture them again."""
        if self._graphs is not None:
            self._graphs.clear()

    def allocate(self, blocks: int, longest: int) -> None:
        """Have a KV cache of at least `blocks` blocks, for sequences of up to `longest` tokens. One
        that is too small is allocated anew, without values."""
        columns = blocks_of(DecodeGraphs.rounded_length(longest), self.table.size)
        if blocks <= self.table.blocks and columns <= self.table.columns:
            return
        if blocks > self.table.blocks:
            for layer in self._pipeline.layers:
                layer.allocate(blocks, self.table.size)
        blocks, columns = max(blocks, self.table.blocks), max(columns, self.table.columns)
        self.table.allocate(blocks, columns)
        self._drop_graphs()

    @torch.no_grad()
    def prefill(
        self,
        prompts: Sequence[Tensor],
        slots: Sequence[Sequence[int]],
        cached: Sequence[int] = (),
        copies: Sequence[tuple[int, int]] = (),
    ) -> Tensor | None:
        """Prefill prompts or chunks, each once, and write their final states to slots.

        prompts: D tensors [m] of ids on the host, m at least 1. slots: for each, the slots that
        continue it; keys and values are written to the blocks of the first. cached: for each, the
        number of cached tokens in the first of its slots, which it continues; 0 for a new sequence,
        and empty if all are new. copies: pairs of blocks, of which the first is then copied to the
        second. Cached tokens need no activation memory on a CPU, on a GPU that of one layer's keys
        and values.
        Returns logits [D, V] after each prompt's last token on the last stage, None on the others.
        Raises ValueError if a chunk with cached tokens has no slot.
        """
        documents = [
            Document(p, torch.zeros(p.numel(), dtype=torch.bool), f"prompt {i}")
            for i, p in enumerate(prompts)
        ]
        lengths = [p.numel() for p in prompts]
        batch = pack_documents(documents, self._padded(max(1, sum(lengths))))
        recorder = self._recorder(batch.capacity)
        packed, assignment, last = self._on_device(
            Microbatch.from_batch(batch, torch.device("cpu"), recorder=recorder),
            SlotAssignment.from_lists(slots, cached, lengths, copies, self.table, batch.capacity),
        )

        def read(layer: SlotLayer, hidden: Tensor) -> Tensor:
            return layer.prefill(hidden.unsqueeze(1), packed, assignment).squeeze(1)

        assert packed.batch is not None
        hidden = self._pipeline.run(packed.batch.tokens, read)
        self._record_choices(recorder)
        if hidden is None:
            return None
        return self._logits(hidden, last[: len(prompts)])

    def _on_device(
        self, packed: Microbatch, assignment: SlotAssignment
    ) -> tuple[Microbatch, SlotAssignment, Tensor]:
        """A prefill's inputs on the device, and each document's last row [D], in one transfer."""
        batch = packed.batch
        assert batch is not None
        last = packed.starts + packed.lengths - 1
        fields = ("tokens", "targets", "positions", "token_weight", "cu_seqlens")
        tensors = [*(getattr(batch, name) for name in fields), last, *assignment.tensors]
        moved = to_device(tensors, self.world.device)
        on_device: dict[str, Any] = dict(zip(fields, moved, strict=False))
        batch = replace(batch, **on_device)
        packed = replace(packed, batch=batch, cu_seqlens=batch.cu_seqlens)
        last, *rest = moved[len(fields) :]
        return packed, assignment.on_device(rest), last

    @torch.no_grad()
    def decode(
        self, tokens: Tensor, slots: Tensor, positions: Tensor, longest: int, rows: int = 0
    ) -> Tensor | None:
        """Decode one token of each row.

        tokens, slots, positions: [n] int64 on the device: the token, the row's slot, its
        number of cached tokens. longest: at least the largest position + 1. rows: the largest n of
        the ranks that share experts; they pass the same `longest`.
        Returns logits [n, V] on the last stage, None on the others.
        """
        real = tokens.numel()
        self.table.send()
        if self._graphs is not None:
            return self._replayed(tokens, slots, positions, longest, rows)
        spare = self._padded(max(real, rows)) - real
        if spare:
            tokens, positions = (
                torch.nn.functional.pad(t, (0, spare)) for t in (tokens, positions)
            )
            slots = torch.nn.functional.pad(slots, (0, spare), value=self.slots)
        recorder = self._recorder(tokens.numel())
        step = DecodeStep(
            self.table.on_device, slots, positions, longest, real, self.slots, recorder
        )
        hidden = self._pipeline.run(tokens, lambda layer, hidden: layer.step(hidden, step))
        self._record_choices(recorder)
        return None if hidden is None else self._logits(hidden, None)[:real]

    def _replayed(
        self, tokens: Tensor, slots: Tensor, positions: Tensor, longest: int, rows: int
    ) -> Tensor | None:
        """Implements `decode` by a graph; stages exchange hidden states outside of it."""
        assert self._graphs is not None
        real, [chunk] = tokens.numel(), self.chunks
        if not chunk.pre_process:
            count = self._graphs.rounded_rows(max(real, rows)) // self.world.parallel.tp
            self._pipeline.receive(self._inbox[:count])
        out = self._graphs.step(tokens, slots, positions, longest, self.most_rows, rows)
        if chunk.post_process:
            return out[:real]
        self._pipeline.send(out)
        return None

    def _captured_step(
        self, tokens: Tensor, slots: Tensor, positions: Tensor, longest: int
    ) -> Tensor:
        """This rank's part of a step for a graph, in which the host does not know the number of
        real rows."""
        table, [chunk] = self.table.on_device, self.chunks
        step = DecodeStep(table, slots, positions, longest, None, self.slots)
        if chunk.pre_process:
            hidden = self._pipeline.embed(tokens)
        else:
            # Layers may overwrite their input, and warm-up steps must not change the inbox.
            hidden = self._inbox[: tokens.numel() // self.world.parallel.tp].clone()
        for layer in self._pipeline.layers:
            hidden = layer.step(hidden, step)
        return self._logits(hidden, None) if chunk.post_process else hidden

    @torch.no_grad()
    def copy(
        self, source: int, targets: Sequence[int], copies: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Copy the Mamba states of `source` to the slots `targets`, and the first block of each
        pair to the second."""
        columns = [list(targets), *([pair[i] for pair in copies] for i in (0, 1))]
        slots, first, second = to_device(
            [torch.tensor(c, dtype=torch.int64) for c in columns], self.world.device
        )
        for layer in self._pipeline.layers:
            layer.copy(source, slots)
            if copies:
                layer.copy_blocks(first, second)

    @torch.no_grad()
    def save(self, slot: int, blocks: Sequence[int]) -> Saved:
        """Copy the state of a slot and its blocks to host memory. The host does not wait: only
        `restore` may read it."""
        [index] = to_device([torch.tensor(blocks, dtype=torch.int64)], self.world.device)
        return [[_on_host(t) for t in layer.state(slot, index)] for layer in self._pipeline.layers]

    @torch.no_grad()
    def restore(self, saved: Saved, slot: int, blocks: Sequence[int]) -> None:
        """Write a state back to a slot, and the last of its blocks to `blocks`."""
        device = self.world.device
        [index] = to_device([torch.tensor(blocks, dtype=torch.int64)], device)
        for layer, state in zip(self._pipeline.layers, saved, strict=True):
            layer.restore(slot, index, [t.to(device, non_blocking=True) for t in state])

    @torch.no_grad()
    def draw(
        self, logits: Tensor, keys: Tensor, positions: Tensor, settings: SampleSettings
    ) -> tuple[Tensor, Tensor]:
        """Sample the tokens [n] at `positions` [n], and their log-probabilities [n].

        logits: [n, V]. keys: [n] int64, of the rows' random numbers.
        """
        return self._draws.sample(logits, keys, positions, settings)

    def _padded(self, rows: int) -> int:
        """`rows` rounded up, so that tensor-parallel ranks share them equally."""
        tp = self.world.parallel.tp
        return max(tp, -(-rows // tp) * tp)

    def _recorder(self, rows: int) -> RouteRecorder | None:
        if not self.record_routing:
            return None
        return RouteRecorder(self.config.shape, rows, self.world.device)

    def _record_choices(self, recorder: RouteRecorder | None) -> None:
        self.choices = None if recorder is None else recorder.gathered(self.world.groups)

    def _logits(self, hidden: Tensor, rows: Tensor | None) -> Tensor:
        """Logits [n, V] of the chosen rows, bit-identical on all tensor-parallel ranks."""
        tp = self.world.groups.tp
        hidden = gather_rows(hidden, tp)
        if rows is not None:
            hidden = hidden[rows]
        normed = self._steps.norm(hidden, self._norm_weight, self._norm_eps)
        mine = self._steps.linear(normed, self._head, None)
        if tp.size() == 1:
            return mine
        shards = gather_rows(mine, tp).view(tp.size(), *mine.shape)
        return shards.transpose(0, 1).flatten(1)


def _on_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, in pinned memory if it comes from a GPU."""
    if not tensor.is_cuda:
        return tensor
    kept = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return kept.copy_(tensor, non_blocking=True)
