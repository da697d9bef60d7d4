"""Cost of checkpoints: the bytes that each rank writes and reads, and the time that training waits.

An asynchronous save blocks for the copy to host memory, and for the part of the write that is
unfinished when the next save is due. A synchronous save blocks for the whole write.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from nemocascade.plan.job import Job
from nemocascade.plan.parameters import RankCoordinates, stage_parameters
from nemocascade.recipe import ModelConfig, MoeTrainingConfig, ParallelConfig
from nemocascade.types import CONVERTED_FILE_BYTES

HOST_LINK_GB_S = 50.0
"""Assumed bandwidth between a device and its host's memory: PCIe 5, 16 lanes."""
HASH_GB_S = 0.5
"""Rate at which a rank hashes its file, in one thread: sha256 measured at 0.56 GB/s on a shared CPU
core without SHA instructions, and faster with them."""
STORAGE_GB_S = 2.0
"""Assumed rate at which a node writes to a shared file system, over all of its ranks."""


@dataclass(frozen=True)
class CheckpointCost:
    """Bytes of a checkpoint, of the rank that writes most, and of the mean rank; seconds of the
    largest rank's copy and write."""

    total: int
    largest: int
    mean: float
    copy_s: float
    write_s: float

    def blocked_s(self, interval_s: float, *, asynchronous: bool) -> float:
        """Seconds that training waits for a save, if saves are due every `interval_s`."""
        if not asynchronous:
            return self.write_s
        return self.copy_s + max(0.0, self.write_s - interval_s)


def checkpoint_cost(job: Job) -> CheckpointCost:
    """Cost of one checkpoint of a job with a legal layout.

    The ranks of a pipeline stage write about the same, see `megatron.checkpoint.balance`. Padding
    of the distributed optimizer, and parameters that tensor-parallel ranks replicate, are counted
    though nobody writes them, or one rank does: up to 1 % for the 30B model.
    """
    p = job.parallel
    ranks = job.world_size // p.pp
    replicas, expert_replicas = ranks // p.tp, ranks // (p.etp * p.ep)
    width = 2 if job.engine.precision == "bf16" else 4
    found = []
    for stage in range(p.pp):
        dense, expert = _written(job.model, replace(p, cp=1), job.moe, stage, width)
        states = job.state(RankCoordinates(stage, 0, 0)).optimizer
        if not job.optimizer.distributed:
            states //= replicas
        found.append(states + dense // replicas + expert // expert_replicas)
    largest = max(found)
    link = HOST_LINK_GB_S if job.on_gpu else job.gpu.memory_gb_s
    per_rank = STORAGE_GB_S / min(job.gpu.per_node, job.world_size)
    return CheckpointCost(
        total=sum(found) * ranks,
        largest=largest,
        mean=sum(found) / len(found),
        copy_s=largest / (link * 1e9),
        write_s=largest / (min(HASH_GB_S, per_rank) * 1e9),
    )


@dataclass(frozen=True)
class ReadCost:
    """Bytes that a job reads at its start. total: from storage, by all ranks, for hashes too.
    largest: by the rank that reads most. received: by a rank from other ranks, at most."""

    total: int
    largest: int
    received: int


def start_cost(job: Job) -> ReadCost:
    """Bytes of the weights of an artifact that a job with a legal layout reads.

    Each file is read once, by one rank, which hashes it and sends its parts to those that hold
    them, see `megatron.checkpoint.streaming`. A converted artifact has files of
    CONVERTED_FILE_BYTES; one that a run wrote has a smaller file for each of its ranks. A
    checkpoint is read in the same way, with the optimizer's state.
    """
    p = job.parallel
    width = 2 if job.engine.precision == "bf16" else 4
    total = sum(_written(job.model, ParallelConfig(), job.moe, 0, width))
    files = -(-total // CONVERTED_FILE_BYTES)
    largest = min(total, -(-files // job.world_size) * CONVERTED_FILE_BYTES)
    held = [
        sum(_written(job.model, replace(p, cp=1), job.moe, stage, width)) for stage in range(p.pp)
    ]
    return ReadCost(total, largest, 0 if job.world_size == 1 else max(held))


def checkpoint_line(job: Job, step_s: float) -> str:
    """One line about the checkpoints of a job whose steps take `step_s`."""
    cost, settings = checkpoint_cost(job), job.checkpoint
    asynchronous = settings.asynchronous
    each = cost.blocked_s(step_s, asynchronous=asynchronous)
    how = "while training continues" if asynchronous else "while training waits"
    every = f"every {settings.every} steps" if settings.every else "at the end"
    return (
        f"checkpoint {every}: {cost.total / 1e9:,.1f} GB, the largest rank writes "
        f"{cost.largest / 1e9:.2f} GB ({cost.largest / cost.mean:.2f} x the mean) in "
        f"{cost.write_s:.1f} s {how}; a save at every step blocks {each:.2f} s "
        f"({each / (each + step_s):.1%}); assumed: {HOST_LINK_GB_S:g} GB/s to the host, "
        f"{HASH_GB_S:g} GB/s hashed, {STORAGE_GB_S:g} GB/s written a node"
    )


def start_line(job: Job) -> str:
    """One line about the weights that a job reads at its start."""
    cost = start_cost(job)
    return (
        f"start from an artifact: {cost.total / 1e9:,.1f} GB of weights read from storage and "
        f"hashed, each byte once, at most {cost.largest / 1e9:.2f} GB by a rank; a rank gets up to "
        f"{cost.received / 1e9:.2f} GB from the others"
    )


@functools.lru_cache(maxsize=1 << 10)
def _written(
    model: ModelConfig, parallel: ParallelConfig, moe: MoeTrainingConfig, stage: int, width: int
) -> tuple[int, int]:
    """Bytes of a stage's dense weights and of its experts' on a rank."""
    listed = [p for chunk in stage_parameters(model, parallel, moe, stage) for p in chunk]
    sizes = [(p.expert, p.numel * (4 if p.float32 else width)) for p in listed]
    return sum(n for expert, n in sizes if not expert), sum(n for expert, n in sizes if expert)
