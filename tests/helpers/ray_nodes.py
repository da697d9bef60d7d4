"""A real Ray cluster on loopback: a head without slots, and nodes that run programs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from helpers.slurm import free_port, wait_for
from nemocascade.plan.slurm_nodes import RAY_ENVIRONMENT
from nemocascade.recipe.envs import RayConfig
from nemocascade.runtime.ray_cluster import cluster_problems

ROOT = Path(__file__).resolve().parents[2]
RAY = (sys.executable, "-m", "ray.scripts.scripts")
# As few processes and as little shared memory as a test needs.
COMMON = ("--disable-usage-stats", "--object-store-memory", str(100 << 20), "--num-gpus", "0")


def environment() -> dict[str, str]:
    """Environment of raylets, and so of their actors."""
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        # A busy machine starts Python processes slowly.
        "RAY_worker_register_timeout_seconds": "300",
        **RAY_ENVIRONMENT,
    }


@dataclass
class Cluster:
    """Started nodes, each a process group with its raylet and its actors."""

    address: str
    started: dict[int, tuple[subprocess.Popen[bytes], tuple[str, ...]]] = field(
        default_factory=dict
    )
    """Processes by their id, with their arguments."""

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a node, `ray start ARGUMENTS`."""
        process = subprocess.Popen(
            [*RAY, "start", "--block", *COMMON, *arguments],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.started[process.pid] = (process, arguments)
        return process

    def add(self, slots: int) -> subprocess.Popen[bytes]:
        """Start a node with `slots` slots; returns its process."""
        return self.start("--address", self.address, "--num-cpus", str(slots))

    def kill(self, slots: int) -> None:
        """Kill all processes of the node with `slots` slots, as when its host is lost."""
        [process] = [p for p, said in self.started.values() if said[-1] == str(slots)]
        kill_tree(process, signal.SIGKILL)

    def wait(self, nodes: int) -> None:
        """Wait until this many nodes with slots have joined. Ray gives a node 30 s to start, which
        is too little on a busy machine: it is started again."""
        settings = RayConfig(self.address, nodes=nodes)

        def joined() -> bool:
            for process, arguments in list(self.started.values()):
                if process.poll() not in (None, -signal.SIGKILL):
                    self.started.pop(process.pid)
                    self.start(*arguments)
            return not cluster_problems(settings)[0]

        wait_for(joined, 400, "the nodes do not join")

    def stop(self) -> None:
        processes = [process for process, _ in self.started.values()]
        for process in reversed(processes):
            kill_tree(process, signal.SIGTERM)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
            kill_tree(process, signal.SIGKILL)


def kill_tree(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a node's processes: with SIGKILL to all of them, as when a host is lost."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        everyone = [root, *root.children(recursive=True)] if number == signal.SIGKILL else [root]
        for one in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(number)


@contextlib.contextmanager
def ray_cluster(*slots: int) -> Iterator[Cluster]:
    """A cluster of nodes with these slots, and a head, on this host's raylet, without any."""
    port = free_port()
    cluster = Cluster(f"127.0.0.1:{port}")
    try:
        cluster.start(
            "--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false",
            "--node-ip-address=127.0.0.1",
        )  # fmt: skip
        time.sleep(1)
        wait_for(lambda: not _is_closed(cluster.address), 60, "no head")
        for count in slots:
            cluster.add(count)
        cluster.wait(len(slots))
        yield cluster
    finally:
        cluster.stop()


def _is_closed(address: str) -> str:
    from nemocascade.runtime.ray_cluster import unreachable

    return unreachable(address)
