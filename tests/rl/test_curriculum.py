"""Curricula: the order of tasks by difficulty, its state, and its settings."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import pytest
from helpers.data import sentencepiece_tokenizer

from nemocascade.envs.registry import close_environments, make_environments
from nemocascade.recipe import (
    DataConfig,
    DemonstrationConfig,
    DomainConfig,
    GrpoRecipe,
    MopdConfig,
    MopdRecipe,
    RolloutConfig,
    SftRecipe,
)
from nemocascade.rl.tasks import Task, TaskStream
from nemocascade.runtime.row_errors import DataError
from nemocascade.types import Environment, Prompt, Verdict

ROLLOUT = RolloutConfig(prompts_per_step=16, rollouts_per_prompt=8)
MADE = DomainConfig("math", difficulty=3, tasks=200)
STEPS = 20


@pytest.fixture(scope="module")
def environments() -> Iterator[dict[str, Environment]]:
    found = make_environments()
    yield dict(found)
    close_environments(found)


def stream(
    environments: dict[str, Environment], *domains: DomainConfig, seed: int = 3
) -> TaskStream:
    tokenizer = sentencepiece_tokenizer()
    return TaskStream(domains, environments, tokenizer, ROLLOUT, seed=seed, steps=STEPS)


@pytest.fixture
def rows(tmp_path: Path) -> tuple[str, ...]:
    """Rows of mathematics: 90 for each of the pass rates 0/8 .. 8/8."""
    path = tmp_path / "rows.jsonl"
    lines = [
        {"prompt": f"what is {n} + 1?", "expected_answer": str(n + 1), "pass_rate": n % 9 / 8}
        for n in range(810)
    ]
    random.Random(1).shuffle(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return (str(path),)


def play(found: TaskStream, first: int, last: int, ability: float = 0.4) -> list[list[Task]]:
    """Tasks of some steps, by a policy that solves easier tasks with a higher probability."""
    steps = []
    for step in range(first, last):
        tasks = found.take(ROLLOUT.prompts_per_step, step)
        found.observe((t.prompt, verdicts(t, ability)) for t in tasks)
        steps.append(tasks)
    return steps


def plain(tasks: list[Task]) -> list[tuple[Prompt, list[int], int]]:
    """Tasks as values that can be compared."""
    return [(task.prompt, task.ids.tolist(), task.number) for task in tasks]


def played(found: TaskStream, first: int, last: int) -> list[Any]:
    return [plain(tasks) for tasks in play(found, first, last)]


def verdicts(task: Task, ability: float) -> list[Verdict]:
    rate = task.prompt.pass_rate
    easy = 0.5 if rate is None else rate
    rng = random.Random(f"{task.number}/{ability}")
    chance = min(1.0, max(0.0, 0.5 + ability + easy - 1))
    return [Verdict(float(rng.random() < chance)) for _ in range(8)]


def test_without_a_curriculum_the_order_is_that_of_a_shuffled_epoch(
    environments: dict[str, Environment],
) -> None:
    found = stream(environments, MADE, seed=7)
    order = list(range(200))
    random.Random("7/math/0").shuffle(order)
    wanted = [found.prompts["math"][n][0].id for n in order]
    assert [task.prompt.id for task in found.take(200, 5)] == wanted
    assert found.state_dict() == {"drawn": {"math": 200}}
    assert found.metrics(5) == {}


def test_easy_to_hard_follows_the_pass_rates(
    environments: dict[str, Environment], rows: tuple[str, ...]
) -> None:
    domain = DomainConfig("math", path=rows, tasks=0, curriculum="easy_to_hard")
    steps = play(stream(environments, domain), 0, STEPS)
    rates = [[cast(float, t.prompt.pass_rate) for t in tasks] for tasks in steps]
    means = [fmean(values) for values in rates]
    assert fmean(means[:3]) > 0.75
    assert 0.4 < fmean(means[9:12]) < 0.6
    assert fmean(means[-3:]) < 0.25
    # A batch keeps easier and harder tasks.
    assert len(set(rates[10])) > 2
    counts = Counter(t.prompt.id for tasks in steps for t in tasks)
    assert set(counts.values()) == {1}, "no task repeats before its level is used up"


def test_easy_to_hard_reaches_the_hardest_in_its_own_steps(
    environments: dict[str, Environment], rows: tuple[str, ...]
) -> None:
    domain = DomainConfig("math", path=rows, tasks=0, curriculum="easy_to_hard", curriculum_steps=5)
    found = stream(environments, domain)
    targets = [found.metrics(step)["curriculum/math"] for step in range(8)]
    assert targets == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]


def test_easy_to_hard_takes_generated_difficulties(environments: dict[str, Environment]) -> None:
    domain = replace(MADE, curriculum="easy_to_hard", easiest_difficulty=1)
    found = stream(environments, domain)
    asked = {prompt.id: prompt for prompt, _ in found.prompts["math"]}
    assert len(asked) == 200
    by_level = [
        {p.id for p in environments["math"].prompts(seed=3, count=k, difficulty=d)}
        for d, k in ((1, 67), (2, 67), (3, 66))
    ]
    assert set(asked) == set().union(*by_level)
    steps = play(found, 0, STEPS)
    shares = [[sum(t.prompt.id in level for t in tasks) for level in by_level] for tasks in steps]
    assert sum(s[0] for s in shares[:3]) > 36 > 12 > sum(s[2] for s in shares[:3])
    assert sum(s[2] for s in shares[-3:]) > 36 > 12 > sum(s[0] for s in shares[-3:])


@pytest.mark.parametrize("target", [0.3, 0.7])
@pytest.mark.parametrize("ability", [0.3, 0.4])
def test_adaptive_holds_the_pass_rate(
    environments: dict[str, Environment], rows: tuple[str, ...], target: float, ability: float
) -> None:
    domain = DomainConfig(
        "math", path=rows, tasks=0, curriculum="adaptive", target_pass_rate=target
    )
    found = stream(environments, domain)
    play(found, 0, 40, ability)
    values = found.metrics(39)
    assert values["curriculum_pass_rate/math"] == pytest.approx(target, abs=0.07)
    # The policy improves: the tasks become harder, and the pass rate comes back.
    play(found, 40, 80, ability + 0.2)
    later = found.metrics(79)
    assert later["curriculum/math"] > values["curriculum/math"] + 0.05
    assert later["curriculum_pass_rate/math"] == pytest.approx(target, abs=0.07)


def test_adaptive_starts_at_the_easiest_generated_tasks_and_stops_at_the_ends(
    environments: dict[str, Environment],
) -> None:
    found = stream(environments, replace(MADE, curriculum="adaptive"))
    assert found.metrics(0) == {"curriculum/math": 0.0}
    play(found, 0, 20, ability=2.0)
    assert found.metrics(20) == {"curriculum/math": 1.0, "curriculum_pass_rate/math": 1.0}
    play(found, 20, 60, ability=-2.0)
    assert found.metrics(60)["curriculum/math"] == 0.0


def test_a_group_without_a_verdict_changes_nothing(environments: dict[str, Environment]) -> None:
    found = stream(environments, replace(MADE, curriculum="adaptive"))
    [task] = found.take(1)
    before = json.dumps(found.state_dict())
    found.observe([(task.prompt, [Verdict(None, "the judge is gone")])])
    assert json.dumps(found.state_dict()) == before
    found.observe([(task.prompt, [Verdict(None, "gone"), Verdict(1.0)])])
    assert found.metrics(0)["curriculum_pass_rate/math"] == 1.0


@pytest.mark.parametrize("kind", ["easy_to_hard", "adaptive"])
def test_a_resumed_stream_goes_on_with_the_same_tasks(
    environments: dict[str, Environment], rows: tuple[str, ...], kind: Any
) -> None:
    domains = (
        DomainConfig("math", path=rows, tasks=0, curriculum=kind, share=2.0),
        DomainConfig("multiple_choice", tasks=50),
    )
    whole = stream(environments, *domains)
    play(whole, 0, 7)
    state = json.loads(json.dumps(whole.state_dict()))
    parts = stream(environments, *domains)
    parts.load_state_dict(state)
    assert played(parts, 7, 15) == played(whole, 7, 15)
    assert parts.state_dict() == whole.state_dict()
    assert played(stream(environments, *domains, seed=4), 0, 1) != played(
        stream(environments, *domains), 0, 1
    )


def test_a_state_without_a_curriculum_starts_one(environments: dict[str, Environment]) -> None:
    old = stream(environments, MADE)
    play(old, 0, 3)
    found = stream(environments, replace(MADE, curriculum="easy_to_hard"))
    found.load_state_dict(old.state_dict())
    assert found.position == 48
    # The schedule goes by the step, so a later start is not easier than it should be.
    assert found.metrics(19)["curriculum/math"] == 1.0
    back = stream(environments, MADE)
    back.load_state_dict(found.state_dict())
    assert plain(back.take(5)) == plain(old.take(5))


def test_rows_without_a_pass_rate(
    environments: dict[str, Environment], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows.jsonl"
    lines: list[dict[str, Any]] = [
        {"prompt": f"what is {n} + 1?", "expected_answer": str(n + 1)} for n in range(30)
    ]

    def write() -> DomainConfig:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return DomainConfig("math", path=(str(path),), curriculum="easy_to_hard")

    with pytest.raises(DataError, match=r"needs the rows' pass_rate.*nemocascade pass-rates"):
        stream(environments, write())
    for line in lines[:20]:
        line["pass_rate"] = 1.0
    with caplog.at_level("WARNING"):
        found = stream(environments, write())
    assert "10 of 30 tasks have no pass_rate" in caplog.text
    assert {t.prompt.pass_rate for t in found.take(16, 0)} >= {1.0}


def test_answers_that_are_compared_have_no_pass_rate(environments: dict[str, Environment]) -> None:
    domain = DomainConfig("preference", difficulty=2, tasks=30, curriculum="adaptive")
    with pytest.raises(DataError, match="no pass rate for curriculum"):
        stream(environments, domain)
    stream(environments, replace(domain, curriculum="easy_to_hard"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"curriculum": "adaptive"}, r"difficulty\(0\) above easiest_difficulty\(0\)"),
        (
            {"curriculum": "easy_to_hard", "difficulty": 2, "easiest_difficulty": 2},
            r"difficulty\(2\) above easiest_difficulty\(2\)",
        ),
        ({"curriculum": "adaptive", "difficulty": 3, "tasks": 3}, r"tasks\(3\).* 4 levels"),
        ({"target_pass_rate": 1.0}, r"domains.0.target_pass_rate\(1.0\) must be in \(0, 1\)"),
        ({"curriculum_spread": 0.0}, r"domains.0.curriculum_spread\(0.0\) must be at least 0.01"),
        ({"curriculum_spread": float("inf")}, r"curriculum_spread\(inf\) must be a finite number"),
        ({"curriculum_steps": -1}, r"domains.0.curriculum_steps\(-1\)"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], problem: str) -> None:
    recipe = GrpoRecipe(init_from="x", domains=(DomainConfig("math", **changes),))
    assert match(recipe.problems(1), problem)


def match(problems: Sequence[str], pattern: str) -> bool:
    return any(re.search(pattern, problem) for problem in problems)


def test_stages_that_have_no_rewards_or_no_order() -> None:
    domain = DomainConfig("math", difficulty=2, curriculum="adaptive")
    silent = MopdRecipe(domains=(domain,), mopd=MopdConfig(score_rollouts=False))
    assert match(silent.problems(1), r"domains.0.curriculum\(adaptive\).*score_rollouts\(False\)")
    assert not match(replace(silent, mopd=MopdConfig()).problems(1), "curriculum")
    rows = DemonstrationConfig(domains=(domain,))
    sft = SftRecipe(demonstrations=rows, data=DataConfig())
    assert match(sft.problems(1), r"demonstrations.domains.0.curriculum\(adaptive\)")
