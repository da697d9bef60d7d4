"""The packing planner in plain Python: the reference for csrc/packing.

`nemocascade.data.packing` documents the algorithm and its arguments. Names follow
csrc/packing/packing.cpp function by function, and the results are bit-identical.
"""

from __future__ import annotations

import bisect
import heapq
from collections import Counter
from collections.abc import Sequence

import numpy as np

from nemocascade.data.packing import Int64Array, WorkModel

CLOSING_SHARE = 8
CLOSING_DOCUMENTS = 4
ATTEMPTS = 3
EXTRA_BINS_SHARE = 1000
LEAST_BINS_FOR_ONE_EXTRA = 100
_MASK = (1 << 64) - 1


class Random:
    """splitmix64 (Steele, Lea, Flood 2014)."""

    def __init__(self, seed: int) -> None:
        self._state = seed

    def below(self, bound: int) -> int:
        """Uniform in 0..bound-1 up to a bias of bound / 2^64."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return ((z ^ (z >> 31)) * bound) >> 64

    def shuffle(self, values: list[int]) -> None:
        """Fisher-Yates, in place."""
        for i in range(len(values), 1, -1):
            j = self.below(i)
            values[i - 1], values[j] = values[j], values[i - 1]


class Bins:
    """Where each document (by its place in the sorted order) went, and what each bin holds."""

    def __init__(self, documents: int, capacity: int) -> None:
        self.capacity = capacity
        self.bin_of = [0] * documents
        self.fills: list[int] = []
        self.squares: list[int] = []

    def open(self) -> int:
        """A new bin."""
        self.fills.append(0)
        self.squares.append(0)
        return len(self.fills) - 1

    def space(self, index: int) -> int:
        """Tokens that a bin can still take."""
        return self.capacity - self.fills[index]

    def place(self, position: int, length: int, index: int) -> None:
        """Put a document in a bin."""
        self.bin_of[position] = index
        self.fills[index] += length
        self.squares[index] += length * length

    def density(self, index: int, level: int) -> float:
        """The length-weighted mean length that would bring a bin to `level` as it fills up."""
        return (level - self.squares[index]) / self.space(index)


class LengthPool:
    """The multiset of the lengths still to be packed."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._counts = Counter(lengths)
        self._present = sorted(self._counts)

    def __bool__(self) -> bool:
        return bool(self._present)

    def remove(self, length: int) -> None:
        """Take one document of this length."""
        self._counts[length] -= 1
        if self._counts[length] == 0:
            del self._present[bisect.bisect_left(self._present, length)]

    def longest_at_most(self, limit: int) -> int:
        """The longest length <= limit, or 0 where there is none."""
        index = bisect.bisect_right(self._present, limit)
        return self._present[index - 1] if index else 0

    def shortest(self) -> int:
        """The shortest length."""
        return self._present[0]


def plan_packing(
    lengths: Sequence[int], capacity: int, group: int, linear: float, quadratic: float, seed: int
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Documents `[D]`, bin offsets `[B + 1]`, fills `[B]` and sums of squares `[B]` of a plan."""
    random = Random(seed)
    shuffled = list(range(len(lengths)))
    random.shuffle(shuffled)
    by_length = sorted(shuffled, key=lambda document: -lengths[document])
    bins = assign([lengths[document] for document in by_length], capacity)
    order = order_bins(bins, group, linear, quadratic, random)

    contents: list[list[int]] = [[] for _ in bins.fills]
    for document, index in zip(by_length, bins.bin_of, strict=True):
        contents[index].append(document)
    documents: list[int] = []
    bin_offsets = [0]
    for index in order:
        documents += contents[index]
        bin_offsets.append(len(documents))
    fills = [bins.fills[index] for index in order]
    return documents, bin_offsets, fills, [bins.squares[index] for index in order]


def assign(lengths: Sequence[int], capacity: int) -> Bins:
    """Spread and close, or plain first-fit-decreasing where that needs clearly fewer bins."""
    first_fit = Bins(len(lengths), capacity)
    close(lengths, 0, 0, False, first_fit)
    if not lengths:
        return first_fit
    tokens = sum(lengths)
    halves = sum(2 * length > capacity for length in lengths)
    least = max(-(-tokens // capacity), halves)
    level = balance_level(lengths, least)
    most = len(first_fit.fills)
    most += max(most // EXTRA_BINS_SHARE, int(most >= LEAST_BINS_FOR_ONE_EXTRA))
    for attempt in range(ATTEMPTS):
        balanced = Bins(len(lengths), capacity)
        for _ in range(least):
            balanced.open()
        spread_count = count_spread(lengths, tokens, least, attempt)
        spread(lengths[:spread_count], level, balanced)
        close(lengths, spread_count, level, True, balanced)
        if len(balanced.fills) <= most:
            return balanced
    return first_fit


def balance_level(lengths: Sequence[int], bins: int) -> int:
    """The sum of squares that every bin can be brought to, when a document whose own square is
    above it has a bin to itself."""
    rest = sum(length * length for length in lengths)
    for length in lengths:
        if bins == 1 or length * length * bins <= rest:
            break
        rest -= length * length
        bins -= 1
    return rest // bins


def count_spread(lengths: Sequence[int], tokens: int, bins: int, attempt: int) -> int:
    """How many of the longest documents are spread; the others close the bins."""
    share, documents = CLOSING_SHARE >> attempt, CLOSING_DOCUMENTS << attempt
    spread_count = len(lengths)
    closing_tokens = closing_documents = 0
    while spread_count > 0 and (
        closing_tokens * share < tokens or closing_documents < documents * bins
    ):
        spread_count -= 1
        closing_tokens += lengths[spread_count]
        closing_documents += 1
    return spread_count


def spread(lengths: Sequence[int], level: int, bins: Bins) -> None:
    """Give each document, longest first, to the bin that needs length most."""
    candidates = [(-bins.density(index, level), index) for index in range(len(bins.fills))]
    heapq.heapify(candidates)
    waiting: list[tuple[int, int]] = []  # (-space, bin): too full for now
    for position, length in enumerate(lengths):
        while waiting and -waiting[0][0] >= length:
            index = heapq.heappop(waiting)[1]
            heapq.heappush(candidates, (-bins.density(index, level), index))
        while candidates and bins.space(candidates[0][1]) < length:
            index = heapq.heappop(candidates)[1]
            heapq.heappush(waiting, (-bins.space(index), index))
        index = heapq.heappop(candidates)[1] if candidates else bins.open()
        bins.place(position, length, index)
        if bins.space(index) > 0:
            heapq.heappush(candidates, (-bins.density(index, level), index))


def pick(pool: LengthPool, space: int, look_ahead: bool) -> int:
    """The longest document that fits; with `look_ahead`, one that does not leave a remainder too
    short for any document, where there is such a one. 0 where none fits."""
    longest = pool.longest_at_most(space)
    remainder = space - longest
    if not look_ahead or longest == 0 or remainder == 0 or remainder >= pool.shortest():
        return longest
    return pool.longest_at_most(space - pool.shortest()) or longest


def close(lengths: Sequence[int], first: int, level: int, look_ahead: bool, bins: Bins) -> None:
    """Pack the documents from `first` on: bin after bin, and into each the longest that fits. That
    is first-fit-decreasing: a document lands in the first bin that has space for it in its turn."""
    pool = LengthPool(lengths[first:])
    following: dict[int, int] = {}
    for position in range(len(lengths) - 1, first - 1, -1):
        following[lengths[position]] = position
    with_space = [index for index in range(len(bins.fills)) if bins.space(index) > 0]
    order = iter(sorted(with_space, key=lambda index: (-bins.density(index, level), index)))
    while pool:
        index = next(order, None)
        if index is None:
            index = bins.open()
        while length := pick(pool, bins.space(index), look_ahead) if pool else 0:
            pool.remove(length)
            bins.place(following[length], length, index)
            following[length] += 1


def order_bins(
    bins: Bins, group: int, linear: float, quadratic: float, random: Random
) -> list[int]:
    """Groups of bins of nearly equal work, each from its least to its greatest, in random order.
    The bins that are left over have the least work and come last."""
    costs = [
        linear * float(fill) + quadratic * float(square)
        for fill, square in zip(bins.fills, bins.squares, strict=True)
    ]
    by_cost = sorted(range(len(costs)), key=lambda index: -costs[index])
    full_groups = len(costs) // group
    groups = list(range(full_groups))
    random.shuffle(groups)
    groups.append(full_groups)
    return [
        index
        for number in groups
        for index in reversed(by_cost[number * group : (number + 1) * group])
    ]


def plan_arrays(
    lengths: Int64Array, capacity: int, group: int, work: WorkModel, seed: int
) -> tuple[Int64Array, ...]:
    """`plan_packing` with the arguments and results of `packing._native`."""
    results = plan_packing(lengths.tolist(), capacity, group, work.linear, work.quadratic, seed)
    return tuple(np.array(result, np.int64) for result in results)
