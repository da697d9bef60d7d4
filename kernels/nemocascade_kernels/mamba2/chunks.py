"""Split of a pack into chunks that never cross a document boundary."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nemocascade_kernels.common.documents import PackedSeq
from nemocascade_kernels.common.transfer import to_device

# Last chunks with fewer slots than this in total are computed with those of the next size.
_FEW_SLOTS = 256
# Ratio of the widths of segments.
_NARROWER = 16


@dataclass(frozen=True)
class Carry:
    """One step of the recurrence over segments of body chunks, for several documents at once.

    first: the first body chunk. count, width: segments, and the chunks of each.
    before: the last body chunk before each segment, as a range or as [count] int64.
    """

    first: int
    count: int
    width: int
    before: slice | Tensor

    @property
    def chunks(self) -> slice:
        """The chunks, among all body chunks."""
        return slice(self.first, self.first + self.count * self.width)

    def within(self, block: ChunkBlock) -> slice:
        """The chunks, among those of `block`."""
        assert block.body is not None
        at = self.first - block.body.start
        return slice(at, at + self.count * self.width)

    def segments(self, block: ChunkBlock) -> slice:
        """The segments, among those of `block`."""
        at = self.within(block).start // self.width
        return slice(at, at + self.count)


@dataclass(frozen=True)
class ChunkBlock:
    """Chunks of one run that are computed at once: c chunks of s slots.

    here: range of the block's chunks in the run; segments: that of its segments.
    pad_slots: [P] int64, slots of the block beyond a chunk's end, or None if there are none.
    used_slots: [c * s - P] int64, the other slots, or None if all are used.
    used_rows: [c * s - P] int64, their tokens.
    enter: [c] int64, the body chunk before each chunk; None if all start a document.
    body: range of the block's chunks among the body chunks; None for last chunks.
    carries: the recurrence's steps within the block, in order.
    """

    size: int
    count: int
    here: slice
    segments: slice
    rows: Tensor
    pad_slots: Tensor | None
    used_slots: Tensor | None
    used_rows: Tensor
    enter: Tensor | None
    body: slice | None
    carries: tuple[Carry, ...]


@dataclass(frozen=True)
class ChunkRun:
    """Consecutive blocks of chunks of one size.

    A chunk with fewer tokens than its size is padded with its own last row, so no chunk holds
    values of another document. width: chunks of a segment.

    rows: [chunks * size] int64, the token of each slot. pad_slots: that of a block, for the run.
    """

    size: int
    width: int
    rows: Tensor
    pad_slots: Tensor | None
    blocks: tuple[ChunkBlock, ...]


@dataclass(frozen=True)
class ChunkTable:
    """Chunks of every document, in blocks that can be computed one after the other.

    All chunks of a document but its last are "body" chunks: full, and followed by another. After
    a document's first chunk they form segments of consecutive chunks: as many as possible of the
    largest width, then of the next one. Segments of one width are ordered by step (index within
    the document), then by document with the most segments first. So the segments of step k+1
    follow the first segments of step k, in the same order, and a step of the recurrence is one
    operation for all documents. Every chunk's predecessor comes before it. The documents' last
    chunks come after the body, grouped by size.
    """

    num_body: int
    runs: tuple[ChunkRun, ...]


def chunk_table(
    packed: PackedSeq, size: int, block_slots: int, smallest: int = 8, widest: int = 1
) -> ChunkTable:
    """Cut documents into chunks of `size` tokens, computed in blocks of about `block_slots` slots.

    size, widest: powers of two; a segment has at most `widest` chunks, and fits in a block. Last
    chunks have the smallest fitting power of two from `smallest` to `size` slots.
    """
    fitting = 1 << (max(1, block_slots // size).bit_length() - 1)
    return packed.cached(
        ("chunks", size, block_slots, smallest, widest),
        lambda: _on_device(
            _cut(packed, size, block_slots, min(smallest, size), min(widest, fitting)),
            packed.device,
        ),
    )


def _on_device(table: ChunkTable, device: torch.device) -> ChunkTable:
    """The same table with its tensors on `device`, by one transfer; views stay views."""
    if device.type == "cpu":
        return table
    found: dict[int, Tensor] = {}

    def owner(t: Tensor) -> Tensor:
        return t if t._base is None else t._base

    def collect(t: Tensor) -> Tensor:
        found.setdefault(id(owner(t)), owner(t))
        return t

    _replaced(table, collect)
    sent = dict(zip(found, to_device(list(found.values()), device), strict=True))

    def moved(t: Tensor) -> Tensor:
        base = sent[id(owner(t))]
        return base.as_strided(t.shape, t.stride(), base.storage_offset() + t.storage_offset())

    result: ChunkTable = _replaced(table, moved)
    return result


def _replaced(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of nested dataclasses and tuples with `change` applied to each tensor."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_replaced(item, change) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{f.name: _replaced(getattr(value, f.name), change) for f in fields(value)}
        )
    return value


def _cut(packed: PackedSeq, size: int, block_slots: int, smallest: int, widest: int) -> ChunkTable:
    chunks = (packed.lengths + size - 1) // size
    order = torch.argsort(chunks, descending=True, stable=True)
    starts, lengths, body_chunks = packed.starts[order], packed.lengths[order], chunks[order] - 1
    make = _RunMaker(size, block_slots)
    last = _cut_body(make, starts, body_chunks, widest)

    start, rest = starts + body_chunks * size, lengths - body_chunks * size
    for continues in (True, False):
        left = rest.where((body_chunks > 0) == continues, 0)
        bound, width = 0, smallest
        while width <= size:
            chosen = torch.nonzero((left > bound) & (left <= width)).reshape(-1)
            if width == size or chosen.numel() * width >= _FEW_SLOTS:
                before = last[chosen] if continues else None
                make.add(width, start[chosen], rest[chosen], before)
                bound = width
            width *= 2
    return ChunkTable(num_body=make.num_body, runs=tuple(make.runs))


def _cut_body(make: _RunMaker, starts: Tensor, body_chunks: Tensor, widest: int) -> Tensor:
    """Add the body chunks; returns each document's last one, [D] int64."""
    make.add_body(starts[: int((body_chunks > 0).sum())], None, 1, [])
    last = torch.arange(starts.numel())
    # Chunks of each document so far, and those of its body that are left.
    done, left = torch.ones_like(last), (body_chunks - 1).clamp_(min=0)
    width = widest
    while bool(left.any()):
        steps = left // width
        # Documents with the most segments first, so that a step has the first ones of the last.
        order = torch.argsort(steps, descending=True, stable=True)
        _cut_segments(make, starts + done * make.size, last, steps, order, width)
        done, left = done + steps * width, left % width
        width = max(1, width // _NARROWER)
    return last


def _cut_segments(
    make: _RunMaker, starts: Tensor, last: Tensor, steps: Tensor, order: Tensor, width: int
) -> None:
    """Add `steps` [D] segments of each document, from rows `starts`; updates `last`."""
    ranked = steps[order]
    num_steps = int(ranked[0])
    if not num_steps:
        return
    ended = torch.bincount(ranked, minlength=num_steps + 1).cumsum(0)[:num_steps]
    segments = order.numel() - ended
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), segments.cumsum(0)])
    step = torch.repeat_interleave(torch.arange(num_steps), segments)
    rank = torch.arange(step.numel()) - offsets[step]
    document = order[rank]
    ends = make.num_body + torch.arange(1, step.numel() + 1) * width - 1
    before = torch.where(step > 0, ends[offsets[step - 1] % step.numel() + rank], last[document])
    make.add_body(starts[document] + step * width * make.size, before, width, offsets.tolist())
    final = step == steps[document] - 1
    last[document[final]] = ends[final]


class _RunMaker:
    """Collects runs in blocks of at most `block_slots` slots, or of one segment.

    size: slots of a body chunk. num_body: body chunks so far.
    """

    def __init__(self, size: int, block_slots: int) -> None:
        self.size, self.block_slots = size, block_slots
        self.runs: list[ChunkRun] = []
        self.num_body = 0

    def add_body(
        self, first: Tensor, before: Tensor | None, width: int, offsets: list[int]
    ) -> None:
        """Add segments of `width` body chunks that start at rows `first`.

        before: the body chunk before each segment. offsets: the first segment of each step of the
        recurrence, and their total.
        """
        count = first.numel()
        rows = (first[:, None] + torch.arange(width) * self.size).reshape(-1)
        enter = carries = None
        if before is not None:
            chunks = self.num_body + torch.arange(count * width).view(count, width)
            enter = torch.cat([before[:, None], chunks[:, :-1]], dim=1).reshape(-1)
            carries = _Carries(before, offsets, width, self.num_body)
        full = torch.full_like(rows, self.size)
        self._add(self.size, rows, full, enter, width, self.num_body, carries)
        self.num_body += count * width

    def add(self, size: int, first: Tensor, filled: Tensor, enter: Tensor | None) -> None:
        """Add last chunks that start at rows `first` and hold `filled` tokens each.

        enter: the body chunk before each.
        """
        self._add(size, first, filled, enter, 1, None, None)

    def _add(
        self,
        size: int,
        first: Tensor,
        filled: Tensor,
        enter: Tensor | None,
        width: int,
        body: int | None,
        carries: _Carries | None,
    ) -> None:
        if not first.numel():
            return
        slot = torch.arange(size)
        is_pad = slot >= filled[:, None]
        rows = first[:, None] + torch.minimum(slot, filled[:, None] - 1)
        flat = rows.reshape(-1)
        per_block = max(1, self.block_slots // (size * width)) * width
        blocks = []
        for lo in range(0, first.numel(), per_block):
            here = slice(lo, min(lo + per_block, first.numel()))
            pads, used = self._split(is_pad[here].reshape(-1))
            block_rows = flat[here.start * size : here.stop * size]
            blocks.append(
                ChunkBlock(
                    size=size,
                    count=here.stop - here.start,
                    here=here,
                    segments=slice(here.start // width, here.stop // width),
                    rows=block_rows,
                    pad_slots=pads,
                    used_slots=used,
                    used_rows=block_rows if pads is None else rows[here][~is_pad[here]],
                    enter=None if enter is None else enter[here],
                    body=None if body is None else slice(body + here.start, body + here.stop),
                    carries=() if carries is None else carries.of(here),
                )
            )
        pads, _ = self._split(is_pad.reshape(-1))
        self.runs.append(ChunkRun(size, width, flat, pads, tuple(blocks)))

    def _split(self, is_pad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if not bool(is_pad.any()):
            return None, None
        pads, used = torch.nonzero(is_pad).reshape(-1), torch.nonzero(~is_pad).reshape(-1)
        return pads, used


class _Carries:
    """The recurrence's steps over a run of segments; arguments as in `_RunMaker.add_body`.

    body: the run's first body chunk.
    """

    def __init__(self, before: Tensor, offsets: list[int], width: int, body: int) -> None:
        self.before, self.offsets, self.width, self.body = before.tolist(), offsets, width, body

    def of(self, chunks: slice) -> tuple[Carry, ...]:
        """The steps of a block. chunks: the block's chunks in the run."""
        at, end = chunks.start // self.width, chunks.stop // self.width
        step = bisect.bisect_right(self.offsets, at) - 1
        carries = []
        while at < end:
            stop = min(self.offsets[step + 1], end)
            first = self.body + at * self.width
            before = self._places(self.before[at:stop])
            carries.append(Carry(first, stop - at, self.width, before))
            at, step = stop, step + 1
        return tuple(carries)

    def _places(self, chunks: list[int]) -> slice | Tensor:
        """`chunks` as a range if they are one, else as a tensor."""
        stride = chunks[1] - chunks[0] if len(chunks) > 1 else 1
        if stride > 0 and chunks == list(range(chunks[0], chunks[-1] + 1, stride)):
            return slice(chunks[0], chunks[-1] + 1, stride)
        return torch.tensor(chunks)
