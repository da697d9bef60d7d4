"""The benchmark runner: rejected runs, regressions, and that every benchmark's code runs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import measure, run
from benchmarks.measure import Case, Goal, Prepared, Row, Unavailable

CPU = torch.device("cpu")


def sleepy(row: Row, median_s: float) -> measure.Outcome:
    return measure.Outcome(row, times_s=[median_s] * 3, extra_bytes=int(median_s * 1e6))


def row(name: str, kind: str) -> Row:
    return Row(name, kind, lambda: lambda: None)


@pytest.mark.parametrize("suite", ["cpu", "gpu"])
def test_dry_run_reaches_every_case(suite: str, capsys: pytest.CaptureFixture[str]) -> None:
    ops = ("linear_logprob", "mopd_advantage")
    arguments = [part for op in ops for part in ("--op", op)]
    assert run.main(["--suite", suite, "--dry-run", *arguments]) == 0
    shown = capsys.readouterr().out
    for op in ops:
        assert f"== {op}" in shown
    assert "WRONG" not in shown
    assert "missing: verl" in shown or "verl  " in shown


def test_red_tests_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tests/kernels"
    folder.mkdir(parents=True)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    (folder / "test_good.py").write_text("def test(): pass\n")
    (folder / "test_bad.py").write_text("def test(): assert False\n")
    assert "1 passed" in run.run_tests("good")
    for op in ("bad", "untested"):
        with pytest.raises(SystemExit) as error:
            run.run_tests(op)
        assert error.value.code == 2


def test_rows_are_timed_checked_and_excused() -> None:
    def wrong() -> Prepared:
        return Prepared(lambda: None, lambda: torch.tensor([1.0, 3.0]))

    def absent() -> Any:
        raise Unavailable("no such package")

    def broken() -> Any:
        raise RuntimeError("no kernel image")

    case = Case(
        "case",
        {"T": 1},
        [
            Row("ours", "ours", lambda: lambda: torch.tensor([1.0, 2.0])),
            Row("wrong", "peer", wrong),
            Row("absent", "peer", absent),
            Row("broken", "peer", broken),
        ],
        repeats=4,
    )
    ours, off, gone, failed = measure.measure(case, CPU, 1.0)
    assert len(ours.times_s) == 4
    assert ours.wrong is None
    assert off.wrong is not None
    assert gone.missing == "no such package"
    assert failed.missing == "RuntimeError: no kernel image"
    with pytest.raises(RuntimeError, match="no kernel image"):
        measure.measure(Case("ours fails", {}, [Row("ours", "ours", broken)]), CPU, 1.0)


def test_extra_memory_is_what_a_call_holds_at_its_peak() -> None:
    """Blocks are so large that malloc maps each, and gives it back when it is freed."""

    def call() -> None:
        torch.ones(128 << 18)  # 128 MiB
        torch.ones(64 << 18)

    found = measure.extra_memory(call, CPU)
    assert 120 << 20 < found < 140 << 20


def test_goals() -> None:
    ours, floor = sleepy(row("ours", "ours"), 2.0), sleepy(row("floor", "floor"), 1.6)
    gone = measure.Outcome(row("gone", "peer"), missing="not installed")
    outcomes = [ours, floor, gone]

    def met(goal: Goal) -> bool | None:
        found: bool | None = run.check_goal(goal, outcomes)["met"]
        return found

    assert met(Goal("", "ours", 1.3, "floor")) is True
    assert met(Goal("", "ours", 1.2, "floor")) is False
    assert met(Goal("", "ours", 1.2, "gone")) is None
    assert met(Goal("", "ours", 1.9)) is False
    assert met(Goal("", "ours", 2e6, None, "extra_memory")) is True


def record(ours_s: float, floor_s: float | None = 1.0, cpu: str = "a") -> dict[str, Any]:
    rows = [{"name": "ours", "kind": "ours", "median_s": ours_s}]
    if floor_s is not None:
        rows.append({"name": "floor", "kind": "floor", "median_s": floor_s})
    case = {"case": "case", "settings": {"T": 1}, "rows": rows, "goals": []}
    return {"environment": {"cpu": cpu}, "ops": {"op": {"cases": [case]}}}


def test_regressions_are_relative_to_the_floor() -> None:
    old = record(2.0)
    assert run.regressions(record(4.0, 2.0, cpu="slower"), old, 0.1) == []
    assert run.regressions(record(2.1), old, 0.1) == []
    assert len(run.regressions(record(2.3), old, 0.1)) == 1
    without = record(2.0, None)
    assert len(run.regressions(record(3.0, None), without, 0.1)) == 1


def test_what_cannot_be_compared_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    without = record(2.0, None)
    assert run.regressions(record(3.0, None, cpu="b"), without, 0.1) == []
    assert "other hardware, no floor row" in capsys.readouterr().out
    other = copy.deepcopy(without)
    other["ops"]["op"]["cases"][0]["settings"] = {"T": 2}
    assert run.regressions(record(3.0, None), other, 0.1) == []
    assert "no counterpart" in capsys.readouterr().out


def test_a_case_is_restricted_to_some_rows() -> None:
    goals = (
        Goal("beside the floor", "ours", 1.1, "floor"),
        Goal("beside a peer", "ours", 1.0, "peer"),
        Goal("in bytes", "ours", 1e6, None, "extra_memory"),
    )
    rows = [row("ours", "ours"), row("floor", "floor"), row("peer", "peer")]
    found = run.restricted(Case("case", {}, rows, goals), ["floor", "ours"])
    assert [r.name for r in found.rows] == ["ours", "floor"]
    assert [g.text for g in found.goals] == ["beside the floor", "in bytes"]
