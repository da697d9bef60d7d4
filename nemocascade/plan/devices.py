"""Timed checks of the local device and of the links between ranks, against the known ceilings."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemocascade.plan.errors import PlanError
from nemocascade.plan.findings import Preflight
from nemocascade.plan.gpus import GPUS, Gpu
from nemocascade.plan.hosts import check_hosts
from nemocascade.plan.job import Job, job_of_recipe
from nemocascade.plan.memory import GIB
from nemocascade.runtime.host_memory import total_memory
from nemocascade.runtime.launcher import local_rank, ranks_of_node
from nemocascade.runtime.world import World

# Below this share of its ceiling, a device or link is throttled, shared or misconfigured.
SLOW = 0.5
_COLLECTIVE_BYTES = 16 << 20


def this_gpu() -> Gpu:
    """Entry of `GPUS` for this machine's device, with its actual memory.

    An unknown accelerator keeps its name and gets the ceilings of the slowest known one. A CPU's
    memory is divided among the ranks of the node.
    """
    if not torch.cuda.is_available():
        memory = total_memory() / GIB / ranks_of_node()
        return replace(GPUS["cpu"], memory_gib=memory)
    properties = torch.cuda.get_device_properties(local_rank())
    name = properties.name.lower()
    unknown = replace(GPUS["a100-80gb"], name=name, fp8_experts=properties.major == 9)
    known = next((g for key, g in GPUS.items() if key.split("-")[0] in name), unknown)
    return replace(known, memory_gib=properties.total_memory / GIB)


def job_here(recipe: Any, world_size: int) -> Job | None:
    """The recipe's job on this machine; None if its model is not known yet."""
    try:
        return job_of_recipe(recipe, this_gpu(), world_size)
    except PlanError:
        return None


def check_together(recipe: Any, world: World) -> Preflight:
    """Check hosts, devices and collectives on all ranks."""
    job = job_here(recipe, world.size)
    return Preflight() if job is None else online(world, job, Path(recipe.run_dir))


def online(world: World, job: Job, run_dir: Path) -> Preflight:
    """Check the hosts, the device and the collectives of a started job. Every rank calls it and
    gets the problems of all ranks."""
    started = time.perf_counter()
    found = Preflight()
    check_hosts(world, job, run_dir, found)
    check_device(world, job, found)
    check_axes(world, job, found)
    elsewhere = world.all_gather_object((found.problems, found.warnings))
    for rank, (problems, warnings) in enumerate(elsewhere):
        if rank != world.rank and (problems or warnings):
            found.add(f"rank {rank}", problems, warnings=warnings)
    found.seconds = time.perf_counter() - started
    return found


def check_device(world: World, job: Job, into: Preflight) -> None:
    """Time a matrix product and a copy on this rank's device, and compare with its ceilings."""
    with into.guarded("device"):
        device = world.device
        on_gpu = device.type == "cuda"
        n = 8192 if on_gpu else 512
        dtype = torch.bfloat16 if on_gpu else torch.float32
        a = torch.randn(n, n, dtype=torch.float32).to(device, dtype)
        seconds = _time(lambda: a @ a, device)
        tflops = 2 * n**3 / seconds / 1e12
        x = torch.zeros((256 << 20) if on_gpu else (8 << 20), dtype=torch.uint8, device=device)
        y = torch.empty_like(x)
        copied = 2 * x.numel() / _time(lambda: y.copy_(x), device) / 1e9
        warnings = []
        if on_gpu and job.gpu.name in GPUS:
            for what, found, expected, unit in (
                ("matrix products", tflops, job.gpu.matmul_tflops, "TFLOP/s"),
                ("memory", copied, job.gpu.memory_gb_s, "GB/s"),
            ):
                if found < SLOW * expected:
                    warnings.append(
                        f"rank {world.rank} ({os.uname().nodename}): {what} run at {found:.0f} "
                        f"{unit}, {job.gpu.name} has {expected:.0f}: another program uses the "
                        "device, or it is throttled"
                    )
        seen = f"{tflops:.2f} TFLOP/s, copies {copied:.0f} GB/s"
        into.add("device", [], seen, warnings)


def check_axes(world: World, job: Job, into: Preflight) -> None:
    """Time an all-reduce on every parallel axis with more than one rank."""
    axes = {
        "tp": world.groups.tp,
        "cp": world.groups.cp,
        "pp": world.groups.pp,
        "dp": world.groups.dp,
        "ep": world.groups.ep,
        "etp": world.groups.expt_tp,
        "expert dp": world.groups.expt_dp,
    }
    on_gpu = world.device.type == "cuda"
    size = _COLLECTIVE_BYTES if on_gpu else _COLLECTIVE_BYTES >> 4
    for name, group in axes.items():
        ranks = group.size()
        if ranks == 1:
            continue
        with into.guarded(f"collective on {name}"):
            data = torch.ones(size // 4, device=world.device)
            seconds = _time(functools.partial(dist.all_reduce, data, group=group), world.device)
            data.fill_(1)
            dist.all_reduce(data, group=group)
            problems = []
            if float(data[0]) != ranks or float(data[-1]) != ranks:
                problems.append(f"rank {world.rank}: a sum over {name} of {ranks} ones is wrong")
            speed = 2 * (ranks - 1) / ranks * size / seconds / 1e9
            warnings = []
            # A group of neighbours may cross nodes; only the network's speed can be expected.
            if on_gpu and job.gpu.name in GPUS and speed < SLOW * job.gpu.network_gb_s:
                warnings.append(
                    f"rank {world.rank}: {name} ({ranks} ranks) moves {speed:.1f} GB/s, "
                    f"{job.gpu.network_gb_s:.0f} expected: look at NCCL_DEBUG=INFO"
                )
            seen = f"{ranks} ranks, {speed:.2f} GB/s"
            into.add(f"collective on {name}", problems, seen, warnings)


def _time(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of three runs, after a warm-up run."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    best = float("inf")
    for _ in range(3):
        wait()
        started = time.perf_counter()
        work()
        wait()
        best = min(best, time.perf_counter() - started)
    return best
