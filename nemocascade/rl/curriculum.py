"""The curriculum of one domain: which difficulty its next task has.

A task has a difficulty on a scale from 0, the easiest, to 1. Each draw weighs the tasks by a
Gaussian around a target on that scale, as Nemotron 3 Nano does (arXiv 2512.20848, section 3.2.2),
so that a batch has easier and harder tasks. `easy_to_hard` moves the target linearly with the
steps. `adaptive` moves it by the rewards: up while the policy passes more often than
`target_pass_rate`, down while it passes less often.

Every draw depends on the seed, the step and the state alone, and the state on the rewards in the
order of their tasks. Ranks and timing play no part.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from nemocascade.recipe import DomainConfig, RolloutConfig
from nemocascade.rl.prompts import EncodedPrompts
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.row_errors import DataError

GAIN = 0.3
"""Movement of an adaptive target in a step of `prompts_per_step` prompts, for each unit by which
the pass rate differs from `target_pass_rate`."""
WINDOW = 4
"""Steps of `prompts_per_step` prompts over which the running pass rate averages."""
LEVELS = 8
"""Rows are grouped by their pass rate in this many equal steps from 0 to 1."""


class Curriculum:
    """Draws the tasks of a domain by their difficulty.

    difficulty: of each task, in 0..1. share: of the stage's prompts that belong to the domain.
    steps: length of the stage in steps.
    """

    def __init__(
        self,
        domain: DomainConfig,
        difficulty: Sequence[float],
        rollout: RolloutConfig,
        *,
        share: float,
        seed: int,
        steps: int,
    ) -> None:
        self.domain, self.seed = domain, seed
        self._steps = domain.curriculum_steps or steps
        self._prompts = max(1.0, rollout.prompts_per_step * share)
        self._tasks: dict[float, list[int]] = {}
        for number, value in enumerate(difficulty):
            self._tasks.setdefault(value, []).append(number)
        self.levels = sorted(self._tasks)
        self._drawn = dict.fromkeys(self.levels, 0)
        self._orders: dict[float, tuple[int, list[int]]] = {}
        # Rows have a measured pass rate, so the tasks nearest to the target are known.
        start = 1.0 - domain.target_pass_rate if domain.path else 0.0
        self._target = self._inside(start if domain.curriculum == "adaptive" else 0.0)
        self._pass_rate, self._groups = 0.0, 0

    def target(self, step: int) -> float:
        """Difficulty around which a step draws. step: counted from 0."""
        if self.domain.curriculum == "adaptive":
            return self._target
        progress = min(1.0, step / max(1, self._steps - 1))
        return self.levels[0] + progress * (self.levels[-1] - self.levels[0])

    def draw(self, number: int, step: int) -> int:
        """Index of the domain's task `number`, counted from 0. A level's tasks repeat only after
        all of them were drawn."""
        target, spread = self.target(step), self.domain.curriculum_spread
        squares = [((level - target) / spread) ** 2 for level in self.levels]
        least = min(squares)
        weights = [
            len(self._tasks[level]) * math.exp((least - square) / 2)
            for level, square in zip(self.levels, squares, strict=True)
        ]
        rng = random.Random(f"{self.seed}/{self.domain.domain}/curriculum/{number}")
        (level,) = rng.choices(self.levels, weights)
        epoch, index = divmod(self._drawn[level], len(self._tasks[level]))
        self._drawn[level] += 1
        return self._order(level, epoch)[index]

    def observe(self, rewards: Sequence[float]) -> None:
        """Take a group's rewards into account. Their mean, clipped to 0..1, is its pass rate."""
        if not rewards:
            return
        rate = min(1.0, max(0.0, sum(rewards) / len(rewards)))
        self._groups += 1
        window = min(self._groups, WINDOW * self._prompts)
        self._pass_rate += (rate - self._pass_rate) / window
        move = GAIN / self._prompts * (rate - self.domain.target_pass_rate)
        self._target = self._inside(self._target + move)

    def metrics(self, step: int) -> dict[str, float]:
        """Target after `step`, and the running pass rate once there is one."""
        name = self.domain.domain
        found = {f"curriculum/{name}": self.target(step)}
        if self._groups:
            found[f"curriculum_pass_rate/{name}"] = self._pass_rate
        return found

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON values. drawn: number of draws by level."""
        return {
            "drawn": {str(level): count for level, count in self._drawn.items()},
            "target": self._target,
            "pass_rate": self._pass_rate,
            "groups": self._groups,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state. Levels that it does not have start anew."""
        self._drawn = {level: state["drawn"].get(str(level), 0) for level in self.levels}
        self._target = self._inside(state["target"])
        self._pass_rate, self._groups = state["pass_rate"], state["groups"]

    def _inside(self, target: float) -> float:
        return min(self.levels[-1], max(self.levels[0], target))

    def _order(self, level: float, epoch: int) -> list[int]:
        if level not in self._orders or self._orders[level][0] != epoch:
            order = list(self._tasks[level])
            name = f"{self.seed}/{self.domain.domain}/{level}/{epoch}"
            random.Random(name).shuffle(order)
            self._orders[level] = (epoch, order)
        return self._orders[level][1]


def by_level(
    domain: DomainConfig, read: Callable[[DomainConfig], EncodedPrompts]
) -> tuple[EncodedPrompts, list[float]]:
    """The prompts of a domain, and the difficulty of each in 0..1; 0 for all without a curriculum.

    Rows without a `pass_rate` count as half solved, and are counted in the log. Raises DataError if
    no row has one.
    """
    if domain.curriculum == "none":
        found = read(domain)
        return found, [0.0] * len(found)
    if not domain.path:
        return _made_by_level(domain, read)
    found = read(domain)
    unknown = sum(prompt.pass_rate is None for prompt in found.prompts)
    if len(found) and unknown == len(found):
        raise DataError(
            f"{domain.domain}: curriculum({domain.curriculum}) needs the rows' pass_rate, and no "
            "row has one: make them with `nemocascade pass-rates`, or set it to none"
        )
    if unknown:
        LOGGER.warning(
            "%s: %d of %d tasks have no pass_rate; the curriculum takes them as half solved",
            domain.domain,
            unknown,
            len(found),
        )
    rates = [0.5 if p.pass_rate is None else p.pass_rate for p in found.prompts]
    return found, [1 - round(rate * LEVELS) / LEVELS for rate in rates]


def _made_by_level(
    domain: DomainConfig, read: Callable[[DomainConfig], EncodedPrompts]
) -> tuple[EncodedPrompts, list[float]]:
    """Generated tasks of every level of difficulty, in equal shares."""
    levels = range(domain.easiest_difficulty, domain.difficulty + 1)
    parts, difficulty = list[EncodedPrompts](), list[float]()
    for k, level in enumerate(levels):
        tasks = (domain.tasks + len(levels) - 1 - k) // len(levels)
        part = read(replace(domain, difficulty=level, tasks=tasks))
        parts.append(part)
        difficulty += [k / (len(levels) - 1)] * len(part)
    return EncodedPrompts.joined(parts), difficulty
