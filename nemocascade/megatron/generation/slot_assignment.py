"""Assignment of slots to the documents of a prefill, for their initial and final states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from nemocascade_kernels import PackedSeq
from torch import Tensor

from nemocascade.megatron.generation.kv_cache import BlockTable


@dataclass(frozen=True, eq=False)
class SlotAssignment:
    """Initial and final states of the documents of a prefill, by slot.

    initial: for each document with an initial state, by number: its slot, which is the first of
    those that it writes to, and the number of cached tokens. Other documents are new.
    document, slot: [m] int64: the final state of a document is written to a slot, for each pair.
    initial_document, initial_slot: [i] int64, those of `initial`.
    cache_indices: [2, T] int64, block and row where each token is written in the KV cache, see
    `BlockTable.cache_indices`; padding is written to the spare block.
    source, target: [c] int64, blocks that are copied after that.
    attended: for each document of `initial`, the blocks of its tokens up to its end, int64.
    """

    initial: Mapping[int, tuple[int, int]]
    document: Tensor
    slot: Tensor
    initial_document: Tensor
    initial_slot: Tensor
    cache_indices: Tensor
    source: Tensor
    target: Tensor
    attended: Sequence[Tensor]

    @classmethod
    def from_lists(
        cls,
        slots: Sequence[Sequence[int]],
        cached: Sequence[int],
        lengths: Sequence[int],
        copies: Sequence[tuple[int, int]],
        table: BlockTable,
        capacity: int,
    ) -> SlotAssignment:
        """Make the assignment, with its tensors on the host.

        slots: for each document, the slots that continue it; keys and values are written to the
        blocks of the first. cached: for each, the number of cached tokens there; empty means none
        for all. lengths: for each, the number of its new tokens. copies: pairs of blocks, from and
        to. capacity: T.

        Raises ValueError if a document has cached tokens but no slot.
        """
        pairs = [(d, s) for d, group in enumerate(slots) for s in group]
        initial: dict[int, tuple[int, int]] = {}
        cache_indices = torch.zeros(2, capacity, dtype=torch.int64)
        cache_indices[0] = table.blocks
        attended, start = [], 0
        starts = cached or [0] * len(slots)
        for d, (group, tokens, length) in enumerate(zip(slots, starts, lengths, strict=True)):
            if tokens and not group:
                raise ValueError(f"document {d} continues {tokens} cached tokens: name their slot")
            if group:
                end = tokens + length
                indices = table.cache_indices(group[0], tokens, end)
                cache_indices[:, start : start + length] = indices
                if tokens:
                    initial[d] = (group[0], tokens)
                    attended.append(table.named(group[0], end))
            start += length
        document, slot, initial_document, initial_slot, source, target = (
            torch.tensor(column, dtype=torch.int64)
            for column in (
                [d for d, _ in pairs],
                [s for _, s in pairs],
                list(initial),
                [s for s, _ in initial.values()],
                [first for first, _ in copies],
                [second for _, second in copies],
            )
        )
        return cls(
            initial,
            document,
            slot,
            initial_document,
            initial_slot,
            cache_indices,
            source,
            target,
            attended,
        )

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, which `on_device` replaces."""
        return [
            *(self.document, self.slot, self.initial_document, self.initial_slot),
            *(self.cache_indices, self.source, self.target),
            *self.attended,
        ]

    def on_device(self, tensors: Sequence[Tensor]) -> SlotAssignment:
        """The same assignment with copies of `tensors`."""
        document, slot, initial_document, initial_slot, *others = tensors
        cache_indices, source, target, *attended = others
        return SlotAssignment(
            self.initial,
            document,
            slot,
            initial_document,
            initial_slot,
            cache_indices,
            source,
            target,
            attended,
        )

    def cached_tokens(self, packed: PackedSeq) -> Tensor:
        """Number of cached tokens before each row's document, [T] int64 on the host."""
        before = torch.zeros(packed.num_documents, dtype=torch.int64)
        for document, (_, tokens) in self.initial.items():
            before[document] = tokens
        return before[packed.document_of()]
