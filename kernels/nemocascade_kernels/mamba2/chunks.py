"""Split of a pack into chunks that never cross a document boundary."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemocascade_kernels.common.documents import PackedSeq
from nemocascade_kernels.common.transfer import to_device

# Last chunks with fewer slots than this in total are computed with those of the next size.
_FEW_SLOTS = 256


@dataclass(frozen=True)
class Carry:
    """One step of the recurrence over body chunks, for all documents at once.

    The chunks [first, first + count) follow the chunks [before, before + count).
    """

    first: int
    before: int
    count: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """The chunks and their predecessors, among all body chunks."""
        now = slice(self.first, self.first + self.count)
        return now, slice(self.before, self.before + self.count)

    def within(self, block: ChunkBlock) -> slice:
        """The chunks, among those of `block`."""
        assert block.body is not None
        at = self.first - block.body.start
        return slice(at, at + self.count)


@dataclass(frozen=True)
class ChunkBlock:
    """Chunks of one run that are computed at once: c chunks of s slots.

    here: range of the block's chunks in the run.
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
    values of another document.

    rows: [chunks * size] int64, the token of each slot. pad_slots: that of a block, for the run.
    """

    size: int
    rows: Tensor
    pad_slots: Tensor | None
    blocks: tuple[ChunkBlock, ...]


@dataclass(frozen=True)
class ChunkTable:
    """Chunks of every document, in blocks that can be computed one after the other.

    All chunks of a document but its last are "body" chunks: full, and followed by another. They
    are ordered by step (index within the document), then by document with the longest first. So
    the chunks of step k+1 follow the first chunks of step k, in the same order, and a step of the
    recurrence is one operation on views for all documents. Every chunk's predecessor comes before
    it. The documents' last chunks come after the body, grouped by size.
    """

    num_body: int
    runs: tuple[ChunkRun, ...]


def chunk_table(packed: PackedSeq, size: int, block_slots: int, smallest: int = 8) -> ChunkTable:
    """Cut documents into chunks of `size` tokens, computed in blocks of about `block_slots` slots.

    size: a power of two. Last chunks have the smallest fitting power of two from `smallest` to
    `size` slots. The table's tensors are on the device of `packed`.
    """
    return packed.cached(
        ("chunks", size, block_slots, smallest),
        lambda: _on_device(_cut(packed, size, block_slots, min(smallest, size)), packed.device),
    )


def _on_device(table: ChunkTable, device: torch.device) -> ChunkTable:
    """The same table with its tensors on `device`."""
    on_host: list[Tensor] = []

    def listed(value: Tensor) -> Tensor:
        on_host.append(value)
        return value

    _replaced(table, listed)
    sent = iter(to_device(on_host, device))
    return _replaced(table, lambda _: next(sent))


def _replaced(table: ChunkTable, change: Callable[[Tensor], Tensor]) -> ChunkTable:
    """The same table with `change` applied to each of its tensors, in a fixed order."""

    def maybe(value: Tensor | None) -> Tensor | None:
        return None if value is None else change(value)

    runs = []
    for run in table.runs:
        rows = change(run.rows)
        blocks = [
            replace(
                block,
                rows=rows[block.here.start * run.size : block.here.stop * run.size],
                pad_slots=maybe(block.pad_slots),
                used_slots=maybe(block.used_slots),
                used_rows=change(block.used_rows),
                enter=maybe(block.enter),
            )
            for block in run.blocks
        ]
        runs.append(ChunkRun(run.size, rows, maybe(run.pad_slots), tuple(blocks)))
    return replace(table, runs=tuple(runs))


def _cut(packed: PackedSeq, size: int, block_slots: int, smallest: int) -> ChunkTable:
    chunks = (packed.lengths + size - 1) // size
    order = torch.argsort(chunks, descending=True, stable=True)
    starts, lengths, body_chunks = packed.starts[order], packed.lengths[order], chunks[order] - 1
    num_steps = int(body_chunks.max())
    ended = torch.bincount(body_chunks, minlength=num_steps + 1).cumsum(0)[:num_steps]
    steps = order.numel() - ended
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), steps.cumsum(0)])
    num_body = int(offsets[-1])

    make = _RunMaker(block_slots, offsets.tolist())
    if num_body:
        step = torch.repeat_interleave(torch.arange(num_steps), steps)
        rank = torch.arange(num_body) - offsets[step]
        first = starts[rank] + step * size
        full = torch.full_like(first, size)
        enter = offsets[step - 1] + rank
        beginning = int(steps[0])
        make.add(size, first[:beginning], full[:beginning], None, 0)
        make.add(size, first[beginning:], full[beginning:], enter[beginning:], beginning)

    start, rest = starts + body_chunks * size, lengths - body_chunks * size
    enter = offsets[body_chunks - 1] + torch.arange(order.numel())
    for continues in (True, False):
        left = rest.where((body_chunks > 0) == continues, 0)
        bound, width = 0, smallest
        while width <= size:
            chosen = torch.nonzero((left > bound) & (left <= width)).reshape(-1)
            if width == size or chosen.numel() * width >= _FEW_SLOTS:
                before = enter[chosen] if continues else None
                make.add(width, start[chosen], rest[chosen], before, None)
                bound = width
            width *= 2
    return ChunkTable(num_body=num_body, runs=tuple(make.runs))


class _RunMaker:
    """Collects runs in blocks of at most `block_slots` slots, or of one chunk.

    offsets: the first body chunk of each step of the recurrence, and their total.
    """

    def __init__(self, block_slots: int, offsets: list[int]) -> None:
        self.block_slots, self.offsets = block_slots, offsets
        self.runs: list[ChunkRun] = []

    def add(
        self, size: int, first: Tensor, filled: Tensor, enter: Tensor | None, body: int | None
    ) -> None:
        """Add the chunks, if any, that start at rows `first` and hold `filled` tokens each.

        enter: the body chunk before each. body: index of the first one among the body chunks.
        """
        if not first.numel():
            return
        slot = torch.arange(size)
        is_pad = slot >= filled[:, None]
        rows = first[:, None] + torch.minimum(slot, filled[:, None] - 1)
        flat = rows.reshape(-1)
        per_block = max(1, self.block_slots // size)
        blocks = []
        for lo in range(0, first.numel(), per_block):
            here = slice(lo, min(lo + per_block, first.numel()))
            pads, used = self._split(is_pad[here].reshape(-1))
            among = None if body is None else slice(body + here.start, body + here.stop)
            blocks.append(
                ChunkBlock(
                    size=size,
                    count=here.stop - here.start,
                    here=here,
                    rows=flat[here.start * size : here.stop * size],
                    pad_slots=pads,
                    used_slots=used,
                    used_rows=rows[here][~is_pad[here]],
                    enter=None if enter is None else enter[here],
                    body=among,
                    carries=() if enter is None or among is None else self._carries(among),
                )
            )
        pads, _ = self._split(is_pad.reshape(-1))
        self.runs.append(ChunkRun(size, flat, pads, tuple(blocks)))

    def _split(self, is_pad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if not bool(is_pad.any()):
            return None, None
        return torch.nonzero(is_pad).reshape(-1), torch.nonzero(~is_pad).reshape(-1)

    def _carries(self, body: slice) -> tuple[Carry, ...]:
        carries = []
        step = bisect.bisect_right(self.offsets, body.start) - 1
        at = body.start
        while at < body.stop:
            stop = min(self.offsets[step + 1], body.stop)
            before = self.offsets[step - 1] + at - self.offsets[step]
            carries.append(Carry(at, before, stop - at))
            at, step = stop, step + 1
        return tuple(carries)
