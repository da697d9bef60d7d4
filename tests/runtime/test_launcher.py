"""Launchers that start several processes without torchrun."""

from __future__ import annotations

import pytest

from nemocascade.runtime.launcher import LauncherError, world_size_of_environment


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_several_tasks_need_torchrun(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "2")
    with pytest.raises(LauncherError, match=f"{name} is 2, so 2 processes run this script"):
        world_size_of_environment()
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert world_size_of_environment() == 16


def test_one_task_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch script, or a shell of salloc, sees the tasks of its allocation."""
    for name in ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.setenv(name, "1" if "STEP" in name else "8")
    assert world_size_of_environment() == 1
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    assert world_size_of_environment() == 1
