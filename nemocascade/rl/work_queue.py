"""The queue of a step's rollouts: replicas take prompts and copies as their slots become free.

Work items are requests, one for each copy of a prompt, in chunks that share the prefill of their
prompt. A replica takes the next chunks by a counter in the job's store, so none is taken twice, and
a replica is idle only if nothing is left. Chunks are small where there are few rollouts for each
replica. The expected longest start first. Which replica generates a rollout, and when, does not
change it: a draw depends on the seed, the request's id, the position and the logits.

With a `Drawing`, replicas also share their verdicts through the store. Each of them derives from
these which candidates may start, and which are cancelled.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch.distributed as dist

from nemocascade.rl.drawing import Drawing
from nemocascade.rl.tasks import GroupRequest, Task
from nemocascade.rl.verification import Verification
from nemocascade.rollout.engine import Request, Supply
from nemocascade.runtime.watchdog import job_store
from nemocascade.runtime.world import World

ROUNDS = 8
"""Chunks that a replica takes on average, unless they would be smaller than one request."""
LISTEN_S = 0.2
"""Interval for reading the store, if it is shared with other replicas."""


class _Requests(Mapping[int, Request]):
    """The requests of groups by id, made when they are asked for: prompts are kept as arrays."""

    def __init__(self, groups: Sequence[GroupRequest]) -> None:
        self._groups = {number: group for group in groups for number in group.ids}
        if len(self._groups) < sum(len(group.ids) for group in groups):
            raise ValueError("two requests have one id: their random numbers would be the same")
        self._last: tuple[Task | None, tuple[int, ...]] = (None, ())

    def __getitem__(self, number: int) -> Request:
        group = self._groups[number]
        task, prompt = self._last
        if task is not group.task:
            prompt = tuple(group.task.ids.tolist())
            self._last = (group.task, prompt)
        home = group.task.number if group.is_compared else None
        return Request(number, prompt, group.sampling, home)

    def __iter__(self) -> Iterator[int]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)


class Board:
    """A counter of tickets, and a log of verdicts, in a store that all replicas use. Thread-safe.

    name: prefix of the keys, the same on all ranks and different for each queue.
    """

    def __init__(self, store: Any, name: str) -> None:
        self._store, self._name = store, name

    def take(self, count: int) -> int:
        """The first of the next `count` tickets, counted from 0; 0 tickets only reads the count."""
        return int(self._store.add(f"{self._name}/tickets", count)) - count

    def report(self, line: str) -> None:
        """Append a line to the log."""
        number = self._store.add(f"{self._name}/lines", 1) - 1
        self._store.set(f"{self._name}/line_{number}", line)

    def lines(self, start: int) -> list[str]:
        """The lines of the log from number `start` on, as far as they are complete; never waits."""
        count = self._store.add(f"{self._name}/lines", 0)
        keys = [f"{self._name}/line_{number}" for number in range(start, count)]
        # Lines are counted before they are written. A read that waits for one would hold the
        # connection, which the thread that writes it may need.
        while keys and not self._store.check(keys):
            keys.pop()
        return [line.decode() for line in self._store.multi_get(keys)] if keys else []

    def clear(self) -> None:
        """Delete the keys; no replica may use them any more."""
        for number in range(self._store.add(f"{self._name}/lines", 0)):
            self._store.delete_key(f"{self._name}/line_{number}")
        for name in ("lines", "tickets"):
            self._store.delete_key(f"{self._name}/{name}")


class Queues:
    """The queues of a job, one after the other; every rank makes the same calls.

    ahead: number of groups that the last one has started beyond those that were needed.
    """

    def __init__(self, world: World) -> None:
        self.world, self.ahead = world, 0
        self._lengths: dict[str, float] = {}
        self._name, self._number = "", 0
        self._store: Any = None
        self._last: Board | None = None

    def open(
        self,
        groups: Sequence[GroupRequest],
        drawing: Drawing | None = None,
        *,
        restored: Collection[int] = (),
        is_journalled: bool = False,
    ) -> WorkQueue:
        """A queue of these groups; see `WorkQueue`."""
        world = self.world
        if self._store is None:
            # A launcher's store outlives the job.
            self._name = world.broadcast_object(uuid.uuid4().hex)
            self._store = job_store() or dist.distributed_c10d._get_default_store()
        self._number += 1
        # The ranks of a single replica all take the same, each by a counter of its own. Verdicts
        # come from any of them.
        is_ordered = world.dp_size == 1 and drawing is None and not is_journalled
        store = dist.HashStore() if world.size == 1 or is_ordered else self._store
        board = Board(store, f"nemocascade/rollouts/{self._name}/{self._number}")
        return WorkQueue(
            groups,
            board,
            world,
            drawing=drawing,
            lengths=self._lengths,
            restored=restored,
            is_journalled=is_journalled,
        )

    def close(self, queue: WorkQueue, needed: int, lengths: Mapping[str, float]) -> None:
        """End a queue after all ranks have left it. needed: number of its groups that were needed.
        lengths: mean length of their rollouts, by the id of their prompt."""
        self.ahead = queue.started - needed
        self._lengths |= lengths
        # Other ranks may still read the counters of this queue, but not those of the one before.
        if self._last is not None and self.world.is_main:
            self._last.clear()
        self._last = queue.board


class WorkQueue:
    """`Work` that all replicas share; every rank passes the same arguments.

    groups: in the order of their numbers. drawing: the groups are candidates, which start and are
    cancelled as it says. lengths: expected length of the rollouts of a prompt, by its id, where it
    is known, to start the longest first. listen_s: interval in seconds for reading the board, if
    other replicas share it. restored: ids of requests whose rollouts a journal has; nobody takes
    them. is_journalled: a later start may restore some of the rollouts and generate the others, so
    no prompts are prefilled together: what a prompt shares its prefill with changes its rounding.
    """

    verification: Verification | None = None
    """Verification of the rollouts on this rank; its failure ends the polls."""

    requests: Mapping[int, Request]

    def __init__(
        self,
        groups: Sequence[GroupRequest],
        board: Board,
        world: World,
        *,
        drawing: Drawing | None = None,
        lengths: Mapping[str, float] = MappingProxyType({}),
        listen_s: float = LISTEN_S,
        restored: Collection[int] = (),
        is_journalled: bool = False,
    ) -> None:
        self.listen_s = listen_s
        self.groups, self.board, self.drawing, self.world = groups, board, drawing, world
        self.replicas = replicas = world.dp_size
        self.is_ordered = replicas == 1 and drawing is None and not is_journalled
        self._progress = (0, 0)
        self.requests = _Requests(groups)
        self._index = {number: n for n, group in enumerate(groups) for number in group.ids}
        first = len(groups) if drawing is None else drawing.limit
        self._restored = restored
        wanted = sum(n not in restored for group in groups[:first] for n in group.ids)
        size = wanted if replicas == 1 else wanted // (ROUNDS * replicas)

        # In an ordered queue, what has been generated before must not change what is packed.
        known = {} if self.is_ordered else lengths

        def expected(n: int) -> float:
            return known.get(groups[n].task.prompt.id, groups[n].sampling.max_tokens)

        order = sorted(range(first), key=expected, reverse=True)
        ordered = [groups[n] for n in (*order, *range(first, len(groups)))]
        self._chunks = _chunks(ordered, max(1, size), restored)
        self._first = [min(self._index[number] for number in chunk) for chunk in self._chunks]
        self._allowed, self._share = len(self._chunks), -(-wanted // replicas)
        self._taken: list[int] = []
        self._read = 0
        self._listened = self._polled = float("-inf")
        self._cutoff = self._told = len(groups)
        self._is_open = bool(self._chunks)
        self._listen()

    def check(self) -> None:
        """Implements `Work.check`: a verifier that has failed on this rank ends the run. Every rank
        learns here which verdicts are needless."""
        if self.verification is not None:
            self.verification.check()
        self._listen()

    def poll(self, free_slots: int, busy: int) -> Supply:
        """Implements `Work.poll`; `check` has read the verdicts."""
        cancelled: list[int] = []
        if self._cutoff < self._told:
            cancelled = [n for n in self._taken if self._index[n] >= self._cutoff]
            self._told = self._cutoff
        taken = self._take(free_slots, busy) if self._is_open else []
        self._taken += taken
        return Supply(taken, cancelled, self._is_open)

    def idle(self) -> None:
        """Implements `Work.idle`: tell the watchdog that the rank waits, for its own verifiers or
        for other ranks."""
        verification = self.verification
        if verification is None or not verification.pending:
            self.world.watch.waits("verdicts of other ranks")
            return
        self.world.watch.waits("")
        progress = (verification.pending, verification.activity)
        if progress != self._progress:
            self.world.watch.progress(f"{verification.pending} texts without a verdict")
            self._progress = progress

    def report(self, number: int, reward: float | None) -> None:
        """Share the verdict on request `number`, if the queue draws by verdicts. Thread-safe."""
        if self.drawing is not None:
            self.board.report(f"{number} {reward!r}")

    def is_needed(self, number: int) -> bool:
        """False for a request that is cancelled. Thread-safe."""
        return self._index[number] < self._cutoff

    @property
    def is_empty(self) -> bool:
        """True if no request is left to be generated, because all are restored."""
        return not self._chunks

    @property
    def started(self) -> int:
        """Number of groups of which a request was taken, by any replica, or restored."""
        taken = itertools.chain(self._restored, *self._chunks[: self.board.take(0)])
        return len({self._index[number] for number in taken})

    def _take(self, free_slots: int, busy: int) -> list[int]:
        """Take the next chunks, as many as there are free slots, and at most this replica's share
        of all requests at a time: the others need work as well."""
        now = time.monotonic()
        if self.replicas > 1 and now - self._polled < self.listen_s:
            return []
        free_slots = min(free_slots, self._share - busy)
        if free_slots <= 0:
            return []
        first = last = self.board.take(0)
        while last < self._allowed and free_slots > 0:
            size = len(self._chunks[last])
            if self.replicas > 1 and first < last and size > free_slots:
                # Less rather than more: the other replicas need work as well.
                break
            free_slots, last = free_slots - size, last + 1
        if first >= self._allowed:
            # Nothing may be taken until the next draw; without one, never again.
            self._polled = now
            self._is_open = self.drawing is not None
        if last == first:
            return []
        count = last - first
        # Another replica may have taken some in between; then these are later ones.
        first = self.board.take(count)
        found = [n for chunk in self._chunks[first : first + count] for n in chunk]
        return [number for number in found if self.is_needed(number)]

    def _listen(self) -> None:
        """Read the verdicts of all replicas, and what follows from them."""
        drawing, now = self.drawing, time.monotonic()
        if drawing is None or (self.world.size > 1 and now - self._listened < self.listen_s):
            return
        lines = self.board.lines(self._read)
        if lines or self._listened == float("-inf"):
            for line in lines:
                number, reward = line.split()
                drawing.report(
                    self._index[int(number)], None if reward == "None" else float(reward)
                )
            self._read += len(lines)
            self._cutoff, limit = drawing.cutoff, drawing.limit
            self._is_open = drawing.needed is None
            may_start = [k for k, first in enumerate(self._first) if first < limit]
            # A later candidate may precede one of them, if it is expected to be longer.
            self._allowed = max(may_start, default=-1) + 1
            allowed = sum(map(len, self._chunks[: self._allowed]))
            self._share = -(-allowed // self.replicas)
        self._listened = now


def _chunks(
    groups: Sequence[GroupRequest], size: int, restored: Collection[int]
) -> list[list[int]]:
    """Request ids in chunks of one prompt, of at most `size` unless a group must stay whole. Those
    that are restored are excluded."""
    chunks: list[list[int]] = []
    before: bytes | None = None
    for group in groups:
        ids = [number for number in group.ids if number not in restored]
        parts = [ids] if group.is_whole else _split(ids, size)
        for part in parts:
            is_same = not group.is_whole and before == group.task.ids.tobytes()
            if is_same and len(chunks[-1]) + len(part) <= size:
                chunks[-1].extend(part)
            elif part:
                chunks.append(part)
            before = None if group.is_whole else group.task.ids.tobytes()
    return chunks


def _split(ids: list[int], size: int) -> list[list[int]]:
    return [ids[n : n + size] for n in range(0, len(ids), size)]
