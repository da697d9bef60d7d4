"""The step of an RL or MOPD stage by phase, and the choice of its generation layout.

The expected step needs no seed: lengths are at even quantiles of their distribution, and as many
prompts start as do on average. `stages/simulation.py` draws both, with the queue of a stage.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from nemocascade.plan.checkpoints import HOST_LINK_GB_S
from nemocascade.plan.generation import DecodeTimeModel
from nemocascade.plan.job import Job
from nemocascade.plan.memory import fits, resident_slots, worst_rank
from nemocascade.plan.parameters import RankCoordinates
from nemocascade.plan.replicas import Costs, DecodeGroup
from nemocascade.plan.rollout_events import RolloutEvents, Rollouts, RolloutTime, first_polls
from nemocascade.plan.search import PricedLayout
from nemocascade.plan.timing import StepModel
from nemocascade.plan.workload import EpisodeCosts, StepWork
from nemocascade.recipe import ParallelConfig, RolloutParallelConfig

OUTCOME_BYTES, TOKEN_BYTES = 192, 9
"""Bytes that a rank receives of every rollout, and of a token that it trains; see docs/scale.md."""
MOST_TURNS = 10
"""Turns of an episode in the expected step: several turns are merged."""
_SIZES = {"tp": (1, 2, 4, 8), "pp": (1, 2)}


class _Supply(NamedTuple):
    taken: Sequence[int]
    cancelled: Sequence[int] = ()


class _ListQueue:
    """Requests in order, of which a replica holds at most `share` at a time."""

    def __init__(self, requests: range, share: int) -> None:
        self._left, self._share = requests, share

    def poll(self, free_slots: int, busy: int) -> _Supply:
        count = max(0, min(free_slots, self._share - busy))
        taken, self._left = self._left[:count], self._left[count:]
        return _Supply(taken)

    def check(self) -> None:
        """Nothing is shared."""

    def report(self, number: int, reward: float | None) -> None:
        """Verdicts decide nothing."""


@dataclass(frozen=True)
class RolloutStep:
    """A step of rollouts and training, with the seconds of each phase.

    job: with the layouts of both.
    """

    job: Job
    rollout: RolloutTime
    offload: float
    weights: float
    exchange: float
    scoring: float
    training: float
    other: float = 0.0

    @property
    def total(self) -> float:
        return sum(seconds for _, seconds in self.phases())

    def phases(self) -> list[tuple[str, float]]:
        """Names of the phases with their seconds, in order."""
        found = (
            ("offload and restore", self.offload),
            ("weights to the replicas", self.weights),
            ("generation", self.rollout.generation_s),
            ("verification, after the last text", self.rollout.verify_s),
            ("exchange of rollouts", self.exchange),
            ("teachers or reference", self.scoring),
            ("training", self.training),
            ("other", self.other),
        )
        return [(name, seconds) for name, seconds in found if seconds]


def generation_parallel(job: Job) -> ParallelConfig:
    """The layout of the job's replicas."""
    return job.rollout.parallel.layout(job.parallel)


def expected_rollouts(job: Job) -> RolloutTime:
    """Expected times of the rollouts of a step: lengths at even quantiles in a fixed random order,
    so that some replicas get more of the long ones than others."""
    return _expected(_generation_only(job))


def _generation_only(job: Job) -> Job:
    """The job without what makes no difference to its rollouts, such as training's layout."""
    load = replace(
        job.rollout, slots=resident_slots(job), parallel=RolloutParallelConfig(), offload=False
    )
    return replace(
        job,
        parallel=generation_parallel(job),
        engine=replace(job.engine, recompute=False, recompute_layers=""),
        rollout=load,
        capacity=1,
        sequences_per_step=1,
        document=0,
    )


@functools.lru_cache(maxsize=512)
def _expected(job: Job) -> RolloutTime:
    rollouts, episodes = _expected_texts(job)
    groups = decode_groups(job, job.rollout.slots)
    count, replicas = len(rollouts.lengths), sum(len(group.replicas) for group in groups)
    queue = _ListQueue(range(count), -(-count // replicas))
    return RolloutEvents(rollouts, episodes, [queue] * replicas, groups).run()


@functools.lru_cache(maxsize=512)
def _longest_end(job: Job) -> float:
    """Seconds until the replicas that decode together with the longest text have ended all theirs,
    of the rollouts of `_expected`; 0 if they do not take everything at the start."""
    rollouts, episodes = _expected_texts(job)
    groups = decode_groups(job, job.rollout.slots)
    polls = first_polls(groups)
    count = len(rollouts.lengths)
    share = -(-count // len(polls))
    if share > job.rollout.slots:
        return 0.0
    # Each replica takes its share with its first poll.
    longest = max(range(count), key=rollouts.lengths.__getitem__)
    number, _ = polls[longest // share]
    taken = {
        replica: _ListQueue(range(count)[share * n :][:share], share)
        for n, (of, replica) in enumerate(polls)
        if of == number
    }
    group = groups[number]
    queues = [taken[replica] for replica in group.replicas]
    return RolloutEvents(rollouts, episodes, queues, [group]).run().generation_s


def _expected_texts(job: Job) -> tuple[Rollouts, EpisodeCosts]:
    """The texts of the expected step, and what their episodes cost with merged turns."""
    work = job.work
    assert work is not None
    lengths = work.lengths.evenly(max(1, work.rollouts))
    random.Random(1).shuffle(lengths)
    rollouts = Rollouts(work.copies, work.prompt, lengths, [0.0] * len(lengths))
    most = max(map(work.costs.turns, lengths))
    return rollouts, replace(work.costs, merged=-(-most // MOST_TURNS))


def decode_groups(job: Job, slots: int, costs: Costs | None = None) -> list[DecodeGroup]:
    """All replicas of the job's generation layout.

    slots: whose sequences decode at a time, see `resident_slots`. costs: of decode steps and
    prefills; None: by the planner's model.
    """
    own = generation_parallel(job)
    decoder = costs or DecodeTimeModel(job, own)
    replicas = max(1, own.data_parallel(job.world_size))
    ranks, count = decoder.members * own.tp * own.pp, max(1, replicas // decoder.members)
    return [DecodeGroup(decoder, slots, ranks) for _ in range(count)]


def step_of(job: Job, rollout: RolloutTime) -> RolloutStep:
    """All phases of a step, given its rollouts."""
    work = job.work
    assert work is not None
    training = StepModel(job)
    state = job.state(RankCoordinates(0, 0, 0))
    host = HOST_LINK_GB_S * 1e9
    kept = StepModel(job.with_layout(job.parallel, recompute=False))
    forward = kept.slowest.total / 3.0 * job.microbatches
    swap = state.parameters / host
    dp = max(1, job.parallel.data_parallel(job.world_size))
    received = OUTCOME_BYTES * work.wanted * work.copies + TOKEN_BYTES * work.trained_tokens / dp
    return RolloutStep(
        job=job,
        rollout=rollout,
        offload=2 * state.optimizer / host if job.rollout.offload else 0.0,
        weights=_copy_seconds(job),
        exchange=received / (job.gpu.network_gb_s * 1e9),
        # The policy is swapped back; teachers come one after another.
        scoring=forward + (work.teachers + 1) * swap if work.teachers else 0.0,
        training=training.step().total,
    )


def _copy_seconds(job: Job) -> float:
    """Seconds to copy the weights to the replicas; 0 if they are read in place."""
    own = generation_parallel(job)
    if own == replace(job.parallel, cp=1):
        return 0.0
    there = replace(job, parallel=own)
    copied = max(there.state(RankCoordinates(stage, 0, 0)).parameters for stage in range(own.pp))
    p = job.parallel
    # A node that holds the whole model takes it from there.
    in_node = p.pp * max(p.tp * p.cp, p.ep * p.etp) <= job.gpu.per_node
    speed = job.gpu.link_gb_s if in_node else job.gpu.network_gb_s
    return float(copied / (speed * 1e9))


def expected_step(job: Job) -> RolloutStep:
    """The expected step of a job in its own layouts."""
    return step_of(job, expected_rollouts(job))


def generation_jobs(job: Job) -> Iterator[Job]:
    """The job with each legal generation layout that fits: without offload where that fits, and
    with as many slots as fit, at most the recipe's."""
    assert job.work is not None
    for tp in _SIZES["tp"]:
        for pp in _SIZES["pp"]:
            for ep in _expert_sizes(job):
                own = RolloutParallelConfig(tp=tp, pp=pp, ep=ep)
                if own.problems(job.parallel, job.model, job.world_size):
                    continue
                if found := _fitting(job, own):
                    yield found


def _expert_sizes(job: Job) -> list[int]:
    if "E" not in job.model.pattern:
        return [1]
    return [n for n in (1, 2, 4, 8, 16, 32, 64) if job.model.num_experts % n == 0]


def _fitting(job: Job, own: RolloutParallelConfig) -> Job | None:
    assert job.work is not None
    replicas = max(1, own.layout(job.parallel).data_parallel(job.world_size))
    slots = job.rollout.slots
    while slots:
        sequences = min(slots * replicas, job.work.rollouts)
        for offload in (False, True):
            load = replace(
                job.rollout, sequences=sequences, slots=slots, parallel=own, offload=offload
            )
            found = replace(job, rollout=load)
            if fits(found, worst_rank(found)) and resident_slots(found) == slots:
                return found
        slots //= 2
    return None


def best_steps(plans: Sequence[PricedLayout]) -> list[RolloutStep]:
    """The expected step of each training layout with its fastest generation, fastest first."""
    found = [best_generation(plan.job) for plan in plans]
    return sorted((step for step in found if step is not None), key=lambda step: step.total)


def best_generation(job: Job) -> RolloutStep | None:
    """The expected step with the fastest generation layout that fits; None if none does."""
    work = job.work
    assert work is not None
    bounds = sorted(
        ((_bound(found, work), n, found) for n, found in enumerate(generation_jobs(job))),
        key=lambda each: each[:2],
    )
    best: RolloutStep | None = None
    for bound, _, found in bounds:
        if best is not None:
            allowed = best.total - best.training
            if bound >= allowed:
                break
            if _longest_end(_generation_only(found)) >= allowed:
                continue
        step = expected_step(found)
        if best is None or step.total < best.total:
            best = step
    return best


def _bound(job: Job, work: StepWork) -> float:
    """Lower bound of the seconds of a job's generation: its longest text alone, and all texts in
    full slots."""
    own = generation_parallel(job)
    decoder = DecodeTimeModel(job, own)
    replicas = max(1, own.data_parallel(job.world_size))
    slots = job.rollout.slots
    share = 1.0 - work.costs.tool_share
    longest = float(work.lengths.at(1.0 - 0.5 / max(1, work.rollouts))[0])
    alone = longest * share * decoder.step(1, 1, longest / 2).total
    alone += (work.costs.turns(int(longest)) - 1) * work.costs.tool_s
    steps = work.rollouts * work.lengths.mean * share / replicas / slots
    cached = slots * work.live_tokens / 2
    return max(alone, steps * decoder.step(slots, slots * decoder.members, cached).total)
