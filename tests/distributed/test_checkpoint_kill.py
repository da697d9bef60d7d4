"""A run killed with signal 9 at any moment loses at most the save that was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.kill_jobs import kill_before_every_operation, random_kills, train_through_kills
from helpers.ranks import run_ranks
from helpers.stored import unequal

from nemocascade.megatron.checkpoint import checkpoint_name

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
    ("ranks", "rounds", "asynchronous"),
    [
        (1, 10, False),
        (1, 10, True),
        (2, 4, True),
        pytest.param(2, 20, False, marks=pytest.mark.slow),
        pytest.param(2, 20, True, marks=pytest.mark.slow),
    ],
)
def test_random_moments(tmp_path: Path, ranks: int, rounds: int, asynchronous: bool) -> None:
    arguments = {
        "root": str(tmp_path),
        "rounds": rounds,
        "seed": rounds,
        "asynchronous": asynchronous,
    }
    results = run_ranks(random_kills, ranks, arguments, timeout_s=400)
    check(results)
    steps = [round_[0][1] for round_ in results[0]]
    assert steps[-1] > 0, "no save was ever finished, so nothing was tested"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_before_every_file_operation(tmp_path: Path, asynchronous: bool) -> None:
    arguments = {"root": str(tmp_path), "asynchronous": asynchronous}
    (rounds,) = run_ranks(kill_before_every_operation, 1, arguments, timeout_s=400)
    check([rounds])
    died = [events[-1] for events in rounds[:-1]]
    # Files, folders, renames of a save, and the deletion of the checkpoint that is not kept.
    assert len(died) >= 12
    assert all(what in ("saving", "saved") for what, _ in died)
    last = rounds[-1][-1][1]
    names = leftovers(tmp_path / "checkpoints")
    assert names == ["latest", f"step_{last - 1:08d}", f"step_{last:08d}"]


@pytest.mark.parametrize(
    ("rounds", "steps"), [(3, 12), pytest.param(20, 60, marks=pytest.mark.slow)]
)
def test_training_through_kills_of_asynchronous_saves(
    tmp_path: Path, rounds: int, steps: int
) -> None:
    """A run killed while it trains and writes ends bit-identical to one that nothing has killed."""
    folders = []
    for name, kills in (("whole", 0), ("killed", rounds)):
        arguments = {"root": str(tmp_path / name), "rounds": kills, "steps": steps}
        results = run_ranks(train_through_kills, 2, arguments, timeout_s=500)
        assert results[0][-1][-1] == ["done", steps]
        folders.append(tmp_path / name / "checkpoints" / checkpoint_name(steps))
    assert unequal(*folders) == []
    resumed = [round_[0][1] for round_ in results[0]]
    assert resumed == sorted(resumed)
    assert any(round_[0][2] for round_ in results[0]), "no kill has met a save under way"
