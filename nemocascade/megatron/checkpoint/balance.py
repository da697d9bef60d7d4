"""The shards that each rank writes: every shard once, and about as many bytes on every rank.

The distributed optimizer's shards exist on one rank each. Data-parallel ranks hold the same
weights, so each of them writes a share, which is larger where a rank has fewer bytes of its own.
Nothing is sent between ranks: pipeline stages of unequal size stay unequal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist

from nemocascade.megatron.checkpoint.boxes import Box, boxes_of_range
from nemocascade.megatron.checkpoint.storage import TensorShard
from nemocascade.runtime.world import World

Kind = Literal["expert_dp", "dp"]
# The order in which ranks share: the experts' replicas are fewer than the others.
_KINDS: tuple[Kind, ...] = ("expert_dp", "dp")


@dataclass(frozen=True)
class Holding:
    """Bytes of a rank. own: of shards that it alone writes. shared, digest, first: by kind, the
    bytes of shards that its replicas hold as well, the hash of their boxes, and the first replica.
    """

    own: int
    shared: dict[Kind, int]
    digest: dict[Kind, str]
    first: dict[Kind, int]


def holding(world: World, shards: Sequence[TensorShard]) -> Holding:
    """The bytes of this rank."""
    groups = {"dp": world.groups.dp_cp, "expert_dp": world.groups.expt_dp}
    shared = {kind: _shared(shards, kind) for kind in _KINDS}
    return Holding(
        own=sum(_num_bytes(p) for p in shards if not p.replicated_over and p.is_main),
        shared={kind: sum(map(_num_bytes, found)) for kind, found in shared.items()},
        digest={kind: _digest(found) for kind, found in shared.items()},
        first={kind: dist.get_process_group_ranks(groups[kind])[0] for kind in _KINDS},
    )


def written_shards(
    rank: int, holdings: Sequence[Holding], shards: Sequence[TensorShard]
) -> list[TensorShard]:
    """The shards that `rank` writes. holdings: of all ranks. shards: of this rank."""
    mine = [p for p in shards if not p.replicated_over and p.is_main]
    for kind, shares in zip(_KINDS, _shares_by_kind(holdings), strict=True):
        start, stop = shares[rank]
        mine += _cut(_shared(shards, kind), start, stop)
    return mine


def _shares_by_kind(holdings: Sequence[Holding]) -> list[list[tuple[int, int]]]:
    """For each of `_KINDS`, the first byte that each rank writes of what its replicas share, and
    the first that it does not."""
    load = [h.own for h in holdings]
    found = []
    for kind in _KINDS:
        groups: dict[int, list[int]] = {}
        for number, rank in enumerate(holdings):
            groups.setdefault(rank.first[kind], []).append(number)
        ranges = [(0, 0)] * len(holdings)
        for group in groups.values():
            shares = _shares([load[r] for r in group], holdings[group[0]].shared[kind])
            if len({holdings[r].digest[kind] for r in group}) > 1:
                # The first replica writes all where the others hold different boxes.
                shares = [holdings[r].shared[kind] if r == group[0] else 0 for r in group]
            start = 0
            for number, share in zip(group, shares, strict=True):
                load[number] += share
                ranges[number] = (start, start + share)
                start += share
        found.append(ranges)
    return found


def _shared(shards: Sequence[TensorShard], kind: Kind) -> list[TensorShard]:
    """The shards that replicas of a kind hold as well, in a fixed order."""
    found = [p for p in shards if p.replicated_over == kind and not any(p.replica[:-1])]
    return sorted(found, key=lambda p: (p.key, p.box.offset))


def _digest(shards: Sequence[TensorShard]) -> str:
    boxes = [(p.key, p.box, p.dtype_name) for p in shards]
    return hashlib.sha256(repr(boxes).encode()).hexdigest()


def _num_bytes(shard: TensorShard) -> int:
    return shard.box.volume * shard.tensor.element_size()


def _shares(loads: Sequence[int], shared: int) -> list[int]:
    """Bytes of `shared` for each rank, so that the largest load is as small as it can be."""
    ordered = sorted(loads)
    level, left = ordered[0], shared
    for count, following in enumerate([*ordered[1:], None], 1):
        step = left if following is None else min(left, count * (following - level))
        level += -(-step // count)
        left -= step
    found = []
    for load in loads:
        found.append(min(shared, max(0, level - load)))
        shared -= found[-1]
    return found


def _cut(shards: Sequence[TensorShard], start: int, stop: int) -> list[TensorShard]:
    """The elements of `shards`, laid end to end, whose first bytes are in [start, stop)."""
    found = []
    begin = 0
    for shard in shards:
        width, size = shard.tensor.element_size(), _num_bytes(shard)
        low, high = (-(-min(max(edge - begin, 0), size) // width) for edge in (start, stop))
        for box in boxes_of_range(shard.box.size, low, high):
            offset = tuple(a + b for a, b in zip(shard.box.offset, box.offset, strict=True))
            part = shard.tensor.detach()[box.slices()]
            found.append(TensorShard(shard.key, shard.global_shape, Box(offset, box.size), part))
        begin += size
    return found
