"""Groups without a good rollout: counted, kept in the statistics, masked in the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch

from nemocascade.envs.multiple_choice import MultipleChoice
from nemocascade.recipe import GrpoRecipe, MopdRecipe, RolloutConfig
from nemocascade.rl.collector import Collector, Group, advantages_of, gather
from nemocascade.rl.policy import training_sequences
from nemocascade.rl.rollout_metrics import rollout_values
from nemocascade.rl.tasks import Task, TaskStream
from nemocascade.rl.verification import Rollout
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


def rollout(reward: float | None) -> Rollout:
    return Rollout(
        tokens=torch.arange(6),
        written=torch.arange(6) >= 2,
        logprob=torch.zeros(6),
        prompt_tokens=2,
        truncated=False,
        turns=1,
        text="",
        verdict=Verdict(reward) if reward is not None else Verdict(None, "killed"),
    )


class Stream:
    """Tasks by number."""

    def __init__(self) -> None:
        self.taken = 0

    def take(self, count: int) -> list[Task]:
        self.taken += count
        numbers = range(self.taken - count, self.taken)
        return [Task(Prompt(str(n), "d", (), {}), (1, 2), n) for n in numbers]


class Written:
    """A collector whose rewards are `REWARDS`."""

    def roll_out(self, tasks: Sequence[Task], copies: int) -> list[Group]:
        assert copies == 2
        return [Group(task, tuple(map(rollout, REWARDS[task.number]))) for task in tasks]


def gathered(**settings: Any) -> tuple[Any, RolloutConfig]:
    rollouts = RolloutConfig(
        prompts_per_step=settings.pop("prompts", 7), rollouts_per_prompt=2, **settings
    )
    return gather(cast(Collector, Written()), cast(TaskStream, Stream()), rollouts), rollouts


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
