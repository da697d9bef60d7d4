"""Work around the training steps of an RL or MOPD stage: scores, metrics, checkpoints."""

from __future__ import annotations

from typing import Any

from nemocascade.recipe.rl import GrpoRecipe
from nemocascade.rl.collector import Gathered
from nemocascade.rl.learning_signal import LearningSignal, NothingLearntError
from nemocascade.rl.policy import PolicyRun
from nemocascade.rl.trajectories import sampled
from nemocascade.runtime.stopping import StopAsked
from nemocascade.train.metrics import is_due


class Bookkeeper:
    """Scores the policy at the start; evaluates, logs and saves after each step when due."""

    def __init__(self, run: PolicyRun) -> None:
        self.run, self.recipe = run, run.recipe
        self.signal = LearningSignal(
            run.recipe.rollout,
            by_reward=isinstance(run.recipe, GrpoRecipe),
            is_main=run.world.is_main,
            transcripts=run.transcripts,
        )
        self.first = run.trainer.step_number
        self.writer = run.metrics_writer(self.first)
        self.scores: dict[str, float] = {}
        if self.first == 0:
            self.scores = run.evaluate()
            if self.scores:
                run.log_scores("before", self.scores)
                run.keep_start_scores(self.scores)

    def after_step(self, step: int, values: dict[str, Any], gathered: Gathered) -> None:
        """Evaluate, write metrics.jsonl and samples, save, and stop on request, each when due.

        step: the step just finished, counted from 0. values: its metrics. gathered: its groups.
        Raises NothingLearntError after too many steps without a learning signal.
        """
        recipe, run = self.recipe, self.run
        last = step + 1 == recipe.steps
        run.keep_samples(step, sampled(gathered, recipe.rollout.samples))
        values = values | self.signal.observe(step, gathered) | run.stream.metrics(step)
        try:
            self.signal.check()
        except NothingLearntError:
            self.writer.write(step, values)
            raise
        if last or is_due(step, recipe.eval.every):
            try:
                self.scores = run.evaluate()
            except StopAsked:
                # The step is finished; the next start does not repeat it.
                self.writer.write(step, values)
                raise
            if self.scores:
                run.log_scores(f"step {step + 1}", self.scores)
            values = values | self.scores
        if last or is_due(step, recipe.log.every):
            values = values | {"checkpoint_blocked_s": run.checkpoints.take_blocked_s()}
            self.writer.write(step, values)
        if last or is_due(step, recipe.checkpoint.every):
            run.save()
        if not last:
            run.stop_if_asked()

    def close(self) -> dict[str, float]:
        """Close the metrics files and return the last held-out scores.

        Raises NothingLearntError if no step had a verdict.
        """
        self.writer.close()
        self.signal.finish()
        if self.first >= self.recipe.steps:
            self.scores = self.run.evaluate()
        return self.scores
