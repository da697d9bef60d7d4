"""A run killed with signal 9 at any moment loses at most the save that was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.kill_jobs import kill_before_every_operation, random_kills
from helpers.ranks import run_ranks

Rounds = list[list[list[Any]]]


def check(ranks: list[Rounds]) -> None:
    """Every round resumed, from the last finished save or from the one that was under way."""
    finished = begun = 0
    for number, events in enumerate(zip(*ranks, strict=True)):
        loaded = {tuple(of_rank[0]) for of_rank in events}
        assert len(loaded) == 1, f"round {number}: ranks resumed differently: {loaded}"
        what, step = loaded.pop()
        assert what == "loaded"
        assert finished <= step <= begun, f"round {number}: {step} not in {finished}..{begun}"
        flat = [event for of_rank in events for event in of_rank]
        begun = max(step for what, step in flat if what == "saving")
        finished = max([step, *(step for what, step in flat if what == "saved")])


def leftovers(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


@pytest.mark.parametrize(
    ("ranks", "rounds"), [(1, 20), (2, 4), pytest.param(2, 20, marks=pytest.mark.slow)]
)
def test_random_moments(tmp_path: Path, ranks: int, rounds: int) -> None:
    arguments = {"root": str(tmp_path), "rounds": rounds, "seed": rounds}
    results = run_ranks(random_kills, ranks, arguments, timeout_s=400)
    check(results)
    steps = [round_[0][1] for round_ in results[0]]
    assert steps[-1] > 0, "no save was ever finished, so nothing was tested"


def test_before_every_file_operation(tmp_path: Path) -> None:
    (rounds,) = run_ranks(kill_before_every_operation, 1, {"root": str(tmp_path)}, timeout_s=400)
    check([rounds])
    died = [events[-1] for events in rounds[:-1]]
    # Files, folders, renames of a save, and the deletion of the checkpoint that is not kept.
    assert len(died) >= 12
    assert all(what in ("saving", "saved") for what, _ in died)
    last = rounds[-1][-1][1]
    names = leftovers(tmp_path / "checkpoints")
    assert names == ["latest", f"step_{last - 1:08d}", f"step_{last:08d}"]
