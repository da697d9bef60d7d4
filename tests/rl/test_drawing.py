"""Dynamic filtering as a stream, and the queue of rollouts: who takes what changes no result."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch.distributed as dist

from benchmarks.end_to_end.rollout_queue import (
    Rollouts,
    draw_rollouts,
    filtered_over_plain,
    simulate,
)
from nemocascade.recipe import RolloutConfig
from nemocascade.rl.collector import Collector, Group, decisive_reward
from nemocascade.rl.drawing import Drawing, InformativeShare
from nemocascade.rl.gathering import gather
from nemocascade.rl.rollouts import Rollout
from nemocascade.rl.tasks import Task, TaskStream
from nemocascade.rl.work_queue import Board, GroupRequest, WorkQueue
from nemocascade.rollout.engine import Sampling
from nemocascade.types import Prompt, Verdict

LAYOUTS = [(1, 64), (2, 7), (5, 3), (16, 2)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("replicas", "slots"), LAYOUTS)
def test_the_first_informative_groups_are_found(replicas: int, slots: int, seed: int) -> None:
    """By any number of replicas, in any order, with any margin; nothing needed is cancelled."""
    rollouts = draw_rollouts(seed, 40, 4, 0.6)
    step = simulate(
        rollouts,
        replicas=replicas,
        slots=slots,
        wanted=10,
        margin=seed,
        order=random.Random(seed),
        poll=2000,
    )
    assert step.needed == rollouts.first_informative(10) < 40
    assert 0 <= step.ahead <= 40 - step.needed


def test_all_candidates_start_if_too_few_are_informative() -> None:
    rollouts = draw_rollouts(1, 24, 4, 0.1)
    step = simulate(rollouts, replicas=3, slots=8, wanted=12)
    assert (step.needed, step.ahead) == (24, 0)


def test_filtering_at_256_gpus_costs_no_second_wave() -> None:
    """IF-RL: 128 x 16, limit 49,152, 32 replicas of TP8 with 128 slots, share 0.6."""
    found = filtered_over_plain(replicas=32, slots=128, share=0.6, steps=2, margin=1.0)
    assert found["ratio"] <= 1.15
    assert found["needed"] > 190


def test_few_prompts_with_many_copies_keep_every_replica_busy() -> None:
    rollouts = draw_rollouts(5, 16, 64, 1.0)
    step = simulate(rollouts, replicas=64, slots=64)
    assert step.least_taken == 16
    # Whole prompts would leave 48 of 64 replicas without work.
    assert step.busy > 0.5


def test_the_longest_start_first() -> None:
    """By earlier lengths of a prompt, otherwise by the limit, otherwise in the order of numbers."""
    limits = (100, 900, 900, 100)
    groups = [
        GroupRequest(
            Task(Prompt(str(n), "d", (), {}), np.array([1, n], np.int32), n),
            range(n, n + 1),
            Sampling(max_tokens=m),
        )
        for n, m in enumerate(limits)
    ]

    def order(lengths: dict[str, float]) -> list[int]:
        world = cast(Any, SimpleNamespace(dp_size=2, size=2))
        board = Board(dist.HashStore(), "x")
        queue = WorkQueue(groups, board, world, lengths=lengths)
        return [n for _ in range(2) for n in queue.poll(8, 0).taken]

    assert order({}) == [1, 2, 0, 3]
    assert order({"3": 950.0, "1": 20.0}) == [3, 2, 0, 1]


def test_the_chance_of_a_candidate_falls_with_equal_rewards() -> None:
    drawing = Drawing(4, 40, 8, InformativeShare(6.0, 8.0), margin=0.0)
    limits = [drawing.limit]
    for _ in range(8):
        for index in range(4):
            drawing.report(index, 1.0)
        limits.append(drawing.limit)
    assert limits == sorted(limits)
    assert limits[0] == 6  # 4 / 0.75
    assert limits[4] == 8  # four candidates of 0.41, and 0.75 each
    assert limits[-1] > 9


class Stream:
    """Tasks by number."""

    def __init__(self) -> None:
        self.taken = 0
        self.observed: list[int] = []

    def peek(self, count: int, step: int) -> list[Task]:
        numbers = range(self.taken, self.taken + count)
        return [Task(Prompt(str(n), "d", (), {}), np.array([1, n], np.int32), n) for n in numbers]

    def take(self, count: int, step: int) -> list[Task]:
        found = self.peek(count, step)
        self.taken += count
        return found

    def observe(self, results: Sequence[tuple[Prompt, Sequence[Verdict]]]) -> None:
        self.observed += [int(prompt.id) for prompt, _ in results]


class Shuffled:
    """A collector whose rollouts end in a random order. Rewards and truncation are functions of the
    request's id."""

    environments: ClassVar = {"d": SimpleNamespace(collective=False)}

    def __init__(self, settings: RolloutConfig, rollouts: Rollouts, seed: int) -> None:
        self.settings, self.rollouts, self.rng = settings, rollouts, random.Random(seed)
        self.queues = SimpleNamespace(ahead=0)

    def requests(self, tasks: Sequence[Task], copies: int) -> list[GroupRequest]:
        return [
            GroupRequest(t, range(t.number * copies, (t.number + 1) * copies), Sampling())
            for t in tasks
        ]

    def rollout(self, number: int) -> Rollout:
        reward = self.rollouts.rewards[number]
        verdict = Verdict(None, "killed") if number % 11 == 0 else Verdict(reward)
        return Rollout(4, 3, 1, verdict, truncated=number % 3 == 0)

    def generate(self, wanted: Sequence[GroupRequest], drawing: Drawing) -> list[Group]:
        world = cast(Any, SimpleNamespace(dp_size=1, size=1))
        queue = WorkQueue(wanted, Board(dist.HashStore(), "x"), world, drawing=drawing)
        running: list[int] = []
        is_open = True
        while is_open:
            queue.check()
            taken, cancelled, is_open = queue.poll(13 - len(running), len(running))
            running = [n for n in (*running, *taken) if n not in set(cancelled)]
            if running:
                number = running.pop(self.rng.randrange(len(running)))
                queue.report(number, decisive_reward(self.rollout(number), self.settings))
        assert drawing.needed is not None
        self.queues.ahead = queue.started - drawing.needed
        return [
            Group(g.task, tuple(self.rollout(n) for n in g.ids)) for g in wanted[: drawing.needed]
        ]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("penalties", [{}, {"stop_properly_penalty_coef": 0.0}])
def test_the_groups_are_those_of_drawing_one_after_another(
    seed: int, penalties: dict[str, float]
) -> None:
    settings = RolloutConfig(
        prompts_per_step=5,
        rollouts_per_prompt=3,
        max_draws=3,
        **penalties,  # type: ignore[arg-type]
    )
    rollouts = draw_rollouts(seed, 60, 3, 0.5)
    collector, stream, share = Shuffled(settings, rollouts, seed), Stream(), InformativeShare()
    first = 0
    for step in range(3):
        found = gather(cast(Collector, collector), cast(TaskStream, stream), settings, step, share)
        # One after another: rounds of as many tasks as are missing.
        tried = informative = 0
        while informative < 5 and tried < 15:
            for number in range(first + tried, first + tried + min(5 - informative, 15 - tried)):
                rewards = {
                    decisive_reward(collector.rollout(n), settings)
                    for n in range(3 * number, 3 * number + 3)
                }
                informative += len(rewards - {None}) > 1
                tried += 1
        assert [g.task.number for g in found.tried] == list(range(first, first + tried))
        assert (found.drawn, len(found.groups)) == (tried, informative)
        first += tried
        assert stream.taken == first
        assert stream.observed == list(range(first))


def test_a_line_that_is_counted_but_not_written_is_not_waited_for() -> None:
    """The thread that writes it may need the same connection."""
    store = dist.HashStore()
    board = Board(store, "x")
    board.report("0 1.0")
    store.add("x/lines", 1)
    assert board.lines(0) == ["0 1.0"]
    store.set("x/line_1", "1 None")
    assert board.lines(1) == ["1 None"]
