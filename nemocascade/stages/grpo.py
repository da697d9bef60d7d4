"""Group-relative policy optimisation on verifiable rewards, strictly on-policy."""

from __future__ import annotations

import time
from pathlib import Path

from nemocascade.recipe.rl import GrpoRecipe
from nemocascade.rl.bookkeeping import Bookkeeper
from nemocascade.rl.collector import advantages_of
from nemocascade.rl.drawing import InformativeShare
from nemocascade.rl.gathering import gather
from nemocascade.rl.journal import step_journal
from nemocascade.rl.policy import REFERENCE, PolicyRun, training_batches, training_sequences
from nemocascade.runtime.logging import LOGGER, Console
from nemocascade.stages.policy import policy_run
from nemocascade.train.evaluation import policy_metrics
from nemocascade.train.metrics import step_values
from nemocascade.train.objectives import grpo_objective, truncation_of
from nemocascade.train.weight_swap import WeightSwap


def run_grpo(recipe: GrpoRecipe, console: Console | None = None) -> Path:
    """Train as the recipe says and return the artifact's folder. console: of the cascade.

    Raises RecipeError if settings are invalid, CheckpointError if the artifact to start from or a
    checkpoint cannot be read, and NonFiniteError if the loss or a gradient is not finite.
    """
    with policy_run(recipe, console=console) as run:
        reference = None
        if recipe.grpo.kl_coef:
            reference = WeightSwap(run.world, run.trainer.chunks)
            reference.load(REFERENCE, run.parent)
        scores = _train(recipe, run, reference)
        return run.write_artifact(scores)


def _train(recipe: GrpoRecipe, run: PolicyRun, reference: WeightSwap | None) -> dict[str, float]:
    """Run the training loop; returns the last held-out scores."""
    trainer, objective = run.trainer, grpo_objective(recipe.grpo)
    truncation = truncation_of(recipe.rollout, run.tokenizer.vocab_size)
    books, share = Bookkeeper(run), InformativeShare()
    for step in range(books.first, recipe.steps):
        started = time.perf_counter()
        with run.collector.journalled(step_journal(step)):
            gathered = gather(run.collector, run.stream, recipe.rollout, step, share)
        run.engine.release()
        rolled_out = time.perf_counter()
        groups = advantages_of(gathered.groups, recipe.rollout, recipe.grpo)
        values = run.rollout_values(gathered, rolled_out - started)
        sequences = training_sequences(groups, recipe)
        if sequences:
            batches = training_batches(run, sequences, reference)
            values |= run.free_mismatch(batches)
            packed = time.perf_counter()
            result = trainer.train_step(
                batches,
                objective,
                temperature=recipe.rollout.temperature,
                truncation=truncation,
                measure=policy_metrics,
            )
            values["train_time_s"] = time.perf_counter() - packed
            run.engine.weights_changed()
            seconds = time.perf_counter() - started
            values |= step_values(result, recipe.optimizer.lr_at(step), seconds, run.world)
            run.watch_mismatch(step, result.metrics)
        else:
            trainer.skip_step()
            LOGGER.warning(
                "step %d: no group of %d can teach anything; %d verdicts failed",
                step + 1,
                gathered.drawn,
                values["verifier_errors"],
            )
        books.after_step(step, values, gathered)
    return books.close()
