"""Slurm scripts have the expected text; on a real Slurm on this machine, a warned job saves,
requeues itself and resumes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nemocascade.plan.errors import PlanError
from nemocascade.plan.slurm import (
    SubmitSettings,
    check_submission,
    job_of_script,
    job_script,
    submit_jobs,
)

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "recipes" / "tiny" / "sft.py")
SETTINGS = SubmitSettings(recipes=(TINY,), nodes=4, partition="gpu", time="2:00:00")


def lines_of(settings: SubmitSettings, *arguments: str) -> list[str]:
    return job_script(settings, job_of_script(Path(TINY), "run", arguments)).splitlines()


def test_the_script_says_what_was_asked_for() -> None:
    lines = lines_of(replace(SETTINGS, account="lab", warning_s=300), "--steps", "7")
    for expected in (
        "#SBATCH --nodes=4",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=lab",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --time=2:00:00",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR1@300",
    ):
        assert expected in lines
    text = "\n".join(lines)
    assert "--nnodes=4 --nproc-per-node=8" in text
    assert f"{TINY} --steps 7 &" in text
    shell = ("${SLURM_RESTART_COUNT:-0}", "${SLURM_JOB_NODELIST_HET_GROUP_0:-$SLURM_JOB_NODELIST}")
    for expected in shell:
        assert expected in text
        text = text.replace(expected, "")
    assert "{" not in text


def test_servers_are_nodes_of_their_own(tmp_path: Path) -> None:
    settings = replace(
        SETTINGS,
        servers=4,
        server_gpus=2,
        server_model="a folder",
        judge_nodes=1,
        judge_model="lab/judge",
        judge_options="--max-model-len 9",
    )
    job = job_of_script(Path(TINY), str(tmp_path), ("--steps", "7"), rollouts=True)
    text = job_script(settings, job)
    first, *components = text.split("#SBATCH hetjob\n")
    assert "#SBATCH --gpus-per-node=8" in first
    assert [c.splitlines()[0] for c in components] == ["#SBATCH --nodes=4", "#SBATCH --nodes=1"]
    assert all("#SBATCH --gpus-per-node=2" in c for c in components)
    script = tmp_path / "job.sbatch"
    script.write_text(text)
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "--het-group=1 nemocascade-vllm 'a folder' --announce \"$run_dir/servers\"" in text
    assert "--het-group=2 nemocascade-vllm lab/judge" in text
    assert "--with-tokenizer --max-model-len 9" in text
    assert (
        '--steps 7 --rollout.engine server --rollout.server.announce "$run_dir/servers" '
        "--rollout.server.servers 4 --envs.judge.kind server "
        '--envs.judge.announce "$run_dir/judges" --envs.judge.servers 1 --envs.judge.model judge &'
    ) in text
    assert "hetjob" not in job_script(settings, replace(job, settings=None))
    with pytest.raises(PlanError, match="server_model is empty"):
        check_submission(replace(settings, server_model=""), [])


def test_scripts_are_valid_shell(tmp_path: Path) -> None:
    settings = replace(
        SETTINGS, container_image="img.sqsh", container_mounts="/a:/b", environment="/site.sh"
    )
    path = tmp_path / "job.sbatch"
    text = "\n".join(lines_of(settings, "--data.path", "a file; rm -rf /"))
    path.write_text(text)
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert "'a file; rm -rf /'" in text
    assert "--container-image=img.sqsh --container-mounts=/a:/b" in text
    assert ". /site.sh" in text


def test_a_site_may_bring_its_template(tmp_path: Path) -> None:
    template = tmp_path / "site.sbatch"
    template.write_text("#!/bin/bash\n#SBATCH -N {nodes}\n{recipe} {arguments}\n")
    assert lines_of(replace(SETTINGS, template=str(template))) == [
        "#!/bin/bash",
        "#SBATCH -N 4",
        f"{TINY} ",
    ]


def test_a_dry_run_prints_everything_and_submits_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = job_of_script(Path(TINY), "run", [])
    assert submit_jobs(replace(SETTINGS, dry_run=True, after="17"), [job, job]) == [
        "JOB_1",
        "JOB_2",
    ]
    printed = capsys.readouterr().out
    assert printed.count("#SBATCH --nodes=4") == 2
    assert "sbatch --parsable --dependency=afterok:17" in printed
    assert "sbatch --parsable --dependency=afterok:JOB_1" in printed


def test_all_wrong_settings_are_named() -> None:
    wrong = replace(SETTINGS, recipes=(TINY, "no.py"), nodes=0, warning_s=0)
    with pytest.raises(PlanError) as caught:
        check_submission(wrong, ["--run-dir", "x"])
    for part in (
        "nodes(0) must be",
        "warning_s(0) must be",
        "no.py is no file",
        "share one folder",
    ):
        assert part in str(caught.value)


def test_a_machine_without_slurm_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PlanError, match="sbatch is not on the PATH"):
        submit_jobs(SETTINGS, [])


PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Controller, node and munge on loopback; the environment in which Slurm's programs find it."""
    missing = [p for p in PROGRAMS if shutil.which(p) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian: slurm-wlm)")
    if os.geteuid() != 0:
        pytest.skip("slurmd needs root")
    host = socket.gethostname().partition(".")[0]
    try:
        socket.gethostbyname(host)
    except OSError:
        pytest.skip(f"the machine's name {host} does not resolve")
    folder = tmp_path_factory.mktemp("slurm")
    # munge wants folders that only root may write, all the way up.
    base = Path(f"/run/nemocascade-slurm-{os.getpid()}")
    base.mkdir(mode=0o755)
    key, munge = base / "key", base / "munge.socket"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    conf = base / "slurm.conf"
    conf.write_text(
        f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
SlurmUser=root
AuthInfo=socket={munge},cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} State=UNKNOWN
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
    )
    env = {**os.environ, "SLURM_CONF": str(conf)}
    started: list[subprocess.Popen[bytes]] = []
    try:
        for command in (
            ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge}",
             f"--pid-file={base}/munge.pid", f"--log-file={base}/munge.log",
             f"--seed-file={base}/munge.seed"],
            ["slurmctld", "-D", "-c"],
            ["slurmd", "-D"],
        ):  # fmt: skip
            started.append(
                subprocess.Popen(
                    command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
            )
            time.sleep(1)
        wait_for(lambda: "idle" in run(["sinfo", "-h", "-o", "%T"], env), 60, "no idle node")
        yield env
    except TimeoutError as error:
        log = (folder / "ctld.log").read_text() if (folder / "ctld.log").exists() else ""
        pytest.skip(f"Slurm does not come up here: {error}: {log[-400:]}")
    finally:
        for process in reversed(started):
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            process.kill()
        shutil.rmtree(base, ignore_errors=True)


def run(command: list[str], env: dict[str, str]) -> str:
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False).stdout


def wait_for(condition: object, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.5)


@pytest.mark.slow
def test_a_warned_job_saves_requeues_and_resumes(
    slurm: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'kernels'}:{ROOT}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
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
        assert steps() == list(range(len(steps()))), "steps were lost or made twice"
    except TimeoutError as error:
        raise AssertionError(f"{error}:\n{log()[-4000:]}") from None
    finally:
        run(["scancel", job], slurm)
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: not run(["squeue", "-h"], slurm).strip(), 60, "still in the queue")
