"""Sockets that a rank opens for messages between hosts, at most; those of NCCL are not counted.

gloo connects two ranks of a group when they first exchange a message. A sum and a gather go round a
ring, a broadcast down a binomial tree, and rollouts over a grid (`runtime.world.grid`).
"""

from __future__ import annotations

import math

from nemocascade.megatron.groups import HOST, group_ranks
from nemocascade.recipe import ParallelConfig
from nemocascade.runtime.world import grid

STORES = 3
"""Connections to the launcher's store: of the process group, the watchdog and the checkpoints."""

OTHER_FILES = 256
"""Open files of a rank beside its sockets: mapped files, logs, pipes of verifiers."""


def host_sockets(size: int, parallel: ParallelConfig, rollout: ParallelConfig) -> int:
    """Sockets of the rank that has most, with the groups of training and of generation."""
    world = max(len(_partners(rank, size)) for rank in range(size))
    layouts = [parallel] if rollout == parallel else [parallel, rollout]
    found = STORES + world + 1
    for layout in layouts:
        for name in HOST:
            # A group listens, and its ranks are in a ring. Broadcasts go to a replica's ranks.
            ranks = len(group_ranks(0, size, layout)[name])
            tree = math.ceil(math.log2(ranks)) if name == "mp" else 0
            found += 1 + min(ranks - 1, 2 + tree)
    return found


def _partners(rank: int, size: int) -> set[int]:
    """Ranks of the world that `rank` exchanges messages with."""
    found = {(rank - 1) % size, (rank + 1) % size}
    # The tree from rank 0: a rank's parent is the rank without its lowest bit, its children have a
    # lower one.
    lowest = rank & -rank or 1 << (size - 1).bit_length()
    found.add(rank - (rank & -rank))
    found |= {rank + (1 << k) for k in range(lowest.bit_length() - 1) if rank + (1 << k) < size}
    stride = 1
    for axis in grid(size):
        start = rank - rank // stride % axis * stride
        found |= {start + i * stride for i in range(axis)}
        stride *= axis
    return found - {rank}
