"""Start of the world: the process group, and Megatron-Core's groups of a layout."""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from nemocascade.megatron import cpu
from nemocascade.megatron.groups import (
    HOST,
    ExpertNodes,
    all_groups,
    hop_groups,
    host_groups,
    named_groups,
    own_groups,
)
from nemocascade.megatron.upstream import hide_notes
from nemocascade.recipe import EngineConfig, ParallelConfig, RecipeError
from nemocascade.runtime.launcher import local_rank, ranks_of_node
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
    index = local_rank()
    count = torch.cuda.device_count()
    if index >= count:
        raise RecipeError(
            [
                f"local rank {index} has no GPU of its own, the node has {count}: "
                f"start at most --nproc-per-node {count}"
            ]
        )
    return torch.device("cuda", index)


@dataclass(frozen=True)
class Meeting:
    """The ranks of a world before it has a process group. store: of this world alone."""

    store: dist.Store
    rank: int
    size: int


def meet_ranks(engine: EngineConfig) -> Meeting:
    """Join the rendezvous of the launcher's ranks; one process without a launcher is alone.

    The launcher's store outlives a world and keeps the addresses of its ranks, so each world of a
    process uses its own part of the store.
    """
    if dist.is_initialized():
        store, rank, size = (
            dist.distributed_c10d._get_default_store(),
            dist.get_rank(),
            dist.get_world_size(),
        )
    elif "RANK" in os.environ:
        timeout = datetime.timedelta(seconds=engine.timeout_s)
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    else:
        store, rank, size = dist.HashStore(), 0, 1
    number = store.add(f"nemocascade/worlds_of_rank_{rank}", 1)
    return Meeting(dist.PrefixStore(f"nemocascade/world_{number}", store), rank, size)


def start_world(
    parallel: ParallelConfig, engine: EngineConfig, meeting: Meeting | None = None
) -> World:
    """Join the process group and make Megatron's groups for `parallel`.

    meeting: of `meet_ranks`, for a watchdog that watches this start too.

    Settings must be valid: check them with the recipe's `problems` first. One process without a
    launcher makes a world of its own. Without CUDA, torch.cuda's functions answer for the CPU from
    now on (`cpu.install`).
    """
    hide_notes()
    # Models refer to themselves and to their groups. Until they are collected, the threads of an
    # earlier world's groups wait, and spin once the other ranks have closed theirs.
    gc.collect()
    device = resolve_device(engine)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        cpu.install()
    timeout = datetime.timedelta(seconds=engine.timeout_s)
    raise_file_limit()
    # gloo connects ranks when they first exchange a message, instead of each with every other.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        met = meeting or meet_ranks(engine)
        hook = sys.excepthook
        dist.init_process_group(
            backend, store=met.store, rank=met.rank, world_size=met.size, timeout=timeout
        )
        # torch wraps the hook at every start: once is enough for lines that name the rank.
        if hook.__name__ == sys.excepthook.__name__:
            sys.excepthook = hook
    parallel_state.destroy_model_parallel()
    with _few_gloo_groups(device):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tp,
            pipeline_model_parallel_size=parallel.pp,
            virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
            context_parallel_size=parallel.cp,
            expert_model_parallel_size=parallel.ep,
            expert_tensor_parallel_size=parallel.etp,
            distributed_timeout_minutes=max(1, int(engine.timeout_s / 60)),
            create_gloo_process_groups=False,
        )
    groups: Any = ProcessGroupCollection.use_mpu_process_groups()
    groups.expert_nodes = _make_expert_nodes(parallel, engine, device, timeout)
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        device=device,
        parallel=parallel,
        groups=groups,
        leave_engine=parallel_state.destroy_model_parallel,
    )


_HOST_GROUPS = {
    "dp": "DATA_PARALLEL_GROUP",
    "dp_cp": "DATA_PARALLEL_GROUP_WITH_CP",
    "mp": "MODEL_PARALLEL_GROUP",
    "cp": "CONTEXT_PARALLEL_GROUP",
    "tp_ep": "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP",
}
"""Megatron-Core's descriptions of the groups of `groups.HOST`."""


@contextlib.contextmanager
def _few_gloo_groups(device: torch.device) -> Iterator[None]:
    """Context in which Megatron makes few gloo groups.

    On CPUs, its groups of the same ranks are one group: of about twenty, few differ. Each would
    have three threads, of which one wakes a hundred times a second. On GPUs, groups are of NCCL
    alone, save those of `groups.HOST`: a group without a backend of its own would get those of the
    default group, so a gloo group too.
    """
    assert _HOST_GROUPS.keys() == set(HOST)
    made = parallel_state.create_group
    on_gpu = device.type == "cuda"
    of_ranks: dict[tuple[int, ...], Any] = {}

    def create(ranks: Sequence[int], *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        if on_gpu:
            on_host = kwargs.get("group_desc") in _HOST_GROUPS.values()
            return made(ranks, *args, backend=backend or (None if on_host else "nccl"), **kwargs)
        key = tuple(ranks)
        if key not in of_ranks:
            of_ranks[key] = made(ranks, *args, backend=backend, **kwargs)
        return of_ranks[key]

    parallel_state.create_group = create
    try:
        yield
    finally:
        parallel_state.create_group = made


FILES = 4096
"""Open files that a rank may need: sockets, pipes of verifiers, and mapped files."""


def raise_file_limit() -> int:
    """Raise the soft limit of open files to `FILES`, or to the hard limit; returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= FILES:
        return soft if soft != resource.RLIM_INFINITY else FILES
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def _make_expert_nodes(
    parallel: ParallelConfig,
    engine: EngineConfig,
    device: torch.device,
    timeout: datetime.timedelta,
) -> ExpertNodes | None:
    """The nodes of this rank's expert group, as torchrun numbers its ranks; None if it is one.

    Raises RecipeError if the group cannot exchange its rows as the settings require.
    """
    ranks, size, exchange = (
        parallel.ep * parallel.etp,
        dist.get_world_size(),
        engine.expert_exchange,
    )
    if ranks == 1:
        return None
    found: list[Any] = [None] * size
    dist.all_gather_object(found, ranks_of_node(size))
    # Every rank must come to the same groups, also where a node has fewer ranks.
    sizes = sorted(set(found))
    per_node = sizes[0]
    count = parallel.expert_nodes(per_node) if len(sizes) == 1 else 1
    if count == 1 and ranks > per_node and exchange == "hierarchical":
        nodes = " and ".join(map(str, sizes))
        raise RecipeError(
            [
                f"engine.expert_exchange(hierarchical) needs whole nodes, but ep({parallel.ep}) x "
                f"etp({parallel.etp}) = {ranks} ranks do not fill nodes of {nodes}: set "
                f"--parallel.ep to a multiple of {sizes[-1]} or --engine.expert-exchange direct"
            ]
        )
    if count == 1 or exchange == "deepep":
        return None
    if exchange == "direct":
        return ExpertNodes(count)
    backend = "nccl" if device.type == "cuda" else "gloo"
    own: dict[int, list[Any]] = {}
    for number, every in enumerate(hop_groups(size, parallel, per_node)):
        # Every rank takes part in making a group, also those outside of it.
        made = [dist.new_group(list(r), timeout=timeout, backend=backend) for r in every]
        own[number] = [g for g, r in zip(made, every, strict=True) if dist.get_rank() in r]
    rail, local = own[dist.get_rank() // ranks]
    return ExpertNodes(count, rail, local)


def generation_world(world: World, parallel: ParallelConfig, engine: EngineConfig) -> World:
    """The same ranks in the layout `parallel`, in which rollouts are generated.

    `world` itself if that is its layout. Groups of the same ranks are shared with it; the others
    are made, so every rank calls it. The view has no context parallelism: those ranks count as data
    parallel. `World.close` of `world` destroys all groups.
    """
    if parallel == world.parallel:
        return world
    on_gpu = world.device.type == "cuda"
    existing: dict[tuple[int, ...], Any] = {}
    # Groups with gloo come last, so that they are kept where several have the same ranks.
    for name in (*(f.name for f in fields(ProcessGroupCollection) if f.name not in HOST), *HOST):
        group = getattr(world.groups, name, None)
        if isinstance(group, dist.ProcessGroup):
            existing[tuple(dist.get_process_group_ranks(group))] = group
    with_host = host_groups(world.size, world.parallel)
    needs_host = host_groups(world.size, parallel)
    # Those that every one of their ranks has. A rank alone is among them where an axis has size 1.
    known = {
        ranks
        for ranks in named_groups(world.size, world.parallel)
        if not on_gpu or ranks in with_host or ranks not in needs_host
    }
    timeout = datetime.timedelta(seconds=engine.timeout_s)
    made: dict[tuple[int, ...], Any] = {}
    for ranks in all_groups(world.size, parallel):
        # Every rank takes part in making a group, also those outside of it.
        if ranks not in known:
            backend = "nccl" if on_gpu and ranks not in needs_host else None
            made[ranks] = dist.new_group(list(ranks), timeout=timeout, backend=backend)

    def group_of(ranks: Sequence[int]) -> Any:
        key = tuple(ranks)
        return existing[key] if key in known else made[key]

    groups = own_groups(world.rank, world.size, parallel, group_of)
    return replace(world, parallel=parallel, groups=groups)


def shares_weights(world: World, rollout_world: World) -> bool:
    """True if both layouts hold the same weights on every rank, so that none need a copy."""
    return rollout_world.parallel == replace(world.parallel, cp=1)
