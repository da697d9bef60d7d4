"""Hugging Face model folders: what lies in one, and writing one, tensor by tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemocascade.megatron.checkpoint.folder import flush, write_durably
from nemocascade.megatron.checkpoint.storage import (
    DTYPES,
    Index,
    Outgoing,
    StoredPiece,
    StoredTensor,
    write_tensors,
)
from nemocascade.megatron.convert.names import whole
from nemocascade.recipe import UserError

CONFIG = "config.json"
GENERATION = "generation_config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
SHARD_BYTES = 5 << 30


class ConversionError(UserError, RuntimeError):
    """A folder that cannot be converted; the message lists every reason."""

    def __init__(self, where: object, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        lines = "\n".join(f"  {i}. {p}" for i, p in enumerate(self.problems, 1))
        super().__init__(f"{where}: {len(self.problems)} problem(s):\n{lines}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ConversionError if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConversionError(path.parent, [f"{path.name} is missing"]) from None
    except ValueError as error:
        raise ConversionError(path.parent, [f"{path.name} is no JSON: {error}"]) from None
    if not isinstance(value, dict):
        raise ConversionError(path.parent, [f"{path.name} holds no JSON object"])
    return value


def read_index(folder: Path) -> Index:
    """Every tensor of the folder's safetensors files, from their headers; no value is read.

    Raises ConversionError listing every missing or broken file, every tensor that stands twice or
    not where `model.safetensors.index.json` says, and every dtype that cannot be read.
    """
    listed: dict[str, str] | None = None
    if (folder / WEIGHTS_INDEX).exists():
        listed = dict(read_json(folder / WEIGHTS_INDEX).get("weight_map", {}))
        files = sorted(set(listed.values()))
    elif (folder / WEIGHTS).exists():
        files = [WEIGHTS]
    else:
        raise ConversionError(folder, [f"neither {WEIGHTS} nor {WEIGHTS_INDEX} is there"])
    index: Index = {}
    problems: list[str] = []
    for file in files:
        if Path(file).name != file:
            problems.append(f"{WEIGHTS_INDEX} names {file!r}, which is no file of this folder")
            continue
        try:
            header = _read_header(folder / file)
        except (OSError, ValueError) as error:
            problems.append(f"{file} cannot be read: {error}")
            continue
        for name, entry in header.items():
            shape = tuple(entry["shape"])
            if name in index:
                problems.append(f"{name} stands in {index[name].pieces[0].file} and in {file}")
            index[name] = StoredTensor(
                shape, entry["dtype"], (StoredPiece(file, name, whole(shape)),)
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
    """The header of a safetensors file, its size checked against the file's."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if length > size - 8:
            raise ValueError(f"its header of {length} bytes is longer than the file")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + end != size:
        raise ValueError(f"it has {size} bytes, its header says {8 + length + end}")
    return header


def _listing_problems(listed: dict[str, str], index: Index) -> list[str]:
    problems = []
    for name in sorted(listed.keys() | index.keys()):
        if name not in index:
            problems.append(f"{name} is missing: {listed[name]} does not hold it")
        elif name not in listed:
            problems.append(f"{name} in {index[name].pieces[0].file} stands not in {WEIGHTS_INDEX}")
        elif index[name].pieces[0].file != listed[name]:
            problems.append(
                f"{name} stands in {index[name].pieces[0].file}, the index says {listed[name]}"
            )
    return problems


def write_weights(folder: Path, tensors: Sequence[Outgoing], shard_bytes: int) -> list[str]:
    """Write the tensors to files of at most `shard_bytes` each, and their index; the files' names.

    A tensor larger than that has a file of its own. One file has no index, as is usual.
    """
    shards: list[list[Outgoing]] = [[]]
    for tensor in tensors:
        held = sum(t.num_bytes for t in shards[-1])
        if shards[-1] and held + tensor.num_bytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    names = [WEIGHTS]
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
        names.append(WEIGHTS_INDEX)
    return names


def json_bytes(value: dict[str, Any]) -> bytes:
    """As Hugging Face writes its JSON files."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def publish(temporary: Path, final: Path) -> None:
    """Give a finished folder its name; `final` must not exist."""
    flush(temporary)
    os.rename(temporary, final)
    flush(final.parent)


def main_dtype(index: Index) -> str:
    """The dtype that most bytes of the folder have."""
    sizes: dict[str, int] = {}
    for entry in index.values():
        count = whole(entry.shape).volume * DTYPES[entry.dtype].itemsize
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + count
    return max(sorted(sizes), key=lambda name: sizes[name])
