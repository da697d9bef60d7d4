"""A job of four ranks whose rank is killed, stopped or raises restarts by itself, and its artifact
is that of an undisturbed run, bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import run_ranks
from helpers.restarts import Launcher
from helpers.slurm import run, slurm, wait_for
from helpers.stand_ins import Played
from helpers.start_policy import sft_recipe

from nemocascade.plan.slurm import job_of_script, submit_jobs
from nemocascade.plan.submission import SubmitSettings

__all__ = ["slurm"]  # a fixture

RANKS = 4
VICTIM = 2
FAULT_STEP = 3
STEPS = 5
SILENT_S = 30.0
SETTINGS = SubmitSettings(
    recipes=(__file__,), ranks_per_node=RANKS, time="30", pause_s=1, gpus=False
)
FAULTS = ("killed", "stopped", "raises")


def train(run_dir: str, fault: str) -> None:
    """Train a small model; one rank of the first start fails in a step."""
    from unittest import mock

    from nemocascade.recipe import CheckpointConfig, EngineConfig, LogConfig
    from nemocascade.runtime.errors import exit_cleanly
    from nemocascade.stages.sft import run_sft
    from nemocascade.train.trainer import Trainer

    recipe = sft_recipe(run_dir, ("instruction_following",))
    recipe = replace(
        recipe,
        steps=STEPS,
        data=replace(recipe.data, sequences_per_step=RANKS, balance_group=1),
        engine=EngineConfig(precision="fp32", preflight=False, timeout_s=SILENT_S / 0.8),
        checkpoint=CheckpointConfig(every=1),
        log=LogConfig(tensorboard=False),
    )
    step, failed = Trainer.train_step, Path(run_dir, "fault")

    def fail(trainer: Trainer, *args: Any) -> Any:
        if trainer.step_number == FAULT_STEP and not failed.exists():
            failed.touch()
            if fault == "raises":
                raise OSError("the victim's own fault")
            os.kill(os.getpid(), signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
        return step(trainer, *args)

    if fault and int(os.environ["RANK"]) == VICTIM:
        mock.patch.object(Trainer, "train_step", fail).start()
    exit_cleanly(lambda: run_sft(recipe))


def start() -> None:
    """Do nothing: the servers of the ranks then have their imports."""


def digest_of(run_dir: Path) -> str:
    """Digest of the artifact: of its weights, and of what is known of their origin."""
    return str(json.loads((run_dir / "artifact" / "manifest.json").read_text())["digest"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run folder, which is part of the digest, and the artifact's digest."""
    run_dir = tmp_path_factory.mktemp("job") / "run"
    # Else the first ranks would wait for the imports of the others, longer than the watchdog does.
    run_ranks(start, RANKS, timeout_s=900)
    run_ranks(train, RANKS, {"run_dir": str(run_dir), "fault": ""}, timeout_s=900)
    return run_dir, digest_of(run_dir)


@pytest.fixture
def job(undisturbed: tuple[Path, str]) -> Iterator[tuple[Path, str]]:
    """The folder without a run, and the digest."""
    shutil.rmtree(undisturbed[0])
    yield undisturbed
    undisturbed[0].mkdir(exist_ok=True)


def launcher(folder: Path, run_dir: Path, fault: str) -> Launcher:
    kwargs = {"run_dir": str(run_dir), "fault": fault}
    return Launcher(folder / "launcher", f"{Path(__file__).resolve()}:train", RANKS, kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_job_restarts_and_ends_as_an_undisturbed_one(
    fault: str, job: tuple[Path, str], tmp_path: Path
) -> None:
    run_dir, digest = job
    with launcher(tmp_path, run_dir, fault) as started:
        settings = replace(SETTINGS, torchrun=str(started.command))
        own = job_of_script(Path(__file__), str(run_dir), [])
        ends = [f"exec {started.command}"] * (settings.restarts + 1)
        played = Played(tmp_path, ends, job=own, using=settings, seconds=900)
        assert played.done.returncode == 0, f"{played.done.stdout}\n{started.text()}"
        assert len(started.logs) == 2, played.done.stdout
    assert (run_dir / "fault").exists()
    assert digest_of(run_dir) == digest
    is_named = "the watchdog named 127.0.0.1" in played.done.stdout
    assert is_named == (fault != "raises"), played.done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_under_slurm_it_returns_to_the_queue_if_the_watchdog_names_its_node(
    fault: str,
    job: tuple[Path, str],
    slurm: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    run_dir, digest = job
    with launcher(tmp_path, run_dir, fault) as started:
        settings = replace(SETTINGS, torchrun=str(started.command))
        [number] = submit_jobs(settings, [job_of_script(Path(__file__), str(run_dir), [])])
        log = run_dir / f"slurm-{number}.txt"
        try:
            wait_for((run_dir / "artifact" / "manifest.json").exists, 900, "no artifact")
            wait_for(lambda: not run(["squeue", "-h"], slurm).strip(), 90, "it does not end")
        except TimeoutError as error:
            text = log.read_text() if log.exists() else "no log"
            raise AssertionError(f"{error}:\n{text[-3000:]}\n{started.text()}") from None
        finally:
            run(["scancel", number], slurm)
            with contextlib.suppress(TimeoutError):
                wait_for(lambda: not run(["squeue", "-h"], slurm).strip(), 60, "still queued")
    assert digest_of(run_dir) == digest
    described = run(["scontrol", "show", "job", number], slurm)
    assert "ExitCode=0:0" in described
    is_back = "goes back to the queue" in log.read_text()
    assert is_back == (fault != "raises"), log.read_text()
    if is_back:
        [named] = set((run_dir / "excluded_nodes").read_text().split())
        assert f"ExcNodeList={named}" in described
        assert "NodeList=second" in described
        assert "Restarts=1" in described
