"""Simulated rollouts of a step: the queue's replicas, with dynamic filtering and without.

    python benchmarks/end_to_end/rollout_queue.py --replicas 32 --slots 128 --share 0.6

Only the engine is simulated: `WorkQueue` and `Drawing` are those of a stage. Assumptions: response
lengths are log-normal and cut at the limit, a decode step takes the same time whatever the number
of sequences, prefill and verification take none, and replicas look into the queue every `poll`
tokens. The success rates of informative prompts are uniform in 0..1.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch.distributed as dist

from nemocascade.rl import work_queue
from nemocascade.rl.drawing import Drawing, InformativeShare
from nemocascade.rl.tasks import Task
from nemocascade.rl.work_queue import Board, GroupRequest, WorkQueue
from nemocascade.rollout.engine import Sampling
from nemocascade.types import Prompt


@dataclass
class Rollouts:
    """The rollouts of a step: their lengths in tokens and rewards, by request id."""

    copies: int
    is_informative: list[bool]
    lengths: list[float]
    rewards: list[float]

    @property
    def groups(self) -> list[GroupRequest]:
        """A request for the rollouts of each prompt."""
        prompts = [Prompt(str(n), "d", (), {}) for n in range(len(self.is_informative))]
        return [
            GroupRequest(
                Task(prompt, np.array([1, n], np.int32), n),
                range(n * self.copies, (n + 1) * self.copies),
                Sampling(),
            )
            for n, prompt in enumerate(prompts)
        ]

    def first_informative(self, wanted: int) -> int:
        """Number of prompts up to the last of the first `wanted` informative ones."""
        found = [n + 1 for n, informative in enumerate(self.is_informative) if informative]
        return found[wanted - 1] if len(found) >= wanted else len(self.is_informative)


def draw_rollouts(
    seed: int, prompts: int, copies: int, share: float, *, median: float = 8192, limit: int = 49152
) -> Rollouts:
    """Random rollouts. share: probability of a prompt whose rewards differ."""
    rng = random.Random(seed)
    informative, lengths, rewards = [], [], []
    for _ in range(prompts):
        informative.append(rng.random() < share)
        group = [float(rng.random() < 0.5)] * copies
        while informative[-1] and len(set(group)) == 1:
            rate = rng.random()
            group = [float(rng.random() < rate) for _ in range(copies)]
        rewards += group
        lengths += [min(limit, median * rng.lognormvariate(0, 1)) for _ in range(copies)]
    return Rollouts(copies, informative, lengths, rewards)


@dataclass
class Replica:
    """A simulated engine. running: end and id of its rollouts, as a heap. waiting: ids without a
    slot. first_idle: when it last ran dry."""

    queue: WorkQueue
    slots: int
    running: list[tuple[float, int]] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    busy: float = 0.0

    def poll(self, now: float, rollouts: Rollouts) -> bool:
        """Take and cancel requests at a time; False once the queue is closed."""
        room = self.slots - len(self.running) - len(self.waiting)
        self.queue.check()
        supply = self.queue.poll(room, self.slots - room)
        cancelled = set(supply.cancelled)
        if cancelled:
            self.running = [pair for pair in self.running if pair[1] not in cancelled]
            heapq.heapify(self.running)
        self.waiting = [n for n in (*self.waiting, *supply.taken) if n not in cancelled]
        self.start(now, rollouts)
        return supply.is_open

    def start(self, now: float, rollouts: Rollouts) -> None:
        """Start what waits, in free slots."""
        while self.waiting and len(self.running) < self.slots:
            number = self.waiting.pop(0)
            heapq.heappush(self.running, (now + rollouts.lengths[number], number))

    def advance(self, now: float, until: float, rollouts: Rollouts) -> list[int]:
        """Generate; returns the ids of the rollouts that end."""
        ended = []
        while self.running and self.running[0][0] <= until:
            end, number = heapq.heappop(self.running)
            ended.append(number)
            self.start(end, rollouts)
        self.busy += (until - now) * bool(self.running or ended)
        return ended


@dataclass(frozen=True)
class Step:
    """A simulated step. tokens: decode steps until it ends. needed, ahead: prompts that were needed
    and started in vain. busy: mean fraction of the time that a replica has work. least_taken:
    fewest requests that a replica has taken."""

    tokens: float
    needed: int
    ahead: int
    busy: float
    least_taken: int


def simulate(
    rollouts: Rollouts,
    *,
    replicas: int,
    slots: int,
    poll: float = 400.0,
    wanted: int = 0,
    share: InformativeShare | None = None,
    margin: float = 1.0,
    order: random.Random | None = None,
) -> Step:
    """Simulate a step. wanted: number of informative prompts; 0 generates all prompts. order: of
    the replicas' polls, random if it is given."""
    world = cast(Any, SimpleNamespace(dp_size=replicas, size=replicas))
    board = Board(dist.HashStore(), "step")
    groups, before = rollouts.groups, work_queue._LISTEN_S
    work_queue._LISTEN_S = 0.0  # time is simulated
    try:
        found = []
        for _ in range(replicas):
            drawing = None
            if wanted:
                most = len(groups)
                drawing = Drawing(
                    wanted, most, rollouts.copies, share or InformativeShare(), margin
                )
            found.append(Replica(WorkQueue(groups, board, world, drawing=drawing), slots))
        return _run(found, rollouts, poll, order)
    finally:
        work_queue._LISTEN_S = before


def _run(
    replicas: Sequence[Replica], rollouts: Rollouts, poll: float, order: random.Random | None
) -> Step:
    now, left = 0.0, list(replicas)
    last, taken = 0.0, dict.fromkeys(range(len(replicas)), 0)
    while left or any(r.running for r in replicas):
        polled = list(left)
        if order is not None:
            order.shuffle(polled)
        still_open = {id(r) for r in polled if r.poll(now, rollouts)}
        left = [r for r in left if id(r) in still_open]
        for replica in replicas:
            for number in replica.advance(now, now + poll, rollouts):
                last = now + poll
                replica.queue.report(number, rollouts.rewards[number])
        now += poll
    for n, replica in enumerate(replicas):
        taken[n] = len(replica.queue._taken)
    queue = replicas[0].queue
    needed = len(queue.groups) if queue.drawing is None else queue.drawing.needed or 0
    return Step(
        tokens=last,
        needed=needed,
        ahead=queue.started - needed,
        busy=fmean(r.busy for r in replicas) / last,
        least_taken=min(taken.values()),
    )


def filtered_over_plain(
    *, replicas: int, slots: int, share: float, steps: int, margin: float, seed: int = 1
) -> dict[str, float]:
    """Mean time of steps with dynamic filtering over that of steps without, for 128 x 16."""
    plain = [
        simulate(draw_rollouts(seed + n, 128, 16, 1.0), replicas=replicas, slots=slots).tokens
        for n in range(steps)
    ]
    running = InformativeShare()
    found = []
    for n in range(steps):
        rollouts = draw_rollouts(seed + n, 512, 16, share)
        step = simulate(
            rollouts, replicas=replicas, slots=slots, wanted=128, share=running, margin=margin
        )
        running.observe(sum(rollouts.is_informative[: step.needed]), step.needed)
        found.append(step)
    ratios = [step.tokens / fmean(plain) for step in found]
    return {
        "ratio": fmean(ratios),
        "first_ratio": ratios[0],
        "worst_ratio": max(ratios),
        "needed": fmean(step.needed for step in found),
        "ahead": fmean(step.ahead for step in found),
        "plain_tokens": fmean(plain),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--replicas", type=int, default=32)
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--margin", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=10)
    print(json.dumps(filtered_over_plain(**vars(parser.parse_args())), indent=1))


if __name__ == "__main__":
    main()
