"""Groups without a good rollout: counted, kept in the statistics, masked in the loss."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch

from nemocascade.envs.multiple_choice import MultipleChoice
from nemocascade.recipe import GrpoRecipe, MopdRecipe, RolloutConfig
from nemocascade.rl.collector import Collector, Group, advantages_of
from nemocascade.rl.gathering import gather
from nemocascade.rl.policy import training_sequences
from nemocascade.rl.rollout_metrics import rollout_values
from nemocascade.rl.rollouts import Rollout, TokenSequence, whole_rollout
from nemocascade.rl.tasks import Task, TaskStream
from nemocascade.sandbox.child import ChildPool
from nemocascade.types import Prompt, Verdict

REWARDS: list[list[float | None]] = [
    [0.0, 1.0],
    [0.5, 0.0],
    [0.0, 0.0],
    [None, 0.6],
    [None, None],
    [0.4, 0.2],
    [1.0, 0.0],
]


def rollout(reward: float | None, *, truncated: bool = False) -> Rollout:
    return whole_rollout(
        TokenSequence(torch.arange(6), torch.arange(6) >= 2, torch.zeros(6)),
        Verdict(reward) if reward is not None else Verdict(None, "killed"),
        domain="d",
        text="",
        truncated=truncated,
    )


class Stream:
    """Tasks by number."""

    def __init__(self) -> None:
        self.taken = 0
        self.observed: list[tuple[int, list[float | None]]] = []

    def peek(self, count: int, step: int) -> list[Task]:
        assert step == 4
        numbers = range(self.taken, self.taken + count)
        return [Task(Prompt(str(n), "d", (), {}), np.arange(2, dtype=np.int32), n) for n in numbers]

    def take(self, count: int, step: int) -> list[Task]:
        found = self.peek(count, step)
        self.taken += count
        return found

    def observe(self, results: Sequence[tuple[Prompt, Sequence[Verdict]]]) -> None:
        self.observed += [(int(p.id), [v.reward for v in verdicts]) for p, verdicts in results]


class Written:
    """A collector whose rewards are `REWARDS`. truncated: whether each group's first rollout is.
    Its verdicts are collective, so a step draws in rounds."""

    environments: ClassVar = {"d": SimpleNamespace(collective=True)}

    def __init__(self, *, truncated: bool = False) -> None:
        self.truncated = truncated

    def roll_out(self, tasks: Sequence[Task], copies: int) -> list[Group]:
        assert copies == 2
        return [
            Group(task, (rollout(first, truncated=self.truncated), rollout(second)))
            for task in tasks
            for first, second in [REWARDS[task.number % len(REWARDS)]]
        ]


def gathered(**settings: Any) -> tuple[Any, RolloutConfig]:
    written = Written(truncated=settings.pop("truncated", False))
    rollouts = RolloutConfig(
        prompts_per_step=settings.pop("prompts", 7), rollouts_per_prompt=2, **settings
    )
    stream = Stream()
    found = gather(cast(Collector, written), cast(TaskStream, stream), rollouts, step=4)
    # A curriculum learns of every group, also of those that do not train.
    assert [number for number, _ in stream.observed] == [g.task.number for g in found.tried]
    return found, rollouts


def numbers(groups: Sequence[Group]) -> list[int]:
    return [group.task.number for group in groups]


@pytest.mark.parametrize(
    ("least", "trained"),
    [
        (None, [0, 1, 2, 3, 4, 5, 6]),
        (0.5, [0, 3, 6]),
        (0.0, [0, 1, 3, 5, 6]),
        (1.0, []),
    ],
)
def test_groups_train_whose_best_reward_is_above(least: float | None, trained: list[int]) -> None:
    found, _ = gathered(dynamic_filtering=False, min_best_reward=least)
    assert numbers(found.groups) == trained
    assert found.masked == 7 - len(trained)
    assert numbers(found.tried) == list(range(7))


def test_none_is_drawn_in_their_place() -> None:
    """Dynamic filtering draws for groups that teach nothing; a masked one is no such group."""
    found, _ = gathered(prompts=3, min_best_reward=0.5)
    assert (numbers(found.groups), found.masked) == ([0], 2)
    assert numbers(found.tried) == [0, 1, 2, 3, 4, 5]


def test_their_tokens_are_in_no_batch_and_their_rewards_in_the_metrics() -> None:
    found, rollouts = gathered(dynamic_filtering=False, min_best_reward=0.5)
    recipe = GrpoRecipe(rollout=rollouts)
    groups = advantages_of(found.groups, rollouts, recipe.grpo)
    # Of group 3 one rollout has no verdict.
    assert len(training_sequences(groups, recipe)) == 5
    values = rollout_values(found, 1.0, {"d": MultipleChoice(ChildPool())})
    assert values["groups_masked"] == 4
    assert values["groups"] == 3
    scored = [r for row in REWARDS for r in row if r is not None]
    assert values["reward"] == pytest.approx(sum(scored) / len(scored))


def test_settings_that_cannot_be() -> None:
    broken = GrpoRecipe(rollout=RolloutConfig(min_best_reward=float("nan")))
    assert any("min_best_reward" in problem for problem in broken.problems(1))
    distilled = MopdRecipe(rollout=RolloutConfig(min_best_reward=0.5, dynamic_filtering=False))
    assert any("min_best_reward" in problem for problem in distilled.problems(1))


@pytest.mark.parametrize(
    ("coefficient", "kept", "reward", "informative"),
    [(None, 1.0, 0.5, [0, 1, 5, 6]), (0.5, 0.5, 0.25, [0, 1, 6]), (0.0, 0.0, 0.0, [0, 5])],
)
def test_a_truncated_response_scores_less_before_groups_are_filtered(
    coefficient: float | None, kept: float, reward: float, informative: list[int]
) -> None:
    """The first response of each group is truncated. Errors stay errors."""
    settings: dict[str, Any] = {"truncated": True, "stop_properly_penalty_coef": coefficient}
    found, rollouts = gathered(dynamic_filtering=True, max_draws=1, **settings)
    assert numbers(found.groups) == informative
    firsts = [group.rollouts[0].verdict for group in found.tried]
    assert [v.reward for v in firsts[:2]] == [0.0, reward]
    assert firsts[6].reward == kept
    assert [v.reward is None for v in firsts] == [row[0] is None for row in REWARDS]
    assert [g.rollouts[1].verdict.reward for g in found.tried] == [row[1] for row in REWARDS]
    if coefficient is not None:
        assert firsts[6].details == {"reward_before_stop_penalty": 1.0}
    advantages = advantages_of(found.groups, rollouts, GrpoRecipe().grpo)
    assert all(bool((g.advantage != 0).all()) for g in advantages if g.advantage is not None)
