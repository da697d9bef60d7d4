"""Rows that a context-parallel rank gathers or sends on, because documents cross its segments."""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class CrossedSegments:
    """The most rows of any rank, for documents of equal length.

    exchanges: a document crosses a border of the pack's 2 cp segments. keys: rows whose keys a rank
    keeps for its queries. entering: segments of a rank that continue a document. entered: rows of
    these documents in them. left: rows in its segments of documents that continue in the next.
    folded: states of earlier segments that add up to those that enter. longest: as many of one
    document.
    """

    exchanges: bool
    keys: int
    entering: int
    entered: int
    left: int
    folded: int
    longest: int


@functools.cache
def crossed_segments(capacity: int, document: int, cp: int) -> CrossedSegments:
    """Rows of the worst of `cp` ranks; rank r holds segments r and 2 cp - 1 - r."""
    if cp == 1:
        return CrossedSegments(False, capacity, 0, 0, 0, 0, 0)
    count = 2 * cp
    size = capacity // count
    # For each border, the rows before it of the document that crosses it.
    crossed = [border * size % document for border in range(count)] + [0]
    ranks = [(r, count - 1 - r) for r in range(cp)]

    def most(rows: list[int]) -> int:
        return max(rows[first] + rows[second] for first, second in ranks)

    return CrossedSegments(
        exchanges=any(crossed),
        keys=most([size + rows for rows in crossed[:-1]]),
        entering=most([int(rows > 0) for rows in crossed[:-1]]),
        entered=most([min(document - rows, size) * (rows > 0) for rows in crossed[:-1]]),
        left=most([min(rows, size) for rows in crossed[1:]]),
        folded=most([-(-rows // size) for rows in crossed[:-1]]),
        longest=max(-(-rows // size) for rows in crossed[:-1]),
    )


def scan_rounds(longest: int) -> int:
    """Exchanges of the scan of border states, for documents that fold up to `longest` of them."""
    return 1 + (longest - 1).bit_length() if longest else 0
