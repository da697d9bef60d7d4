"""An adapter merged into its base: a full artifact, without a process group or a model.

`W + alpha/rank B A` is computed in float32 and rounded once to the weight's dtype, as in the
artifact that the stage wrote. All other tensors are copied.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from nemocascade.megatron.adapter_artifact import (
    StoredAdapter,
    factors_of,
    index_problems,
    open_adapter,
)
from nemocascade.megatron.artifact import KIND, artifact_model
from nemocascade.megatron.checkpoint.boxes import Box
from nemocascade.megatron.checkpoint.folder import INDEX, read_manifest
from nemocascade.megatron.checkpoint.index import DTYPES
from nemocascade.megatron.checkpoint.state import MODEL
from nemocascade.megatron.checkpoint.storage import Outgoing, Reader, TensorShard
from nemocascade.megatron.checkpoint.weights import describe_shape
from nemocascade.megatron.convert.conversion import open_artifact, store_artifact
from nemocascade.megatron.convert.folder import ConversionError
from nemocascade.recipe import ParallelConfig
from nemocascade.types import Artifact


def merge_adapter(source: Path, target: Path, base: Path | None = None) -> tuple[int, int]:
    """Write the artifact `target` from the adapter `source`; returns its bytes and the number of
    merged tensors.

    base: folder of the adapter's base artifact; None is the one that it names.

    Raises ConversionError if `target` exists or `base` is another artifact, and CheckpointError if
    a folder is damaged.
    """
    adapter, index = open_adapter(source)
    folder = base or Path(adapter.artifact.parent or "")
    if base is None and not folder.is_dir():
        raise ConversionError(
            source, [f"its base, {folder}, is not a folder here: name it with --base FOLDER"]
        )
    on, stored = open_artifact(folder)
    problems = adapter.base_problems(on) or index_problems(index, stored)
    if target.exists():
        problems.append(f"{target} exists already: name a folder that does not")
    if problems:
        raise ConversionError(source, problems)
    factors = factors_of(index, stored)
    with Reader(folder, stored) as weights, Reader(source, index) as low:
        tensors = [
            _outgoing(key, weights, low, factors.get(key), adapter.lora.scale) for key in stored
        ]
        size = store_artifact(target, tensors, _documents(folder), _fields(adapter, on))
    return size, len(factors)


def read_box(reader: Reader, key: str, box: Box) -> Tensor:
    """A box of a stored tensor, in its dtype."""
    entry = reader.index[key]
    values = torch.empty(box.size, dtype=DTYPES[entry.dtype])
    reader.read_into(TensorShard(key, entry.shape, box, values))
    return values


def _outgoing(
    key: str, weights: Reader, low: Reader, factors: tuple[str, str] | None, scale: float
) -> Outgoing:
    entry = weights.index[key]

    def read(box: Box) -> Tensor:
        weight = read_box(weights, key, box)
        if factors is None:
            return weight
        (*lead, first, left), (*ones, rows, columns) = box.offset, box.size
        rank = low.index[factors[0]].shape[-2]
        a, b = (
            read_box(low, name, Box((*lead, *offset), (*ones, *size))).float()
            for name, offset, size in zip(
                factors,
                ((0, left), (first, 0)),
                ((rank, columns), (rows, rank)),
                strict=True,
            )
        )
        return (weight + b @ a * scale).to(weight.dtype)

    return Outgoing(key.removeprefix(MODEL), entry.dtype, entry.shape, read)


def _documents(folder: Path) -> dict[str, bytes]:
    """The small files of the base: tokenizer, template and their companions."""
    names = read_manifest(folder, KIND)["files"]
    return {
        name: (folder / name).read_bytes()
        for name in names
        if not name.endswith(".safetensors") and name != INDEX
    }


def _fields(adapter: StoredAdapter, base: Artifact) -> dict[str, object]:
    """The manifest's entries: what trained the adapter, on this base."""
    made = adapter.artifact
    return {
        **describe_shape(artifact_model(base), base.precision, ParallelConfig(), 1),
        "stage": made.stage,
        "step": made.step,
        "recipe": made.recipe,
        "data": made.data,
        "scores": made.scores,
        "parent": str(base.folder),
        "parent_digest": base.digest,
        "tokenizer": base.tokenizer,
        "template": base.template,
        "context_length": max(made.context_length, base.context_length),
    }
