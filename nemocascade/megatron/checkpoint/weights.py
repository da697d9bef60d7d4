"""Model descriptions in manifests, and reading of weights, for checkpoints and artifacts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from nemocascade.megatron.checkpoint.folder import agree, digest_of
from nemocascade.megatron.checkpoint.index import Index
from nemocascade.megatron.checkpoint.state import unwrap
from nemocascade.megatron.checkpoint.storage import Piece, Reader
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
    folder: object,
    world: World,
    reader: Reader,
    pieces: Sequence[Piece],
    problems: Iterable[str],
    *,
    ignored: tuple[str, ...] = (),
    cast: bool = False,
) -> None:
    """Read every piece after all ranks have checked that the folder holds exactly their tensors.

    problems: those found by this rank. ignored: prefixes of stored keys that need not be read.
    cast: stored values may have another dtype and are converted.

    Raises CheckpointError on every rank, before anything is changed, naming each tensor that is
    missing, foreign, or of another shape or dtype.
    """
    found = list(problems)
    mine = {p.key: (list(p.global_shape), p.dtype_name) for p in pieces}
    ranks = world.all_gather_object(mine)
    # A model of another shape differs in every tensor; its settings explain it better.
    if not found:
        expected = {key: what for rank in ranks for key, what in rank.items()}
        found = _key_problems(expected, reader.index, ignored, cast)
    if not found:
        found = [p for p in map(reader.problem, pieces) if p is not None]
    agree(world, folder, found)
    for piece in pieces:
        reader.read_into(piece)


def _key_problems(
    expected: dict[str, tuple[list[int], str]], index: Index, ignored: tuple[str, ...], cast: bool
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
        if entry.dtype != dtype and not cast:
            problems.append(f"{key} has dtype {entry.dtype}, this run needs {dtype}")
    return problems


def _essential(model: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in model.items() if name not in FREE_FIELDS}
