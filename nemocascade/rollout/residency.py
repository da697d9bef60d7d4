"""Residency of sequences: which ones have a slot and blocks on the device, and which are suspended.

A suspended sequence has its Mamba states, keys and values in host memory, bit for bit. So nothing
that it generates depends on when it was suspended, or on the number of blocks.

**Order.** Sequences are numbered as they start. One that needs blocks may suspend those that wait
for their environment, and then younger ones, the youngest first: it usually has the fewest tokens
to copy. The oldest is never suspended for another, so every run ends. A sequence that finds no
blocks is suspended itself. Suspended ones return before new requests start, the oldest first.

All decisions follow from data that every rank of a replica has.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Sequence

from nemocascade.megatron.generation.model_runner import ModelRunner
from nemocascade.rollout.blocks import BlockPool
from nemocascade.rollout.engine import Counts
from nemocascade.rollout.slots import ActiveSequence, SlotTable


class Residency:
    """The sequences of a run on the device and in host memory.

    suspended: the sequences in host memory, the oldest first. headroom: blocks that stay free when
    sequences start or return, for the next tokens of those that run.
    """

    def __init__(
        self, model: ModelRunner, table: SlotTable, pool: BlockPool, counts: Counts
    ) -> None:
        self.model, self.table, self.pool, self.counts = model, table, pool, counts
        self.suspended: list[ActiveSequence] = []
        self.headroom = 0

    @property
    def returning(self) -> list[ActiveSequence]:
        """Suspended sequences that do not wait for their environment."""
        return [sequence for sequence in self.suspended if not sequence.is_paused]

    @property
    def waiting(self) -> list[ActiveSequence]:
        """Sequences on the device that wait for their environment, the youngest first."""
        return self._resident(
            sequence for sequence in self.table.sequences.values() if sequence.is_paused
        )

    def startable(self, tokens: int, requests: int, *, is_kept: bool) -> int:
        """Number of `requests` with one prompt of `tokens` that can start now.

        is_kept: the prompt's state is stored already. Otherwise it is stored for those that cannot.
        """
        return self._startable(tokens, requests, is_kept=is_kept, without=())

    def _startable(
        self, tokens: int, requests: int, *, is_kept: bool, without: Sequence[ActiveSequence]
    ) -> int:
        """Implements `startable`. without: sequences that would be suspended first."""
        if self.returning:
            return 0
        slots = len(self.table.free) + len(without)
        most = min(requests, slots, len(self.table.free_seats))
        whole, rest = divmod(tokens, self.pool.size)
        left = self._free(without) - self.headroom - (0 if is_kept else whole)
        if not rest:
            return most if left >= 0 else 0
        count = min(most, left)
        if count < requests and not is_kept:
            count = min(count, left - 1)
        return max(0, count)

    def suspend_waiting(self, tokens: int, requests: int, *, is_kept: bool) -> None:
        """Suspend sequences that wait for their environment until a request can start; none if all
        of them are too few."""
        waiting = self.waiting
        if not self._startable(tokens, requests, is_kept=is_kept, without=waiting):
            return
        while waiting and not self.startable(tokens, requests, is_kept=is_kept):
            self.suspend(waiting.pop(0))

    def place(self, sequence: ActiveSequence, blocks: list[int]) -> None:
        """Give a sequence its first blocks."""
        sequence.blocks = blocks
        self.model.table.assign(sequence.slot, 0, blocks)

    def grow(self, sequence: ActiveSequence, tokens: int) -> None:
        """Give a sequence on the device blocks for `tokens`, or suspend it."""
        missing = self.pool.needed(tokens) - len(sequence.blocks)
        if missing <= 0:
            return
        victims = self._victims(sequence)
        for victim in victims if missing <= self._free(victims) else ():
            if missing <= self.pool.free:
                break
            self.counts.preemptions += not victim.is_paused
            self.suspend(victim)
        if missing > self.pool.free:
            self.counts.preemptions += 1
            self.suspend(sequence)
            return
        taken = self.pool.take(missing)
        self.model.table.assign(sequence.slot, len(sequence.blocks), taken)
        sequence.blocks += taken

    def suspend(self, sequence: ActiveSequence) -> None:
        """Move the state of a sequence to host memory, and free its slot and its blocks."""
        self.counts.offloads += 1
        sequence.saved = self.model.save(
            sequence.slot, sequence.blocks[: self.pool.needed(sequence.cached)]
        )
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        self.table.free_slot(sequence)
        insort(self.suspended, sequence, key=lambda t: t.order)

    def resume(self) -> list[ActiveSequence]:
        """Return suspended sequences to the device, as many as fit; the oldest first."""
        found: list[ActiveSequence] = []
        for sequence in self.returning:
            need = self.pool.needed(sequence.length) + self.headroom + len(found)
            waiting = self.waiting
            if need > self._free(waiting) or not (self.table.free or waiting):
                break
            while waiting and (need > self.pool.free or not self.table.free):
                self.suspend(waiting.pop(0))
            self._return(sequence)
            found.append(sequence)
        return found

    def release(self, sequence: ActiveSequence) -> None:
        """Remove a finished sequence, and free what it has."""
        self.pool.release(sequence.blocks)
        if sequence.slot < 0:
            self.suspended.remove(sequence)
        self.table.release(sequence)

    def _return(self, sequence: ActiveSequence) -> None:
        """Write the state of a sequence to a free slot. Its prompt's blocks are shared again with
        another sequence of the same prefill."""
        whole = len(sequence.request.prompt) // self.pool.size
        others = (
            t for t in self.table.sequences.values() if t.origin is sequence.origin and t.slot >= 0
        )
        other = next(others, None)
        shared = [] if other is None else self.pool.share(other.blocks[:whole])
        self.suspended.remove(sequence)
        self.table.assign_slot(sequence)
        self.place(
            sequence, shared + self.pool.take(self.pool.needed(sequence.length) - len(shared))
        )
        assert sequence.saved is not None
        cached = self.pool.needed(sequence.cached)
        self.model.restore(sequence.saved, sequence.slot, sequence.blocks[len(shared) : cached])
        sequence.saved = None

    def _free(self, without: Sequence[ActiveSequence]) -> int:
        """Number of free blocks once the sequences `without` are suspended."""
        return self.pool.free + self.pool.freed_by(sequence.blocks for sequence in without)

    def _victims(self, sequence: ActiveSequence) -> list[ActiveSequence]:
        """Sequences that are suspended for `sequence`, in order."""
        younger = (
            t
            for t in self.table.sequences.values()
            if t.order > sequence.order and not (t.is_paused or t.is_prefilling)
        )
        return [t for t in self.waiting if t is not sequence] + self._resident(younger)

    def _resident(self, sequences: Iterable[ActiveSequence]) -> list[ActiveSequence]:
        """Those of `sequences` on the device, the youngest first."""
        return sorted((t for t in sequences if t.slot >= 0), key=lambda t: -t.order)
