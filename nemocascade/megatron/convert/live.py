"""Hugging Face tensors of a live model, assembled from the shards of all ranks one after another.

No rank holds more than a few tensors of the others: a tensor is assembled on the rank that holds
most of it already, from the boxes that other ranks send. The exchange is planned once, from the
boxes of all ranks, so it is right for any layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemocascade.megatron.adapter import merged_parts
from nemocascade.megatron.checkpoint.boxes import Box
from nemocascade.megatron.checkpoint.resharding import exchange
from nemocascade.megatron.checkpoint.state import unwrap
from nemocascade.megatron.checkpoint.storage import consecutive
from nemocascade.megatron.convert.config import families_of_model
from nemocascade.megatron.convert.names import NameMap, default_style, name_map
from nemocascade.megatron.convert.stream import translate
from nemocascade.runtime.world import World

BUCKET_BYTES = 256 << 20


@dataclass(frozen=True)
class TensorSpec:
    """A tensor by its Hugging Face name. owner: the rank that assembles it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    owner: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Copy:
    """A box of a tensor, which rank `source` holds as `part` of its model part number `number`.

    target: the box in the Hugging Face tensor. part: the same elements of our global tensor.
    """

    source: int
    number: int
    part: Box
    target: Box


class LiveTensors:
    """The tensors of a model, `specs`, in the order of its layers.

    chunks: the model, bare or wrapped; adapted weights are sent merged. Every rank creates the
    object and consumes `stream`.

    Raises ConfigError if no family of Hugging Face models can express the model's shape.
    """

    def __init__(self, world: World, chunks: Sequence[Any]) -> None:
        self.world = world
        self.parts = merged_parts(chunks, world)
        shape = unwrap(chunks[0]).config.shape
        self.family = families_of_model(shape)[0]
        names = name_map(self.family, shape, default_style(self.family, shape))
        mine = [(p.key, p.box, p.owner.dtype) for p in self.parts]
        copies, dtypes = _plan(names, world.all_gather_object(mine))
        self.specs: list[TensorSpec] = []
        self._copies: list[list[_Copy]] = []
        for name, size in names.theirs.items():
            self.specs.append(TensorSpec(name, dtypes[name], size, _owner(copies[name])))
            self._copies.append(copies[name])

    def stream(self, bucket_bytes: int = BUCKET_BYTES) -> Iterator[list[tuple[TensorSpec, Tensor]]]:
        """The tensors that this rank owns, by buckets of all tensors, which are empty elsewhere.

        bucket_bytes: of the tensors of one bucket, over all ranks, unless one alone is larger. The
        ranks exchange while they iterate, so all of them consume every bucket.
        """
        for bucket in self.buckets(bucket_bytes):
            yield self._exchange(bucket)

    def buckets(self, bucket_bytes: int = BUCKET_BYTES) -> list[list[int]]:
        """Consecutive numbers of `specs`, by bucket."""
        return consecutive([spec.num_bytes for spec in self.specs], bucket_bytes)

    @torch.no_grad()
    def _exchange(self, bucket: Sequence[int]) -> list[tuple[TensorSpec, Tensor]]:
        """Assemble the tensors of a bucket on their owners."""
        rank, device = self.world.rank, self.world.device
        found: dict[int, Tensor] = {}
        sent: list[tuple[Tensor, int]] = []
        received: list[tuple[Tensor, int]] = []
        for number in bucket:
            spec = self.specs[number]
            if spec.owner == rank:
                found[number] = torch.empty(spec.shape, dtype=spec.dtype, device=device)
            for copy in self._copies[number]:
                if spec.owner == rank:
                    place = found[number][copy.target.slices()]
                    if copy.source == rank:
                        place.copy_(self._values(copy).view(copy.target.size))
                    else:
                        received.append((place, copy.source))
                elif copy.source == rank:
                    sent.append((self._values(copy).to(spec.dtype), spec.owner))
        exchange(sent, received)
        return [(self.specs[number], tensor) for number, tensor in found.items()]

    def _values(self, copy: _Copy) -> Tensor:
        """The elements of a copy, of which this rank holds the source: a view where it can be."""
        return self.parts[copy.number].view(copy.part)


def _plan(
    names: NameMap, ranks: Sequence[Sequence[tuple[str, Box, torch.dtype]]]
) -> tuple[dict[str, list[_Copy]], dict[str, torch.dtype]]:
    """The copies that make each tensor, and its dtype.

    ranks: key, box and dtype of the parts of every rank. Of equal boxes the lowest rank's is used.
    """
    owned: dict[str, dict[Box, tuple[int, int]]] = {}
    dtype_of: dict[str, torch.dtype] = {}
    for rank, parts in enumerate(ranks):
        for number, (key, box, dtype) in enumerate(parts):
            owned.setdefault(key, {}).setdefault(box, (rank, number))
            dtype_of[key] = dtype
    copies: dict[str, list[_Copy]] = {name: [] for name in names.theirs}
    dtypes: dict[str, torch.dtype] = {}
    for move in names.moves:
        dtypes[move.theirs] = dtype_of[move.ours]
        for box, (rank, number) in owned[move.ours].items():
            part = move.our_box.intersect(box)
            if part is not None:
                target = translate(part, move.our_box, move.their_box)
                copies[move.theirs].append(_Copy(rank, number, part, target))
    return copies, dtypes


def _owner(copies: Sequence[_Copy]) -> int:
    """The rank that holds most elements of a tensor; of several, the lowest."""
    elements: dict[int, int] = {}
    for copy in copies:
        elements[copy.source] = elements.get(copy.source, 0) + copy.part.volume
    return max(sorted(elements), key=lambda rank: elements[rank])
