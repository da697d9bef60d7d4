"""Multi-domain on-policy distillation: teacher artifacts score the student's own rollouts.

The objective is Eq. 2-4 of Nemotron-Cascade 2 (arXiv 2603.19220), which know the teacher by the
sampled tokens, or an exact divergence over the vocabulary in each of their states.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from nemocascade.megatron.artifact import read_artifact
from nemocascade.recipe import RecipeError
from nemocascade.recipe.mopd import MopdConfig, MopdRecipe
from nemocascade.rl.batches import PlannedSequence
from nemocascade.rl.bookkeeping import Bookkeeper
from nemocascade.rl.collector import Gathered, Group, verdicts_of
from nemocascade.rl.journal import step_journal
from nemocascade.rl.policy import PolicyRun
from nemocascade.rl.teachers import Teachers
from nemocascade.runtime.logging import LOGGER, Console
from nemocascade.stages.policy import policy_run
from nemocascade.stages.teacher_scores import TaughtDomain, teacher_warning
from nemocascade.train.evaluation import distill_metrics, mopd_metrics
from nemocascade.train.metrics import step_values
from nemocascade.train.objectives import Objective, distill_objective, mopd_objective
from nemocascade.train.trainer import Measure
from nemocascade.train.weight_swap import model_problems
from nemocascade.types import Artifact


def run_mopd(recipe: MopdRecipe, console: Console | None = None) -> Path:
    """Train as the recipe says and return the artifact's folder. console: of the cascade.

    Raises RecipeError if settings are invalid or a teacher does not match the student,
    CheckpointError if an artifact or a checkpoint cannot be read, and NonFiniteError if the loss
    or a gradient is not finite.
    """
    with policy_run(recipe, check=open_teachers, console=console) as run:
        by_domain = open_teachers(recipe)
        exact = recipe.mopd.divergence != "sampled"
        with closing(Teachers(run, by_domain, recipe.mopd.keep, states=exact)) as teachers:
            scores = _train(recipe, run, teachers, by_domain)
        digests = {domain: artifact.digest for domain, artifact in by_domain.items()}
        return run.write_artifact(scores, teachers=digests)


def open_teachers(recipe: MopdRecipe) -> dict[str, Artifact]:
    """Open the teacher artifact of each domain.

    Raises CheckpointError for one that cannot be read, and RecipeError naming every teacher whose
    tokenizer, vocabulary or shape differs from the student's.
    """
    student = read_artifact(Path(recipe.init_from))
    found = {t.domain: read_artifact(Path(t.artifact)) for t in recipe.teachers}
    problems = []
    for domain, teacher in found.items():
        named = f"teachers: {domain} is taught by {teacher.folder}"
        problems += model_problems(named, teacher, "the student's", student)
    if problems:
        raise RecipeError(problems)
    return found


def warning_of(
    recipe: MopdRecipe,
    start: Artifact,
    by_domain: Mapping[str, Artifact],
    before: Mapping[str, float],
) -> str:
    """Warning about teachers from which the student cannot improve, by the held-out scores in their
    manifests; empty without one. start: the student's artifact. before: its scores by metric."""
    whole = sum(d.share for d in recipe.domains)
    return teacher_warning(
        (
            TaughtDomain(
                domain=d.domain,
                share=d.share / whole,
                teacher=str(by_domain[d.domain].folder),
                teacher_score=by_domain[d.domain].scores.get(f"heldout/{d.domain}"),
                student_score=before.get(f"heldout/{d.domain}"),
                is_start=by_domain[d.domain].digest == start.digest,
            )
            for d in recipe.domains
        ),
        "--teachers",
    )


def _train(
    recipe: MopdRecipe, run: PolicyRun, teachers: Teachers, by_domain: Mapping[str, Artifact]
) -> dict[str, float]:
    """Run the training loop; returns the last held-out scores. by_domain: the teachers."""
    trainer, rollout = run.trainer, recipe.rollout
    objective = objective_of(recipe.mopd)
    books = Bookkeeper(run)
    if warning := warning_of(recipe, run.parent, by_domain, books.scores):
        LOGGER.warning("%s", warning)
    for step in range(books.first, recipe.steps):
        started = time.perf_counter()
        teachers.prefetch()
        tasks = run.stream.peek(rollout.prompts_per_step, step)
        with run.collector.journalled(step_journal(step)):
            groups = tuple(
                run.collector.roll_out(
                    tasks, rollout.rollouts_per_prompt, scored=recipe.mopd.score_rollouts
                )
            )
        run.engine.release()
        run.stream.take(rollout.prompts_per_step, step)
        run.stream.observe(verdicts_of(groups))
        rolled_out = time.perf_counter()
        gathered = Gathered(groups, len(groups), groups)
        values = run.rollout_values(gathered, rolled_out - started)
        sequences = student_sequences(groups, recipe)
        if sequences:
            batches, packing = teachers.batches(sequences)
            values |= packing
            values |= run.free_mismatch(batches)
            packed = time.perf_counter()
            values["teacher_time_s"] = packed - rolled_out
            result = trainer.train_step(
                batches,
                objective,
                temperature=rollout.temperature,
                measure=measure_of(recipe.mopd, [s.domain for s in sequences]),
            )
            # States and heads of teachers would stay during the next rollouts.
            del batches
            values["train_time_s"] = time.perf_counter() - packed
            run.engine.weights_changed()
            seconds = time.perf_counter() - started
            values |= step_values(result, recipe.optimizer.lr_at(step), seconds, run.world)
            run.watch_mismatch(step, result.metrics)
        else:
            trainer.skip_step()
            LOGGER.warning("step %d: all %d groups were filtered", step + 1, len(groups))
        books.after_step(step, values, gathered)
    return books.close()


def objective_of(settings: MopdConfig) -> Objective:
    """The objective of the recipe's divergence."""
    if settings.divergence == "sampled":
        return mopd_objective(settings.ratio_low, settings.ratio_high)
    return distill_objective(settings.divergence)


def measure_of(settings: MopdConfig, domains: Sequence[str]) -> Measure:
    """Metrics of the recipe's divergence. domains: of the step's sequences."""
    if settings.divergence == "sampled":
        return functools.partial(
            mopd_metrics,
            domains=domains,
            ratio_low=settings.ratio_low,
            ratio_high=settings.ratio_high,
        )
    return functools.partial(distill_metrics, domains=domains, divergence=settings.divergence)


def student_sequences(groups: Sequence[Group], recipe: MopdRecipe) -> list[PlannedSequence]:
    """Training sequences of all rollouts, with token weight 1 / |V(y)|: Eq. 4 averages by sequence,
    and an exact divergence likewise.

    Rewards are not used, so a rollout whose verifier failed trains like the others. Excluded: empty
    rollouts, those that a server gave up, and truncated ones under overlong filtering.
    """
    return [
        PlannedSequence(rollout, 1.0 / rollout.length, domain=group.task.prompt.domain)
        for group in groups
        for rollout in group.rollouts
        if rollout.length and not rollout.dropped
        if not (rollout.truncated and recipe.rollout.overlong_filter)
    ]
