"""States of the random generators of a rank: torch's, CUDA's, numpy's and Python's."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemocascade.megatron.checkpoint.boxes import whole
from nemocascade.megatron.checkpoint.index import Index
from nemocascade.megatron.checkpoint.storage import ReplicaGroup, TensorShard
from nemocascade.runtime.world import World

PREFIX = "rng/"
FIRST = f"{PREFIX}{0:05d}/torch"
"""Key of the state that other layouts seed their generators from."""


def rng_shards(world: World) -> list[TensorShard]:
    """The states of this rank's generators, as tensors of bytes."""
    name, words, *rest = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": _bytes([name, np.asarray(words).tolist(), *rest]),
        "python": _bytes(random.getstate()),
    }
    if world.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(world.device)
    return [
        TensorShard(_key(world, name), tuple(state.shape), whole(state.shape), state)
        for name, state in states.items()
    ]


def stored_rng(world: World, index: Index, *, same_layout: bool) -> list[TensorShard]:
    """Empty memory for the stored states that a resume needs on this rank."""
    keys = [_key(world, name) for name in ("torch", "numpy", "python")]
    if world.device.type == "cuda":
        keys.append(_key(world, "cuda"))
    # On another layout all ranks need the same state, and get it from one another.
    over: ReplicaGroup = "" if same_layout else "dp"
    found = []
    for key in keys if same_layout else [FIRST]:
        if key in index:
            shape = index[key].shape
            state = torch.empty(shape, dtype=torch.uint8, device="cpu")
            found.append(TensorShard(key, shape, whole(shape), state, replicated_over=over))
    return found


def restore_rng(world: World, states: Sequence[TensorShard]) -> None:
    """Set this rank's generators to the states that `rng_shards` saved and `stored_rng` read."""
    found = {shard.key: shard.tensor for shard in states}
    torch.set_rng_state(found[_key(world, "torch")])
    np.random.set_state(_from_bytes(found[_key(world, "numpy")]))
    version, words, gauss = _from_bytes(found[_key(world, "python")])
    random.setstate((version, tuple(words), gauss))
    if (cuda := found.get(_key(world, "cuda"))) is not None:
        torch.cuda.set_rng_state(cuda, world.device)


def reseed_rng(world: World, states: Sequence[TensorShard]) -> None:
    """Seed this rank's generators from rank 0's saved state and this rank's number.

    Used on another layout than the saved one, whose ranks have no saved state of their own.
    """
    [state] = [shard.tensor for shard in states]
    digest = hashlib.sha256(state.numpy().tobytes() + world.rank.to_bytes(8, "little")).digest()
    seed = int.from_bytes(digest[:7], "little")
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def missing_rng(world: World, index: Index, *, same_layout: bool) -> list[str]:
    """Generator states that a resume needs and that are missing from `index`."""
    needed = [FIRST]
    if same_layout:
        needed = [_key(world, name) for name in ("torch", "numpy", "python")]
    return [f"{key} is missing" for key in needed if key not in index]


def _key(world: World, name: str) -> str:
    return f"{PREFIX}{world.rank:05d}/{name}"


def _bytes(state: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)


def _from_bytes(data: Tensor) -> Any:
    return json.loads(data.numpy().tobytes())
