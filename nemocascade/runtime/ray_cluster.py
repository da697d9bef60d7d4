"""Connection to a Ray cluster, whose nodes run programs. Nothing else runs on Ray.

Only this module and its child process import ray, inside of functions: without the extra
`nemocascade[workers]`, whatever does not ask for a cluster works.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import nemocascade
from nemocascade.recipe import UserError
from nemocascade.recipe.envs import RayConfig, SandboxConfig
from nemocascade.runtime.cores import slots_of_rank
from nemocascade.runtime.launcher import world_size_of_environment
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.stopping import AGAIN
from nemocascade.types import SandboxUnavailable

REACHABLE_S = 3.0
"""Timeout of the first connection to an address."""
POLL_S = 1.0
"""Poll interval while the cluster or its nodes are missing."""
DESCRIBE_S = 60.0
"""Timeout of the child process that asks a cluster for its versions and nodes."""
SHARES = 2
"""Programs of a rank at a time, in units of its share of the slots."""
_LOCK = threading.Lock()


class ClusterError(UserError, SandboxUnavailable):
    """The Ray cluster cannot run programs now."""

    exit_code = AGAIN


class ClusterSettingsError(ClusterError):
    """The Ray cluster cannot be used as it is named, or as it is installed."""

    exit_code = UserError.exit_code


@dataclass(frozen=True)
class RayNode:
    """A node that runs programs. slots: number of concurrent programs, its CPUs."""

    id: str
    host: str
    slots: int


def address_of(settings: RayConfig) -> str:
    """The cluster's address, `host:port`. Raises ClusterSettingsError if none is known."""
    address = settings.address or os.environ.get("RAY_ADDRESS", "")
    if problems := RayConfig(address).problems():
        raise ClusterSettingsError("; ".join(problems))
    if not address:
        raise ClusterSettingsError(
            "envs.sandbox.workers is ray, and no cluster is named: set "
            "--envs.sandbox.ray.address host:port, or RAY_ADDRESS"
        )
    return address


def connect(settings: RayConfig) -> Any:
    """Connect this process to the cluster, which may still be starting; returns the module `ray`.

    Raises ClusterError if the cluster does not answer within `wait_s`, or if this host has not
    joined it, and ClusterSettingsError if ray is not installed, or of another version.
    """
    ray, address = _module(), address_of(settings)
    deadline = time.monotonic() + settings.wait_s
    with _LOCK:
        while not ray.is_initialized():
            reason = unreachable(address) or _joined(ray, address)
            if reason and time.monotonic() >= deadline:
                raise ClusterError(
                    f"the Ray cluster at {address} cannot be used from {socket.gethostname()}: "
                    f"{reason}"
                )
            if reason:
                _say_once(f"waiting up to {settings.wait_s:g} s for Ray at {address}: {reason}")
                time.sleep(POLL_S)
    return ray


def unreachable(address: str) -> str:
    """Reason why nothing answers at `host:port`; empty if something does."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=REACHABLE_S).close()
    except OSError as error:
        return f"nothing answers there ({error}): start it with `ray start --head`"
    return ""


def worker_nodes(ray: Any) -> list[RayNode]:
    """The nodes that run programs: alive, with CPUs, and without GPUs."""
    return _workers(ray.nodes())


def on_node(node: RayNode) -> Any:
    """Ray's scheduling strategy for an actor that may run on this node only."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node.id, soft=False)


def wait_for_nodes(settings: RayConfig) -> list[RayNode]:
    """The nodes that run programs, once `settings.nodes` are there. Raises ClusterError."""
    ray = connect(settings)
    wanted, deadline = max(1, settings.nodes), time.monotonic() + settings.wait_s
    while len(found := worker_nodes(ray)) < wanted:
        if time.monotonic() >= deadline:
            raise ClusterError(
                f"{len(found)} of {wanted} nodes with CPUs and without GPUs have joined the Ray "
                f"cluster at {address_of(settings)} in {settings.wait_s:g} s: start them with `ray "
                "start --address`, or lower --envs.sandbox.ray.nodes"
            )
        time.sleep(POLL_S)
    return found


def program_slots(config: SandboxConfig, ranks: int = 0) -> int:
    """Number of programs, verifiers or tool calls that a rank runs at a time.

    ranks: those that verify; 0 = all of the job. With `ray`, waits for the cluster's nodes, and
    raises ClusterError.
    """
    if config.workers != "ray":
        return slots_of_rank(config.local_workers)
    if config.ray.programs:
        return config.ray.programs
    slots = sum(node.slots for node in wait_for_nodes(config.ray))
    return -(-SHARES * slots // (ranks or world_size_of_environment()))


def cluster_problems(settings: RayConfig) -> tuple[list[str], str]:
    """Check a cluster from any host. Returns what is wrong, and its readable description.

    Nothing is started on it. The version of this package is compared when a stage opens its
    sandbox.
    """
    try:
        address = address_of(settings)
        _module()
    except ClusterError as error:
        return [str(error)], ""
    if reason := unreachable(address):
        return [f"Ray at {address}: {reason}, or fix --envs.sandbox.ray.address"], ""
    command = [sys.executable, "-m", "nemocascade.runtime.ray_description", address]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=DESCRIBE_S, check=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        said = str(getattr(error, "stderr", None) or error).strip().splitlines()
        return [f"Ray at {address} does not say what it is: {said[-1] if said else error}"], ""
    own = own_versions()
    problems = [
        f"Ray at {address} runs {name} {found[name]}, and this is {own[name]}: install the same"
        for name in ("ray", "python")
        if found[name] != own[name]
    ]
    nodes = _workers(found["nodes"])
    if len(nodes) < max(1, settings.nodes):
        problems.append(
            f"Ray at {address} has {len(nodes)} nodes with CPUs and without GPUs, and "
            f"{max(1, settings.nodes)} are needed: start them with `ray start --address`"
        )
    slots = sum(node.slots for node in nodes)
    return problems, f"Ray {found['ray']} at {address}: {len(nodes)} nodes, {slots} slots"


def own_versions() -> dict[str, str]:
    """Versions of ray, Python and this package in this process; a cluster's must be the same."""
    return {
        "ray": _module().__version__,
        "python": platform.python_version(),
        "nemocascade": nemocascade.__version__,
    }


def _module() -> Any:
    """The module `ray`. Raises ClusterSettingsError if it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise ClusterSettingsError(
            f"envs.sandbox.workers is ray, which cannot be imported ({error}): pip install "
            "'nemocascade[workers]'"
        ) from error
    return ray


def _joined(ray: Any, address: str) -> str:
    """Connect through this host's raylet. Returns why it cannot be done yet; empty if it is done.

    Raises ClusterSettingsError for other versions.
    """
    is_main = threading.current_thread() is threading.main_thread()
    # Ray ends the process on SIGTERM, without a checkpoint.
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address,
            namespace=f"nemocascade-{_job()}",
            log_to_driver=False,
            configure_logging=False,
        )
    except (ConnectionError, ValueError) as error:
        said = str(error).strip().splitlines()
        return (
            f"this host has not joined it (ray start --address={address} --num-cpus=0): "
            f"{said[0] if said else type(error).__name__}"
        )
    except RuntimeError as error:
        raise ClusterSettingsError(f"the Ray cluster at {address}: {error}") from error
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, handler)
    return ""


@cache
def _job() -> str:
    """Name that the ranks of a job share, and other jobs of the cluster do not."""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    found = [os.environ[name] for name in names if name in os.environ]
    return "-".join(found) if len(found) == len(names) else uuid.uuid4().hex


@cache
def _say_once(message: str) -> None:
    LOGGER.info(message)


def _workers(nodes: Sequence[dict[str, Any]]) -> list[RayNode]:
    return [
        RayNode(node["NodeID"], node["NodeManagerHostname"], int(resources["CPU"]))
        for node in nodes
        for resources in [node["Resources"]]
        if node["Alive"] and resources.get("CPU", 0) >= 1 and not resources.get("GPU")
    ]
