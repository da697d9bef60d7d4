"""Storage of global tensors in safetensors files, written as shards and read by any box.

Each rank writes one file, with its share of the shards (`balance.py`). An index holds for every key
the global shape, the dtype and the position of each shard. Reading a box intersects it with the
stored shards, so any parallel layout reads the files of any other. No tensor is gathered, and files
are read by slices of at most CHUNK_BYTES.

The format is plain safetensors (https://huggingface.co/docs/safetensors), which any reader opens.
This module writes the files itself, so that it can hash the bytes as they are written and needs no
full copy of strided views of live parameters.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemocascade.megatron.checkpoint.boxes import Box, whole
from nemocascade.megatron.checkpoint.errors import (
    CheckpointError,
    FolderError,
    NonFiniteWeightsError,
    storage_problem,
)
from nemocascade.megatron.checkpoint.index import (
    DTYPE_NAMES,
    DTYPES,
    Index,
    StoredShard,
    StoredTensor,
)
from nemocascade.runtime.files import naming

CHUNK_BYTES = 64 << 20
ReplicaGroup = Literal["", "dp", "expert_dp"]
"""Ranks that hold the same box of a tensor: this one alone, all data-parallel ranks, or those of an
expert."""


def consecutive(sizes: Iterable[int], limit: int) -> list[list[int]]:
    """Consecutive numbers of `sizes`, by buckets of at most `limit` together, or one larger."""
    found: list[list[int]] = []
    total = 0
    for number, size in enumerate(sizes):
        if not found or total + size > limit:
            found.append([])
            total = 0
        found[-1].append(number)
        total += size
    return found


@dataclass(frozen=True, eq=False)
class TensorShard:
    """A box of a global tensor in this rank's memory.

    key: the global tensor's name. global_shape: its shape. box: the part of it.
    tensor: the live memory, of shape `box.size`, with any strides: saving reads it and loading
        writes it.
    replica: this rank's coordinates among those that hold the same box; the last one counts the
        ranks of `replicated_over`.
    replicated_over: ranks that hold the same box.
    """

    key: str
    global_shape: tuple[int, ...]
    box: Box
    tensor: Tensor
    replica: tuple[int, ...] = ()
    replicated_over: ReplicaGroup = ""

    @property
    def is_main(self) -> bool:
        """True on one of the ranks that hold the shard."""
        return not any(self.replica)

    @property
    def dtype_name(self) -> str:
        return DTYPE_NAMES[self.tensor.dtype]


@dataclass(frozen=True)
class WrittenFile:
    """A file of one rank: its name, hash and size, and its part of the index."""

    name: str
    sha256: str
    size: int
    index: Index


@dataclass(frozen=True, eq=False)
class Outgoing:
    """A tensor to be written, read box by box during the write.

    dtype: its safetensors name. read: the values of a box, of that dtype, in any memory.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[Box], Tensor]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def chunks(self) -> Iterator[Tensor]:
        """The tensor's values in row-major order on the CPU, at most CHUNK_BYTES at a time."""
        dtype = DTYPES[self.dtype]
        for box in whole(self.shape).split(CHUNK_BYTES // dtype.itemsize):
            # `contiguous()` keeps odd strides where a size is 1, and those have no view as bytes.
            part = torch.empty(box.size, dtype=dtype, device="cpu").copy_(self.read(box))
            if part.numel():
                yield part.reshape(-1)


def write_tensors(
    path: Path, tensors: Sequence[Outgoing], metadata: dict[str, str] | None = None
) -> tuple[str, int]:
    """Write and fsync a safetensors file; returns its sha256 and its size in bytes.

    Raises NonFiniteWeightsError naming every tensor with a value that is NaN or infinite.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    bad: list[str] = []
    with naming(path), path.open("wb") as file:

        def write(data: Any) -> None:
            digest.update(data)
            file.write(data)

        write(len(text).to_bytes(8, "little"))
        write(text)
        for tensor in tensors:
            finite = True
            for values in tensor.chunks():
                finite = finite and _is_finite(values)
                write(memoryview(values.view(torch.uint8).numpy()))
            bad += [] if finite else [tensor.name.partition("@")[0]]
        file.flush()
        os.fsync(file.fileno())
    if bad:
        raise NonFiniteWeightsError(path, [f"{n} holds NaN or infinite values" for n in bad])
    return digest.hexdigest(), 8 + len(text) + end


def _is_finite(values: Tensor) -> bool:
    """True if no value is NaN or infinite: both pass through to the smallest or the largest."""
    if not values.is_floating_point():
        return True
    low, high = torch.aminmax(values)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def write_shards(folder: Path, name: str, shards: Iterable[TensorShard]) -> WrittenFile:
    """Write `shards` to the safetensors file `folder/name` and fsync it."""
    # The widest types first, so that every tensor is aligned.
    ordered = sorted(shards, key=lambda p: -p.tensor.element_size())
    outgoing = [Outgoing(p.key, p.dtype_name, p.box.size, _reader_of(p.tensor)) for p in ordered]
    return write_boxes(folder, name, outgoing, [(p.global_shape, p.box) for p in ordered])


def write_boxes(
    folder: Path,
    name: str,
    tensors: Sequence[Outgoing],
    places: Sequence[tuple[tuple[int, ...], Box]],
) -> WrittenFile:
    """Write tensors, each a box of a global tensor that has its name, to the file `folder/name`.

    places: the global shape and the box of each.
    """
    named = [
        replace(t, name=f"{t.name}@{','.join(map(str, box.offset))}")
        for t, (_, box) in zip(tensors, places, strict=True)
    ]
    names = [t.name for t in named]
    if len(set(names)) != len(names):
        twice = sorted({n for n in names if names.count(n) > 1})
        raise ValueError(f"{name}: the same shard occurs twice: {', '.join(twice)}")
    sha256, size = write_tensors(folder / name, named)
    index: Index = {}
    for tensor, stored_name, (shape, box) in zip(tensors, names, places, strict=True):
        before = index[tensor.name].shards if tensor.name in index else ()
        shards = (*before, StoredShard(name, stored_name, box))
        index[tensor.name] = StoredTensor(shape, tensor.dtype, shards)
    return WrittenFile(name, sha256, size, index)


def _reader_of(tensor: Tensor) -> Callable[[Box], Tensor]:
    detached = tensor.detach()
    return lambda box: detached[box.slices()]


@torch.no_grad()
def copied_to_host(shards: Sequence[TensorShard], buffer: Tensor) -> list[TensorShard]:
    """The shards with copies of their values in `buffer`, which is large enough.

    buffer: [bytes] uint8 on the host, pinned if the shards are on a GPU. The host waits for the
    device once.
    """
    found: list[TensorShard] = []
    begin = 0
    # The widest types first, so that every tensor is aligned.
    for shard in sorted(shards, key=lambda p: -p.tensor.element_size()):
        source, end = shard.tensor.detach(), begin + shard.tensor.nbytes
        copy = buffer[begin:end].view(source.dtype).view(shard.box.size)
        # A device copies strided values once before it sends them.
        limit = CHUNK_BYTES // source.element_size()
        boxes = [] if source.is_contiguous() else whole(shard.box.size).split(limit)
        for index in [box.slices() for box in boxes] or [()]:
            copy[index].copy_(source[index], non_blocking=True)
        found.append(replace(shard, tensor=copy))
        begin = end
    if any(p.tensor.is_cuda for p in shards):
        torch.cuda.current_stream().synchronize()
    return found


def _parts(box: Box, stored: StoredTensor) -> Iterator[tuple[StoredShard, Box]]:
    """The stored shards that hold elements of `box`, each with the part that it holds."""
    for source in stored.shards:
        part = box.intersect(source.box)
        if part is not None:
            yield source, part


def covering_problem(index: Index, shard: TensorShard) -> str | None:
    """The reason why the stored tensor cannot fill `shard`, or None."""
    stored = index.get(shard.key)
    if stored is None:
        return f"{shard.key} is missing"
    covered = sum(part.volume for _, part in _parts(shard.box, stored))
    if covered != shard.box.volume:
        return f"{shard.key}: {covered} of the {shard.box.volume} elements at {shard.box} exist"
    return None


class Reader:
    """Reads boxes of stored tensors; files stay open (memory-mapped) until the context ends.

    error: raised for a file that cannot be read.
    """

    def __init__(
        self, folder: Path, index: Index, *, error: type[FolderError] = CheckpointError
    ) -> None:
        self.folder, self.error = folder, error
        self.index = index
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._open.clear()

    @torch.no_grad()
    def read_into(self, shard: TensorShard) -> None:
        """Fill `shard.tensor` from the stored tensor; values are cast where the dtypes differ."""
        target = shard.tensor.detach()
        for source, part in _parts(shard.box, self.index[shard.key]):
            for box in part.split(CHUNK_BYTES // 8):
                values = self._read(source, box.relative_to(source.box.offset))
                target[box.relative_to(shard.box.offset).slices()].copy_(values)

    def _read(self, source: StoredShard, box: Box) -> Tensor:
        """Values of a box. Raises `error` if the file's header is broken or does not have it."""
        found: Tensor
        try:
            file = self._open.get(source.file)
            if file is None:
                path = str(self.folder / source.file)
                file = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
                self._open[source.file] = file
            if not box.size:
                found = file.get_tensor(source.name)
            else:
                found = file.get_slice(source.name)[box.slices()]
        except (SafetensorError, OSError, IndexError) as error:
            problem = f"{source.file}: tensor {source.name!r} cannot be read: {error}"
            raise self.error(self.folder, [storage_problem(problem, error)]) from error
        if found.shape != torch.Size(box.size):
            problem = (
                f"{source.file}: tensor {source.name!r} is smaller than the index says: "
                f"{list(found.shape)} of {list(box.size)}"
            )
            raise self.error(self.folder, [problem])
        return found
