"""Model descriptions in manifests, and reading of weights, for checkpoints and artifacts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemocascade.megatron.checkpoint.folder import agree, digest_of
from nemocascade.megatron.checkpoint.index import Index
from nemocascade.megatron.checkpoint.state import unwrap
from nemocascade.megatron.checkpoint.storage import (
    CHUNK_BYTES,
    ReplicaGroup,
    TensorShard,
    consecutive,
    covering_problem,
)
from nemocascade.megatron.checkpoint.streaming import FolderStream
from nemocascade.recipe import ModelConfig, ParallelConfig
from nemocascade.runtime.world import World

PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# Fields of ModelConfig that change neither a tensor nor what the model computes.
FREE_FIELDS = frozenset({"init_std", "mamba_chunk"})


def describe_model(world: World, chunks: Sequence[Any]) -> dict[str, Any]:
    """Manifest fields: model shape and its hash, precision, and parallel layout."""
    config = unwrap(chunks[0]).config
    precision = PRECISIONS[config.params_dtype]
    return describe_shape(config.shape, precision, world.parallel, world.size)


def describe_shape(
    shape: ModelConfig, precision: str, parallel: ParallelConfig, world_size: int
) -> dict[str, Any]:
    """Manifest fields of `describe_model` for a model that was not built."""
    model = dataclasses.asdict(shape)
    return {
        "model": model,
        "model_sha256": digest_of(_essential(model)),
        "precision": precision,
        "layout": {"world": world_size, **dataclasses.asdict(parallel)},
        "torch": torch.__version__,
    }


def model_problems(
    manifest: dict[str, Any], world: World, chunks: Sequence[Any], *, cast: bool
) -> list[str]:
    """Differences between the stored model and `chunks`. cast: another precision is allowed."""
    here = describe_model(world, chunks)
    problems = []
    if here["model_sha256"] != manifest["model_sha256"]:
        stored, mine = _essential(manifest["model"]), _essential(here["model"])
        problems += [
            f"model.{name} is {mine.get(name)!r} in this run and {stored.get(name)!r} in the folder"
            for name in sorted(stored.keys() | mine.keys())
            if stored.get(name) != mine.get(name)
        ]
    if here["precision"] != manifest["precision"] and not cast:
        problems.append(
            f"engine.precision is {here['precision']} in this run and {manifest['precision']} in "
            f"the folder: set --engine.precision {manifest['precision']}"
        )
    return problems


def fill(
    folder: Path,
    world: World,
    files: Mapping[str, Any],
    index: Index,
    shards: Sequence[TensorShard],
    problems: Iterable[str],
    *,
    ignored: tuple[str, ...] = (),
    cast: tuple[str, ...] = (),
) -> None:
    """Fill every shard after all ranks have checked that the folder holds exactly their tensors.

    files: the manifest's. problems: those found by this rank. ignored: prefixes of stored keys that
    need not be read. cast: prefixes of keys whose stored values may have another dtype and are
    converted.

    Every byte of the folder's weights is read once, by one rank, and hashed. Of ranks that hold the
    same weights, each gets a share of them from the ranks that read, and the rest from one another.

    Raises CheckpointError on every rank, before anything is changed, naming each tensor that is
    missing, foreign, or of another shape or dtype, and each file without its tensors. Also naming
    each file that was altered, but then the shards have values that must not be used.
    """
    found = list(problems)
    groups = {"dp": world.groups.dp_cp, "expert_dp": world.groups.expt_dp}
    kinds: list[ReplicaGroup] = ["", "dp", "expert_dp"]
    shared = [
        _share([p for p in shards if p.replicated_over == kind], groups.get(kind)) for kind in kinds
    ]
    wanted = [shard for held in shared for shard in held.wanted]
    mine = {p.key: (list(p.global_shape), p.dtype_name) for p in shards}
    ranks = world.all_gather_object((mine, [(p.key, p.box) for p in wanted]))
    # A model of another shape differs in every tensor; its settings explain it better.
    if not found:
        expected = {key: what for keys, _ in ranks for key, what in keys.items()}
        found = _key_problems(expected, index, ignored, cast)
    if not found:
        found = [p for shard in shards if (p := covering_problem(index, shard)) is not None]
    stream = FolderStream(folder, world, files, index)
    agree(world, folder, found or stream.open())
    agree(world, folder, stream.fill(wanted, [boxes for _, boxes in ranks]))
    for held in shared:
        held.exchange(world.device)


@dataclass(frozen=True)
class _Shared:
    """Shards that all ranks of `group` hold, and the numbers of those that each of them gets from
    the ranks that read. group: None for shards of this rank alone."""

    shards: Sequence[TensorShard]
    group: Any
    shares: Sequence[Sequence[int]]

    @property
    def wanted(self) -> list[TensorShard]:
        """This rank's share."""
        share = self.shares[0 if self.group is None else self.group.rank()]
        return [self.shards[number] for number in share]

    def exchange(self, device: torch.device) -> None:
        """Give the shares to one another; every rank of the group calls it."""
        if self.group is None:
            return
        for rank, share in enumerate(self.shares):
            source = dist.get_global_rank(self.group, rank)
            tensors = [self.shards[n].tensor.detach() for n in share]
            for bucket in consecutive([t.nbytes for t in tensors], CHUNK_BYTES):
                _broadcast([tensors[n] for n in bucket], source, self.group, device)


def _share(shards: Iterable[TensorShard], group: Any) -> _Shared:
    """Divide shards among the ranks of `group`; ranks whose shards differ want all of theirs."""
    shards = sorted(shards, key=lambda p: (p.key, p.box.offset))
    size = 1 if group is None else group.size()
    if size > 1:
        digests: list[Any] = [None] * size
        mine = digest_of([[p.key, list(p.box.offset), list(p.box.size)] for p in shards])
        dist.all_gather_object(digests, mine, group=group)
        size = size if len(set(digests)) == 1 else 1
    shares = _shares([p.box.volume for p in shards], size)
    return _Shared(shards, group if size > 1 else None, shares)


def _shares(volumes: Sequence[int], size: int) -> list[list[int]]:
    """Numbers of the shards of each of `size` ranks: consecutive, and about equally large."""
    shares: list[list[int]] = [[] for _ in range(size)]
    total, done = max(1, sum(volumes)), 0
    for number, volume in enumerate(volumes):
        shares[min(size - 1, (2 * done + volume) * size // (2 * total))].append(number)
        done += volume
    return shares


def _broadcast(tensors: Sequence[Tensor], source: int, group: Any, device: torch.device) -> None:
    """Broadcast the tensors of rank `source` to the other ranks of the group, as one message."""
    parts = [t.to(device).contiguous().view(-1).view(torch.uint8) for t in tensors if t.numel()]
    if not parts:
        return
    message = torch.cat(parts)
    dist.broadcast(message, src=source, group=group)
    if dist.get_rank() == source:
        return
    received = message.split([p.numel() for p in parts])
    for tensor, data in zip((t for t in tensors if t.numel()), received, strict=True):
        # A part of the message need not begin where the dtype may.
        values = data.clone().view(tensor.dtype).view(tensor.shape)
        tensor.copy_(values)


def _key_problems(
    expected: dict[str, tuple[list[int], str]],
    index: Index,
    ignored: tuple[str, ...],
    cast: tuple[str, ...],
) -> list[str]:
    problems = [f"{key} is missing" for key in sorted(expected.keys() - index.keys())]
    stored = {key for key in index if not key.startswith(ignored)}
    problems += [
        f"{key} is foreign: this model and optimizer have no such tensor"
        for key in sorted(stored - expected.keys())
    ]
    for key in sorted(stored & expected.keys()):
        (shape, dtype), entry = expected[key], index[key]
        if list(entry.shape) != shape:
            problems.append(f"{key} has shape {list(entry.shape)}, this run needs {shape}")
        if entry.dtype != dtype and not key.startswith(cast):
            problems.append(f"{key} has dtype {entry.dtype}, this run needs {dtype}")
    return problems


def _essential(model: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in model.items() if name not in FREE_FIELDS}
