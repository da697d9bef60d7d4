"""Reading and writing of Hugging Face model folders, tensor by tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nemocascade.megatron.checkpoint.boxes import whole
from nemocascade.megatron.checkpoint.errors import FolderError
from nemocascade.megatron.checkpoint.folder import write_durably
from nemocascade.megatron.checkpoint.index import DTYPES, Index, StoredShard, StoredTensor
from nemocascade.megatron.checkpoint.storage import Outgoing, write_tensors

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
SHARD_BYTES = 5 << 30


class ConversionError(FolderError):
    """A folder that cannot be converted."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ConversionError if the file holds none."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConversionError(path.parent, [f"{path.name} is missing"]) from None
    except (ValueError, RecursionError) as error:
        raise ConversionError(path.parent, [f"{path.name} is not JSON: {error}"]) from None
    if not isinstance(value, dict):
        raise ConversionError(path.parent, [f"{path.name} holds no JSON object"])
    return value


def read_index(folder: Path) -> Index:
    """Every tensor of the folder's safetensors files, from their headers; no value is read.

    Raises ConversionError listing every missing or broken file, every tensor that occurs twice or
    is not where `model.safetensors.index.json` says, and every dtype that cannot be read.
    """
    listed: dict[str, str] | None = None
    if (folder / WEIGHTS_INDEX).exists():
        listed = read_json(folder / WEIGHTS_INDEX).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(f, str) for f in listed.values()):
            raise ConversionError(folder, [f"{WEIGHTS_INDEX} has no weight_map of files by name"])
        files = sorted(set(listed.values()))
    elif (folder / WEIGHTS).exists():
        files = [WEIGHTS]
    else:
        raise ConversionError(folder, [f"neither {WEIGHTS} nor {WEIGHTS_INDEX} is there"])
    index: Index = {}
    problems: list[str] = []
    for file in files:
        if Path(file).name != file:
            problems.append(f"{WEIGHTS_INDEX} names {file!r}, which is not a file of this folder")
            continue
        try:
            header = _read_header(folder / file)
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"{file} cannot be read: {error}")
            continue
        for name, entry in header.items():
            shape = tuple(entry["shape"])
            if name in index:
                problems.append(f"{name} is in {index[name].shards[0].file} and in {file}")
            index[name] = StoredTensor(
                shape, entry["dtype"], (StoredShard(file, name, whole(shape)),)
            )
    if listed is not None:
        problems += _listing_problems(listed, index)
    problems += [
        f"{name} has dtype {entry.dtype}, which cannot be read: use F32, BF16 or F16"
        for name, entry in sorted(index.items())
        if entry.dtype not in ("F32", "BF16", "F16")
    ]
    if problems:
        raise ConversionError(folder, problems)
    return index


def _read_header(path: Path) -> dict[str, Any]:
    """Read the header of a safetensors file and check its size against the file's."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if length > size - 8:
            raise ValueError(f"its header of {length} bytes is longer than the file")
        header: dict[str, Any] = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    header.pop("__metadata__", None)
    if wrong := [name for name, entry in header.items() if not _is_entry(entry)]:
        raise ValueError(f"its header describes no tensor as {wrong[0][:80]!r}")
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + end != size:
        raise ValueError(f"it has {size} bytes, its header says {8 + length + end}")
    return header


def _is_entry(entry: Any) -> bool:
    """True for a tensor whose bytes are those of its shape."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            sized = all(type(n) is int and n >= 0 for n in shape) and 0 <= begin <= end
            known = dtype in DTYPES
            return sized and (not known or math.prod(shape) * DTYPES[dtype].itemsize == end - begin)
    return False


def _listing_problems(listed: dict[str, str], index: Index) -> list[str]:
    problems = []
    for name in sorted(listed.keys() | index.keys()):
        if name not in index:
            problems.append(f"{name} is missing: {listed[name]} does not hold it")
        elif name not in listed:
            problems.append(f"{name} in {index[name].shards[0].file} is not in {WEIGHTS_INDEX}")
        elif index[name].shards[0].file != listed[name]:
            problems.append(
                f"{name} is in {index[name].shards[0].file}, the index says {listed[name]}"
            )
    return problems


def split_shards(tensors: Iterable[Outgoing], shard_bytes: int) -> list[list[Outgoing]]:
    """Split the tensors into files, in order; one larger than `shard_bytes` gets its own file."""
    shards: list[list[Outgoing]] = [[]]
    for tensor in tensors:
        size = sum(t.num_bytes for t in shards[-1])
        if shards[-1] and size + tensor.num_bytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    return shards


def write_weights(folder: Path, tensors: Sequence[Outgoing], shard_bytes: int) -> None:
    """Write the tensors to files of `shard_bytes`, and an index if there are several files."""
    shards, names = split_shards(tensors, shard_bytes), [WEIGHTS]
    if len(shards) > 1:
        names = [
            f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
        ]
    for name, shard in zip(names, shards, strict=True):
        write_tensors(folder / name, shard, {"format": "pt"})
    if len(shards) > 1:
        placed = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
        total = sum(t.num_bytes for t in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
        write_durably(folder / WEIGHTS_INDEX, json_bytes(index))


def json_bytes(value: dict[str, Any]) -> bytes:
    """A JSON file in the form that Hugging Face writes."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def main_dtype(index: Index) -> str:
    """The dtype of most of the folder's bytes."""
    sizes: dict[str, int] = {}
    for entry in index.values():
        count = whole(entry.shape).volume * DTYPES[entry.dtype].itemsize
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + count
    return max(sorted(sizes), key=lambda name: sizes[name])
