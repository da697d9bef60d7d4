"""Start of the world: the process group, and Megatron-Core's groups of a layout."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from nemocascade.megatron import cpu
from nemocascade.megatron.groups import all_groups, own_groups
from nemocascade.megatron.upstream import hide_notes
from nemocascade.recipe import EngineConfig, ParallelConfig, RecipeError
from nemocascade.runtime.world import World


def resolve_device(engine: EngineConfig) -> torch.device:
    """The device that `engine.device` asks for. Raises RecipeError if it is unavailable."""
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
    """The rendezvous store, this process's rank and the number of ranks.

    The launcher's store outlives a world and keeps the addresses of its ranks, so each world of a
    process uses its own part of the store.
    """
    if "RANK" not in os.environ:
        return dist.HashStore(), 0, 1
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    number = store.add(f"nemocascade/worlds_of_rank_{rank}", 1)
    return dist.PrefixStore(f"nemocascade/world_{number}", store), rank, size


def start_world(parallel: ParallelConfig, engine: EngineConfig) -> World:
    """Join the process group and make Megatron's groups for `parallel`.

    Settings must be valid: check them with the recipe's `problems` first. One process without a
    launcher makes a world of its own. Without CUDA, torch.cuda's functions answer for the CPU from
    now on (`cpu.install`).
    """
    hide_notes()
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
        device=device,
        parallel=parallel,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        leave_engine=parallel_state.destroy_model_parallel,
    )


def generation_world(world: World, parallel: ParallelConfig, engine: EngineConfig) -> World:
    """The same ranks in the layout `parallel`, in which rollouts are generated.

    `world` itself if that is its layout. Groups of the same ranks are shared with it; the others
    are made, so every rank calls it. The view has no context parallelism: those ranks count as data
    parallel. `World.close` of `world` destroys all groups.
    """
    if parallel == world.parallel:
        return world
    held = {
        tuple(dist.get_process_group_ranks(group)): group
        for field in fields(ProcessGroupCollection)
        if isinstance(group := getattr(world.groups, field.name, None), dist.ProcessGroup)
    }
    known = set(all_groups(world.size, world.parallel))
    timeout = datetime.timedelta(seconds=engine.timeout_s)
    made: dict[tuple[int, ...], Any] = {}
    for ranks in all_groups(world.size, parallel):
        # Every rank takes part in making a group, also those outside of it.
        if ranks not in known:
            made[ranks] = dist.new_group(list(ranks), timeout=timeout)

    def group_of(ranks: Sequence[int]) -> Any:
        key = tuple(ranks)
        return held[key] if key in known else made[key]

    groups = own_groups(world.rank, world.size, parallel, group_of)
    return replace(world, parallel=parallel, groups=groups)


def shares_weights(world: World, rollout_world: World) -> bool:
    """True if both layouts hold the same weights on every rank, so that none need a copy."""
    return rollout_world.parallel == replace(world.parallel, cp=1)
