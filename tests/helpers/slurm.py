"""A real Slurm of two nodes on loopback."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which Slurm's programs find a controller and two nodes on loopback.

    The first node, which jobs get first, has the name of the machine, so that it resolves."""
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
    names = (host, "second")
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} "
        f"CPUs={os.cpu_count()} Weight={weight} State=UNKNOWN"
        for weight, name in enumerate(names, start=1)
    )
    conf.write_text(
        f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmUser=root
AuthInfo=socket={munge},cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SchedulerParameters=bf_interval=2
{nodes}
PartitionName=test Nodes={",".join(names)} Default=YES MaxTime=INFINITE State=UP
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
            *(["slurmd", "-D", "-N", name] for name in names),
        ):  # fmt: skip
            started.append(
                subprocess.Popen(
                    command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
            )
            time.sleep(1)
        idle = ["sinfo", "-h", "-t", "idle", "-o", "%D"]
        wait_for(lambda: run(idle, env).strip() == str(len(names)), 60, "no idle nodes")
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


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.5)
