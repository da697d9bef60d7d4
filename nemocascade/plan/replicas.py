"""Replicas that decode in step, as discrete events: a batch that grows and shrinks."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from nemocascade.plan.generation import StepTerms


class Costs(Protocol):
    """Time of generation."""

    @property
    def members(self) -> int:
        """Number of replicas that decode in step."""

    def step(self, rows: float, shared: float, cached: float) -> StepTerms:
        """Seconds of a decode step: rows and cached tokens of the fullest replica, and the rows of
        all replicas that decode in step."""

    def prefill(self, tokens: float) -> float:
        """Seconds to prefill `tokens` of a sequence."""


@dataclass(eq=False)
class SimulatedReplica:
    """One replica. rows: number of sequences that decode. occupied: number of slots in use.
    waiting: ids of requests without one. cached: tokens of all that hold a slot. busy_s: seconds in
    which it decoded. prompt: the last one that was prefilled, whose state is kept."""

    slots: int
    rows: int = 0
    occupied: int = 0
    waiting: list[int] = field(default_factory=list)
    cached: float = 0.0
    busy_s: float = 0.0
    prompt: int = -1

    @property
    def taken(self) -> int:
        """Number of requests that were taken and have not finished."""
        return self.occupied + len(self.waiting)


@dataclass(eq=False)
class DecodeGroup:
    """Replicas that share experts, and so run the same passes.

    slots: of each replica. ranks: of all of them. now: seconds. steps: decode steps so far. terms,
    prefill_s: seconds of decode steps and of prefills. row_steps: decoded tokens. prefilled:
    prefilled tokens. most_cached: largest number of cached tokens of a replica.
    """

    costs: Costs
    slots: int
    ranks: int = 1
    now: float = 0.0
    steps: int = 0
    terms: StepTerms = field(default_factory=StepTerms)
    prefill_s: float = 0.0
    row_steps: int = 0
    prefilled: float = 0.0
    most_cached: float = 0.0
    replicas: list[SimulatedReplica] = field(init=False)

    def __post_init__(self) -> None:
        self.replicas = [SimulatedReplica(self.slots) for _ in range(self.costs.members)]
        self._running: list[tuple[int, int, SimulatedReplica]] = []
        self._dropped: set[int] = set()
        # Cached tokens, steps to the next end and their mean, until a sequence starts or ends.
        self._next: tuple[float, int, StepTerms] | None = None

    def prefill(self, prompts: Sequence[Sequence[float]]) -> None:
        """Run prefills, given the tokens of each on each replica; replicas run at the same time."""
        seconds = max((sum(map(self.costs.prefill, own)) for own in prompts), default=0.0)
        self.now, self.prefill_s = self.now + seconds, self.prefill_s + seconds
        self.prefilled += sum(map(sum, prompts))

    def start(self, number: int, replica: SimulatedReplica, length: int) -> None:
        """Decode `length` tokens of a sequence that holds a slot."""
        self._next = None
        replica.rows += 1
        heapq.heappush(self._running, (self.steps + max(1, length), number, replica))

    def drop(self, number: int) -> int:
        """Stop a sequence that decodes; returns the tokens that it did not decode."""
        end, replica = next((end, r) for end, n, r in self._running if n == number)
        self._dropped.add(number)
        self._next = None
        replica.rows -= 1
        return end - self.steps

    @property
    def is_decoding(self) -> bool:
        while self._running and self._running[0][1] in self._dropped:
            self._dropped.remove(heapq.heappop(self._running)[1])
        return bool(self._running)

    def next_end(self) -> float:
        """Time at which the next sequence ends its turn, if nothing happens before."""
        if not self.is_decoding:
            return math.inf
        steps, terms = self._to_next_end()
        return self.now + steps * terms.total

    def advance(self, until: float = math.inf) -> list[tuple[int, SimulatedReplica]]:
        """Decode to the end of the first step that ends at `until` or later, or that a sequence
        ends its turn with; these are returned."""
        if not self.is_decoding:
            self.now = max(self.now, until) if until < math.inf else self.now
            return []
        steps, terms = self._to_next_end()
        self._next = None
        if self.now + steps * terms.total > until:
            steps = min(steps, max(0, math.ceil((until - self.now) / terms.total)))
        self._decode(steps, terms)
        ended = []
        while self.is_decoding and self._running[0][0] <= self.steps:
            _, number, replica = heapq.heappop(self._running)
            replica.rows -= 1
            ended.append((number, replica))
        return ended

    def _to_next_end(self) -> tuple[int, StepTerms]:
        """Number of steps to the next end of a turn, and the mean of them."""
        cached = sum(replica.cached for replica in self.replicas)
        if self._next is None or self._next[0] != cached:
            steps = self._running[0][0] - self.steps
            self._next = cached, steps, self._terms_of(steps)
        return self._next[1:]

    def _decode(self, steps: int, terms: StepTerms) -> None:
        seconds = steps * terms.total
        self.steps += steps
        self.now += seconds
        self.terms = self.terms.plus(terms, steps)
        for replica in self.replicas:
            if replica.rows:
                self.row_steps += steps * replica.rows
                replica.busy_s += seconds
                replica.cached += steps * replica.rows
                self.most_cached = max(self.most_cached, replica.cached)

    def _terms_of(self, steps: int) -> StepTerms:
        """A step in the middle of the next `steps`, over which caches grow evenly."""
        most = shared = 0
        cached = 0.0
        for replica in self.replicas:
            shared += replica.rows
            most = max(most, replica.rows)
            cached = max(cached, replica.cached + replica.rows * steps / 2)
        return self.costs.step(most, shared, cached)
