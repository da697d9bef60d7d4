"""Shares of a host's cores."""

from __future__ import annotations

import os

import pytest

from nemocascade.runtime.cores import slots_of_rank


@pytest.mark.parametrize(
    ("usable", "cores", "ranks", "slots"),
    [(96, 96, 8, 12), (12, 96, 8, 12), (2, 2, 1, 2), (2, 2, 4, 1), (48, 96, 2, 48), (7, 8, 3, 2)],
)
def test_ranks_share_the_cores_unless_each_has_its_own(
    monkeypatch: pytest.MonkeyPatch, usable: int, cores: int, ranks: int, slots: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(usable)))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert slots_of_rank() == slots
    assert slots_of_rank(5) == 5
