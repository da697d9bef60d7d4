"""Alarm for a stage that learns nothing: verdicts that fail, and groups whose rewards are equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nemocascade.recipe import UserError
from nemocascade.recipe.rl import RolloutConfig
from nemocascade.rl.collector import Gathered, is_informative_group
from nemocascade.rl.rollouts import Rollout, Transcript
from nemocascade.runtime.logging import FILE_ONLY, LOGGER
from nemocascade.runtime.turns import encodable

MOST_KINDS = 20
"""Errors of further kinds are counted in the metrics only."""
_SHOWN = 300


class NothingLearntError(UserError, RuntimeError):
    """Several steps in a row gave no learning signal; the message says why and what to do."""


class LearningSignal:
    """Watches the verdicts and groups of each step.

    by_reward: the stage trains on rewards, so that steps without a signal end it. is_main: log.
    transcripts: the texts of some rollouts, on the main rank.
    """

    def __init__(
        self,
        settings: RolloutConfig,
        *,
        by_reward: bool,
        is_main: bool,
        transcripts: Callable[[Sequence[Rollout]], list[Transcript]],
    ) -> None:
        self._transcripts = transcripts
        self.settings, self.by_reward, self.is_main = settings, by_reward, is_main
        self._steps = self._silent = self._idle = 0
        self._ever_verdict = self._ever_informative = False
        self._kinds: set[int] = set()
        self._error = ""

    def observe(self, step: int, gathered: Gathered) -> dict[str, Any]:
        """Log the counts of a step and the first error of each kind; returns metrics. Every rank
        calls it.

        step: counted from 0; messages count from 1.
        """
        rollouts = [r for group in gathered.tried for r in group.rollouts]
        scored = [r for r in rollouts if r.is_scored]
        verdicts = [r.verdict.reward for r in scored if r.verdict.reward is not None]
        informative = sum(is_informative_group(g, self.settings) for g in gathered.groups)
        self._find_errors(step, gathered)
        if not self.by_reward:
            return {}
        LOGGER.info(
            "step %d: %d groups drawn, %d informative, %d of %d verdicts failed, reward %s",
            step + 1,
            gathered.drawn,
            informative,
            len(scored) - len(verdicts),
            len(scored),
            f"{sum(verdicts) / len(verdicts):.3f}" if verdicts else "none",
            extra=FILE_ONLY,
        )
        self._steps += 1
        self._silent = 0 if verdicts else self._silent + 1
        self._idle = 0 if informative else self._idle + 1
        self._ever_verdict |= bool(verdicts)
        self._ever_informative |= informative > 0
        return {"groups_informative": informative}

    def check(self) -> None:
        """Raise NothingLearntError after `max_idle_steps` steps in a row without a signal."""
        most = self.settings.max_idle_steps
        if most and self._silent >= most:
            raise self._no_verdict(self._silent)
        if most and self._idle >= most:
            raise NothingLearntError(
                f"{self._idle} steps in a row had no group with different rewards "
                f"(rollout.max_idle_steps is {most}), so nothing is learnt: see the answers in "
                "RUN/rollouts; take easier or harder tasks, more rollouts per prompt or more "
                "draws, or raise rollout.max_idle_steps (0 = never stop)"
            )

    def finish(self) -> None:
        """Raise NothingLearntError if no step of the stage had a verdict; warn if none could train.

        Called before an artifact is written.
        """
        if not self._steps:
            return
        if not self._ever_verdict and self.settings.max_idle_steps:
            raise self._no_verdict(self._steps)
        if not self._ever_informative and self.is_main:
            LOGGER.warning(
                "nothing was learnt: none of %d steps had a group with different rewards; see "
                "the answers in RUN/rollouts",
                self._steps,
            )

    def _no_verdict(self, steps: int) -> NothingLearntError:
        return NothingLearntError(
            f"{steps} steps in a row had no verdict (rollout.max_idle_steps is "
            f"{self.settings.max_idle_steps}), so nothing is learnt: the first verifier failed "
            f"with {self._error or 'what the log says'}; fix the verifier, the judge or the rows"
        )

    def _find_errors(self, step: int, gathered: Gathered) -> None:
        new = []
        for group in gathered.tried:
            for rollout in group.rollouts:
                kind = rollout.error_kind
                if kind and kind not in self._kinds and len(self._kinds) < MOST_KINDS:
                    self._kinds.add(kind)
                    new.append((group.task.prompt, rollout))
        texts = self._transcripts([rollout for _, rollout in new])
        for (prompt, _), text in zip(new, texts, strict=False):
            error = text.verdict.error or ""
            shown = encodable(error)[:_SHOWN]
            self._error = self._error or f"{shown} ({prompt.source})"
            LOGGER.warning(
                "step %d: a verifier of %s fails on %s: %s; the answer: %a",
                step + 1,
                prompt.domain,
                prompt.source,
                shown,
                text.text[:_SHOWN],
            )
