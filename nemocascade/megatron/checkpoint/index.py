"""Index of the global tensors in a folder: shape, dtype, and the position of each stored shard."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemocascade.megatron.checkpoint.boxes import Box, first_overlap, whole

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class StoredShard:
    """Position of a stored shard: tensor `name` of `file` is `box` of the global tensor."""

    file: str
    name: str
    box: Box


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor of a checkpoint. dtype: its safetensors name."""

    shape: tuple[int, ...]
    dtype: str
    shards: tuple[StoredShard, ...]


Index = dict[str, StoredTensor]


def merge_indices(parts: Sequence[Index]) -> tuple[Index, list[str]]:
    """Merge all ranks' parts; returns the index and every reason why it is not a tiling."""
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    shards: dict[str, list[StoredShard]] = {}
    problems = []
    for part in parts:
        for key, entry in part.items():
            seen = shapes.setdefault(key, (entry.shape, entry.dtype))
            if seen != (entry.shape, entry.dtype):
                problems.append(
                    f"{key}: ranks disagree on its shape and dtype: {list(seen[0])} {seen[1]} "
                    f"and {list(entry.shape)} {entry.dtype}"
                )
            shards.setdefault(key, []).extend(entry.shards)
    index = {
        key: StoredTensor(*shapes[key], tuple(sorted(found, key=lambda p: p.box.offset)))
        for key, found in sorted(shards.items())
    }
    for key, entry in index.items():
        problems += _tiling_problems(key, entry)
    return index, problems


def _tiling_problems(key: str, entry: StoredTensor) -> list[str]:
    everything = whole(entry.shape)
    boxes = [p.box for p in entry.shards]
    outside = [b for b in boxes if b.intersect(everything) != b]
    if outside:
        return [f"{key}: a shard at {outside[0]} is outside of its shape {list(entry.shape)}"]
    overlap = first_overlap(boxes)
    if overlap is not None:
        return [f"{key}: two shards overlap: {overlap[0]} and {overlap[1]}"]
    covered = sum(b.volume for b in boxes)
    if covered != everything.volume:
        return [f"{key}: its shards have {covered} of {everything.volume} elements"]
    return []


def index_to_json(index: Index) -> dict[str, Any]:
    """The index as JSON. Tensor names follow from keys and offsets; file names are listed once."""
    files = sorted({p.file for entry in index.values() for p in entry.shards})
    number = {file: i for i, file in enumerate(files)}
    tensors = {
        key: {
            "shape": list(entry.shape),
            "dtype": entry.dtype,
            "pieces": [
                {
                    "file": number[p.file],
                    "name": p.name,
                    "offset": list(p.box.offset),
                    "size": list(p.box.size),
                }
                for p in entry.shards
            ],
        }
        for key, entry in index.items()
    }
    return {"files": files, "tensors": tensors}


def index_from_json(value: Any, known: Container[str]) -> Index:
    """Inverse of `index_to_json`.

    Raises ValueError if the value is not an index, names a file that is not `known`, or has a
    tensor whose shards do not tile it.
    """
    try:
        files = value["files"]
        index = {
            key: StoredTensor(
                _sizes(entry["shape"]),
                str(entry["dtype"]),
                tuple(
                    StoredShard(files[p["file"]], str(p["name"]), _box(p)) for p in entry["pieces"]
                ),
            )
            for key, entry in value["tensors"].items()
        }
        foreign = [file for file in files if file not in known]
        problems = [p for key, entry in index.items() for p in _tiling_problems(key, entry)]
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"it is not an index of tensors: {error!r}") from error
    problems += [
        f"{entry.dtype!r} is not a dtype" for entry in index.values() if entry.dtype not in DTYPES
    ]
    problems += [f"it names {file!r}, which is not a file of this folder" for file in foreign]
    if problems:
        raise ValueError("; ".join(problems))
    return index


def _box(shard: dict[str, Any]) -> Box:
    return Box(_sizes(shard["offset"]), _sizes(shard["size"]))


def _sizes(value: list[Any]) -> tuple[int, ...]:
    if wrong := [n for n in value if type(n) is not int or not 0 <= n < 2**63]:
        raise ValueError(f"{str(wrong[0])[:80]!r} is not a size of a tensor")
    return tuple(value)
