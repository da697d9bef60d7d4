"""Writes the batches of a step with a non-finite loss or gradient to files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from nemocascade.recipe import UserError
from nemocascade.runtime.world import World
from nemocascade.types import PackedBatch


class NonFiniteError(UserError, RuntimeError):
    """A loss or gradient outside masked slots is NaN or infinite."""

    exit_code = 3


def dump_batches(run_dir: Path, step: int, world: World, batches: Sequence[PackedBatch]) -> Path:
    """Write batches to RUN/nonfinite/step_N_rank_R_I.safetensors with their ids in the header.

    step: counted from 1.
    """
    folder = run_dir / "nonfinite"
    folder.mkdir(parents=True, exist_ok=True)
    for index, batch in enumerate(batches):
        tensors = {
            f.name: value.cpu().contiguous()
            for f in fields(batch)
            if isinstance(value := getattr(batch, f.name), Tensor)
        }
        header = {
            "step": str(step),
            "rank": str(world.rank),
            "cp_rank": f"{batch.cp_rank} of {batch.cp_size}",
            "num_tokens": str(batch.num_tokens),
            "document_ids": json.dumps(batch.document_ids),
        }
        name = f"step_{step:08d}_rank_{world.rank:05d}_{index:03d}.safetensors"
        save_file(tensors, folder / name, metadata=header)
    return folder
