"""Checks of the hosts of a started job: versions, limits, memory, devices, clocks, the run folder.

One rank of each host collects its facts. Every rank gets those of all hosts, and the rules compare
them.
"""

from __future__ import annotations

import contextlib
import platform
import resource
import shutil
import subprocess
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

import nemocascade
from nemocascade.plan.findings import Preflight
from nemocascade.plan.job import Job
from nemocascade.plan.memory import GIB, every_rank
from nemocascade.runtime.host_memory import available_memory
from nemocascade.runtime.launcher import local_rank
from nemocascade.runtime.world import World

# Clocks may differ by the time that a collective takes to reach all ranks, and by NTP's error.
CLOCK_S = 5.0
# NCCL keeps a buffer in shared memory for each pair of a node's ranks; containers get 64 MiB.
SHARED_GIB = 1.0
# A network file system may show a new file only after its attributes' cache has expired.
FOLDER_S = 20.0
# Versions that must agree on all hosts, since ranks exchange messages and kernels in their formats.
_MUST_AGREE = ("nemocascade", "torch", "CUDA", "NCCL", "megatron-core", "triton")


@dataclass(frozen=True)
class HostFacts:
    """Facts of a host, as one of its ranks sees them.

    versions: of what is installed, by name. clock_s: Unix time when all ranks reported. locked,
    shared, memory: bytes that may be locked, free bytes of /dev/shm, and available memory; None if
    unlimited or unknown. faults: of its devices, readable. unlinked: pairs of its devices without
    peer access.
    """

    host: str = field(default_factory=platform.node)
    versions: Mapping[str, str] = field(default_factory=dict)
    clock_s: float = 0.0
    locked: int | None = None
    shared: int | None = None
    memory: int | None = None
    faults: Sequence[str] = ()
    unlinked: Sequence[tuple[int, int]] = ()


def check_hosts(world: World, job: Job, run_dir: Path, into: Preflight) -> None:
    """Check the hosts of all ranks, and that they share the run folder. Every rank calls it, and
    the main rank alone records what it finds."""
    first = local_rank() == 0
    facts = host_facts(on_gpu=world.device.type == "cuda") if first else None
    world.barrier()
    now = time.time()
    reports = world.all_gather_object((platform.node(), now, facts))
    blind = _blind_hosts(world, run_dir, reports)
    if not world.is_main:
        return
    hosts = [HostFacts(**{**vars(f), "clock_s": clock}) for _, clock, f in reports if f is not None]
    ranks = [host for host, _, _ in reports]
    with into.guarded("hosts"):
        problems, warnings = version_findings(hosts)
        warnings += layout_findings(job, ranks) + clock_findings(hosts)
        known = hosts[0].versions
        seen = ", ".join(f"{name} {known[name]}" for name in known)
        into.add("hosts", problems, f"{len(hosts)} with {len(ranks)} ranks; {seen}", warnings)
    with into.guarded("limits of the hosts"):
        problems, warnings = limit_findings(job, hosts, Counter(ranks))
        warnings += device_findings(hosts)
        least = min((f.memory for f in hosts if f.memory is not None), default=0)
        into.add("limits of the hosts", problems, f"{least / GIB:.1f} GiB of memory", warnings)
    problems = [
        f"run_dir({run_dir}) of the main rank ({ranks[0]}) does not appear on {_some(blind)} "
        f"within {FOLDER_S:.0f} s: name a folder of a file system that all hosts share"
    ] * bool(blind)
    into.add("run folder on all hosts", problems, f"{len(hosts)} hosts")


def host_facts(*, on_gpu: bool) -> HostFacts:
    """The facts of this host. on_gpu: its devices are asked too."""
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    shared = Path("/dev/shm")
    driver, faults = _driver_and_faults() if on_gpu else ("", [])
    return HostFacts(
        versions=_versions(driver),
        locked=None if locked == resource.RLIM_INFINITY else locked,
        shared=shutil.disk_usage(shared).free if shared.is_dir() else None,
        memory=available_memory(),
        faults=faults,
        unlinked=_unlinked() if on_gpu else (),
    )


def version_findings(hosts: Sequence[HostFacts]) -> tuple[list[str], list[str]]:
    """Problems and warnings about versions that differ between hosts."""
    problems: list[str] = []
    warnings: list[str] = []
    for name in dict.fromkeys(name for facts in hosts for name in facts.versions):
        by_version: dict[str, list[str]] = defaultdict(list)
        for facts in hosts:
            by_version[facts.versions.get(name, "absent")].append(facts.host)
        if len(by_version) == 1:
            continue
        found = "; ".join(f"{version} on {_some(where)}" for version, where in by_version.items())
        text = f"hosts differ in {name}: {found}: use one installation on all of them"
        (problems if name in _MUST_AGREE else warnings).append(text)
    return problems, warnings


def layout_findings(job: Job, ranks: Sequence[str]) -> list[str]:
    """Warnings about the placement of ranks on hosts. ranks: the host of each rank."""
    found = []
    counts = Counter(ranks)
    most = max(counts.values())
    if fewer := [host for host, count in counts.items() if count != most]:
        found.append(
            f"{_some(fewer)} has {counts[fewer[0]]} ranks where others have {most}: start the same "
            "number on every host"
        )
    tp = job.parallel.tp
    if crossing := [r for r in range(0, len(ranks), tp) if len(set(ranks[r : r + tp])) > 1]:
        found.append(
            f"{len(crossing)} tensor-parallel groups cross hosts, the first at rank {crossing[0]}: "
            f"lower --parallel.tp({tp}) to a divisor of the ranks on a host"
        )
    return found


def clock_findings(hosts: Sequence[HostFacts]) -> list[str]:
    """A warning about hosts whose clock differs from the median by more than `CLOCK_S`."""
    middle = sorted(f.clock_s for f in hosts)[len(hosts) // 2]
    skewed = {f.host: f.clock_s - middle for f in hosts if abs(f.clock_s - middle) > CLOCK_S}
    if not skewed:
        return []
    worst = max(skewed, key=lambda host: abs(skewed[host]))
    return [
        f"the clock of {_some(list(skewed))} differs, at {worst} by {skewed[worst]:+.0f} s: times "
        "in logs and metrics do not match; synchronise it (chronyc tracking)"
    ]


def limit_findings(
    job: Job, hosts: Sequence[HostFacts], ranks: Mapping[str, int]
) -> tuple[list[str], list[str]]:
    """Problems and warnings about memory. ranks: their number on each host."""
    problems, warnings = [], []
    # State that is offloaded during rollouts is in host memory.
    needed = max(memory.offloaded for memory in every_rank(job)) if job.on_gpu else 0.0
    for short in _short(hosts, lambda f: f.memory, lambda f: needed * ranks[f.host]):
        problems.append(
            f"{short}, and its ranks offload {needed / GIB:.1f} GiB each: use more hosts, or "
            "--rollout.offload False"
        )
    if job.on_gpu and max(ranks.values()) > 1:
        for short in _short(hosts, lambda f: f.shared, lambda _: SHARED_GIB * GIB, "in /dev/shm"):
            warnings.append(
                f"{short}, where NCCL keeps its buffers: enlarge it (docker run --shm-size 8g)"
            )
    if job.on_gpu and len(hosts) > 1:
        limited = [f.host for f in hosts if f.locked is not None]
        if limited:
            warnings.append(
                f"the memory that a process may lock is limited on {_some(limited)}, and "
                "InfiniBand needs it: set `ulimit -l unlimited` for Slurm's daemon or the container"
            )
    return problems, warnings


def device_findings(hosts: Sequence[HostFacts]) -> list[str]:
    """Warnings about errors of devices, and about devices that cannot reach each other."""
    found = [f"{f.host}: {fault}" for f in hosts for fault in f.faults]
    for facts in hosts:
        if facts.unlinked:
            one, other = facts.unlinked[0]
            found.append(
                f"{facts.host}: GPUs {one} and {other} have no peer access, "
                f"{len(facts.unlinked)} pairs in all: messages go through host memory; look at "
                "nvidia-smi topo -m"
            )
    return found


def _short(
    hosts: Sequence[HostFacts],
    has: Callable[[HostFacts], int | None],
    needs: Callable[[HostFacts], float],
    where: str = "of memory",
) -> list[str]:
    """The scarcest host in words, if any host has less than it needs."""
    short = [f for f in hosts if (free := has(f)) is not None and free < needs(f)]
    if not short:
        return []
    least = min(short, key=lambda f: has(f) or 0)
    return [f"{_some([f.host for f in short])}: {(has(least) or 0) / GIB:.1f} GiB are free {where}"]


def _blind_hosts(
    world: World, run_dir: Path, reports: Sequence[tuple[str, float, HostFacts | None]]
) -> list[str]:
    """Hosts that do not see a file of the main rank in the run folder; [] if there is no folder."""
    probe = run_dir / f".seen-{uuid.uuid4().hex}"
    written = world.is_main and _write(probe)
    name = world.broadcast_object(probe.name if written else "")
    if not name:
        return []
    sees = reports[world.rank][2] is None or _appears(run_dir / name)
    blind = world.all_gather_object("" if sees else platform.node())
    if world.is_main:
        probe.unlink(missing_ok=True)
    return [host for host in blind if host]


def _write(path: Path) -> bool:
    """True if an empty file could be made. A job that only reads may have no folder."""
    try:
        path.touch()
    except OSError:
        return False
    return True


def _appears(path: Path, *, within_s: float | None = None) -> bool:
    """True once the folder lists the file; a folder that cannot be read does not."""
    end = time.monotonic() + (FOLDER_S if within_s is None else within_s)
    while True:
        with contextlib.suppress(OSError):
            if any(p.name == path.name for p in path.parent.iterdir()):
                return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.2)


def _versions(driver: str) -> dict[str, str]:
    found = {"nemocascade": nemocascade.__version__, "torch": torch.__version__}
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
        if torch.cuda.is_available():
            found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    for name in ("megatron-core", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | ({"driver": driver} if driver else {})


def _driver_and_faults() -> tuple[str, list[str]]:
    """Version of the driver, and the devices' memory errors in words, by nvidia-smi."""
    fields = "index,driver_version,ecc.errors.uncorrected.volatile.total"
    driver, faults = "", []
    for row in _nvidia_smi(f"--query-gpu={fields}"):
        index, driver, errors = row
        if errors.isdigit() and int(errors):
            faults.append(
                f"GPU {index} has {errors} uncorrected memory errors since the driver was loaded: "
                "reset it, or exclude the host"
            )
    fields = "gpu_bus_id,remapped_rows.pending,remapped_rows.failure"
    for bus, pending, failure in _nvidia_smi(f"--query-remapped-rows={fields}"):
        if "yes" in (pending.lower(), failure.lower()) or "1" in (pending, failure):
            faults.append(f"GPU {bus} has rows of memory to remap: reset it, or exclude the host")
    return driver, faults


def _nvidia_smi(query: str) -> list[list[str]]:
    """Rows of an nvidia-smi query with three fields; [] where it cannot answer."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in text.stdout.splitlines()]
    return [row for row in rows if len(row) == 3]


def _unlinked() -> list[tuple[int, int]]:
    """Pairs of this process's devices without peer access."""
    count = torch.cuda.device_count()
    pairs = ((i, j) for i in range(count) for j in range(i + 1, count))
    return [(i, j) for i, j in pairs if not torch.cuda.can_device_access_peer(i, j)]


def _some(hosts: Sequence[str]) -> str:
    """Names of hosts, shortened."""
    more = f" and {len(hosts) - 3} more" if len(hosts) > 3 else ""
    return ", ".join(hosts[:3]) + more
