"""A stage that learns nothing says so: errors, samples, and the stop."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from nemocascade.recipe import RolloutConfig
from nemocascade.rl.collector import Gathered, Group
from nemocascade.rl.learning_signal import LearningSignal, NothingLearntError
from nemocascade.rl.rollouts import (
    NOT_SCORED,
    Rollout,
    TokenSequence,
    Transcript,
    whole_rollout,
)
from nemocascade.rl.tasks import Task
from nemocascade.rl.trajectories import sampled
from nemocascade.types import Prompt, Verdict

Verdicts = Sequence[float | str | None]


def group(number: int, verdicts: Verdicts) -> Group:
    """A task with verdicts: a reward, an error, or None for one that was not scored."""
    prompt = Prompt(str(number), "math", (), {}, source=f"rows.jsonl:{number}")
    made = [
        Verdict(None, v) if isinstance(v, str) else NOT_SCORED if v is None else Verdict(v)
        for v in verdicts
    ]
    rollouts = tuple(
        whole_rollout(
            TokenSequence(torch.arange(6), torch.arange(6) >= 2, torch.zeros(6)),
            verdict,
            domain="math",
            text=f"answer {number} \ud83d",
        )
        for verdict in made
    )
    return Group(Task(prompt, np.arange(2, dtype=np.int32), number), rollouts)


def texts(rollouts: Sequence[Rollout]) -> list[Transcript]:
    """The texts of rollouts of this process."""
    return [r.transcript for r in rollouts if r.transcript is not None]


def step(*rows: Verdicts, trained: Sequence[int] = ()) -> Gathered:
    groups = tuple(group(n, row) for n, row in enumerate(rows))
    return Gathered(tuple(groups[n] for n in trained), len(groups), groups)


def watch(*steps: Gathered, by_reward: bool = True, **settings: Any) -> LearningSignal:
    config = RolloutConfig(**settings)
    signal = LearningSignal(config, by_reward=by_reward, is_main=True, transcripts=texts)
    for number, gathered in enumerate(steps):
        signal.observe(number, gathered)
        signal.check()
    return signal


GOOD = step([0.0, 1.0], [0.0, 0.0], trained=[0])
EQUAL = step([0.0, 0.0], [1.0, 1.0])
FAILED = step(["killed after 5 s", "killed after 7 s"], ["unknown instruction 'a'"] * 2)


def test_the_first_error_of_each_kind_is_logged_with_its_row_and_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="nemocascade"):
        watch(GOOD, FAILED, FAILED, by_reward=False)
    assert [record.getMessage() for record in caplog.records] == [
        "step 2: a verifier of math fails on rows.jsonl:0: killed after 5 s; the answer: "
        "'answer 0 \\ud83d'",
        "step 2: a verifier of math fails on rows.jsonl:1: unknown instruction 'a'; the answer: "
        "'answer 1 \\ud83d'",
    ]


def test_counts_are_logged_each_step(caplog: pytest.LogCaptureFixture) -> None:
    mixed = step([0.0, 1.0], ["x", 0.5], [None, 0.5], trained=[0, 1])
    with caplog.at_level(logging.INFO, logger="nemocascade"):
        signal = LearningSignal(RolloutConfig(), by_reward=True, is_main=True, transcripts=texts)
        assert signal.observe(4, mixed) == {"groups_informative": 1}
    said = "step 5: 3 groups drawn, 1 informative, 1 of 5 verdicts failed, reward 0.500"
    assert said in caplog.text


@pytest.mark.parametrize(
    ("idle", "reason"),
    [
        (EQUAL, "3 steps in a row had no group with different rewards"),
        (FAILED, "3 steps in a row had no verdict"),
        (step([0.0, 0.0], trained=[0]), "no group with different rewards"),
    ],
)
def test_a_stage_stops_after_idle_steps_in_a_row(idle: Gathered, reason: str) -> None:
    watch(idle, idle, GOOD, idle, idle, max_idle_steps=3)
    with pytest.raises(NothingLearntError, match=rf"{reason}(.|\n)*max_idle_steps") as caught:
        watch(GOOD, idle, idle, idle, max_idle_steps=3)
    assert caught.value.exit_code != 0
    watch(*[idle] * 30, max_idle_steps=0)
    watch(*[idle] * 30, max_idle_steps=3, by_reward=False)


def test_a_short_stage_without_a_verdict_writes_no_artifact(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failed = r"2 steps in a row had no verdict .* with killed after 5 s \(rows.jsonl:0\)"
    with pytest.raises(NothingLearntError, match=failed):
        watch(FAILED, FAILED).finish()
    watch().finish()
    watch(FAILED, GOOD).finish()
    assert "nothing was learnt" not in caplog.text
    with caplog.at_level(logging.WARNING, logger="nemocascade"):
        watch(EQUAL, EQUAL).finish()
    assert "nothing was learnt: none of 2 steps had a group with different" in caplog.text


def test_samples_show_groups_that_did_not_train() -> None:
    gathered = step([0, 0], [0, 1], [1, 0], ["x", 1], [0, 1], trained=[1, 2, 4])

    def chosen(found: Gathered, count: int) -> list[int]:
        return [g.task.number for g in sampled(found, count)]

    assert [chosen(gathered, n) for n in (0, 1, 2, 3)] == [[], [1], [1, 3], [1, 2, 3]]
    assert chosen(gathered, 9) == [1, 2, 4, 3, 0]
    assert chosen(EQUAL, 4) == [0, 1]
    assert chosen(step([0, 1], [0, 1], trained=[0, 1]), 2) == [0, 1]
