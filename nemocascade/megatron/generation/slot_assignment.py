"""Slots that the documents of a prefill take their initial states from and write their final ones
to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from nemocascade_kernels import PackedSeq
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SlotAssignment:
    """Initial and final states of the documents of a prefill, by slot.

    document: [m] int64, slot: [m] int64: the final state of document[i] is written to slot[i]; a
    document may have many slots or none. On the device.
    initial: documents with an initial state, by number: its slot, which is one of those that they
    write to, and the number of tokens cached there. Other documents start from nothing.
    """

    document: Tensor
    slot: Tensor
    initial: Mapping[int, tuple[int, int]]

    @classmethod
    def from_lists(
        cls, slots: Sequence[Sequence[int]], cached: Sequence[int], device: torch.device
    ) -> SlotAssignment:
        """slots: for each document, the slots that continue it. cached: for each, the tokens that
        the first of its slots holds already; empty means none for all.

        Raises ValueError if a document has cached tokens but no slot.
        """
        pairs = [(d, s) for d, group in enumerate(slots) for s in group]
        table = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
        document, slot = table.to(device).unbind(1)
        initial = {}
        for d, (group, tokens) in enumerate(zip(slots, cached or [0] * len(slots), strict=True)):
            if tokens and not group:
                raise ValueError(f"document {d} continues {tokens} cached tokens: name their slot")
            if tokens:
                initial[d] = (group[0], tokens)
        return cls(document.contiguous(), slot.contiguous(), initial)

    def cached_tokens(self, packed: PackedSeq) -> Tensor:
        """[T] int64 on the host: tokens cached before each row's document."""
        before = torch.zeros(packed.num_documents, dtype=torch.int64)
        for document, (_, tokens) in self.initial.items():
            before[document] = tokens
        return before[packed.document_of()]
