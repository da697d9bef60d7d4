"""A cascade with every kind of stage: reuse, changes, kills, scores, and a layout per stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.cascade_jobs import DOMAINS, kill_and_restart, on_layouts, on_one, scenarios
from helpers.ranks import run_ranks

from nemocascade.stages.teacher_scores import NEAR_ZERO

STAGES = ["sft", "if_rl", "teacher", "mopd", "last"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = str(tmp_path_factory.mktemp("cascade"))
    [result] = run_ranks(scenarios, 1, {"root": root}, timeout_s=550)
    return {**result, "root": root}


def actions(text: str) -> dict[str, str]:
    """Decisions that a dry run prints, by stage."""
    heads = [line.split(": ", 1) for line in text.splitlines() if line and line[0] != " "]
    return {name: action.partition(",")[0] for name, action in heads}


def test_every_stage_leaves_an_artifact_and_scores(found: dict[str, Any]) -> None:
    assert sorted(found["first"]) == sorted(STAGES)
    for stage in found["cascade"]["stages"]:
        assert stage["status"] == "done"
        assert stage["artifact_digest"] == found["first"][stage["name"]]
        assert stage["seconds"] > 0
        assert stage["tokens"] > 0
        scores = found["scores"][stage["name"]]
        assert scores["digest"] == stage["artifact_digest"]
        for domain in DOMAINS:
            measured = scores["scores"][domain]
            assert measured["tasks"] == 8
            assert measured["errors"] == 0
            assert 0 <= measured["score"] <= 1
            assert scores["samples"][domain][0]["prompt"][-1]["role"] == "user"
    kinds = [(s["name"], s["kind"], s["start"], s["side"]) for s in found["cascade"]["stages"]]
    assert kinds == [
        ("sft", "sft", "", False),
        ("if_rl", "grpo", "sft", False),
        ("teacher", "grpo", "sft", True),
        ("mopd", "mopd", "if_rl", False),
        ("last", "grpo", "mopd", False),
    ]
    assert found["leftovers"] == [], "checkpoints of finished stages stay"


def test_each_domain_is_taught_by_its_best_artifact(found: dict[str, Any]) -> None:
    for domain in DOMAINS:
        teacher = found["cascade"]["teachers"][domain]
        before = {n: found["scores"][n]["scores"][domain]["score"] for n in STAGES[:3]}
        assert teacher["score"] == before[teacher["stage"]] == max(before.values())
        assert not teacher["pinned"]
        # The best artifact is above the student, unless the student starts from it.
        is_named = f"\n  - {domain}, 50%: " in found["taught again"]
        assert is_named == (teacher["score"] < NEAR_ZERO or teacher["stage"] == "if_rl")
    assert "cannot improve" not in found["kept"], "a finished stage has no rollouts to come"


def test_the_report_shows_where_artifacts_come_from(found: dict[str, Any]) -> None:
    lines = found["report"].splitlines()
    assert lines[0].startswith(f"sft  {found['first']['sft'][:12]}  12 steps")
    assert lines[1].startswith(f"├─ if_rl  {found['first']['if_rl'][:12]}")
    assert lines[2].startswith("│  └─ mopd")
    assert lines[3].startswith("│     └─ last")
    assert lines[4].startswith("└─ teacher")
    assert lines[4].endswith("side branch")
    # The words of a domain stand below each other.
    [heading] = [number for number, line in enumerate(lines) if line.startswith("stage ")]
    assert "instruction" in lines[heading - 1]
    assert "following" in lines[heading]


def test_a_stage_that_is_not_there_yet_is_asked_for(found: dict[str, Any]) -> None:
    assert actions(found["before"]) == dict.fromkeys(STAGES, "run")
    assert "mopd: run\n  - after sft, if_rl, teacher, which run before it" in found["before"]
    assert found["rejected"].startswith("CascadeError: stage if_rl needs the artifact of sft")
    assert "--only sft" in found["rejected"]


def test_what_has_not_changed_is_not_run_again(found: dict[str, Any]) -> None:
    assert actions(found["kept"]) == dict.fromkeys(STAGES, "keep")
    assert found["untouched"], "a file of a finished stage was written again"


def test_what_has_changed_runs_and_says_why(found: dict[str, Any]) -> None:
    kept = dict.fromkeys(STAGES[:4], "keep")
    assert actions(found["change"]) == {**kept, "last": "run"}
    assert "  - changed: seed 3 -> 11" in found["change"]
    first, changed = found["first"], found["changed"]
    assert {n for n in STAGES if first[n] != changed[n]} == {"last"}
    # What lay there is not lost.
    assert found["retired"] == {"last.1": first["last"]}


def test_a_change_upstream_reaches_what_depends_on_it(found: dict[str, Any]) -> None:
    assert actions(found["upstream"]) == {
        "sft": "keep",
        "if_rl": "run",
        "teacher": "keep",
        "mopd": "run",
        "last": "run",
    }
    assert "changed: steps 2 -> 3" in found["upstream"]
    # From a later stage on, what is before it is taken as it lies.
    assert actions(found["from"]) == {"mopd": "keep", "last": "keep"}
    assert actions(found["again"]) == {"teacher": "run"}


def test_other_held_out_tasks_are_other_scores_of_the_same_artifacts(
    found: dict[str, Any],
) -> None:
    before = found["scores"]["sft"]
    assert found["rescored"]["scores"]["math"]["tasks"] == 4
    assert found["rescored"]["settings"] != before["settings"]
    assert found["rescored"]["digest"] == before["digest"]
    assert found["same"] == found["changed"]


def test_an_alarm_stops_the_run(found: dict[str, Any]) -> None:
    assert found["alarm"].startswith("AlarmError: if_rl has lost")
    assert "points of math: 100.0 after sft" in found["alarm"]
    assert "--alarm.stop False" in found["alarm"]
    named = [(a["stage"], a["from_stage"], a["domain"]) for a in found["alarms"]]
    assert ("if_rl", "sft", "math") in named
    assert ("teacher", "sft", "math") in named


def test_a_damaged_artifact_is_made_anew(found: dict[str, Any]) -> None:
    assert actions(found["damaged"]) == {"last": "run"}
    assert "is damaged" in found["damaged"]
    assert "is missing" in found["damaged"]


@pytest.mark.parametrize(("kills", "least"), [(3, 1), pytest.param(10, 5, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_artifacts_are_the_same_bits(
    found: dict[str, Any], kills: int, least: int
) -> None:
    arguments = {"root": found["root"], "kills": kills, "seed": kills, "whole_s": found["seconds"]}
    [result] = run_ranks(kill_and_restart, 1, arguments, timeout_s=500)
    assert sum(result["died"]) >= least, "too few kills met a running cascade"
    assert sorted(result["parts"]) == sorted(STAGES)
    assert result["parts"] == found["first"]
    assert result["retired"] == []


@pytest.mark.slow
def test_every_stage_on_a_layout_of_its_own(tmp_path: Path) -> None:
    """TP2, EP2 and DP2 in one job of two ranks; one process then finds nothing left to do."""
    layouts = {"sft": {"tp": 2}, "if_rl": {"ep": 2}, "mopd": {"tp": 2, "ep": 2}}
    run_dir = str(tmp_path / "run")
    arguments = {"run_dir": run_dir, "layouts": layouts}
    ours, theirs = run_ranks(on_layouts, 2, arguments, timeout_s=550)
    assert sorted(ours["once"]) == sorted(STAGES)
    assert ours == theirs
    assert ours["kept"]
    [said] = run_ranks(on_one, 1, {"run_dir": run_dir}, timeout_s=120)
    assert actions(said) == dict.fromkeys(STAGES, "keep")
