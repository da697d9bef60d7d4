"""Assignment of slots to the documents of a prefill, for their initial and final states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from nemocascade_kernels import PackedSeq
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SlotAssignment:
    """Initial and final states of the documents of a prefill, by slot.

    pairs: the final state of a document is written to a slot, for each pair of their numbers. A
    document may have many slots or none.
    initial: for each document with an initial state, by number: its slot, which is one of those
    that it writes to, and the number of cached tokens. Other documents are new.
    document, slot: [m] int64, the pairs on the device.
    initial_document, initial_slot: [i] int64, those of `initial` on the device.
    """

    pairs: Sequence[tuple[int, int]]
    initial: Mapping[int, tuple[int, int]]
    document: Tensor
    slot: Tensor
    initial_document: Tensor
    initial_slot: Tensor

    @classmethod
    def from_lists(cls, slots: Sequence[Sequence[int]], cached: Sequence[int]) -> SlotAssignment:
        """Make the assignment, with its tensors on the host.

        slots: for each document, the slots that continue it. cached: for each, the number of cached
        tokens in the first of its slots; empty means none for all.

        Raises ValueError if a document has cached tokens but no slot.
        """
        pairs = [(d, s) for d, group in enumerate(slots) for s in group]
        initial = {}
        for d, (group, tokens) in enumerate(zip(slots, cached or [0] * len(slots), strict=True)):
            if tokens and not group:
                raise ValueError(f"document {d} continues {tokens} cached tokens: name their slot")
            if tokens:
                initial[d] = (group[0], tokens)
        columns = (
            torch.tensor(column, dtype=torch.int64)
            for column in (
                [d for d, _ in pairs],
                [s for _, s in pairs],
                list(initial),
                [s for s, _ in initial.values()],
            )
        )
        return cls(pairs, initial, *columns)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, which `on_device` replaces."""
        return self.document, self.slot, self.initial_document, self.initial_slot

    def on_device(self, tensors: Sequence[Tensor]) -> SlotAssignment:
        """The same assignment with copies of `tensors`."""
        return SlotAssignment(self.pairs, self.initial, *tensors)

    def cached_tokens(self, packed: PackedSeq) -> Tensor:
        """Number of cached tokens before each row's document, [T] int64 on the host."""
        before = torch.zeros(packed.num_documents, dtype=torch.int64)
        for document, (_, tokens) in self.initial.items():
            before[document] = tokens
        return before[packed.document_of()]
