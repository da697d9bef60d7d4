"""Sockets of a rank: ranks are connected when they exchange a message, with few others."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import run_ranks

from nemocascade.plan.sockets import host_sockets
from nemocascade.recipe import ParallelConfig
from nemocascade.runtime.world import grid

RANKS = 24
LAYOUT: dict[str, Any] = {"tp": 2, "pp": 3, "ep": 2}


def count_sockets() -> dict[str, Any]:
    """Sockets after the start and after messages of every kind, and what a delivery brought."""
    import torch
    import torch.distributed as dist

    from nemocascade.megatron.world import start_world
    from nemocascade.recipe import EngineConfig

    def count() -> int:
        found = 0
        for entry in Path("/proc/self/fd").iterdir():
            try:
                found += os.readlink(entry).startswith("socket:")
            except FileNotFoundError:
                continue
        return found

    before = count()
    world = start_world(ParallelConfig(**LAYOUT), EngineConfig(timeout_s=300))
    started = count() - before
    found = list(dist.distributed_c10d._world.pg_map)
    groups = len(found)
    repeated = groups - len({tuple(dist.get_process_group_ranks(group)) for group in found})
    messages = list(range(3 * world.size))
    owners = [k % world.size for k in messages]
    receivers = [random.Random(k).sample(range(world.size), k % world.size) for k in messages]
    sizes = [k % 7 for k in messages]
    for _ in range(2):
        got = world.deliver(
            owners, sizes, receivers, lambda k: torch.full((sizes[k],), k, dtype=torch.uint8)
        )
        world.barrier()
        assert world.broadcast_object([world.rank]) == [0]
        assert world.all_gather_object(world.rank) == list(range(world.size))
        value = torch.tensor([world.rank / 3.0, -float(world.rank)])
        world.broadcast(value, world.size - 1)
        assert value.tolist() == torch.tensor([23 / 3.0, -23.0]).tolist()
        assert int(world.sum_over_ranks(torch.ones(1, dtype=torch.int64))) == world.size
        world.sum_over_data_parallel(torch.ones(5, dtype=torch.float64))
        first = dist.get_global_rank(world.groups.mp, 0)
        dist.broadcast_object_list([world.rank], src=first, group=world.groups.mp)
        each = [torch.zeros(1) for _ in range(world.replica_size)]
        dist.all_gather(each, torch.ones(1), group=world.groups.mp)
        for group in (world.groups.tp_ep, world.groups.dp_cp, world.groups.cp):
            dist.all_reduce(torch.ones(1), group=group)
    talked = count() - before
    world.close()
    return {
        "started": started,
        "groups": groups,
        "repeated": repeated,
        "talked": talked,
        "delivered": {str(k): message.tolist() for k, message in got.items()},
        "expected": {
            str(k): [k] * sizes[k]
            for k in messages
            if world.rank in receivers[k] and owners[k] != world.rank
        },
    }


def test_a_rank_is_connected_to_few_others() -> None:
    results = run_ranks(count_sockets, RANKS, timeout_s=300)
    parallel = ParallelConfig(**LAYOUT)
    bound = host_sockets(RANKS, parallel, parallel)
    for result in results:
        assert result["delivered"] == result["expected"]
        assert result["repeated"] <= 1, "beside the default group, only one is of all ranks"
        # Each group listens. At the start no rank is connected to most others.
        assert result["started"] - result["groups"] < RANKS // 2
        # All groups of a CPU world are gloo's; the bound counts the listeners of six.
        assert result["talked"] - result["groups"] <= bound - 6
        assert result["talked"] > result["started"]


@pytest.mark.parametrize("size", [64, 256, 1024])
def test_the_bound_holds_at_scale(size: int) -> None:
    training, rollout = ParallelConfig(tp=8, pp=2, ep=8), ParallelConfig(tp=2, ep=2)
    assert host_sockets(size, training, rollout) <= 64


@pytest.mark.parametrize("size", [1, 2, 16, 24, 34, 97, 1000, 1024])
def test_a_grid_has_every_rank(size: int) -> None:
    product = 1
    for axis in grid(size):
        product *= axis
    assert product == size
