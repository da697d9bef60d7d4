"""Files of a folder to the ranks that need their tensors: every byte is read once, and hashed.

Each file is read by one rank, from the first byte to the last, in rounds of a few megabytes. The
rank hashes what it reads and sends each box to the ranks that want elements of it. So a whole
folder is read once, on any layout, and the bytes that are used are those that were verified.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemocascade.megatron.checkpoint.boxes import Box, whole
from nemocascade.megatron.checkpoint.errors import storage_problem
from nemocascade.megatron.checkpoint.folder import altered, file_sha256, is_weights
from nemocascade.megatron.checkpoint.index import DTYPES, Index, StoredShard
from nemocascade.megatron.checkpoint.resharding import exchange
from nemocascade.megatron.checkpoint.storage import CHUNK_BYTES, TensorShard, consecutive
from nemocascade.runtime.world import World

ROUND_BYTES = 16 * CHUNK_BYTES
"""Most bytes that all ranks together read in a round, so that what arrives at one is bounded."""
SMALLEST_CHUNK = 4 << 20
"""Bytes that a rank reads in a round at least."""

_Wanted = tuple[str, Box]
"""Key of a global tensor, and the box of it that a rank wants."""


@dataclass(frozen=True)
class _Region:
    """Consecutive bytes of a file: a box of a global tensor. key: "" for bytes of no tensor."""

    key: str
    box: Box
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.box.volume * self.dtype.itemsize

    def split(self, limit: int) -> list[_Region]:
        """Regions of at most `limit` bytes, in the order of the file."""
        boxes = self.box.split(max(1, limit // self.dtype.itemsize))
        return [_Region(self.key, box, self.dtype) for box in boxes]


@dataclass(frozen=True)
class _Stored:
    """A tensor of a file, as the index describes it."""

    key: str
    dtype: str
    shard: StoredShard

    @property
    def num_bytes(self) -> int:
        return self.shard.box.volume * DTYPES[self.dtype].itemsize


_UNREADABLE = (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError)


class _File:
    """A file that is read once, in order, and hashed.

    record: its entry in the manifest. stored: its tensors. order: numbers of `stored` in the order
    of the file; -n means n bytes of no tensor. problem: the reason why it cannot be used.
    """

    def __init__(self, path: Path, record: Mapping[str, Any], stored: Sequence[_Stored]) -> None:
        self.path, self.record, self.stored = path, record, stored
        self.order: list[int] = []
        self.problem: str | None = None
        self._hash = hashlib.sha256()
        self._position = 0
        self._file: io.FileIO | None = None

    def open(self) -> None:
        """Read the header and compare it with the index."""
        try:
            with self.path.open("rb", buffering=0) as file:
                start = self._take(file, 8)
                length = int.from_bytes(start, "little")
                size = self.record["bytes"]
                if not 0 < length <= size - 8:
                    raise ValueError(f"a header of {length} bytes in a file of {size}")
                header = json.loads(self._take(file, length))
            self.order = self._order(header, size - 8 - length)
        except _UNREADABLE as error:
            self._fail(error)

    def read(self, count: int) -> Tensor:
        """The next `count` bytes, [count] uint8; undefined once there is a problem."""
        data = torch.empty(count, dtype=torch.uint8, device="cpu")
        view = memoryview(data.numpy())
        try:
            if self._file is None:
                self._file = self.path.open("rb", buffering=0)
                self._file.seek(self._position)
            done = 0
            while done < count and self.problem is None:
                got = self._file.readinto(view[done:])
                if not got:
                    raise ValueError(f"it ends at byte {self._position + done}")
                done += got
        except (OSError, ValueError) as error:
            self.problem = storage_problem(f"{self.path.name} cannot be read: {error}", error)
        self._hash.update(view)
        self._position += count
        if self._file is not None and self._position == self.record["bytes"]:
            self._file.close()
        return data

    def close(self) -> None:
        """Compare the hash of all bytes with the manifest."""
        if self.problem is None and self._hash.hexdigest() != self.record["sha256"]:
            self.problem = altered(self.path.name)

    def _take(self, file: Any, count: int) -> bytes:
        """Read `count` bytes of the header."""
        parts: list[bytes] = []
        while count and (part := file.read(count)):
            parts.append(part)
            count -= len(part)
        data = b"".join(parts)
        self._hash.update(data)
        self._position += len(data)
        return data

    def _order(self, header: dict[str, Any], num_bytes: int) -> list[int]:
        """Raises ValueError unless the header has the tensors of the index, and its tensors fill
        the file's `num_bytes` of data."""
        header.pop("__metadata__", None)
        numbers = {stored.shard.name: n for n, stored in enumerate(self.stored)}
        if missing := sorted(numbers.keys() - header.keys()):
            raise LookupError(f"the file has no tensor {missing[0]!r}")
        order, at = [], 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            if begin != at or type(end) is not int or end < begin:
                raise ValueError(f"tensor {name!r} is at byte {begin}, not at {at}")
            at = end
            number = numbers.get(name)
            if number is None:
                order += [begin - end] if end > begin else []
                continue
            stored = self.stored[number]
            described = [stored.dtype, list(stored.shard.box.size), stored.num_bytes]
            if [entry["dtype"], list(entry["shape"]), end - begin] != described:
                raise ValueError(f"tensor {name!r} is not of the shape that the index says")
            order.append(number)
        if at != num_bytes:
            raise ValueError(f"its tensors have {at} bytes, the file has {num_bytes}")
        return order

    def _fail(self, error: Exception) -> None:
        """Say why the header cannot be used: the file was altered, or was never right."""
        name = self.stored[0].shard.name if self.stored else ""
        problem = f"{self.path.name}: tensor {name!r} cannot be read: {error}"
        self.problem = storage_problem(problem, error)
        try:
            digest = file_sha256(self.path)
        except OSError:
            return
        if digest != self.record["sha256"]:
            self.problem = altered(self.path.name)


class FolderStream:
    """The files of weights of a folder, each read by one rank; every rank makes the object.

    records: the entries of the manifest's files, by name.
    """

    def __init__(
        self, folder: Path, world: World, records: Mapping[str, Any], index: Index
    ) -> None:
        self.world = world
        self._stored: dict[str, list[_Stored]] = {n: [] for n in records if is_weights(n)}
        for key, entry in index.items():
            for shard in entry.shards:
                stored = _Stored(key, entry.dtype, shard)
                self._stored.setdefault(shard.file, []).append(stored)
        # A run's files are those of its ranks in order, so a rank reads much that it needs itself.
        self._names = sorted(self._stored)
        self._files = [
            _File(folder / name, records[name], self._stored[name])
            for name in self._names[world.rank :: world.size]
        ]

    def open(self) -> list[str]:
        """Read the headers of this rank's files; returns their problems."""
        for file in self._files:
            file.open()
        return self._problems()

    @torch.no_grad()
    def fill(self, wanted: Sequence[TensorShard], every: Sequence[Sequence[_Wanted]]) -> list[str]:
        """Fill `wanted` from the files of all ranks; every rank calls it. Returns the problems of
        this rank's files, which are read to their ends.

        every: the key and the box of each shard that each rank wants. Values are cast where the
        dtypes differ.
        """
        chunks = self._chunks()
        receivers: dict[str, list[tuple[int, Box]]] = {}
        for rank, found in enumerate(every):
            for key, box in found:
                receivers.setdefault(key, []).append((rank, box))
        mine: dict[str, list[TensorShard]] = {}
        for shard in wanted:
            mine.setdefault(shard.key, []).append(shard)
        if self.world.device.type == "cuda":
            # All ranks must take part in a group's first exchange on a GPU.
            dist.all_reduce(torch.zeros(1, device=self.world.device))
        for number in range(max(map(len, chunks), default=0)):
            now = [found[number] if number < len(found) else (0, []) for found in chunks]
            leaving = self._leaving(*now[self.world.rank], receivers)
            self._exchange(leaving, _arriving([regions for _, regions in now], mine))
        for file in self._files:
            file.close()
        return self._problems()

    def _problems(self) -> list[str]:
        return [file.problem for file in self._files if file.problem is not None]

    def _chunks(self) -> list[list[tuple[int, list[_Region]]]]:
        """Regions of a file, and its number, for every rank and round."""
        orders = self.world.all_gather_object([file.order for file in self._files])
        sources = max(1, min(self.world.size, len(self._names)))
        limit = max(SMALLEST_CHUNK, min(CHUNK_BYTES, ROUND_BYTES // sources))
        found: list[list[tuple[int, list[_Region]]]] = []
        for rank, files in enumerate(orders):
            found.append([])
            names = self._names[rank :: self.world.size]
            for number, (name, order) in enumerate(zip(names, files, strict=True)):
                regions = [p for n in order for p in _region(self._stored[name], n).split(limit)]
                buckets = consecutive([p.num_bytes for p in regions], limit)
                found[-1] += [(number, [regions[n] for n in bucket]) for bucket in buckets]
        return found

    def _leaving(
        self,
        number: int,
        regions: Sequence[_Region],
        receivers: Mapping[str, Sequence[tuple[int, Box]]],
    ) -> dict[int, list[Tensor]]:
        """Read the regions of a file; returns the parts that each rank wants, in order."""
        leaving: dict[int, list[Tensor]] = {}
        if not regions:
            return leaving
        data = self._files[number].read(sum(p.num_bytes for p in regions))
        for region, part in zip(regions, data.split([p.num_bytes for p in regions]), strict=True):
            values = _values(part, region.dtype, region.box.size)
            for rank, box in receivers.get(region.key, ()):
                common = region.box.intersect(box)
                if common is not None:
                    inner = values[common.relative_to(region.box.offset).slices()]
                    leaving.setdefault(rank, []).append(inner)
        return leaving

    def _exchange(
        self, leaving: dict[int, list[Tensor]], arriving: dict[int, list[_Place]]
    ) -> None:
        """Send the parts, one message a rank, and copy those that arrive to their places."""
        device, rank = self.world.device, self.world.rank
        for values, place in zip(leaving.pop(rank, []), arriving.pop(rank, []), strict=True):
            place.tensor.copy_(values)
        sent = [
            (torch.cat([v.reshape(-1).view(torch.uint8) for v in parts]).to(device), target)
            for target, parts in leaving.items()
        ]
        received = [
            (torch.empty(sum(p.num_bytes for p in places), dtype=torch.uint8, device=device), s)
            for s, places in arriving.items()
        ]
        exchange(sent, received)
        for message, source in received:
            places = arriving[source]
            parts = message.split([p.num_bytes for p in places])
            for place, part in zip(places, parts, strict=True):
                place.tensor.copy_(_values(part, place.dtype, tuple(place.tensor.shape)))


@dataclass(frozen=True, eq=False)
class _Place:
    """A part of a wanted tensor, and the dtype of the values that arrive for it."""

    tensor: Tensor
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.tensor.numel() * self.dtype.itemsize


def _arriving(
    regions: Sequence[Sequence[_Region]], wanted: Mapping[str, Sequence[TensorShard]]
) -> dict[int, list[_Place]]:
    """The places of what each rank sends in a round, in the order of its regions."""
    found: dict[int, list[_Place]] = {}
    for source, read in enumerate(regions):
        for region in read:
            for shard in wanted.get(region.key, ()):
                common = region.box.intersect(shard.box)
                if common is not None:
                    inner = shard.tensor.detach()[common.relative_to(shard.box.offset).slices()]
                    found.setdefault(source, []).append(_Place(inner, region.dtype))
    return found


def _region(stored: Sequence[_Stored], number: int) -> _Region:
    """The region of a number in a file's order."""
    if number < 0:
        return _Region("", whole((-number,)), torch.uint8)
    found = stored[number]
    return _Region(found.key, found.shard.box, DTYPES[found.dtype])


def _values(data: Tensor, dtype: torch.dtype, size: tuple[int, ...]) -> Tensor:
    """Bytes as values of a shape. A part of a buffer need not begin where the dtype may."""
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).view(size)
