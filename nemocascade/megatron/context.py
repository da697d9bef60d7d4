"""Context parallelism: the part of a pack that a rank computes, and what ranks exchange.

A pack is cut into 2 c equal segments, and rank r holds segments r and 2 c - 1 - r
(`PackedBatch.shard`). Layers see the documents among its rows as documents of their own; a document
that crosses a segment's border is continued there, from another rank's keys or states.

Shape letters: c context-parallel ranks, S rows of a segment, R = 2 S rows of a rank, D documents.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from nemocascade_kernels import PackedSeq
from nemocascade_kernels.common.transfer import to_device
from torch import Tensor

from nemocascade.types import PackedBatch

MOST_GATHERED = 16
"""Ranks up to which the states of all segments are gathered, see `layers.border_states`."""


@dataclass(frozen=True)
class SegmentRows:
    """One of a rank's two segments.

    number: of the segment in the pack. rows: among the rank's rows. bounds: of its documents among
    its rows, [0, .., S]. first, last: index of its first and last document among the rank's.
    before: number of the first document's rows in earlier segments; 0: it starts here. continues:
    the last document continues in the next segment.
    """

    number: int
    rows: slice
    bounds: tuple[int, ...]
    first: int
    before: int
    continues: bool

    @property
    def last(self) -> int:
        return self.first + len(self.bounds) - 2

    @property
    def last_rows(self) -> slice:
        """The last document's, among the rank's rows."""
        return slice(self.rows.start + self.bounds[-2], self.rows.stop)

    def pack(self, device: torch.device) -> PackedSeq:
        """The segment's documents, as far as they are in it."""
        return PackedSeq.from_cu_seqlens(self.bounds, device)


@dataclass(frozen=True, eq=False)
class RowRun:
    """Consecutive rows of a rank: whole documents, as far as they are in a segment.

    continues: the segment of the one document that started in an earlier one; None: new documents.
    """

    continues: int | None
    documents: PackedSeq


class ContextShard:
    """The documents of a pack among the rows of one context-parallel rank.

    rank, size: of the context-parallel group. parts: the rank's segments. crossed: for each of the
    2 c + 1 borders, the number of rows before it of the document that crosses it, or 0. Padding is
    cut at borders.
    """

    def __init__(self, batch: PackedBatch, device: torch.device) -> None:
        self.rank, self.size, self.device = batch.cp_rank, batch.cp_size, device
        self._cu = batch.cu_seqlens.tolist()
        self.segment = batch.capacity // (2 * self.size)
        borders = [n * self.segment for n in range(2 * self.size + 1)]
        # Padding has no values to exchange: each segment's is a document of its own.
        self.crossed = [
            b - self._cu[bisect.bisect_right(self._cu, b) - 1] if b < batch.num_tokens else 0
            for b in borders
        ]
        parts: list[SegmentRows] = []
        for index, rows in enumerate(batch.segments):
            low, high = (bisect.bisect_right(self._cu, row) for row in (rows.start, rows.stop - 1))
            number = rows.start // self.segment
            parts.append(
                SegmentRows(
                    number=number,
                    rows=slice(index * self.segment, (index + 1) * self.segment),
                    bounds=(0, *(c - rows.start for c in self._cu[low:high]), self.segment),
                    first=parts[0].last + 1 if parts else 0,
                    before=self.crossed[number],
                    continues=self.crossed[number + 1] > 0,
                )
            )
        self.parts = tuple(parts)
        self._own = batch.own_cu_seqlens()

    @property
    def exchanges(self) -> bool:
        """True if a document crosses a border of the pack; the same on every rank."""
        return any(self.crossed)

    def cu_seqlens(self) -> list[int]:
        """Bounds of the documents among the rank's rows; one in both segments counts twice."""
        first, second = self.parts
        return [*first.bounds, *(self.segment + b for b in second.bounds[1:])]

    @cached_property
    def positions(self) -> Tensor:
        """Each row's position within its document, [R] int64 on the host."""
        parts = []
        for part in self.parts:
            rows = torch.arange(self.segment)
            bounds = torch.tensor(part.bounds)
            starts = bounds[torch.bucketize(rows, bounds, right=True) - 1]
            parts.append(rows - starts + part.before * (starts == 0))
        return torch.cat(parts)

    @cached_property
    def document_bounds(self) -> Tensor:
        """`PackedBatch.own_cu_seqlens` on the device, [D + 1] int32."""
        return to_device([self._own.int()], self.device)[0]

    def place(self, segment: int) -> tuple[int, int]:
        """The rank that holds a segment, and which of its two it is."""
        last = 2 * self.size - 1
        return (segment, 0) if segment < self.size else (last - segment, 1)

    def span(self, number: int) -> int:
        """How many segments the document that crosses the border before `number` has before it."""
        return -(-self.crossed[number] // self.segment)

    @cached_property
    def runs(self) -> tuple[RowRun, ...]:
        """The rank's rows in order: documents that continue from an earlier segment, and others."""
        found: list[RowRun] = []
        for part in self.parts:
            cut = int(part.before > 0)
            for bounds, number in (
                (part.bounds[: cut + 1], part.number),
                (part.bounds[cut:], None),
            ):
                if len(bounds) > 1:
                    own = [b - bounds[0] for b in bounds]
                    packed = PackedSeq.from_cu_seqlens(own, self.device)
                    found.append(RowRun(number, packed))
        return tuple(found)

    @cached_property
    def leaving(self) -> dict[int, PackedSeq]:
        """The document that continues in the next segment, for each of the rank's that has one."""
        lengths = {
            p.number: p.last_rows.stop - p.last_rows.start for p in self.parts if p.continues
        }
        return {
            number: PackedSeq.from_cu_seqlens([0, length], self.device)
            for number, length in lengths.items()
        }

    @cached_property
    def keys(self) -> tuple[AttendedKeys, ...]:
        """The keys that each part's queries attend to."""
        return tuple(AttendedKeys.of(self, part) for part in self.parts)


@dataclass(frozen=True, eq=False)
class AttendedKeys:
    """The pack's rows from the start of a part's first document to the end of the part.

    rows: of the pack. queries, documents: the part's rows, and the keys, by document.
    """

    rows: slice
    queries: PackedSeq
    documents: PackedSeq

    @classmethod
    def of(cls, shard: ContextShard, part: SegmentRows) -> AttendedKeys:
        start = part.number * shard.segment
        bounds = [0, *(b + part.before for b in part.bounds[1:])]
        return cls(
            rows=slice(start - part.before, start + shard.segment),
            queries=part.pack(shard.device),
            documents=PackedSeq.from_cu_seqlens(bounds, shard.device),
        )


def gather_keys(
    k: Tensor, v: Tensor, shard: ContextShard, group: dist.ProcessGroup
) -> tuple[tuple[Tensor, Tensor], ...]:
    """The keys and values that each part attends to, [U, g, d], from those of all ranks [R, g, d].

    Backward sums the gradients of a row over the ranks that attended to it, at least in float32.
    """
    found = _GatherKeys.apply(torch.stack([k, v]), shard, group)
    return tuple((own[0], own[1]) for own in found)


class _GatherKeys(torch.autograd.Function):
    """[2, R, ...] -> [2, U, ...] for each part, its rows of the pack in order."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, shard: ContextShard, group: dist.ProcessGroup
    ) -> tuple[Tensor, ...]:
        ctx.shard, ctx.group = shard, group
        gathered = _segments(gather_ranks(rows, group), shard)
        return tuple(
            torch.cat([gathered[s][:, cut] for s, cut in _covered(shard, keys.rows)], dim=1)
            for keys in shard.keys
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        shard: ContextShard = ctx.shard
        shape = grads[0].shape[0], 2 * shard.segment, *grads[0].shape[2:]
        # Up to 2 c gradients of a row are added: in half precision each sum would round.
        high = torch.promote_types(grads[0].dtype, torch.float32)
        total = grads[0].new_zeros(shard.size, *shape, dtype=high)
        by_segment = _segments(total, shard)
        for grad, keys in zip(grads, shard.keys, strict=True):
            at = 0
            for s, cut in _covered(shard, keys.rows):
                by_segment[s][:, cut] += grad[:, at : at + cut.stop - cut.start]
                at += cut.stop - cut.start
        return scatter_sums(total, ctx.group).to(grads[0].dtype), None, None


def _segments(by_rank: Tensor, shard: ContextShard) -> list[Tensor]:
    """Views [k, S, ...] of the pack's segments, in order, from rows [c, k, R, ...] of the ranks."""
    found = []
    for number in range(2 * shard.size):
        rank, which = shard.place(number)
        found.append(by_rank[rank][:, which * shard.segment : (which + 1) * shard.segment])
    return found


def _covered(shard: ContextShard, rows: slice) -> list[tuple[int, slice]]:
    """The segments that hold `rows` of the pack, with the rows of each."""
    size = shard.segment
    return [
        (number, slice(max(rows.start - number * size, 0), min(rows.stop - number * size, size)))
        for number in range(rows.start // size, -(-rows.stop // size))
    ]


def gather_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[...] of every rank -> [c, ...], without a gradient."""
    out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    if x.numel():
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out.view(group.size(), *x.shape)


def scatter_sums(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[c, ...] -> [...]: the sum over the ranks of this rank's entry, without a gradient."""
    out = torch.empty_like(x[0])
    if x.numel():
        dist.reduce_scatter_tensor(out, x.contiguous().flatten(0, 1), group=group)
    return out


class GatherRanks(torch.autograd.Function):
    """[...] -> [c, ...]; backward sums the gradients of a rank's entry over the ranks.

    Every rank must run this backward, whether its rows used an entry or not: see `tie`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gather_ranks(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return scatter_sums(grads[0], ctx.group), None


class _Tie(torch.autograd.Function):
    """x; its backward also gives `gathered` a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gathered: Tensor) -> Tensor:
        ctx.shape, ctx.options = gathered.shape, {"dtype": gathered.dtype}
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0].new_zeros(ctx.shape, **ctx.options)


def tie(x: Tensor, gathered: Tensor) -> Tensor:
    """Return x, from which backward reaches `gathered` even if x does not depend on it.

    The ranks of a group run the same collectives in the same order only if each of them reaches
    every gathered tensor in backward.
    """
    out: Tensor = _Tie.apply(x, gathered)
    return out
