"""Statistics of races between two ways to train: a level that is not reached remains infinite."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.end_to_end.races import Race, interval, plot, summary
from benchmarks.end_to_end.tiny_stages import measured


def race(*scores: float, teacher: float = 0.8) -> Race:
    """Evaluations every two steps, 100 tokens and 3 s each."""
    steps = [2 * n for n in range(len(scores))]
    return Race(steps, scores, [50.0 * s for s in steps], [1.5 * s for s in steps], teacher)


FAST = [race(0.4, 0.6, 0.8, 0.9), race(0.4, 0.7, 0.7, 0.8), race(0.5, 0.8, 0.8, 0.8)]
SLOW = [race(0.4, 0.5, 0.6, 0.8), race(0.4, 0.4, 0.5, 0.6), race(0.5, 0.5, 0.6, 0.7)]


def test_a_level_is_reached_at_its_first_evaluation() -> None:
    one = race(0.4, 0.6, 0.9, 0.7)
    assert one.to_level(one.steps, 0.8) == 4
    assert one.to_level(one.tokens, 0.8) == 200
    assert one.to_level(one.steps, 0.95) == float("inf")
    assert one.recovered().tolist() == pytest.approx([0.0, 0.5, 1.25, 0.75])
    assert race(0.8, 0.9).recovered().tolist() == [0.0, 0.0]


def test_the_summary_counts_what_was_not_reached() -> None:
    found = summary({"MOPD": FAST, "GRPO": SLOW}, margin=0.0)
    assert (found["MOPD"]["reached"], found["GRPO"]["reached"]) == (3, 1)
    assert found["MOPD"]["steps_to_teacher"]["value"] == 4
    # Two of three seeds never got there, so the median is not a number of steps.
    assert found["GRPO"]["steps_to_teacher"]["value"] is None
    assert found["GRPO"]["steps_to_teacher"]["ci95"] == [6, None]
    assert summary({"MOPD": FAST, "GRPO": SLOW}, margin=0.11)["GRPO"]["reached"] == 2
    paired = found["MOPD - GRPO"]["final_score"]
    assert paired["value"] == pytest.approx((0.1 + 0.2 + 0.1) / 3)
    assert paired["ci95"][0] == pytest.approx(0.1)
    json.dumps(found, allow_nan=False)


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    dice = np.random.default_rng(1)
    covered = 0
    for _ in range(60):
        _, low, high = interval(dice.normal(0.0, 1.0, 40).tolist(), lambda v: v.mean(-1))
        covered += low <= 0.0 <= high
    # 95 % of 60, with room for the draw; a one-sided or a 68 % interval falls out of it.
    assert 51 <= covered <= 60


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    plot(tmp_path / "race.png", {"MOPD": FAST, "GRPO": SLOW}, "Three seeds")
    assert (tmp_path / "race.png").read_bytes().startswith(b"\x89PNG")


def test_a_stage_is_measured_from_its_start(tmp_path: Path) -> None:
    rows: list[dict[str, float]] = [
        {"step": 1, "reward": 0.1},
        {"step": 2, "reward": 0.3, "heldout/code": 0.5, "heldout/math": 0.2},
        {"step": 3, "reward": 0.4, "heldout/code": 0.75, "heldout/math": 0.1},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = {"heldout/code": 0.25, "heldout/math": 0.2}
    (tmp_path / "heldout_start.json").write_text(json.dumps(start))
    found = measured(tmp_path, 9.0)
    assert found["heldout"]["code"] == [[0, 0.25], [2, 0.5], [3, 0.75]]
    assert found["gain"] == {"code": 0.5, "math": pytest.approx(-0.1)}
    assert (found["steps"], found["seconds"], found["reward"]) == (3, 9.0, [0.1, 0.3, 0.4])


def test_a_comparison_is_measured_by_its_win_rate(tmp_path: Path) -> None:
    scores = {"heldout/preference": 0.9, "heldout/preference_over_start": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward": 2.0, **scores}))
    start = {"heldout/preference": 0.0, "heldout/preference_over_start": 0.5}
    (tmp_path / "heldout_start.json").write_text(json.dumps(start))
    assert measured(tmp_path, 1.0)["gain"] == {"preference_over_start": 0.5}
