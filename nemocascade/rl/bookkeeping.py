"""Work around the training steps of an RL or MOPD stage: scores, metrics, checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemocascade.rl.collector import Group
from nemocascade.rl.policy import PolicyRun
from nemocascade.train.metrics import is_due


class Bookkeeper:
    """Scores the policy at the start; evaluates, logs and saves after each step when due."""

    def __init__(self, run: PolicyRun) -> None:
        self.run, self.recipe = run, run.recipe
        self.first = run.trainer.step_number
        self.writer = run.metrics_writer(self.first)
        self.scores: dict[str, float] = {}
        if self.first == 0:
            self.scores = run.evaluate()
            if self.scores:
                run.log_scores("before", self.scores)
                run.keep_start_scores(self.scores)

    def after_step(self, step: int, values: dict[str, Any], groups: Sequence[Group]) -> None:
        """Evaluate, write metrics.jsonl and samples, save, and stop on request, each when due.

        step: the step just finished, counted from 0. values: its metrics. groups: the groups it
        trained on.
        """
        recipe, run = self.recipe, self.run
        last = step + 1 == recipe.steps
        if last or is_due(step, recipe.eval.every):
            self.scores = run.evaluate()
            if self.scores:
                run.log_scores(f"step {step + 1}", self.scores)
            values = values | self.scores
        if last or is_due(step, recipe.log.every):
            self.writer.write(step, values)
        run.keep_samples(step, groups)
        if last or is_due(step, recipe.checkpoint.every):
            run.save()
        if not last:
            run.stop_if_asked()

    def close(self) -> dict[str, float]:
        """Close the metrics files and return the last held-out scores."""
        self.writer.close()
        if self.first >= self.recipe.steps:
            self.scores = self.run.evaluate()
        return self.scores
