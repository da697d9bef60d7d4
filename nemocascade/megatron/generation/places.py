"""Which slots the documents of a prompt pack go on from, and which they leave their states in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemocascade.megatron.layers.packing import PackedSeq


@dataclass(frozen=True, eq=False)
class Places:
    """Where the documents of a prompt pack come from, and where they leave their states.

    document: [m] int64, slot: [m] int64: document[i]'s state goes to slot[i]; a document may go to
    many slots or to none. On the device.
    past: of documents that go on, by number: the slot whose states they continue, which is one of
    those that they go to, and the tokens that it holds. Other documents begin.
    """

    document: Tensor
    slot: Tensor
    past: Mapping[int, tuple[int, int]]

    @classmethod
    def of(
        cls, slots: Sequence[Sequence[int]], held: Sequence[int], device: torch.device
    ) -> Places:
        """slots: for each document, the slots that continue it. held: the tokens that the first of
        them holds already; empty is none anywhere.

        Raises ValueError if a document goes on from no slot.
        """
        pairs = [(d, s) for d, group in enumerate(slots) for s in group]
        table = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
        document, slot = table.to(device).unbind(1)
        past = {}
        for d, (group, tokens) in enumerate(zip(slots, held or [0] * len(slots), strict=True)):
            if tokens and not group:
                raise ValueError(f"document {d} goes on after {tokens} tokens: name their slot")
            if tokens:
                past[d] = (group[0], tokens)
        return cls(document.contiguous(), slot.contiguous(), past)

    def held(self, packed: PackedSeq) -> Tensor:
        """[T] int64 on the host: tokens that stand before each row's document."""
        before = torch.zeros(packed.num_documents, dtype=torch.int64)
        for document, (_, tokens) in self.past.items():
            before[document] = tokens
        return before[packed.document_of()]
