"""Held-out scores of several samples: avg@k, its errors, pass@k, on any number of ranks."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import run_ranks
from helpers.start_policy import start_policy

from nemocascade.recipe import ScoreConfig, ScoredDomain
from nemocascade.stages.domain_score import domain_score, pass_at
from nemocascade.stages.scoring import Scores, report_scores


@pytest.mark.parametrize(("samples", "solved"), [(1, 0), (1, 1), (4, 1), (6, 2), (6, 5), (5, 5)])
def test_pass_at_is_the_mean_over_all_choices_of_samples(samples: int, solved: int) -> None:
    outcomes = [1] * solved + [0] * (samples - solved)
    for n in range(1, samples + 1):
        chosen = [any(choice) for choice in itertools.combinations(outcomes, n)]
        assert pass_at(samples, solved, n) == pytest.approx(statistics.mean(chosen))


def test_a_score_of_samples() -> None:
    found = domain_score([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.5, None, 1.0], [None] * 3])
    assert (found.tasks, found.errors, found.samples) == (4, 4, 3)
    assert found.score == pytest.approx((2 / 3 + 0 + 3 / 4) / 3)
    assert found.standard_error == pytest.approx(statistics.stdev([2 / 3, 0, 3 / 4]) / 3**0.5)
    within = [(1 / 3) / 3, 0.0, (1 / 8) / 2]
    assert found.sampling_error == pytest.approx(sum(within) ** 0.5 / 3)
    # The task with two verdicts has no pass@3.
    assert found.pass_at == {
        "1": pytest.approx((2 / 3 + 0 + 1 / 2) / 3),
        "2": pytest.approx((1 + 0 + 1) / 3),
        "3": pytest.approx((1 + 0) / 2),
    }
    assert str(found) == "0.472 ± 0.237 (avg@3, pass@2 0.667, pass@3 0.500)"


def test_one_sample_is_the_mean_reward() -> None:
    found = domain_score([[0.1], [0.7], [None], [0.1]])
    assert found.score == (0.1 + 0.7 + 0.1) / 3
    assert (found.errors, found.sampling_error, str(found)) == (1, None, "0.300")
    assert domain_score([[None]]).score is None
    assert domain_score([]).pass_at == {}


def test_failed_verdicts_are_logged_with_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    answers: list[dict[str, Any]] = [{"error": None}, {"error": "KeyError: 'a\x1bb'"}]
    scores = {"math": domain_score([[1.0], [None]])}
    report_scores(Scores("", "", scores, {"math": answers}, 1.0))
    assert "1 of 2 verdicts of math failed and are not counted, such as KeyError" in caplog.text
    assert "\x1b" not in caplog.text


def test_the_sampling_is_greedy_or_the_paper_s_unless_it_is_set() -> None:
    def how(domain: ScoredDomain, **settings: Any) -> tuple[int, float, float]:
        found = ScoreConfig(**settings).sampling_of(domain)
        return found.samples, found.temperature, found.top_p

    assert how(ScoredDomain("math")) == how(ScoredDomain("code")) == (1, 0.0, 1.0)
    assert how(ScoredDomain("math"), samples=64) == (64, 1.0, 1.0)
    assert how(ScoredDomain("code"), samples=8) == (8, 1.0, 0.95)
    assert how(ScoredDomain("instruction_following", samples=8)) == (8, 0.6, 0.95)
    assert how(ScoredDomain("math"), temperature=0.7, top_p=0.9) == (1, 0.7, 0.9)
    assert how(ScoredDomain("math", temperature=0.2), samples=2, temperature=0.7) == (2, 0.2, 1.0)
    equal = ScoreConfig(domains=(ScoredDomain("math", samples=2),), temperature=0.0).problems(1)
    assert equal == [
        "scores.samples(2) of math are all equal at temperature 0: set scores.temperature above "
        "0, or one sample"
    ]


def scored(
    artifact: str, folder: str, domains: dict[str, dict[str, Any]], settings: dict[str, Any]
) -> Any:
    """The content of scores.json, without times."""
    from nemocascade.recipe import EngineConfig, EnvConfig
    from nemocascade.stages.scoring import score_artifact

    config = ScoreConfig(
        domains=tuple(ScoredDomain(name, **said) for name, said in domains.items()),
        tasks=16,
        max_prompt_tokens=128,
        max_response_tokens=12,
        thinking=False,
        slots=5,
        envs=EnvConfig(if_grading="fraction", if_language_check="letters", check_workers=1),
        engine=EngineConfig(precision="fp32"),
        **settings,
    )
    found = score_artifact(Path(artifact), config, Path(folder)).as_json()
    found.pop("seconds")
    return json.loads(json.dumps(found))


BOTH: dict[str, dict[str, Any]] = {"preference": {}, "instruction_following": {}}
SAMPLED: dict[str, Any] = {"samples": 4, "temperature": 1.0}


def alone(folder: str) -> dict[str, Any]:
    artifact = start_policy(f"{folder}/sft", tuple(BOTH))
    one: dict[str, dict[str, Any]] = {"instruction_following": {}}
    return {
        "artifact": artifact,
        "both": scored(artifact, folder, BOTH, SAMPLED),
        "one": scored(artifact, folder, one, SAMPLED),
        "seed": scored(artifact, folder, one, SAMPLED | {"seed": 2}),
        "greedy": scored(artifact, folder, one, {}),
        "cold": scored(artifact, folder, one, {"temperature": 0.0}),
    }


def together(artifact: str, folder: str) -> Any:
    """Two ranks are two replicas, also if they are context parallel."""
    from nemocascade.recipe import ParallelConfig

    context = scored(artifact, folder, BOTH, SAMPLED | {"parallel": ParallelConfig(cp=2)})
    found = scored(artifact, folder, BOTH, SAMPLED)
    assert context == found
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = str(tmp_path_factory.mktemp("scores"))
    [result] = run_ranks(alone, 1, {"folder": folder})
    ranks = run_ranks(together, 2, {"artifact": result["artifact"], "folder": folder})
    return {**result, "ranks": ranks}


def test_samples_do_not_depend_on_ranks_or_on_other_domains(found: dict[str, Any]) -> None:
    main, other = found["ranks"]
    assert main == found["both"]
    assert all(found["both"]["samples"].values())
    # Answers that are stored stay with the rank that writes them.
    assert other == {**main, "samples": {key: [] for key in main["samples"]}}
    name = "instruction_following"
    assert found["one"]["scores"][name] == found["both"]["scores"][name]
    assert found["one"]["samples"][name] == found["both"]["samples"][name]
    assert found["seed"]["samples"][name] != found["one"]["samples"][name]


def test_a_record_has_samples_errors_and_passes(found: dict[str, Any]) -> None:
    score = found["both"]["scores"]["instruction_following"]
    assert (score["tasks"], score["samples"], score["errors"]) == (16, 4, 0)
    assert 0 < score["score"] < 1
    assert score["standard_error"] > 0
    assert score["sampling_error"] > 0
    assert set(score["pass_at"]) == {"1", "2", "4"}


def test_each_sample_is_scored_by_itself_where_training_compares(found: dict[str, Any]) -> None:
    """Rewards of a compared group start at 1 and need not agree with the baseline's verdict."""
    score = found["both"]["scores"]["preference"]
    assert (score["samples"], score["errors"]) == (4, 0)
    assert 0 <= score["score"] < 1


def test_one_answer_is_greedy(found: dict[str, Any]) -> None:
    assert found["greedy"] == found["cold"]
    assert found["greedy"]["scores"]["instruction_following"]["samples"] == 1
