"""Dynamic filtering as a stream, and the queue of rollouts: who takes what changes no result."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch.distributed as dist

from nemocascade.plan.generation import StepTerms
from nemocascade.plan.lengths import Lengths
from nemocascade.plan.replicas import DecodeGroup
from nemocascade.plan.rollout_events import RolloutEvents, Rollouts, RolloutTime
from nemocascade.plan.workload import EpisodeCosts, StepWork
from nemocascade.recipe import RolloutConfig
from nemocascade.rl.collector import Collector, Group, decisive_reward
from nemocascade.rl.drawing import Drawing, InformativeShare
from nemocascade.rl.gathering import gather
from nemocascade.rl.rollouts import Rollout
from nemocascade.rl.tasks import GroupRequest, Task, TaskStream
from nemocascade.rl.work_queue import Board, WorkQueue
from nemocascade.rollout.engine import Sampling
from nemocascade.stages.simulation import draw_rollouts, drawings, open_queues
from nemocascade.types import Prompt, Verdict

LAYOUTS = [(1, 64), (2, 7), (5, 3), (16, 2)]


class EqualSteps:
    """A decode step takes a second, whatever its rows; prefills take none."""

    members = 1

    def step(self, rows: float, shared: float, cached: float) -> StepTerms:
        return StepTerms(host=1.0)

    def prefill(self, tokens: float) -> float:
        return 0.0


def work_of(wanted: int, most: int, copies: int, share: float, margin: float = 1.0) -> StepWork:
    lengths = Lengths(49_152, 8192, 1.0)
    return StepWork(wanted, copies, most, share, margin, 1, lengths, EpisodeCosts(), 0)


@dataclass(frozen=True)
class Simulated:
    """A simulated step. needed, ahead: prompts that were needed, and started in vain."""

    time: RolloutTime
    needed: int
    ahead: int


def simulate(
    work: StepWork,
    rollouts: Rollouts,
    replicas: int,
    slots: int,
    *,
    share: InformativeShare | None = None,
    seed: int = 1,
    apart: bool = False,
) -> Simulated:
    """Simulate a step. apart: each replica has a queue of its own, as in a stage."""
    found = drawings(work, replicas if apart else 1, share)
    queues = open_queues(work, rollouts, replicas, found)
    each = queues if len(queues) == replicas else queues * replicas
    groups = [DecodeGroup(EqualSteps(), slots) for _ in range(replicas)]
    is_done = (lambda: found[0].needed is not None) if found else None
    order = random.Random(seed)
    events = RolloutEvents(rollouts, work.costs, each, groups, is_done=is_done, order=order)
    time = events.run()
    needed = (found[0].needed or 0) if found else len(queues[0].groups)
    assert not events.cancelled & set(range(needed * work.copies)), "a needed one was cancelled"
    return Simulated(time, needed, queues[0].started - needed)


def first_informative(rollouts: Rollouts, wanted: int) -> int:
    """Number of prompts up to the last of the first `wanted` informative ones."""
    copies, rewards = rollouts.copies, rollouts.rewards
    groups = [rewards[n : n + copies] for n in range(0, len(rewards), copies)]
    found = [n + 1 for n, group in enumerate(groups) if len(set(group)) > 1]
    return found[wanted - 1] if len(found) >= wanted else len(groups)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("replicas", "slots"), LAYOUTS)
def test_the_first_informative_groups_are_found(replicas: int, slots: int, seed: int) -> None:
    """By any number of replicas, in any order, with any margin; nothing needed is cancelled."""
    work = work_of(10, 40, 4, 0.6, margin=seed)
    rollouts = draw_rollouts(work, seed)
    step = simulate(
        work, rollouts, replicas, slots, share=InformativeShare(), seed=seed, apart=True
    )
    assert step.needed == first_informative(rollouts, 10) < 40
    assert 0 <= step.ahead <= 40 - step.needed


def test_all_candidates_start_if_too_few_are_informative() -> None:
    work = work_of(12, 24, 4, 0.1)
    step = simulate(work, draw_rollouts(work, 1), 3, 8, share=InformativeShare())
    assert (step.needed, step.ahead) == (24, 0)


def test_filtering_at_256_gpus_costs_no_second_wave() -> None:
    """IF-RL: 128 x 16, limit 49,152, 32 replicas of TP8 with 128 slots, share 0.6. The first step
    does not know the share yet."""
    plain, filtered = work_of(128, 0, 16, 1.0), work_of(128, 512, 16, 0.6)
    share, ratios = InformativeShare(), []
    for seed in range(1, 6):
        before = simulate(plain, draw_rollouts(plain, seed), 32, 128)
        step = simulate(filtered, draw_rollouts(filtered, seed), 32, 128, share=share)
        share.observe(128, step.needed)
        ratios.append(step.time.seconds / before.time.seconds)
        assert step.needed > 190
    assert sum(ratios) / len(ratios) <= 1.15


def test_few_prompts_with_many_copies_keep_every_replica_busy() -> None:
    """Agentic RL: whole prompts would leave 48 of 64 replicas without work."""
    work = work_of(16, 0, 64, 1.0)
    rollouts = draw_rollouts(work, 5)
    [queue] = open_queues(work, rollouts, 64, [])
    taken = [len(queue.poll(64, 0).taken) for _ in range(64)]
    assert taken == [16] * 64
    assert simulate(work, rollouts, 64, 64).time.idle < 0.5


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
    rollouts = draw_rollouts(work_of(60, 0, 3, 0.5), seed)
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


class MixedStream(Stream):
    """Tasks of two domains in turn."""

    shares: ClassVar = {"easy": 1.0, "hard": 1.0}

    def peek(self, count: int, step: int) -> list[Task]:
        domains = ("easy", "hard")
        return [
            replace(task, prompt=replace(task.prompt, domain=domains[task.number % 2]))
            for task in super().peek(count, step)
        ]


@pytest.mark.parametrize("seed", range(6))
def test_filtered_by_domain_each_has_its_share(seed: int) -> None:
    """Few groups of the easy domain are informative; it is drawn until it has its share."""
    hard, easy = (draw_rollouts(work_of(1200, 0, 3, share), seed) for share in (0.9, 0.3))
    rewards = [
        (hard if number // 3 % 2 else easy).rewards[number] for number in range(len(hard.rewards))
    ]
    rollouts = replace(hard, rewards=rewards)
    counts: dict[str, list[list[int]]] = {}
    for filter_by in ("step", "domain"):
        settings = RolloutConfig(
            prompts_per_step=6, rollouts_per_prompt=3, max_draws=30, filter_by=filter_by
        )
        collector, stream = Shuffled(settings, rollouts, seed), MixedStream()
        for step in range(5):
            before = stream.taken
            found = gather(
                cast(Collector, collector), cast(TaskStream, stream), settings, step, None
            )
            domains = [g.task.prompt.domain for g in found.groups]
            counts.setdefault(filter_by, []).append([domains.count(d) for d in ("easy", "hard")])
            # The trained ones are the first informative groups of their domain.
            informative: dict[str, list[int]] = {"easy": [], "hard": []}
            for group in found.tried:
                told = {decisive_reward(r, settings) for r in group.rollouts} - {None}
                if len(told) > 1:
                    informative[group.task.prompt.domain].append(group.task.number)
            for domain in informative if filter_by == "domain" else ():
                mine = [g.task.number for g in found.groups if g.task.prompt.domain == domain]
                assert mine == informative[domain][:3]
            assert stream.taken == before + found.drawn
    assert counts["domain"] == [[3, 3]] * 5
    assert sum(easy for easy, _ in counts["step"]) < 15


def test_a_domain_without_informative_groups_costs_all_draws_and_no_more() -> None:
    drawing = Drawing(
        4, 12, 2, InformativeShare(), 1.0, ["easy", "hard"] * 6, {"easy": 2, "hard": 2}
    )
    for index in range(12):
        for copy in range(2):
            drawing.report(index, float(copy) if index % 2 else 1.0)
    assert drawing.needed == 12
    assert drawing.first_enough([index % 2 == 1 for index in range(12)]) == 12
    assert drawing.first_enough([True] * 12) == 4


def test_a_line_that_is_counted_but_not_written_is_not_waited_for() -> None:
    """The thread that writes it may need the same connection."""
    store = dist.HashStore()
    board = Board(store, "x")
    board.report("0 1.0")
    store.add("x/lines", 1)
    assert board.lines(0) == ["0 1.0"]
    store.set("x/line_1", "1 None")
    assert board.lines(1) == ["1 None"]
