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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemocascade.megatron.checkpoint.errors import CheckpointError
from nemocascade.megatron.checkpoint.folder import (
    MANIFEST,
    TEMPORARY,
    agree,
    flush,
    read_folder,
    write_durably,
    write_folder,
)
from nemocascade.megatron.checkpoint.rng import (
    PREFIX,
    missing_rng,
    reseed_rng,
    restore_rng,
    rng_pieces,
)
from nemocascade.megatron.checkpoint.state import (
    OPTIMIZER,
    model_parts,
    model_pieces,
    optimizer_pieces,
    optimizer_steps,
    set_optimizer_steps,
)
from nemocascade.megatron.checkpoint.storage import Reader
from nemocascade.megatron.checkpoint.weights import describe_model, fill, model_problems
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
) -> Path:
    """Write model, optimizer, random generators and `extra` of all ranks; every rank calls it.

    root: RUN/checkpoints. step: optimizer steps done. chunks: CascadeModels, bare or DDP-wrapped.
    extra: JSON of rank 0, for example the data position; it must survive JSON unchanged.
    Returns the folder; it is then complete, and `latest` names it.

    Raises CheckpointError on every rank if the checkpoint cannot be written; older ones stay.
    """
    final = root / checkpoint_name(step)
    steps: set[int] = set().union(*world.all_gather_object(optimizer_steps(optimizer)))
    agree(world, final, [*_extra_problems(extra), *_pointed_problems(root, final, world)])
    if len(steps) != 1:
        raise CheckpointError(final, [f"parameters disagree on the optimizer's steps: {steps}"])
    parts = model_parts(chunks, world)
    pieces = [*model_pieces(parts), *optimizer_pieces(parts, optimizer), *rng_pieces(world)]
    documents = {EXTRA: json.dumps(extra, indent=1, allow_nan=False).encode()}
    fields = {"step": step, "optimizer_step": steps.pop(), **describe_model(world, chunks)}
    write_folder(final, world, KIND, pieces, documents, fields)
    problems = []
    if world.is_main:
        try:
            _point_to(root, final.name)
        except OSError as error:
            problems.append(f"rank 0 cannot move the pointer {root / POINTER}: {error}")
    agree(world, final, problems)
    return final


def load_checkpoint(
    folder: Path, world: World, chunks: Sequence[Any], optimizer: Optimizer | None
) -> dict[str, Any]:
    """Fill model, optimizer and random generators in place; returns `extra`. Every rank calls it.

    Any layout reads any other's checkpoint. On the layout that wrote it, all is restored bit for
    bit. On another, the random generators are reseeded from the stored state, which is logged.
    optimizer: None reads only the weights and does not touch the generators.

    Raises CheckpointError on every rank, before anything is changed, naming every part that is
    missing, altered or foreign.
    """
    manifest, index = read_folder(folder, world, KIND)
    problems = model_problems(manifest, world, chunks, cast=False)
    parts = model_parts(chunks, world)
    pieces = model_pieces(parts)
    same_layout = manifest["layout"] == describe_model(world, chunks)["layout"]
    if optimizer is not None:
        pieces += optimizer_pieces(parts, optimizer)
        problems += missing_rng(world, index, same_layout=same_layout)
    ignored = (PREFIX,) if optimizer is not None else (PREFIX, OPTIMIZER)
    with Reader(folder, index) as reader:
        fill(folder, world, reader, pieces, problems, ignored=ignored)
        if optimizer is not None:
            set_optimizer_steps(optimizer, manifest["optimizer_step"])
            if same_layout:
                restore_rng(world, reader)
            else:
                reseed_rng(world, reader)
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
        raise CheckpointError(folder, [f"{EXTRA} cannot be read: {error}"]) from error


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
        raise CheckpointError(root, [f"{POINTER} cannot be read: {error}"]) from error
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
        return [f"extra is no JSON: {error}"]
    return [] if same else ["extra changes when written as JSON: use lists and string keys"]
