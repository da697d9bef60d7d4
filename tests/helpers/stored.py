"""Full tensors of a checkpoint, read in one process, and the differences of two checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from nemocascade.megatron.checkpoint.boxes import Box
from nemocascade.megatron.checkpoint.index import DTYPE_NAMES, index_from_json
from nemocascade.megatron.checkpoint.storage import Reader, TensorShard

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by key."""
    index = index_from_json(
        json.loads((folder / "index.json").read_bytes()), {p.name for p in folder.iterdir()}
    )
    tensors = {}
    with Reader(folder, index) as reader:
        for key, stored in index.items():
            whole = Box((0,) * len(stored.shape), stored.shape)
            tensors[key] = torch.zeros(stored.shape, dtype=DTYPES[stored.dtype])
            reader.read_into(TensorShard(key, stored.shape, whole, tensors[key]))
    return tensors


def unequal(a: Path, b: Path, *, ignore: tuple[str, ...] = ()) -> list[str]:
    """Keys whose tensors are not the same bits in both, or are in one only."""
    left, right = read_tensors(a), read_tensors(b)
    keys = sorted(key for key in left.keys() | right.keys() if not key.startswith(ignore or "\0"))
    return [
        key
        for key in keys
        if key not in left or key not in right or not torch.equal(left[key], right[key])
    ]


def distance(a: Path, b: Path, prefix: str) -> float:
    """`|a - b| / |b|` over all tensors whose key begins with `prefix`."""
    left, right = read_tensors(a), read_tensors(b)
    keys = [key for key in right if key.startswith(prefix)]
    assert keys, f"no tensor begins with {prefix}"
    gap = sum(float((left[k].double() - right[k].double()).square().sum()) for k in keys)
    return math.sqrt(gap / sum(float(right[k].double().square().sum()) for k in keys))
