"""The benchmark of the tiny cascade: medians and ranges over runs, and what misses the goal."""

from __future__ import annotations

from typing import Any

from benchmarks.end_to_end.tiny_cascade import GOAL, TO_WIN, missed, summary, table


def a_run(seed: int, gain: float, to_win: float = 2 * TO_WIN) -> dict[str, Any]:
    """A run whose only RL stage gains `gain`, and whose MOPD has three domains to win back."""
    taught = {d: {"before": 10.0, "after": 20.0, "teacher": 10.0 + to_win} for d in ("x", "y", "z")}
    return {
        "seed": seed,
        "level": "v3",
        "scores": {"rl": {"x": {"before": 5.0, "after": 5.0 + gain}}, "mopd": taught},
    }


def test_scores_are_summed_up_by_stage_and_domain() -> None:
    found = summary([a_run(1, 20.0), a_run(2, 30.0), a_run(3, 70.0)])
    assert found["rl"]["x"]["gain"] == {"median": 30.0, "low": 20.0, "high": 70.0}
    assert found["rl"]["x"]["before"] == {"median": 5.0, "low": 5.0, "high": 5.0}
    assert found["mopd"]["y"]["to_win"]["median"] == 2 * TO_WIN
    text = table({"summary": found})
    assert "| rl | x | 5.0 (5.0 to 5.0) | 35.0 (25.0 to 75.0) | 30.0 (20.0 to 70.0) |" in text
    assert "| z | 30.0 (30.0 to 30.0) | 10.0 (10.0 to 10.0) | 20.0 (20.0 to 20.0) |" in text


def test_small_gains_and_too_little_to_win_back_are_named() -> None:
    assert missed([a_run(1, GOAL), a_run(2, GOAL + 1)]) == []
    assert missed([a_run(1, GOAL), a_run(2, GOAL - 1)]) == ["v3, seed 2: rl, x +14.0"]
    assert missed([a_run(4, GOAL, TO_WIN - 1)]) == ["v3, seed 4: mopd has []"]
