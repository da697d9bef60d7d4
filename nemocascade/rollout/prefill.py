"""Chunked prefill of prompts and of what environments added.

A pass reads a chunk of each of some texts onto the states of their slots. A prompt that several
requests continue is read in one slot and its state copied to the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nemocascade.megatron.generation.slot_model import SlotModel
from nemocascade.rollout.engine import Counts, Request, Sampling
from nemocascade.rollout.slots import SlotTable, Text


@dataclass
class SharedPrompt:
    """Requests that continue one prompt and have not begun.

    begun: the prompt is being read, for others of them. kept: it was read, and its state stands in
    the slot beyond the others. logits: [1, V] after it, on the last stage. choices: [m, L, K], its
    experts, where they are recorded.
    """

    prompt: tuple[int, ...]
    requests: deque[Request]
    begun: bool = False
    kept: bool = False
    logits: Tensor | None = None
    choices: Tensor | None = None


@dataclass(eq=False)
class Prefill:
    """A text that is read up to its last known token. texts: those that go on from there; it is
    read in the slot of the first. keep: the group whose other requests need the state later."""

    texts: list[Text]
    keep: SharedPrompt | None = None

    @property
    def text(self) -> Text:
        """The one whose slot reads."""
        return self.texts[0]


@dataclass(frozen=True, eq=False)
class PrefillChunk:
    """The tokens of a text from those that it holds up to `end`."""

    reading: Prefill
    end: int

    @property
    def text(self) -> Text:
        """The one whose slot reads."""
        return self.reading.text

    @property
    def whole(self) -> bool:
        """Nothing is left to read after it."""
        return self.end == self.text.known


Begun = tuple[list[tuple[list[Text], int]], Tensor | None]
"""Texts that were read to their end, by their row of logits; and the logits [n, V], on the last
stage."""


class PrefillQueue:
    """The queue of what is to be read.

    spare: the slot of a kept prompt. room: tokens of a pass that reads several texts. piece: tokens
    of one text in a pass; 0 is all of them. The other arguments are those of the run.
    """

    def __init__(
        self,
        model: SlotModel,
        table: SlotTable,
        requests: Sequence[Request],
        sampling: Sampling,
        counts: Counts,
        *,
        spare: int,
        room: int,
        piece: int,
    ) -> None:
        self.model, self.table, self.sampling, self.counts = model, table, sampling, counts
        self.spare, self.room, self.piece = spare, room, piece
        self._queue: list[Prefill] = []
        self._groups: deque[SharedPrompt] = deque()
        for request in requests:
            if not self._groups or self._groups[-1].prompt != request.prompt:
                self._groups.append(SharedPrompt(request.prompt, deque()))
            self._groups[-1].requests.append(request)

    @property
    def ready(self) -> bool:
        """Something can be read, or begin, now."""
        return bool(self._queue or (self._groups and self.table.free))

    def add(self, text: Text) -> None:
        """An environment continued `text`."""
        self._queue.append(Prefill([text]))

    def begin_from_kept(self) -> Begun | None:
        """Give free slots to the requests of a prompt that was read for others before."""
        if not self._groups or not self._groups[0].kept or not self.table.free:
            return None
        group = self._groups[0]
        texts = self._admit(group)
        self.model.copy(self.spare, [t.slot for t in texts], len(group.prompt))
        if group.choices is not None:
            for text in texts:
                self.table.keep_routing(text.slot, 0, group.choices)
        if not group.requests:
            self._groups.popleft()
        return [(texts, 0)], group.logits

    def read(self, *, always: bool) -> Begun:
        """Read a pass. always: also where there is nothing to read, along with other ranks."""
        pieces = self._pieces()
        if not pieces and not always:
            return [], None
        logits = self.model.prefill(
            [self.table.history[p.text.slot, p.text.held : p.end] for p in pieces],
            [self._places(p) for p in pieces],
            [p.text.held for p in pieces],
        )
        self._keep_routing(pieces)
        begun = []
        for row, piece in enumerate(pieces):
            self.counts.pieces += 1
            self.counts.prefill_tokens += piece.end - piece.text.held
            piece.text.held = piece.end
            if piece.whole:
                self.counts.prefills += 1
                self._queue.remove(piece.reading)
                self._keep(piece.reading, None if logits is None else logits[row : row + 1])
                begun.append((piece.reading.texts, row))
        return begun, logits

    def _pieces(self) -> list[PrefillChunk]:
        """What the next pass reads: of texts that are being read, and of prompts that now begin."""
        pieces: list[PrefillChunk] = []
        used = 0

        def fits(left: int) -> bool:
            nonlocal used
            size = min(left, self.piece or left)
            if used and used + size > self.room:
                return False
            used += size
            return True

        for reading in self._queue:
            text = reading.text
            if not fits(text.known - text.held):
                return pieces
            pieces.append(self._next(reading))
        while self._groups and self.table.free and not self._groups[0].begun:
            group = self._groups[0]
            if not fits(len(group.prompt)):
                break
            reading = Prefill(self._admit(group), group if group.requests else None)
            # At once for the whole prompt: room that grows piece by piece is copied each time.
            self.model.reserve(len(group.prompt))
            self._queue.append(reading)
            pieces.append(self._next(reading))
            if group.requests:
                group.begun = True
            else:
                self._groups.popleft()
        return pieces

    def _next(self, reading: Prefill) -> PrefillChunk:
        left = reading.text.known - reading.text.held
        return PrefillChunk(reading, reading.text.held + min(left, self.piece or left))

    def _places(self, piece: PrefillChunk) -> list[int]:
        """Where a piece leaves its state; the slot that it goes on from is the first."""
        if not piece.whole:
            return [piece.text.slot]
        slots = [text.slot for text in piece.reading.texts]
        return slots if piece.reading.keep is None else [*slots, self.spare]

    def _keep_routing(self, pieces: Sequence[PrefillChunk]) -> None:
        """Note the experts of the tokens that a pass read."""
        if self.model.choices is None or not pieces:
            return
        sizes = [p.end - p.text.held for p in pieces]
        padding = self.model.choices.shape[0] - sum(sizes)
        recorded = self.model.choices.split([*sizes, padding])[:-1]
        for piece, choices in zip(pieces, recorded, strict=True):
            self.table.keep_routing(piece.text.slot, piece.text.held, choices)
            if piece.whole:
                found = self.table.routing_of(piece.text, piece.end)
                for text in piece.reading.texts[1:]:
                    self.table.keep_routing(text.slot, 0, found)

    def _keep(self, reading: Prefill, logits: Tensor | None) -> None:
        """The state of a whole prompt stands in the spare slot for the group's other requests."""
        group = reading.keep
        if group is None:
            return
        group.kept, group.logits = True, logits
        if self.model.choices is not None:
            group.choices = self.table.routing_of(reading.text, len(group.prompt)).clone()

    def _admit(self, group: SharedPrompt) -> list[Text]:
        count = min(len(group.requests), len(self.table.free))
        return self.table.admit([group.requests.popleft() for _ in range(count)], self.sampling)
