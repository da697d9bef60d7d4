"""Group-relative policy optimisation on verifiable rewards, strictly on-policy."""

from __future__ import annotations

import time
from pathlib import Path

from nemocascade.megatron.swap import WeightSwap
from nemocascade.recipe.rl import GrpoRecipe
from nemocascade.stages.experience import advantages_of, gather
from nemocascade.stages.policy import PolicyRun, policy_run, training_batches
from nemocascade.train.metrics import LOGGER
from nemocascade.train.objectives import grpo_objective
from nemocascade.train.report import is_due, step_values

REFERENCE = "start"


def run_grpo(recipe: GrpoRecipe) -> Path:
    """Train as the recipe says and return the artifact's folder.

    Raises RecipeError if settings cannot run, CheckpointError if the artifact to start from or a
    checkpoint cannot be read, and NonFiniteError if training breaks down.
    """
    with policy_run(recipe) as run:
        reference = None
        if recipe.grpo.kl_coef:
            reference = WeightSwap(run.world, run.trainer.chunks)
            reference.load(REFERENCE, run.parent)
        scores = _train(recipe, run, reference)
        return run.write_artifact(scores)


def _train(recipe: GrpoRecipe, run: PolicyRun, reference: WeightSwap | None) -> dict[str, float]:
    """The loop. Returns the last held-out scores."""
    trainer, objective = run.trainer, grpo_objective(recipe.grpo.kl_coef)
    first = trainer.step_number
    writer = run.metrics_writer(first)
    scores = run.evaluate() if first == 0 else {}
    if scores:
        run.log_scores("before", scores)
    for step in range(first, recipe.steps):
        started = time.perf_counter()
        gathered = gather(run.collector, run.stream, recipe.rollout)
        rolled_out = time.perf_counter()
        groups = advantages_of(gathered.groups, recipe.rollout, recipe.grpo)
        values = run.rollout_values(gathered, rolled_out - started)
        if groups:
            result = trainer.train_step(
                training_batches(run, groups, recipe, reference),
                objective,
                temperature=recipe.rollout.temperature,
                policy=True,
            )
            seconds = time.perf_counter() - started
            values |= step_values(result, recipe.optimizer.lr_at(step), seconds, run.world)
            run.watch_mismatch(step, result.metrics)
        else:
            trainer.skip_step()
            LOGGER.warning("step %d: no group of %d can teach anything", step, gathered.drawn)
        last = step + 1 == recipe.steps
        if last or is_due(step, recipe.eval.every):
            scores = run.evaluate()
            values |= scores
        if last or is_due(step, recipe.log.every):
            writer.write(step, values)
        run.keep_samples(step, groups)
        if last or is_due(step, recipe.checkpoint.every):
            run.save()
        if not last:
            run.stop_if_asked()
    writer.close()
    return scores or run.evaluate()
