"""A heterogeneous job on a real Slurm: vLLM serves on one node, and the stage trains on another."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.slurm import free_port, run, slurm, wait_for
from helpers.vllm_server import FOLDER, OPTIONS, ROOT, environment, missing

from nemocascade.plan.slurm import job_of_script, submit_jobs
from nemocascade.plan.submission import SubmitSettings

__all__ = ["slurm"]  # a fixture
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]

TINY = ROOT / "recipes" / "tiny"
STEPS = 2


@pytest.mark.timeout(900)
def test_a_stage_and_its_server_in_one_job(
    slurm: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    for name, value in (environment() | slurm | more).items():
        monkeypatch.setenv(name, value)
    start = tmp_path / "sft" / "artifact"
    sft = [str(TINY / "domains_sft.py"), "--run-dir", str(start.parent), "--steps", "2"]
    convert = ["-m", "nemocascade.cli", "convert", str(start), str(tmp_path / "hf")]
    for command in (sft, convert):
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
    run_dir = tmp_path / "run"
    settings = SubmitSettings(
        recipes=(str(TINY / "if_rl.py"),),
        ranks_per_node=1,
        time="30",
        warning_s=60,
        gpus=False,
        torchrun=f"{sys.executable} -m torch.distributed.run",
        port=free_port(),
        servers=1,
        server_model=str(tmp_path / "hf"),
        server_options=" ".join(OPTIONS),
        serve=f"{FOLDER / 'bin' / 'python'} -m nemocascade_vllm.serve",
    )
    arguments = ["--init-from", str(start), "--run-dir", str(run_dir), "--steps", str(STEPS)]
    arguments += ["--eval.prompts", "16", "--log.every", "1", "--rollout.server.weights", "gloo"]
    recipe = TINY / "if_rl.py"
    [job] = submit_jobs(settings, [job_of_script(recipe, "run", arguments, rollouts=True)])

    def log(name: str) -> str:
        path = run_dir / name
        return path.read_text() if path.exists() else f"no {name}; {run(['squeue'], slurm)}"

    def values() -> list[dict[str, Any]]:
        return [json.loads(line) for line in log("metrics.jsonl").splitlines()]

    try:
        wait_for((run_dir / "artifact" / "manifest.json").exists, 600, "the stage does not end")
        wait_for(lambda: not run(["squeue", "-h"], slurm).strip(), 60, "the job does not end")
        assert "ExitCode=0:0" in run(["scontrol", "show", "job", job], slurm)
        found = values()
        assert [v["step"] for v in found] == list(range(1, STEPS + 1))
        assert all(0 < v["update_probe"] <= 1e-3 and v["response_tokens"] > 0 for v in found)
        assert f"announced http://{os.uname().nodename}" in log("servers.txt")
        assert not list((run_dir / "servers").glob("*.json")), "the announcement stays"
    except TimeoutError as error:
        logs = [log(f"slurm-{job}.txt")[-4000:], log("servers.txt")[-2000:]]
        raise AssertionError("\n".join([str(error), *logs])) from None
    finally:
        run(["scancel", job], slurm)
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: not run(["squeue", "-h"], slurm).strip(), 60, "still in the queue")
