"""Jobs on a real Slurm on this machine: a warned job saves, requeues itself and resumes; a killed
one ends as an undisturbed one; a named node is excluded."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers.journal_jobs import weight_hashes
from helpers.slurm import free_port, run, slurm, wait_for
from helpers.stand_ins import TINY

from nemocascade.plan.slurm import (
    job_of_script,
    submit_jobs,
)
from nemocascade.plan.submission import SubmitSettings

ROOT = Path(__file__).resolve().parents[2]
__all__ = ["slurm"]  # a fixture


@pytest.fixture
def submitting(slurm: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """This process submits jobs to the test's Slurm, and they inherit its environment."""
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'kernels'}:{ROOT}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


ONE_FAULT = """#!/bin/bash
echo "$SLURMD_NODENAME" >> {nodes}
[ "$(wc -l < {nodes})" -gt 1 ] && exit 0
echo "$SLURMD_NODENAME" > "$NEMOCASCADE_SUSPECTS"
exit 1
"""


@pytest.mark.slow
@pytest.mark.usefixtures("submitting")
def test_slurm_gives_another_node_for_the_named_one(slurm: dict[str, str], tmp_path: Path) -> None:
    command, nodes = tmp_path / "torchrun", tmp_path / "nodes"
    command.write_text(ONE_FAULT.format(nodes=nodes))
    command.chmod(0o755)
    settings = SubmitSettings(
        recipes=(TINY,), ranks_per_node=1, time="30", gpus=False, torchrun=str(command)
    )
    [job] = submit_jobs(settings, [job_of_script(Path(TINY), str(tmp_path / "run"), [])])
    try:
        wait_for(lambda: nodes.exists() and nodes.read_text().count("\n") > 1, 200, "no start")
        wait_for(lambda: not run(["squeue", "-h"], slurm).strip(), 60, "it does not end")
    finally:
        run(["scancel", job], slurm)
    named, other = nodes.read_text().split()
    assert named != other
    described = run(["scontrol", "show", "job", job], slurm)
    for expected in (f"ExcNodeList={named}", "Restarts=1", "ExitCode=0:0"):
        assert expected in described


@pytest.mark.slow
@pytest.mark.usefixtures("submitting")
def test_a_job_whose_rank_is_killed_ends_as_an_undisturbed_one(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    settings = SubmitSettings(
        recipes=(TINY,),
        ranks_per_node=2,
        time="30",
        pause_s=1,
        gpus=False,
        torchrun=f"{sys.executable} -m torch.distributed.run",
        port=free_port(),
    )

    def arguments(name: str) -> list[str]:
        found = ["--run-dir", str(tmp_path / name), "--steps", "12", "--checkpoint.every", "1"]
        found += ["--data.capacity", "256", "--log.tensorboard", "False", "--eval.every", "0"]
        # The documents' cache has its own folder, so both runs read the same.
        return [*found, "--data.cache-dir", str(tmp_path / "cache")]

    whole = subprocess.run(
        [
            *settings.torchrun.split(),
            "--standalone",
            "--nproc-per-node",
            "2",
            TINY,
            *arguments("whole"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert whole.returncode == 0, whole.stderr[-3000:]
    run_dir = tmp_path / "run"
    [job] = submit_jobs(settings, [job_of_script(Path(TINY), "run", arguments("run"))])
    log, steps = run_dir / f"slurm-{job}.txt", run_dir / "metrics.jsonl"
    try:
        wait_for(lambda: steps.exists() and steps.read_text().count("\n") >= 3, 240, "no step")
        # The owner of the run folder is the main rank.
        os.kill(json.loads((run_dir / "lock").read_text())["pid"], signal.SIGKILL)
        artifact = run_dir / "artifact" / "manifest.json"
        wait_for(artifact.exists, 300, "it did not end")
    except TimeoutError as error:
        raise AssertionError(f"{error}:\n{log.read_text()[-4000:]}") from None
    finally:
        run(["scancel", job], slurm)
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: not run(["squeue", "-h"], slurm).strip(), 60, "still in the queue")
    # The watchdog names the node, and the other one is free.
    assert "goes back to the queue" in log.read_text()
    hashes = [weight_hashes(tmp_path / name / "artifact") for name in ("whole", "run")]
    assert hashes[0] == hashes[1]


@pytest.mark.slow
@pytest.mark.usefixtures("submitting")
def test_a_warned_job_saves_requeues_and_resumes(slurm: dict[str, str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = SubmitSettings(
        recipes=(TINY,),
        ranks_per_node=2,
        time="30",
        warning_s=60,
        gpus=False,
        torchrun=f"{sys.executable} -m torch.distributed.run",
        port=free_port(),
    )
    arguments = ["--run-dir", str(run_dir), "--steps", "100000", "--checkpoint.every", "0"]
    arguments += ["--data.capacity", "256", "--log.tensorboard", "False", "--eval.every", "0"]
    [job] = submit_jobs(settings, [job_of_script(Path(TINY), "run", arguments)])
    metrics = run_dir / "metrics.jsonl"

    def log() -> str:
        path = run_dir / f"slurm-{job}.txt"
        return path.read_text() if path.exists() else f"no log; {run(['squeue'], slurm)}"

    def steps() -> list[int]:
        if not metrics.exists():
            return []
        return [json.loads(x)["step"] for x in metrics.read_text().splitlines() if x.endswith("}")]

    try:
        wait_for(lambda: len(steps()) >= 3, 240, "no step was made")
        # What Slurm sends before the time limit, sent by hand.
        run(["scancel", "--batch", "--signal=USR1", job], slurm)
        wait_for(lambda: "goes back to the queue" in log(), 120, "it was not requeued")
        saved = [p.name for p in (run_dir / "checkpoints").glob("step_*")]
        assert len(saved) == 1
        wait_for(lambda: f"{saved[0]}, step" in log(), 240, "it did not resume")
        before = max(steps())
        wait_for(lambda: max(steps()) > before + 2, 120, "it does not go on")
        assert steps() == list(range(1, len(steps()) + 1)), "steps were lost or made twice"
    except TimeoutError as error:
        raise AssertionError(f"{error}:\n{log()[-4000:]}") from None
    finally:
        run(["scancel", job], slurm)
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: not run(["squeue", "-h"], slurm).strip(), 60, "still in the queue")


RAY_STAGE = """
from helpers.junk_code import junk_recipe
from nemocascade.recipe.envs import SandboxConfig
from nemocascade.stages.launch import launch
RECIPE = junk_recipe({start!r}, "run", SandboxConfig())
if __name__ == "__main__":
    launch(RECIPE)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("submitting")
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
def test_a_job_runs_its_programs_on_a_worker_node(
    slurm: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'kernels'}:{ROOT}:{ROOT / 'tests'}")
    start = [sys.executable, str(ROOT / "tests/helpers/junk_code.py"), str(tmp_path / "start")]
    done = subprocess.run([*start, "", ""], capture_output=True, text=True, check=True)
    script, run_dir = tmp_path / "stage.py", tmp_path / "run"
    script.write_text(RAY_STAGE.format(start=done.stdout.splitlines()[-1]))
    settings = SubmitSettings(
        recipes=(str(script),),
        ranks_per_node=1,
        time="30",
        warning_s=60,
        gpus=False,
        torchrun=f"{sys.executable} -m torch.distributed.run",
        port=free_port(),
        worker_nodes=1,
        ray=f"{sys.executable} -m ray.scripts.scripts",
        ray_port=free_port(),
    )
    arguments = ["--run-dir", str(run_dir)]
    [job] = submit_jobs(settings, [job_of_script(script, "run", arguments, rollouts=True)])
    try:
        wait_for((run_dir / "artifact" / "manifest.json").exists, 400, "no artifact")
        wait_for(lambda: not run(["squeue", "-h"], slurm).strip(), 90, "the job does not end")
    except TimeoutError as error:
        logs = [run_dir / f"slurm-{job}.txt", run_dir / "ray.txt"]
        said = [path.read_text()[-3000:] for path in logs if path.exists()]
        raise AssertionError("\n".join([str(error), *said])) from None
    finally:
        run(["scancel", job], slurm)
    assert "ExitCode=0:0" in run(["scontrol", "show", "job", job], slurm)
    recipe = json.loads((run_dir / "recipe.json").read_text())
    assert recipe["envs"]["sandbox"]["workers"] == "ray"
    rows = [json.loads(row) for row in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert any(0 < row["reward"] < 1 for row in rows)
    assert all(row["errors"] == 0 for row in rows if "errors" in row)
