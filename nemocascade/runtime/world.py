"""The ranks of a run: process groups, device, and this rank's index on every axis."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist

from nemocascade.recipe import ParallelConfig, UserError
from nemocascade.runtime.watchdog import Watchdog


class MainRankError(RuntimeError):
    """Work that the main rank does for all ranks has failed."""


class LauncherError(UserError, RuntimeError):
    """A launcher started several processes that do not know of each other."""


TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Number of processes, as srun and MPI launchers tell it. A batch script or a shell of salloc has
none: SLURM_NTASKS, which they have, counts the tasks of the allocation."""


SEND_WINDOW = 64 << 20
"""Most bytes of packed messages that wait for their receivers at a time, on a rank."""


def world_size_of_environment() -> int:
    """Number of ranks that the launcher (torchrun, srun + torchrun) started; 1 without one.

    Raises LauncherError if a launcher without torchrun started several processes: each would be a
    world of its own, in one run folder.
    """
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    for name in TASKS:
        if (count := os.environ.get(name, "1")) != "1":
            raise LauncherError(
                f"{name} is {count}, so {count} processes run this script and none knows of the "
                "others: start one task a node (srun --ntasks-per-node 1) that runs torchrun "
                "--nproc-per-node RANKS, see `nemocascade submit --dry-run`"
            )
    return 1


def is_main_process() -> bool:
    """True in the process that prints a job's output; needs no process group."""
    return os.environ.get("RANK", "0") == "0"


class Groups(Protocol):
    """The process groups of a layout, as Megatron-Core's ProcessGroupCollection names them."""

    tp: Any
    pp: Any
    mp: Any
    dp: Any
    cp: Any
    ep: Any
    dp_cp: Any
    tp_cp: Any
    tp_ep: Any
    tp_dp_cp: Any
    expt_tp: Any
    expt_dp: Any


@dataclass(frozen=True)
class World:
    """This process's ranks, device and groups. It is passed as an argument, never a global."""

    rank: int
    size: int
    device: torch.device
    parallel: ParallelConfig
    groups: Groups
    watch: Watchdog = field(default_factory=Watchdog)
    """Names a rank that stalls or dies."""
    leave_engine: Callable[[], None] = lambda: None
    """Destroys the engine's own groups; called before the default process group is destroyed."""

    @property
    def dp_rank(self) -> int:
        return int(dist.get_rank(self.groups.dp))

    @property
    def dp_size(self) -> int:
        return int(dist.get_world_size(self.groups.dp))

    @property
    def cp_rank(self) -> int:
        return int(dist.get_rank(self.groups.cp))

    @property
    def tp_rank(self) -> int:
        return int(dist.get_rank(self.groups.tp))

    @property
    def pp_rank(self) -> int:
        return int(dist.get_rank(self.groups.pp))

    @property
    def replica_rank(self) -> int:
        """Index of this rank among the tensor- and pipeline-parallel ranks of its replica."""
        return int(dist.get_rank(self.groups.mp))

    @property
    def replica_size(self) -> int:
        return int(dist.get_world_size(self.groups.mp))

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.parallel.pp - 1

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes the run's files."""
        return self.rank == 0

    def describe(self) -> str:
        """One line with the size of every axis."""
        p = self.parallel
        return (
            f"world {self.size}: tp {p.tp} x cp {p.cp} x pp {p.pp} (vpp {p.vpp}) x dp "
            f"{self.dp_size}, "
            f"experts etp {p.etp} x ep {p.ep}, {self.device.type}"
        )

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def broadcast_object(self, value: Any, src: int = 0) -> Any:
        """Broadcast a JSON-like object from rank `src` to every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=src)
        return box[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """Gather an object from every rank, in rank order."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum_over_data_parallel(self, value: torch.Tensor) -> torch.Tensor:
        """Sum `value`, on the host or the device, in place over the data-parallel and
        context-parallel ranks, which hold different rows.

        The ranks exchange a host tensor without waiting for their devices.
        """
        groups = self.groups
        dist.all_reduce(value, group=groups.dp if self.parallel.cp == 1 else groups.dp_cp)
        return value

    def sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        """Sum `value`, on the host, in place over all ranks."""
        dist.all_reduce(value)
        return value

    def broadcast(self, value: torch.Tensor, src: int) -> None:
        """Overwrite `value`, on the host, with that of rank `src`."""
        dist.broadcast(value, src=src)

    def replicas(self) -> list[list[int]]:
        """The ranks of each data-parallel rank, which train alike. Every rank calls it."""
        table = torch.zeros(self.size, dtype=torch.int64)
        table[self.rank] = self.dp_rank
        found: list[list[int]] = [[] for _ in range(self.dp_size)]
        for rank, number in enumerate(self.sum_over_ranks(table).tolist()):
            found[number].append(rank)
        return found

    def deliver(
        self,
        owners: Sequence[int],
        sizes: Sequence[int],
        receivers: Sequence[Collection[int]],
        pack: Callable[[int], torch.Tensor],
    ) -> dict[int, torch.Tensor]:
        """Send message k, of `sizes[k]` bytes, from rank `owners[k]` to the ranks `receivers[k]`.

        Every rank passes the same, and its own `pack`: it returns message k, [sizes[k]] uint8 on
        the host, and is called for the messages that this rank sends. Returns the messages from
        other ranks to this one, by number. At most `SEND_WINDOW` bytes, or one message, are packed
        at a time.
        """
        found = {
            k: torch.empty(sizes[k], dtype=torch.uint8)
            for k, owner in enumerate(owners)
            if owner != self.rank and self.rank in receivers[k]
        }
        # All receives are posted before the first send, so that no rank waits for another's turn.
        arriving = [dist.irecv(t, src=owners[k], tag=k) for k, t in found.items() if t.numel()]
        leaving: list[Any] = []
        packed = 0
        for k, owner in enumerate(owners):
            others = [rank for rank in receivers[k] if rank != self.rank]
            if owner != self.rank or not others or not sizes[k]:
                continue
            if leaving and packed + sizes[k] > SEND_WINDOW:
                for work in leaving:
                    work.wait()
                leaving, packed = [], 0
            message = pack(k)
            leaving += [dist.isend(message, dst=rank, tag=k) for rank in others]
            packed += sizes[k]
        for work in (*leaving, *arriving):
            work.wait()
        return found

    def close(self) -> None:
        """Leave all process groups, so that another layout may start in this process."""
        self.leave_engine()
        if dist.is_initialized():
            dist.destroy_process_group()


def main_first(world: World, work: Any, rest: Any) -> Any:
    """Run `work()` on the main rank, then `rest()` on the others; a failure fails all ranks."""
    failure, result = None, None
    if world.is_main:
        try:
            result = work()
        except Exception as error:
            failure = error
    message = world.broadcast_object(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    if message is not None:
        raise MainRankError(message)
    return result if world.is_main else rest()
