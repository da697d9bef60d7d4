"""Weights from the shards of one layout to the shards of another, over the same ranks.

A plan is made once, from the boxes that every rank holds in both layouts: which box of which rank
fills which part of which other rank. Each box is sent once to each rank that needs it and does not
hold it. The ranks exchange by buckets, so the memory for messages is bounded and no rank holds more
of the model than its own shards.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from nemocascade.megatron.checkpoint.boxes import Box
from nemocascade.megatron.checkpoint.state import ModelPart
from nemocascade.runtime.launcher import ranks_of_node
from nemocascade.runtime.world import World

BUCKET_BYTES = 256 << 20


class ReshardingError(RuntimeError):
    """No rank holds some of the weights that another layout needs."""


@dataclass(frozen=True)
class _Boxes:
    """The boxes of a rank: those it holds, and those that it needs. key, box, bytes of the whole
    tensor."""

    owned: list[tuple[str, Box, int]]
    needed: list[tuple[str, Box, int]]


@dataclass(frozen=True)
class _Copy:
    """A box that rank `source` sends to rank `target`. owned, needed: number of the part there."""

    source: int
    target: int
    owned: int
    needed: int
    box: Box


@dataclass
class _Bucket:
    """The copies of a bucket in which this rank takes part."""

    local: list[_Copy] = field(default_factory=list)
    sent: list[_Copy] = field(default_factory=list)
    received: list[_Copy] = field(default_factory=list)


class Resharding:
    """The plan that fills `target` from the `source` of all ranks.

    source, target: the parts of this rank, from `model_parts`. Every rank makes the object.

    Raises ReshardingError if the ranks do not hold all that is needed.
    """

    def __init__(
        self,
        world: World,
        source: Sequence[ModelPart],
        target: Sequence[ModelPart],
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self.world, self.source, self.target = world, source, target
        mine = _Boxes(*([(p.key, p.box, _num_bytes(p)) for p in ps] for ps in (source, target)))
        every = _gather(world, mine)
        # Every rank must choose the same sources, also where a node has fewer ranks.
        per_node = min(world.all_gather_object(ranks_of_node()))
        self._buckets = _plan(world.rank, every, bucket_bytes, per_node)

    @torch.no_grad()
    def run(self) -> None:
        """Copy the current weights; every rank calls it."""
        for bucket in self._buckets:
            for copy in bucket.local:
                self._place(copy).copy_(self._values(copy))
            exchange(
                [(self._values(copy), copy.target) for copy in bucket.sent],
                [(self._place(copy), copy.source) for copy in bucket.received],
            )

    def _values(self, copy: _Copy) -> Tensor:
        return self.source[copy.owned].view(copy.box)

    def _place(self, copy: _Copy) -> Tensor:
        return self.target[copy.needed].view(copy.box)


def exchange(sent: Sequence[tuple[Tensor, int]], received: Sequence[tuple[Tensor, int]]) -> None:
    """Send tensors to ranks and receive others in place, all at once.

    Between two ranks, messages are matched in the order of the lists.
    """
    messages: list[dist.P2POp] = []
    arriving: list[tuple[Tensor, Tensor]] = []
    for place, source in received:
        whole = place.is_contiguous()
        box = place if whole else torch.empty(place.shape, dtype=place.dtype, device=place.device)
        if not whole:
            arriving.append((place, box))
        messages.append(dist.P2POp(dist.irecv, box, source))
    for values, target in sent:
        messages.append(dist.P2POp(dist.isend, values.contiguous(), target))
    if messages:
        for work in dist.batch_isend_irecv(messages):
            work.wait()
    for place, box in arriving:
        place.copy_(box)


def _num_bytes(part: ModelPart) -> int:
    return math.prod(part.global_shape) * part.owner.element_size()


def _gather(world: World, mine: _Boxes) -> list[_Boxes]:
    """The boxes of every rank. Ranks with the same boxes share one object, sent by the first."""
    digest = hashlib.sha256(repr(mine).encode()).hexdigest()
    digests = world.all_gather_object(digest)
    is_first = digests.index(digest) == world.rank
    sent = world.all_gather_object(mine if is_first else None)
    found: dict[str, _Boxes] = {}
    for name, boxes in zip(digests, sent, strict=True):
        if boxes is not None:
            found[name] = boxes
    return [found[name] for name in digests]


def _plan(
    rank: int, every: Sequence[_Boxes], bucket_bytes: int, ranks_per_node: int
) -> list[_Bucket]:
    """The buckets of this rank, the same number on every rank."""
    holders: dict[str, dict[Box, dict[int, int]]] = {}
    sizes: dict[str, int] = {}
    for holder, boxes in enumerate(every):
        for number, (key, box, num_bytes) in enumerate(boxes.owned):
            holders.setdefault(key, {}).setdefault(box, {}).setdefault(holder, number)
            sizes[key] = num_bytes
    starts, count = _bucket_numbers(sizes, bucket_bytes)
    buckets = [_Bucket() for _ in range(count)]
    overlaps: dict[int, list[tuple[str, int, Box, dict[int, int]]]] = {}
    for target, boxes in enumerate(every):
        if id(boxes) not in overlaps:
            overlaps[id(boxes)] = list(_overlaps(boxes, holders))
        for key, needed, box, owners in overlaps[id(boxes)]:
            source = _source(target, owners, ranks_per_node)
            if rank not in (source, target):
                continue
            first, parts = starts[key]
            for number, part in enumerate(_split(box, parts)):
                copy = _Copy(source, target, owners[source], needed, part)
                bucket = buckets[first + number]
                if source == target:
                    bucket.local.append(copy)
                else:
                    (bucket.sent if source == rank else bucket.received).append(copy)
    return buckets


def _bucket_numbers(
    sizes: dict[str, int], bucket_bytes: int
) -> tuple[dict[str, tuple[int, int]], int]:
    """For each key, its first bucket and number of buckets; and the number of all buckets."""
    starts: dict[str, tuple[int, int]] = {}
    last, used = -1, bucket_bytes + 1
    for key, size in sizes.items():
        parts = max(1, -(-size // bucket_bytes))
        if used + size > bucket_bytes:
            last, used = last + 1, 0
        starts[key] = last, parts
        last, used = last + parts - 1, used + size
    return starts, last + 1


def _overlaps(
    boxes: _Boxes, holders: dict[str, dict[Box, dict[int, int]]]
) -> Iterator[tuple[str, int, Box, dict[int, int]]]:
    """Yield the key, the number of the needed part, a box of it, and the ranks that own it."""
    for number, (key, needed, _) in enumerate(boxes.needed):
        found = 0
        for box, owners in holders.get(key, {}).items():
            common = needed.intersect(box)
            if common is not None:
                found += common.volume
                yield key, number, common, owners
        if found != needed.volume:
            raise ReshardingError(
                f"{key}: the ranks hold {found} of the {needed.volume} elements that the "
                "generation layout needs: set rollout.parallel to training's layout"
            )


def _source(target: int, owners: dict[int, int], ranks_per_node: int) -> int:
    """The rank of those in `owners` that sends to `target`: itself, one of its node, or any."""
    if target in owners:
        return target
    node = target // ranks_per_node
    near = [rank for rank in owners if rank // ranks_per_node == node] or list(owners)
    return sorted(near)[target % len(near)]


def _split(box: Box, count: int) -> list[Box]:
    """Split the box into at most `count` nearly equal parts along its first long enough axis."""
    if count == 1 or not box.size:
        return [box]
    axis = next((a for a, n in enumerate(box.size) if n >= count), None)
    if axis is None:
        axis = box.size.index(max(box.size))
    length, parts = box.size[axis], []
    for number in range(count):
        start, stop = length * number // count, length * (number + 1) // count
        if stop > start:
            offset, size = list(box.offset), list(box.size)
            offset[axis], size[axis] = offset[axis] + start, stop - start
            parts.append(Box(tuple(offset), tuple(size)))
    return parts
