"""Checkpoints of a run: N steps, a resume and N more steps are bit-identical to 2N steps.

    ROOT/latest                 name of the newest complete checkpoint
    ROOT/step_00000050/         manifest.json, index.json, extra.json, rank_00000.safetensors, ...

Megatron-Core's own strategies write torch's distributed format, whose `.metadata` and `common.pt`
are pickles. So only its sharded state dicts are used: they say which box of which global tensor a
rank holds (`state.py`). The boxes are written to safetensors files with a JSON index
(`storage.py`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemocascade.megatron.adam import MOMENTS
from nemocascade.megatron.checkpoint.background import Writer
from nemocascade.megatron.checkpoint.errors import CheckpointError, storage_problem
from nemocascade.megatron.checkpoint.folder import (
    MANIFEST,
    TEMPORARY,
    flush,
    read_folder,
    write_durably,
)
from nemocascade.megatron.checkpoint.rng import (
    PREFIX,
    missing_rng,
    reseed_rng,
    restore_rng,
    rng_shards,
    stored_rng,
)
from nemocascade.megatron.checkpoint.state import (
    OPTIMIZER,
    model_parts,
    model_shards,
    optimizer_shards,
    optimizer_steps,
    set_optimizer_steps,
)
from nemocascade.megatron.checkpoint.storage import TensorShard
from nemocascade.megatron.checkpoint.weights import describe_model, fill, model_problems
from nemocascade.megatron.checkpoint.writing import open_folder, write_now
from nemocascade.megatron.optimizer import Optimizer
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.world import World

KIND = "checkpoint"
EXTRA = "extra.json"
POINTER = "latest"


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def save_checkpoint(
    root: Path,
    step: int,
    world: World,
    chunks: Sequence[Any],
    optimizer: Optimizer,
    extra: dict[str, Any],
    *,
    writer: Writer | None = None,
    then: Callable[[], None] = lambda: None,
) -> Path:
    """Write model, optimizer, random generators and `extra` of all ranks; every rank calls it.

    root: RUN/checkpoints. step: optimizer steps done. chunks: CascadeModels, bare or DDP-wrapped.
    extra: JSON of rank 0, for example the data position; it must survive JSON unchanged. writer:
    may write while training continues, see `Writer.finish`; None waits. then: called on rank 0 once
    the checkpoint is complete. Returns the folder; `latest` names it when it is complete.

    Raises CheckpointError on every rank if the checkpoint cannot be written; older ones stay.
    """
    final = root / checkpoint_name(step)
    problems = [*_extra_problems(extra), *_pointed_problems(root, final, world)]
    steps: set[int] = set().union(*world.all_gather_object(optimizer_steps(optimizer)))
    if len(steps) != 1:
        problems.append(f"parameters disagree on the optimizer's steps: {steps}")
    parts = model_parts(chunks, world)
    shards = [*model_shards(parts), *optimizer_shards(parts, optimizer), *rng_shards(world)]
    documents = {} if problems else {EXTRA: json.dumps(extra, indent=1, allow_nan=False).encode()}
    fields = {"step": step, "optimizer_step": max(steps), **describe_model(world, chunks)}

    def complete() -> None:
        _point_to(root, final.name)
        then()

    task = open_folder(
        final, world, KIND, shards, documents, fields, problems=problems, then=complete
    )
    if writer is None:
        write_now(task, world)
    else:
        writer.write(task)
    return final


def load_checkpoint(
    folder: Path, world: World, chunks: Sequence[Any], optimizer: Optimizer | None
) -> dict[str, Any]:
    """Fill model, optimizer and random generators in place; returns `extra`. Every rank calls it.

    Any layout reads any other's checkpoint. On the layout that wrote it, all is restored bit for
    bit. On another, the random generators are reseeded from the stored state, which is logged.
    optimizer: None reads only the weights and does not touch the generators.

    Raises CheckpointError on every rank, naming every part that is missing, altered or foreign.
    Only altered weights are found after the first of them have replaced the model's: then neither
    the model nor the optimizer may be used.
    """
    manifest, index = read_folder(folder, world, KIND)
    problems = model_problems(manifest, world, chunks, cast=False)
    parts = model_parts(chunks, world)
    shards = model_shards(parts)
    same_layout = manifest["layout"] == describe_model(world, chunks)["layout"]
    states: list[TensorShard] = []
    if optimizer is not None:
        shards += optimizer_shards(parts, optimizer)
        problems += missing_rng(world, index, same_layout=same_layout)
        states = stored_rng(world, index, same_layout=same_layout)
    ignored = (PREFIX,) if optimizer is not None else (PREFIX, OPTIMIZER)
    # The recipe says whether a resumed run may change the precision of the moments.
    moments = tuple(f"{OPTIMIZER}{name}/" for name in MOMENTS)
    every = [*shards, *states]
    fill(folder, world, manifest["files"], index, every, problems, ignored=ignored, cast=moments)
    if optimizer is not None:
        set_optimizer_steps(optimizer, manifest["optimizer_step"])
        if same_layout:
            restore_rng(world, states)
        else:
            reseed_rng(world, states)
            LOGGER.info(
                "%s was written by layout %s; random generators are seeded anew from it",
                folder.name,
                manifest["layout"],
            )
    return dict(world.broadcast_object(read_extra(folder) if world.is_main else None))


def read_extra(folder: Path) -> dict[str, Any]:
    """The `extra` of a checkpoint; needs no process group. Raises CheckpointError if unreadable."""
    try:
        return dict(json.loads((folder / EXTRA).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        problem = f"{EXTRA} cannot be read: {error}"
        raise CheckpointError(folder, [storage_problem(problem, error)]) from error


def complete_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints of `root`, oldest first."""
    return sorted(p.parent for p in root.glob(f"step_????????/{MANIFEST}"))


def latest_checkpoint(root: Path) -> Path | None:
    """The checkpoint that the pointer names; without a pointer, the newest complete one, or None.

    Raises CheckpointError if the pointer names a checkpoint that does not exist.
    """
    complete = complete_checkpoints(root)
    try:
        name = (root / POINTER).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return complete[-1] if complete else None
    except (OSError, ValueError) as error:
        problem = f"{POINTER} cannot be read: {error}"
        raise CheckpointError(root, [storage_problem(problem, error)]) from error
    if root / name not in complete:
        have = ", ".join(p.name for p in complete) or "none"
        raise CheckpointError(
            root,
            [
                f"{POINTER} names {name!r}, which is not complete here (complete: {have}): write "
                f"one of these names into {root / POINTER}, or move the folder away to start anew"
            ],
        )
    return root / name


def _point_to(root: Path, name: str) -> None:
    temporary = root / f"{TEMPORARY}{POINTER}"
    write_durably(temporary, f"{name}\n".encode())
    os.replace(temporary, root / POINTER)
    flush(root)


def _pointed_problems(root: Path, final: Path, world: World) -> list[str]:
    """A problem if `final` is the checkpoint that a resume would read: a kill could lose it."""
    if not world.is_main:
        return []
    try:
        newest = latest_checkpoint(root)
    except CheckpointError as error:
        return error.problems
    if newest == final:
        return [f"{final.name} is the newest checkpoint already: a step is saved once"]
    return []


def _extra_problems(extra: dict[str, Any]) -> list[str]:
    try:
        same = json.loads(json.dumps(extra, allow_nan=False)) == extra
    except (TypeError, ValueError) as error:
        return [f"extra is not JSON: {error}"]
    return [] if same else ["extra changes when written as JSON: use lists and string keys"]
