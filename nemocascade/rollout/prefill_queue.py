"""The prefill queue: prompts and environment turns, prefilled in chunks.

A pass prefills one chunk of each of several sequences, from the states of their slots. A prompt
shared by several requests is prefilled in one slot, and its state is copied to the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from nemocascade.megatron.generation.model_runner import ModelRunner
from nemocascade.rollout.engine import Counts, Request, Sampling
from nemocascade.rollout.slots import BatchLimits, SlotTable, Text


@dataclass
class Group:
    """Requests with the same prompt that have no slot yet.

    is_started: the prompt is being prefilled for other requests of the group. is_kept: that prefill
    has finished, and the spare slot stores its state. logits: [1, V] after the prompt, on the last
    stage. choices: [m, L, K], the prompt's experts, if they are recorded.
    """

    prompt: tuple[int, ...]
    requests: deque[Request]
    is_started: bool = False
    is_kept: bool = False
    logits: Tensor | None = None
    choices: Tensor | None = None


@dataclass(eq=False)
class Prefill:
    """The prefill of a sequence up to its last token. texts: the sequences that continue it; it
    runs in the slot of the first. keep: the group whose other requests need the state later."""

    texts: list[Text]
    keep: Group | None = None

    @property
    def text(self) -> Text:
        """The sequence in whose slot the prefill runs."""
        return self.texts[0]

    @property
    def is_turn(self) -> bool:
        """True for an environment turn, False for a prompt."""
        return bool(self.text.given)


@dataclass(frozen=True, eq=False)
class Chunk:
    """The tokens of a sequence between the cached ones and `end`."""

    prefill: Prefill
    end: int

    @property
    def text(self) -> Text:
        """The sequence in whose slot the chunk runs."""
        return self.prefill.text

    @property
    def is_last(self) -> bool:
        """True if this chunk completes the prefill."""
        return self.end == self.text.length


Prefilled = tuple[list[tuple[list[Text], int]], Tensor | None]
"""Sequences whose prefill is complete, with their row of logits; and the logits [n, V], on the last
stage."""


class PrefillQueue:
    """Waiting and running prefills.

    The slot after the last one of `limits` stores the state of a shared prompt. together: prompts
    may be prefilled together. The other arguments are those of the run.
    """

    def __init__(
        self,
        model: ModelRunner,
        table: SlotTable,
        sampling: Sampling,
        counts: Counts,
        limits: BatchLimits,
        *,
        together: bool,
    ) -> None:
        self.model, self.table, self.sampling, self.counts = model, table, sampling, counts
        self.limits, self.spare = limits, limits.slots
        self._most = limits.prefill_tokens if together else 0
        self._queue: list[Prefill] = []
        self._groups: deque[Group] = deque()

    def append(self, requests: Sequence[Request]) -> None:
        """Queue requests that wait for a slot."""
        for request in requests:
            if not self._groups or self._groups[-1].prompt != request.prompt:
                self._groups.append(Group(request.prompt, deque()))
            self._groups[-1].requests.append(request)

    @property
    def waiting(self) -> int:
        """Number of requests without a slot."""
        return sum(len(group.requests) for group in self._groups)

    def cancel(self, ids: Collection[int]) -> None:
        """Drop waiting requests and queued environment turns of these ids.

        The prefill of a prompt is not interrupted, since other sequences may share it. It ends
        before that of the next prompt begins, so the spare slot is free again for that.
        """
        for group in list(self._groups):
            group.requests = deque(r for r in group.requests if r.id not in ids)
            if not group.requests:
                self._groups.remove(group)
        self._queue = [p for p in self._queue if not (p.is_turn and p.text.request.id in ids)]

    def is_filling(self, text: Text) -> bool:
        """True while a prefill of the sequence is queued or running."""
        return any(text is t for prefill in self._queue for t in prefill.texts)

    @property
    def ready(self) -> bool:
        """True if a prefill can run, or a request can start."""
        return bool(self._queue or (self._groups and self.table.free))

    def add(self, text: Text) -> None:
        """Queue the prefill of an environment turn that was appended to `text`."""
        self._queue.append(Prefill([text]))

    def start_from_kept(self) -> Prefilled | None:
        """Assign free slots to requests whose prompt state is stored in the spare slot."""
        if not self._groups or not self._groups[0].is_kept or not self.table.free:
            return None
        group = self._groups[0]
        texts = self._admit(group)
        self.model.copy(self.spare, [t.slot for t in texts], len(group.prompt))
        if group.choices is not None:
            for text in texts:
                self.table.record_routing(text.slot, 0, group.choices)
        if not group.requests:
            self._groups.popleft()
        return [(texts, 0)], group.logits

    def run(self, *, always: bool) -> Prefilled:
        """Run one pass. always: run even with no chunk, because other ranks take part."""
        chunks = self._chunks()
        if not chunks and not always:
            return [], None
        logits = self.model.prefill(
            [self.table.history[p.text.slot, p.text.cached : p.end] for p in chunks],
            [self._slots(p) for p in chunks],
            [p.text.cached for p in chunks],
        )
        self._record_routing(chunks)
        prefilled = []
        for row, chunk in enumerate(chunks):
            self.counts.prefill_chunks += 1
            self.counts.prefill_tokens += chunk.end - chunk.text.cached
            chunk.text.cached = chunk.end
            if chunk.is_last:
                self.counts.prefills += 1
                self._queue.remove(chunk.prefill)
                self._keep(chunk.prefill, None if logits is None else logits[row : row + 1])
                prefilled.append((chunk.prefill.texts, row))
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
            text = prefill.text
            if not fits(text.length - text.cached):
                return chunks
            chunks.append(self._next(prefill))
        while self._groups and self.table.free and not self._groups[0].is_started:
            group = self._groups[0]
            if not fits(len(group.prompt)):
                break
            prefill = Prefill(self._admit(group), group if group.requests else None)
            # Reserve the whole prompt: a KV cache that grows by chunks would be copied each time.
            self.model.reserve(len(group.prompt))
            self._queue.append(prefill)
            chunks.append(self._next(prefill))
            if group.requests:
                group.is_started = True
            else:
                self._groups.popleft()
        return chunks

    def _next(self, prefill: Prefill) -> Chunk:
        left = prefill.text.length - prefill.text.cached
        return Chunk(prefill, prefill.text.cached + min(left, self.limits.prefill_chunk or left))

    def _slots(self, chunk: Chunk) -> list[int]:
        """Slots that receive a chunk's final state; the first one has its initial state."""
        if not chunk.is_last:
            return [chunk.text.slot]
        slots = [text.slot for text in chunk.prefill.texts]
        return slots if chunk.prefill.keep is None else [*slots, self.spare]

    def _record_routing(self, chunks: Sequence[Chunk]) -> None:
        """Record the experts of the tokens of a pass."""
        if self.model.choices is None or not chunks:
            return
        found = self.model.choices.cpu()
        sizes = [p.end - p.text.cached for p in chunks]
        recorded = found.split([*sizes, found.shape[0] - sum(sizes)])[:-1]
        for chunk, choices in zip(chunks, recorded, strict=True):
            self.table.record_routing(chunk.text.slot, chunk.text.cached, choices)
            if chunk.is_last:
                found = self.table.routing_of(chunk.text, chunk.end)
                for text in chunk.prefill.texts[1:]:
                    self.table.record_routing(text.slot, 0, found)

    def _keep(self, prefill: Prefill, logits: Tensor | None) -> None:
        """Mark a prompt's state as stored in the spare slot, for the group's other requests."""
        group = prefill.keep
        if group is None:
            return
        group.is_kept, group.logits = True, logits
        if self.model.choices is not None:
            group.choices = self.table.routing_of(prefill.text, len(group.prompt)).clone()

    def _admit(self, group: Group) -> list[Text]:
        count = min(len(group.requests), len(self.table.free))
        return self.table.admit([group.requests.popleft() for _ in range(count)], self.sampling)
