"""Capacity of generation on a rank: the memory of its caches, and the load of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from nemocascade.megatron.generation.kv_cache import CPU_GIB, CacheMemory, Load
from nemocascade.recipe.errors import UserError
from nemocascade.rollout.engine import Sampling, Work
from nemocascade.runtime.world import World

GIB = 2**30


class CapacityError(UserError, ValueError):
    """The memory of caches does not hold a single sequence."""


def check_capacity(
    memory: CacheMemory, load: Load, slots: int, blocks: int, needed_bytes: int
) -> None:
    """Raise CapacityError if `blocks` do not hold the longest sequence and a stored prompt.

    blocks: the least, and needed_bytes: the most, of the ranks that generate together.
    """
    needed = memory.needed(load)
    if blocks >= needed:
        return
    gib = math.ceil(1000 * needed_bytes / GIB) / 1000
    raise CapacityError(
        f"the KV cache has {max(0, blocks)} blocks of {memory.size} tokens beside the states of "
        f"{slots} slots, in {memory.budget / GIB:.3g} GiB, and a sequence of {load.longest} "
        f"tokens beside a stored prompt of {load.prompt} needs {needed}: set kv_gib to "
        f"{gib:.3f} or more, or lower slots, max_response_tokens or context"
    )


def load_of(world: World, work: Work, sampling: Sampling) -> Load:
    """The load of a run: the largest of the ranks that share experts, since their decode steps are
    of one size."""
    requests = work.requests.values()
    lengths = [len(r.prompt) + (r.sampling or sampling).max_tokens for r in requests]
    longest = max(lengths, default=1 + sampling.max_tokens)
    prompt = max((len(r.prompt) for r in requests), default=1)
    mine = (longest, prompt, len(requests))
    return Load(*largest_of_sharers(world, mine) if shares_experts(world) else mine)


def budget(world: World, gib: float, fraction: float) -> int:
    """Bytes for caches on this rank. gib: given by the settings; 0 is `fraction` of the memory that
    is free on a GPU, and `CPU_GIB` on a CPU."""
    if gib:
        return int(gib * GIB)
    if world.device.type != "cuda":
        return int(CPU_GIB * GIB)
    # Memory that torch keeps for itself is free for the caches.
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(world.device)
    return int(free * fraction)


def shares_experts(world: World) -> bool:
    """True if experts are sharded over data-parallel ranks, which must run the same passes."""
    return bool(world.parallel.tp % world.groups.tp_ep.size())


def largest_of_sharers(world: World, values: Sequence[int]) -> list[int]:
    """The largest of each value over the ranks that share experts."""
    return _reduced(values, dist.ReduceOp.MAX, world.groups.tp_ep)


def least_of_ranks(world: World, value: int) -> int:
    """The least value of the ranks of a replica, and of the replicas that share experts with it."""
    for group in (world.groups.mp, world.groups.tp_ep):
        if group.size() > 1:
            [value] = _reduced([value], dist.ReduceOp.MIN, group)
    return value


def _reduced(
    values: Sequence[int], op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup
) -> list[int]:
    """Reduced by gloo on the host, which knows the values: nothing waits for the device."""
    found = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(found, op=op, group=group)
    return list(map(int, found))
