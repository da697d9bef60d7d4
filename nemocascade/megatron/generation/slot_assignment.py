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

    document: [m] int64, slot: [m] int64, on the device: the final state of document[i] is written
    to slot[i]. A document may have many slots or none.
    initial: for each document with an initial state, by number: its slot, which is one of those
    that it writes to, and the number of cached tokens. Other documents are new.
    """

    document: Tensor
    slot: Tensor
    initial: Mapping[int, tuple[int, int]]

    @classmethod
    def from_lists(
        cls, slots: Sequence[Sequence[int]], cached: Sequence[int], device: torch.device
    ) -> SlotAssignment:
        """Make the tensors. slots: for each document, the slots that continue it. cached: for each,
        the number of cached tokens in the first of its slots; empty means none for all.

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
        """Number of cached tokens before each row's document, [T] int64 on the host."""
        before = torch.zeros(packed.num_documents, dtype=torch.int64)
        for document, (_, tokens) in self.initial.items():
            before[document] = tokens
        return before[packed.document_of()]
