"""The prefill queue: prompts and environment turns, prefilled in chunks.

A pass prefills one chunk of each of several sequences, from the states of their slots. A prompt
shared by several requests is prefilled in one slot. The others share its full blocks of the KV
cache; the last block and the Mamba states are copied.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from nemocascade.rollout.engine import Request, Sampling
from nemocascade.rollout.residency import Residency
from nemocascade.rollout.slots import ActiveSequence, BatchLimits


@dataclass
class PrefillGroup:
    """Requests with the same prompt that have no slot yet. origin: see `ActiveSequence`.

    is_started: the prompt is being prefilled for other requests of the group. is_kept: that prefill
    has finished, and the spare slot and `blocks` store its state. logits: [1, V] after the prompt,
    on the last stage. choices: [m, L, K], the prompt's experts, if they are recorded.
    """

    prompt: tuple[int, ...]
    requests: deque[Request]
    origin: object = field(default_factory=object)
    is_started: bool = False
    is_kept: bool = False
    blocks: list[int] = field(default_factory=list)
    logits: Tensor | None = None
    choices: Tensor | None = None


@dataclass(eq=False)
class Prefill:
    """The prefill of a sequence up to its last token. sequences: the sequences that continue it; it
    runs in the slot of the first. keep: the group whose other requests need the state later."""

    sequences: list[ActiveSequence]
    keep: PrefillGroup | None = None

    @property
    def sequence(self) -> ActiveSequence:
        """The sequence in whose slot the prefill runs."""
        return self.sequences[0]

    @property
    def is_turn(self) -> bool:
        """True for an environment turn, False for a prompt."""
        return bool(self.sequence.given)


@dataclass(frozen=True, eq=False)
class Chunk:
    """The tokens of a sequence between the cached ones and `end`."""

    prefill: Prefill
    end: int

    @property
    def sequence(self) -> ActiveSequence:
        """The sequence in whose slot the chunk runs."""
        return self.prefill.sequence

    @property
    def is_last(self) -> bool:
        """True if this chunk completes the prefill."""
        return self.end == self.sequence.length


Prefilled = tuple[list[tuple[list[ActiveSequence], int]], Tensor | None]
"""Sequences whose prefill is complete, with their row of logits; and the logits [n, V], on the last
stage."""


class PrefillQueue:
    """Waiting and running prefills.

    The slot after the last one of `limits` stores the state of a shared prompt. together: prompts
    may be prefilled together. The other arguments are those of the run.
    """

    def __init__(
        self,
        residency: Residency,
        sampling: Sampling,
        limits: BatchLimits,
        *,
        together: bool,
    ) -> None:
        self.residency, self.model, self.table = residency, residency.model, residency.table
        self.counts, self.sampling = residency.counts, sampling
        self.limits, self.spare = limits, limits.slots
        self._most = limits.prefill_tokens if together else 0
        self._queue: list[Prefill] = []
        self._groups: deque[PrefillGroup] = deque()

    def append(self, requests: Sequence[Request]) -> None:
        """Queue requests that wait for a slot."""
        for request in requests:
            if not self._groups or self._groups[-1].prompt != request.prompt:
                self._groups.append(PrefillGroup(request.prompt, deque()))
            self._groups[-1].requests.append(request)

    @property
    def waiting(self) -> int:
        """Number of requests without a slot."""
        return sum(len(group.requests) for group in self._groups)

    def cancel(self, ids: Collection[int]) -> None:
        """Drop waiting requests and queued environment turns of these ids.

        The prefill of a prompt is not interrupted, since other sequences may share it.
        """
        for group in list(self._groups):
            group.requests = deque(r for r in group.requests if r.id not in ids)
            if not group.requests:
                self._forget(group)
        dropped = [p for p in self._queue if p.is_turn and p.sequence.request.id in ids]
        for prefill in dropped:
            prefill.sequence.is_prefilling = False
            self._queue.remove(prefill)

    @property
    def ready(self) -> bool:
        """True if a prefill can run, or a request can start."""
        return bool(self._queue or self._can_start)

    def suspend_waiting(self) -> None:
        """Suspend sequences that wait for their environment if requests wait for their slots."""
        if self._groups and not self._queue:
            group = self._groups[0]
            count = len(group.requests)
            self.residency.suspend_waiting(len(group.prompt), count, is_kept=group.is_kept)

    def add(self, sequence: ActiveSequence) -> None:
        """Queue the prefill of an environment turn that was appended to `sequence`."""
        sequence.is_prefilling = True
        self._queue.append(Prefill([sequence]))

    def start_from_kept(self) -> Prefilled | None:
        """Assign free slots to requests whose prompt state is stored in the spare slot."""
        if not self._can_start or not self._groups[0].is_kept:
            return None
        group = self._groups[0]
        sequences = self._admit(group)
        for sequence in sequences:
            self._fork(sequence, group.blocks)
        pairs = self._pairs(group.prompt, group.blocks, [t.blocks for t in sequences])
        self.model.copy(self.spare, [t.slot for t in sequences], pairs)
        if group.choices is not None:
            for sequence in sequences:
                self.table.record_routing(sequence, 0, group.choices)
        if not group.requests:
            self._forget(group)
        return [(sequences, 0)], group.logits

    def run(self, *, always: bool) -> Prefilled:
        """Run one pass. always: run even with no chunk, because other ranks take part."""
        chunks = self._chunks()
        if not chunks and not always:
            return [], None
        logits = self.model.prefill(
            [self.table.history[p.sequence.seat, p.sequence.cached : p.end] for p in chunks],
            [self._slots(p) for p in chunks],
            [p.sequence.cached for p in chunks],
            [pair for p in chunks for pair in self._copies(p)],
        )
        self._record_routing(chunks)
        prefilled = []
        for row, chunk in enumerate(chunks):
            self.counts.prefill_chunks += 1
            self.counts.prefill_tokens += chunk.end - chunk.sequence.cached
            chunk.sequence.cached = chunk.end
            if chunk.is_last:
                self.counts.prefills += 1
                self._queue.remove(chunk.prefill)
                for sequence in chunk.prefill.sequences:
                    sequence.is_prefilling = False
                self._keep(chunk.prefill, None if logits is None else logits[row : row + 1])
                prefilled.append((chunk.prefill.sequences, row))
        return prefilled, logits

    def _chunks(self) -> list[Chunk]:
        """The chunks of the next pass, from running prefills and from prompts that start now."""
        chunks: list[Chunk] = []
        used = 0

        def fits(left: int) -> bool:
            nonlocal used
            size = min(left, self.limits.prefill_chunk or left)
            if used and used + size > self._most:
                return False
            used += size
            return True

        for prefill in self._queue:
            sequence = prefill.sequence
            if not fits(sequence.length - sequence.cached):
                return chunks
            chunks.append(self._next(prefill))
        while self._can_start and not self._groups[0].is_started:
            group = self._groups[0]
            if not fits(len(group.prompt)):
                break
            prefill = self._start(group)
            self._queue.append(prefill)
            chunks.append(self._next(prefill))
        return chunks

    @property
    def _can_start(self) -> bool:
        """True if a request of the first group can start."""
        if not self._groups:
            return False
        group = self._groups[0]
        return (group.is_kept or not group.is_started) and self._startable(group) > 0

    def _startable(self, group: PrefillGroup) -> int:
        count = len(group.requests)
        return self.residency.startable(len(group.prompt), count, is_kept=group.is_kept)

    def _start(self, group: PrefillGroup) -> Prefill:
        """The prefill of a prompt for requests that start now."""
        sequences, pool = self._admit(group), self.residency.pool
        blocks = pool.take(pool.needed(len(group.prompt)))
        self.residency.place(sequences[0], blocks)
        for sequence in sequences:
            sequence.is_prefilling = True
            if sequence is not sequences[0]:
                self._fork(sequence, blocks)
        if not group.requests:
            self._groups.popleft()
            return Prefill(sequences)
        group.is_started = True
        group.blocks = pool.fork(blocks, len(group.prompt))
        return Prefill(sequences, group)

    def _fork(self, sequence: ActiveSequence, blocks: list[int]) -> None:
        """Let a sequence start with the prompt that is in `blocks`."""
        mine = self.residency.pool.fork(blocks, len(sequence.request.prompt))
        self.residency.place(sequence, mine)

    def _forget(self, group: PrefillGroup) -> None:
        """Drop a group that has no requests left, and its stored prompt."""
        self._groups.remove(group)
        self.residency.pool.release(group.blocks)
        for prefill in self._queue:
            if prefill.keep is group:
                prefill.keep = None

    def _copies(self, chunk: Chunk) -> list[tuple[int, int]]:
        """Blocks that are copied after a chunk, from and to."""
        first, *others = chunk.prefill.sequences
        if not chunk.is_last or chunk.prefill.is_turn:
            return []
        keep = chunk.prefill.keep
        targets = [t.blocks for t in others] + ([] if keep is None else [keep.blocks])
        return self._pairs(first.request.prompt, first.blocks, targets)

    def _pairs(
        self, prompt: Sequence[int], blocks: list[int], targets: Sequence[list[int]]
    ) -> list[tuple[int, int]]:
        """The last block of a prompt and its copy in each of `targets`, unless it is full."""
        whole, rest = divmod(len(prompt), self.residency.pool.size)
        return [(blocks[whole], target[whole]) for target in targets] if rest else []

    def _next(self, prefill: Prefill) -> Chunk:
        left = prefill.sequence.length - prefill.sequence.cached
        return Chunk(
            prefill, prefill.sequence.cached + min(left, self.limits.prefill_chunk or left)
        )

    def _slots(self, chunk: Chunk) -> list[int]:
        """Slots that receive a chunk's final state; the first one has its initial state."""
        if not chunk.is_last:
            return [chunk.sequence.slot]
        slots = [sequence.slot for sequence in chunk.prefill.sequences]
        return slots if chunk.prefill.keep is None else [*slots, self.spare]

    def _record_routing(self, chunks: Sequence[Chunk]) -> None:
        """Record the experts of the tokens of a pass."""
        if self.model.choices is None or not chunks:
            return
        found = self.model.choices.cpu()
        sizes = [p.end - p.sequence.cached for p in chunks]
        recorded = found.split([*sizes, found.shape[0] - sum(sizes)])[:-1]
        for chunk, choices in zip(chunks, recorded, strict=True):
            self.table.record_routing(chunk.sequence, chunk.sequence.cached, choices)
            if chunk.is_last:
                found = self.table.routing_of(chunk.sequence, chunk.end)
                for sequence in chunk.prefill.sequences[1:]:
                    self.table.record_routing(sequence, 0, found)

    def _keep(self, prefill: Prefill, logits: Tensor | None) -> None:
        """Mark a prompt's state as stored in the spare slot, for the group's other requests."""
        group = prefill.keep
        if group is None:
            return
        group.is_kept, group.logits = True, logits
        if self.model.choices is not None:
            group.choices = self.table.routing_of(prefill.sequence, len(group.prompt)).clone()

    def _admit(self, group: PrefillGroup) -> list[ActiveSequence]:
        """Assign free slots to as many requests of a group as fit."""
        requests = [group.requests.popleft() for _ in range(self._startable(group))]
        return self.table.admit(requests, self.sampling, group.origin)
