"""Rollouts of a step as discrete events: decode steps, tools, verification, and the queue.

Between two events all sequences of a group of replicas decode, so a step of any length costs as
many events as it has turns and verdicts.
"""

from __future__ import annotations

import functools
import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from nemocascade.plan.generation import StepTerms
from nemocascade.plan.replicas import DecodeGroup, SimulatedReplica
from nemocascade.plan.workload import EpisodeCosts


class RolloutQueue(Protocol):
    """Where replicas take requests, such as `WorkQueue`."""

    def poll(self, free_slots: int, busy: int) -> Any:
        """An object with the ids `taken`, the ids `cancelled`, and `is_open`."""

    def check(self) -> None:
        """Read what has been reported."""

    def report(self, number: int, reward: float | None) -> None:
        """A verdict on request `number`."""


@dataclass(frozen=True)
class Rollouts:
    """The sequences of a step, by request id. copies: consecutive ids of a prompt. prompt: its
    tokens. lengths: tokens after the prompt. rewards: of the verdicts."""

    copies: int
    prompt: int
    lengths: Sequence[int]
    rewards: Sequence[float]


@dataclass(frozen=True)
class RolloutTime:
    """Times of a step's rollouts.

    generation_s: until the last sequence that counts has ended. verify_s: from then to the last
    verdict. idle: share of the time in which a replica decodes nothing, mean over all. prefill_s,
    terms: seconds of the group that ends last. tokens, prefilled: decoded and prefilled, of all.
    most_cached: largest number of cached tokens of a replica. longest: steps of that group.
    """

    generation_s: float
    verify_s: float
    idle: float
    prefill_s: float
    terms: StepTerms
    tokens: int
    prefilled: int
    most_cached: int
    steps: int

    @property
    def seconds(self) -> float:
        return self.generation_s + self.verify_s


@dataclass(eq=False)
class _Active:
    """A sequence that a replica has taken. turns: number that are left, the current one included.
    decoded, reply: tokens of a turn, and of the tool's result after it. last: of the last turn."""

    group: int
    replica: SimulatedReplica
    turns: int
    decoded: int
    reply: int
    last: int
    is_decoding: bool = False


@dataclass(eq=False)
class _Verification:
    """A running verification on `width` cores, whose core seconds `left` are those at `since`."""

    number: int
    replica: SimulatedReplica
    width: int
    left: float
    since: float


@dataclass(eq=False)
class _Verifiers:
    """The verifiers of a group's ranks. free: cores. pending: ids that wait for one, with their
    replica. running: verifications that would use more cores."""

    free: int
    pending: deque[tuple[int, SimulatedReplica]] = field(default_factory=deque)
    running: list[_Verification] = field(default_factory=list)


def first_polls(
    groups: Sequence[DecodeGroup], order: random.Random | None = None
) -> list[tuple[int, SimulatedReplica]]:
    """Every replica with the number of its group, in the drawn order in which they first poll."""
    everyone = [(n, replica) for n, group in enumerate(groups) for replica in group.replicas]
    (order or random.Random(1)).shuffle(everyone)
    return everyone


class RolloutEvents:
    """The rollouts of one step on groups of replicas.

    queues: of the replicas, by group; they may be one. is_done: says that the verdicts so far are
    enough, where they decide what starts and is cancelled. order: of the replicas' first polls.
    """

    def __init__(
        self,
        rollouts: Rollouts,
        costs: EpisodeCosts,
        queues: Sequence[RolloutQueue],
        groups: Sequence[DecodeGroup],
        *,
        is_done: Callable[[], bool] | None = None,
        order: random.Random | None = None,
    ) -> None:
        self.rollouts, self.costs, self.groups = rollouts, costs, groups
        replicas = [replica for group in groups for replica in group.replicas]
        self.queues = dict(zip(replicas, queues, strict=True))
        self.distinct = list(dict.fromkeys(queues))
        self.is_done, self.order = is_done, order
        self.now = self.verified = 0.0
        self.sequences: dict[int, _Active] = {}
        self.cancelled: set[int] = set()
        self.ends: dict[int, float] = {}
        self.verifiers = [_Verifiers(costs.cores * group.ranks) for group in groups]
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._versions = [0] * len(groups)
        # Events at one time, until `_flush`.
        self._prefills: dict[int, list[list[float]]] = {}
        self._starting: list[int] = []
        self._changed: set[int] = set()

    def run(self) -> RolloutTime:
        """Generate and verify everything that is needed."""
        for number, replica in first_polls(self.groups, self.order):
            self._take(number, replica)
        self._flush()
        while self._events and not (self.is_done and self.is_done()):
            self.now, _, act = heapq.heappop(self._events)
            act()
            self._flush()
        return self._result()

    def _push(self, time: float, act: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (time, self._count, act))

    def _group_event(self, group: int, version: int) -> None:
        if version == self._versions[group]:
            self._advance(group)

    def _advance(self, group: int) -> None:
        """Decode until now, and let freed slots take what is next."""
        self._changed.add(group)
        for number, replica in self.groups[group].advance(self.now):
            self._turn_ended(number)
            self._take(group, replica)

    def _take(self, group: int, replica: SimulatedReplica) -> int:
        """Poll for a replica; returns the number of requests that it took."""
        supply = self.queues[replica].poll(replica.slots - replica.taken, replica.taken)
        self._cancel(supply.cancelled)
        replica.waiting += supply.taken
        self._fill(group, replica)
        return len(supply.taken)

    def _fill(self, group: int, replica: SimulatedReplica) -> None:
        """Start waiting requests in free slots; consecutive copies share a prompt's prefill."""
        while replica.waiting and replica.occupied < replica.slots:
            number = replica.waiting.pop(0)
            self.sequences[number] = self._sequence(group, replica, self.rollouts.lengths[number])
            prompt = number // self.rollouts.copies
            if prompt != replica.prompt:
                self._prefill(group, replica, [self.rollouts.prompt])
            replica.prompt = prompt
            replica.occupied += 1
            replica.cached += self.rollouts.prompt
            self._starting.append(number)

    def _sequence(self, group: int, replica: SimulatedReplica, length: int) -> _Active:
        turns = -(-self.costs.turns(length) // self.costs.merged)
        reply = int(length * self.costs.tool_share / turns) if turns > 1 else 0
        decoded = max(1, length // turns - reply)
        last = max(1, length - (turns - 1) * (decoded + reply))
        return _Active(group, replica, turns, decoded, reply, last)

    def _prefill(self, group: int, replica: SimulatedReplica, tokens: Sequence[float]) -> None:
        replicas = self.groups[group].replicas
        prompts = self._prefills.setdefault(group, [[] for _ in replicas])
        prompts[replicas.index(replica)] += tokens

    def _flush(self) -> None:
        """Run the prefills of this moment, start their sequences, and plan the groups' events."""
        for group in list(self._prefills):
            # A decode step that runs is finished first.
            self._advance(group)
        for group, prompts in self._prefills.items():
            self.groups[group].prefill(prompts)
        self._prefills.clear()
        for number in self._starting:
            sequence = self.sequences[number]
            sequence.is_decoding = True
            length = sequence.decoded if sequence.turns > 1 else sequence.last
            self.groups[sequence.group].start(number, sequence.replica, length)
            self._changed.add(sequence.group)
        self._starting.clear()
        for group in sorted(self._changed):
            self._versions[group] += 1
            if self.groups[group].is_decoding:
                act = functools.partial(self._group_event, group, self._versions[group])
                self._push(self.groups[group].next_end(), act)
        self._changed.clear()

    def _turn_ended(self, number: int) -> None:
        """Call a tool, or finish the sequence."""
        sequence = self.sequences[number]
        sequence.turns, sequence.is_decoding = sequence.turns - 1, False
        if sequence.turns:
            seconds = self.costs.tool_s * self.costs.merged
            self._push(self.now + seconds, functools.partial(self._reply, number))
            return
        self._release(number, self.rollouts.prompt + self.rollouts.lengths[number])
        self.ends[number] = self.now
        self.verifiers[sequence.group].pending.append((number, sequence.replica))
        self._verify(sequence.group)

    def _release(self, number: int, tokens: float) -> None:
        """Free the slot of a sequence and its cached tokens."""
        sequence = self.sequences.pop(number)
        sequence.replica.occupied -= 1
        sequence.replica.cached -= tokens

    def _reply(self, number: int) -> None:
        """A tool has answered: prefill its result."""
        sequence = self.sequences.get(number)
        if sequence is not None:
            merged = self.costs.merged
            self._prefill(sequence.group, sequence.replica, [sequence.reply / merged] * merged)
            sequence.replica.cached += sequence.reply
            self._starting.append(number)

    def _verify(self, group: int) -> None:
        """Start verifiers on free cores; one verdict's tests use those that nobody waits for."""
        verifiers, costs = self.verifiers[group], self.costs
        while verifiers.pending and verifiers.free:
            number, replica = verifiers.pending.popleft()
            if number not in self.cancelled:
                width = max(1, min(costs.side, verifiers.free - len(verifiers.pending)))
                started = _Verification(number, replica, 0, costs.verify_s, self.now)
                self._widen(group, started, width)
        # The tests of running verifications start on cores that are free by now.
        for found in list(verifiers.running) if verifiers.free else ():
            if more := min(costs.side - found.width, verifiers.free):
                self._widen(group, found, more)

    def _widen(self, group: int, found: _Verification, more: int) -> None:
        """Run a verification on `more` further cores from now on."""
        verifiers = self.verifiers[group]
        verifiers.free -= more
        found.left -= found.width * (self.now - found.since)
        found.width, found.since = found.width + more, self.now
        if found in verifiers.running:
            verifiers.running.remove(found)
        if found.width < self.costs.side:
            verifiers.running.append(found)
        act = functools.partial(self._verdict, group, found, found.width)
        self._push(self.now + found.left / found.width, act)

    def _verdict(self, group: int, found: _Verification, width: int) -> None:
        if width != found.width:
            return  # it has been widened, and ends earlier
        verifiers, number, replica = self.verifiers[group], found.number, found.replica
        if found in verifiers.running:
            verifiers.running.remove(found)
        verifiers.free += width
        self._verify(group)
        if number in self.cancelled:
            return
        self.verified = self.now
        self.queues[replica].report(number, self.rollouts.rewards[number])
        if self.is_done is not None:
            for queue in self.distinct:
                queue.check()
                self._cancel(queue.poll(0, 0).cancelled)
            self._offer()

    def _offer(self) -> None:
        """Let the emptiest replicas take what may start by now."""
        while True:
            free = (
                (replica.taken, n, k)
                for n, group in enumerate(self.groups)
                for k, replica in enumerate(group.replicas)
            )
            taken, group, k = min(free)
            replica = self.groups[group].replicas[k]
            if taken >= replica.slots or not self._take(group, replica):
                return

    def _cancel(self, numbers: Sequence[int]) -> None:
        """Drop requests that cannot train any more."""
        for number in numbers:
            self.cancelled.add(number)
            sequence = self.sequences.get(number)
            if sequence is not None and sequence.is_decoding:
                for ended, _ in self.groups[sequence.group].advance(self.now):
                    self._turn_ended(ended)
                self._changed.add(sequence.group)
                sequence = self.sequences.get(number)
            if sequence is None:
                self._drop_waiting(number)
                continue
            self._starting = [started for started in self._starting if started != number]
            left = max(0, sequence.turns - 1) * (sequence.decoded + sequence.reply)
            if sequence.is_decoding:
                left += self.groups[sequence.group].drop(number)
            whole = self.rollouts.prompt + self.rollouts.lengths[number]
            self._release(number, max(self.rollouts.prompt, whole - left))

    def _drop_waiting(self, number: int) -> None:
        for group in self.groups:
            for replica in group.replicas:
                if number in replica.waiting:
                    replica.waiting.remove(number)

    def _result(self) -> RolloutTime:
        end = max((t for n, t in self.ends.items() if n not in self.cancelled), default=0.0)
        total = max(end, self.verified)
        replicas = [replica for group in self.groups for replica in group.replicas]
        last = max(self.groups, key=lambda group: group.now)
        busy = sum(replica.busy_s for replica in replicas) / len(replicas)
        return RolloutTime(
            generation_s=end,
            verify_s=total - end,
            idle=max(0.0, 1.0 - busy / total) if total else 0.0,
            prefill_s=last.prefill_s,
            terms=last.terms,
            tokens=sum(group.row_steps for group in self.groups),
            prefilled=round(sum(group.prefilled for group in self.groups)),
            most_cached=round(max(group.most_cached for group in self.groups)),
            steps=last.steps,
        )
