"""Boxes of index space: the part of a global tensor that a rank holds.

A box is an offset and a size per axis. Everything that a checkpoint stores or reads is a box of a
global tensor, so resharding is the intersection of boxes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """Elements `offset[i] <= index[i] < offset[i] + size[i]` on every axis i."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def volume(self) -> int:
        """Number of elements; 1 for a box without axes."""
        return math.prod(self.size)

    def intersect(self, other: Box) -> Box | None:
        """The elements in both, or None if there are none."""
        axes = tuple(zip(self.offset, self.size, other.offset, other.size, strict=True))
        starts = tuple(max(a, b) for a, _, b, _ in axes)
        sizes = tuple(min(a + n, b + m) - s for s, (a, n, b, m) in zip(starts, axes, strict=True))
        return Box(starts, sizes) if all(n > 0 for n in sizes) else None

    def relative_to(self, origin: Sequence[int]) -> Box:
        """The same elements counted from `origin`."""
        return Box(tuple(a - b for a, b in zip(self.offset, origin, strict=True)), self.size)

    def slices(self) -> tuple[slice, ...]:
        """An index of a tensor that selects the box."""
        return tuple(slice(a, a + n) for a, n in zip(self.offset, self.size, strict=True))

    def split(self, elements: int) -> list[Box]:
        """Split the box along its first axes into boxes of at most `elements` elements each."""
        if self.volume <= elements or not self.size:
            return [self]
        row = self.volume // self.size[0]
        step = max(1, elements // row)
        boxes = []
        for start in range(0, self.size[0], step):
            offset = (self.offset[0] + start, *self.offset[1:])
            part = Box(offset, (min(step, self.size[0] - start), *self.size[1:]))
            if part.size[0] > 1:
                boxes.append(part)
            else:
                boxes += _in_row(offset[0], Box(offset[1:], part.size[1:]).split(elements))
        return boxes


def whole(shape: Iterable[int]) -> Box:
    """The box of a whole tensor."""
    size = tuple(shape)
    return Box((0,) * len(size), size)


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Boxes of a contiguous tensor of `shape` that hold its flat elements [start, stop).

    They are in order, disjoint, and at most 2 * axes - 1. The distributed optimizer's flat shards
    become boxes this way.
    """
    if stop <= start:
        return []
    if not shape:
        return [Box((), ())]
    row = math.prod(shape[1:])
    first, last = start // row, stop // row
    if first == last:
        inner = boxes_of_range(shape[1:], start - first * row, stop - first * row)
        return _in_row(first, inner)
    boxes = []
    if start % row:
        boxes += _in_row(first, boxes_of_range(shape[1:], start % row, row))
        first += 1
    if last > first:
        boxes.append(Box((first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])))
    return boxes + _in_row(last, boxes_of_range(shape[1:], 0, stop % row))


def _in_row(index: int, boxes: Iterable[Box]) -> list[Box]:
    """Boxes of row `index` as boxes of the tensor that contains it."""
    return [Box((index, *b.offset), (1, *b.size)) for b in boxes]


def first_overlap(boxes: Iterable[Box]) -> tuple[Box, Box] | None:
    """Two boxes that share an element, or None if all are disjoint."""
    active: list[Box] = []
    for box in sorted(boxes, key=lambda b: b.offset):
        if box.offset:
            active = [b for b in active if b.offset[0] + b.size[0] > box.offset[0]]
        for other in active:
            if box.intersect(other) is not None:
                return other, box
        active.append(box)
    return None
