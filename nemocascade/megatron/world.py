"""The ranks of a run: process groups, device, and this rank's place on every axis."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from nemocascade.megatron import cpu
from nemocascade.megatron.watchdog import Watchdog
from nemocascade.recipe import EngineConfig, ParallelConfig


class RecipeError(ValueError):
    """Settings that cannot run; the message lists every one with its remedy."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        lines = "\n".join(f"  {i}. {p}" for i, p in enumerate(problems, 1))
        super().__init__(f"{len(problems)} setting(s) cannot run:\n{lines}")


def world_size_of_environment() -> int:
    """Ranks that the launcher (torchrun, srun + torchrun) started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class World:
    """Where this process stands. Passed down; nothing below asks a global for it."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    parallel: ParallelConfig
    groups: ProcessGroupCollection
    watch: Watchdog = field(default_factory=Watchdog)
    """Names a rank that stalls or dies; see `phase`."""

    @property
    def dp_rank(self) -> int:
        return int(dist.get_rank(self.groups.dp))

    @property
    def dp_size(self) -> int:
        return int(dist.get_world_size(self.groups.dp))

    @property
    def tp_rank(self) -> int:
        return int(dist.get_rank(self.groups.tp))

    @property
    def pp_rank(self) -> int:
        return int(dist.get_rank(self.groups.pp))

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.parallel.pp - 1

    @property
    def is_main(self) -> bool:
        """The one rank that writes what a run writes once."""
        return self.rank == 0

    def describe(self) -> str:
        """One line with the size of every axis."""
        p = self.parallel
        return (
            f"world {self.size}: tp {p.tp} x pp {p.pp} (vpp {p.vpp}) x dp {self.dp_size}, "
            f"experts etp {p.etp} x ep {p.ep}, {self.device.type}"
        )

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def broadcast_object(self, value: Any, src: int = 0) -> Any:
        """`value` of rank `src`, a JSON-like object, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=src)
        return box[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """`value` of every rank, by rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum_over_data_parallel(self, value: torch.Tensor) -> torch.Tensor:
        """`value` summed in place over the data-parallel ranks."""
        dist.all_reduce(value, group=self.groups.dp)
        return value

    def close(self) -> None:
        """Leave all process groups, so that another layout may start in this process."""
        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()


def resolve_device(engine: EngineConfig) -> torch.device:
    """The device that `engine.device` asks for. Raises RecipeError if it is not there."""
    if engine.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError(
            ["engine.device(cuda): torch finds no CUDA device: set --engine.device cpu"]
        )
    if engine.device == "cpu" or not torch.cuda.is_available():
        if torch.cuda.is_available():
            raise RecipeError(
                [
                    "engine.device(cpu) on a machine with CUDA: Megatron-Core would use the GPU; "
                    "start with CUDA_VISIBLE_DEVICES= in the environment"
                ]
            )
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise RecipeError(
            [
                f"local rank {local_rank} has no GPU of its own, the node has {count}: "
                f"start at most --nproc-per-node {count}"
            ]
        )
    return torch.device("cuda", local_rank)


def _meeting_point(timeout: datetime.timedelta) -> tuple[dist.Store, int, int]:
    """Where ranks meet, this process's rank and their number.

    The launcher's store outlives a world and remembers the addresses of its ranks, so each world of
    a process has a part of the store to itself.
    """
    if "RANK" not in os.environ:
        return dist.HashStore(), 0, 1
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    number = store.add(f"nemocascade/worlds_of_rank_{rank}", 1)
    return dist.PrefixStore(f"nemocascade/world_{number}", store), rank, size


def start_world(parallel: ParallelConfig, engine: EngineConfig) -> World:
    """Join the process group and make Megatron's groups for `parallel`.

    Settings must be legal: check them with the recipe's `problems` first. One process without a
    launcher makes a world of its own.
    """
    device = resolve_device(engine)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        cpu.install()
    timeout = datetime.timedelta(seconds=engine.timeout_s)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store, rank, size = _meeting_point(timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp,
        distributed_timeout_minutes=max(1, int(engine.timeout_s / 60)),
        create_gloo_process_groups=device.type == "cuda",
    )
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        device=device,
        parallel=parallel,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
    )
