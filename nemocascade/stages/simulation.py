"""A simulated step of an RL or MOPD stage: `nemocascade plan RECIPE --simulate`.

The queue and the drawing of candidates are the stage's own; the engine, the verifiers and training
take the time that the planner's model gives them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch.distributed as dist

from nemocascade.plan.errors import PlanError
from nemocascade.plan.job import Job
from nemocascade.plan.measured import MeasuredRun, read_run
from nemocascade.plan.memory import resident_slots
from nemocascade.plan.replicas import Costs
from nemocascade.plan.rollout_events import RolloutEvents, Rollouts, RolloutTime
from nemocascade.plan.rollout_report import step_json, step_lines, work_line
from nemocascade.plan.rollout_step import RolloutStep, decode_groups, step_of
from nemocascade.plan.search import faults
from nemocascade.plan.settings import PlanSettings
from nemocascade.plan.summary import planned_job
from nemocascade.plan.workload import StepWork
from nemocascade.recipe import ModelConfig, StageRecipe
from nemocascade.rl.drawing import DECAY, Drawing, InformativeShare
from nemocascade.rl.tasks import GroupRequest, Task
from nemocascade.rl.work_queue import Board, WorkQueue
from nemocascade.rollout.engine import Sampling
from nemocascade.types import Prompt


def draw_rollouts(work: StepWork, seed: int) -> Rollouts:
    """Random rollouts of all candidates of a step.

    The success rates of informative prompts are uniform in 0..1; other groups have equal rewards.
    """
    rng, prompts = np.random.default_rng(seed), work.most or work.wanted
    rewards: list[float] = []
    for _ in range(prompts):
        is_informative = rng.random() < work.share
        group = [float(rng.random() < 0.5)] * work.copies
        while is_informative and work.copies > 1 and len(set(group)) == 1:
            group = [float(n) for n in rng.random(work.copies) < rng.random()]
        rewards += group
    lengths = work.lengths.draw(rng, prompts * work.copies)
    return Rollouts(work.copies, work.prompt, lengths, rewards)


def drawings(work: StepWork, count: int, share: InformativeShare | None = None) -> list[Drawing]:
    """Make `count` equal drawings of a step; none without dynamic filtering.

    share: running share of informative groups; None: that of a stage that has run for long.
    """
    tried = work.wanted / work.share / (1.0 - DECAY)
    share = share or InformativeShare(work.share * tried, tried)
    made = count if work.most else 0
    return [Drawing(work.wanted, work.most, work.copies, share, work.margin) for _ in range(made)]


def open_queues(
    work: StepWork, rollouts: Rollouts, replicas: int, found: Sequence[Drawing]
) -> list[WorkQueue]:
    """Queues with one board: one for each drawing, or one alone."""
    world = cast(Any, SimpleNamespace(dp_size=replicas, size=replicas))
    copies, sampling = rollouts.copies, Sampling(max_tokens=work.lengths.limit)
    groups = [
        GroupRequest(
            Task(Prompt(str(n), "simulated", (), {}), np.array([1, n], np.int32), n),
            range(n * copies, (n + 1) * copies),
            sampling,
        )
        for n in range(len(rollouts.lengths) // copies)
    ]
    board = Board(dist.HashStore(), "simulation")
    return [
        # Time is simulated, so nothing may depend on the clock.
        WorkQueue(groups, board, world, drawing=drawing, listen_s=0.0)
        for drawing in (found or (None,))
    ]


def simulate_rollouts(job: Job, seed: int, costs: Costs | None = None) -> RolloutTime:
    """Simulate the rollouts of a step on all replicas of the job's generation layout.

    costs: of decode steps and prefills; None: by the planner's model.
    """
    work = job.work
    assert work is not None
    groups = decode_groups(job, resident_slots(job), costs)
    replicas = sum(len(group.replicas) for group in groups)
    rollouts = draw_rollouts(work, seed)
    # One queue represents those of all replicas: they would know the same.
    found = drawings(work, 1)
    queues = open_queues(work, rollouts, replicas, found)
    return RolloutEvents(
        rollouts,
        work.costs,
        queues * replicas,
        groups,
        is_done=(lambda: found[0].needed is not None) if found else None,
        order=random.Random(seed),
    ).run()


def simulated_step(job: Job, run: MeasuredRun | None, seed: int) -> RolloutStep:
    """Simulate a step. run: whose times are taken; None: those of the planner's model."""
    if run is None:
        return step_of(job, simulate_rollouts(job, seed))
    job = replace(job, work=run.work)
    rollout = simulate_rollouts(job, seed, run.costs)
    passes = rollout.terms.total + rollout.prefill_s
    return RolloutStep(
        job=job,
        # The last replica waits for verdicts when it does not generate.
        rollout=replace(
            rollout,
            generation_s=passes * (1.0 + run.loop_s),
            verify_s=max(0.0, rollout.seconds - passes),
        ),
        offload=0.0,
        weights=0.0,
        exchange=0.0,
        scoring=run.scoring_s,
        training=run.training_s,
        other=run.other_s,
    )


def simulated_report(
    recipe: StageRecipe, settings: PlanSettings, model: ModelConfig | None = None
) -> tuple[str, dict[str, Any]]:
    """Report of a simulated step, as text and as JSON values. model: the model, if already known.

    Raises PlanError for a recipe without rollouts of its own, or whose layout cannot run.
    """
    job = planned_job(recipe, settings, model)
    if job.work is None or not job.rollout.slots:
        raise PlanError(
            "--simulate needs rollouts on the training ranks: an RL or MOPD recipe with "
            "rollout.engine live"
        )
    if problems := faults(job):
        raise PlanError(f"the recipe's layout cannot run: {'; '.join(problems)}")
    run = None
    if settings.measured:
        run = read_run(
            settings.measured,
            job.work,
            job.world_size,
            job.round_tokens,
            lengths=not settings.response_lengths,
            share=settings.informative_share is None,
        )
    step = simulated_step(job, run, settings.seed)
    assert step.job.work is not None
    source = f"measured by {settings.measured}" if settings.measured else f"{job.gpu.name}"
    lines = [
        work_line(step.job.work),
        f"A simulated step on {job.world_size} ranks, {source}, seed {settings.seed}:",
        *step_lines(step),
    ]
    return "\n".join(lines), step_json(step)
