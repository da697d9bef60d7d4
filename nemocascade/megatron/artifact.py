"""Artifacts: the weights that a stage passes to the next one, with their provenance.

    artifact/manifest.json               recipe, data, parent, scores, model shape, hashes
    artifact/index.json                  file and position of each box of each weight
    artifact/rank_00000.safetensors ...  weights and persistent buffers, in the run's precision
    artifact/tokenizer.model             or tokenizer.json, copied in
    artifact/chat_template.jinja         the chat template of the training text

The storage is that of checkpoints, without optimizer, generators and data position. Any parallel
layout reads it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemocascade.megatron.adapter import base_parts, merged_shards, reset_adapters
from nemocascade.megatron.checkpoint.errors import CheckpointError, storage_problem
from nemocascade.megatron.checkpoint.folder import (
    hash_problems,
    listing_problems,
    read_folder,
    read_manifest,
)
from nemocascade.megatron.checkpoint.state import MODEL, model_shards
from nemocascade.megatron.checkpoint.weights import describe_model, fill, model_problems
from nemocascade.megatron.checkpoint.writing import write_folder
from nemocascade.megatron.cpu import cuda_names
from nemocascade.megatron.optimizer import Optimizer
from nemocascade.recipe import ModelConfig
from nemocascade.runtime.stored_records import record_of
from nemocascade.runtime.world import World
from nemocascade.types import Artifact

KIND = "artifact"
ORIGIN = "huggingface.json"
TEMPLATE = "chat_template.jinja"
# Files beside a tokenizer that are copied with it from artifact to artifact. ORIGIN: the settings
# of a converted folder.
TOKENIZER_COMPANIONS = (
    "tokenizer_config.json",
    TEMPLATE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    ORIGIN,
)


@dataclasses.dataclass(frozen=True)
class Provenance:
    """The training that made an artifact. The fields are those of `Artifact`; their values are JSON
    only."""

    stage: str
    step: int
    recipe: dict[str, Any]
    data: dict[str, Any]
    scores: dict[str, float]
    parent: str | None = None
    parent_digest: str | None = None
    context_length: int = 0
    changes: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Settings that changed when the run resumed: by resume, `step` and `changes`, which has the
    old and the new value by name."""


def write_artifact(
    folder: Path,
    world: World,
    chunks: Sequence[Any],
    provenance: Provenance,
    *,
    tokenizer: Path | None = None,
    template: str | None = None,
) -> Artifact:
    """Write the weights of `chunks`, merged with their adapters, and their provenance to `folder`;
    every rank calls it.

    An existing folder is replaced. tokenizer: a file, copied in with its companions. template:
    jinja source of the chat template that rendered the training text, written beside it.

    Raises CheckpointError on every rank if it cannot be written.
    """
    documents = _tokenizer_files(tokenizer) if world.is_main and tokenizer is not None else {}
    if world.is_main and template is not None:
        documents[TEMPLATE] = template.encode()
    fields = {
        **describe_model(world, chunks),
        **vars(provenance),
        "template": None if template is None else hashlib.sha256(template.encode()).hexdigest(),
        "tokenizer": None if tokenizer is None else _tokenizer_name(tokenizer),
    }
    shards = merged_shards(chunks, world)
    write_folder(folder, world, KIND, shards, documents, fields)
    manifest = read_manifest(folder, KIND) if world.is_main else None
    return artifact_of_manifest(folder, world.broadcast_object(manifest))


def read_artifact(folder: Path) -> Artifact:
    """Read the artifact of `folder`, without a process group; loading checks the weights' hashes.

    Raises CheckpointError naming every file that is missing, truncated, altered or foreign.
    """
    manifest = read_manifest(folder, KIND)
    small = [name for name in manifest["files"] if not name.endswith(".safetensors")]
    problems = listing_problems(folder, manifest) + hash_problems(folder, manifest, small)
    if problems:
        raise CheckpointError(folder, problems)
    return artifact_of_manifest(folder, manifest)


def read_artifact_together(folder: Path, world: World) -> Artifact:
    """`read_artifact` for all ranks; the main rank alone reads. Every rank calls it.

    Raises CheckpointError on every rank.
    """
    artifact: Artifact | None = None
    problems: list[str] = []
    if world.is_main:
        try:
            artifact = read_artifact(folder)
        except CheckpointError as error:
            problems = error.problems
        except OSError as error:
            problems = [storage_problem(str(error), error)]
    found: tuple[Artifact | None, list[str]] = world.broadcast_object((artifact, problems))
    if found[0] is None:
        raise CheckpointError(folder, found[1])
    return found[0]


def verify_artifact(folder: Path) -> Artifact:
    """Read the artifact of `folder` and check the hash of every file, weights too.

    Raises CheckpointError as `read_artifact`.
    """
    artifact, manifest = read_artifact(folder), read_manifest(folder, KIND)
    if problems := hash_problems(folder, manifest, manifest["files"]):
        raise CheckpointError(folder, problems)
    return artifact


def artifact_model(artifact: Artifact) -> ModelConfig:
    """The model shape of an artifact. Raises CheckpointError if it has fields unknown here, or is
    no model."""
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    problems = [
        f"model.{name} is a setting this program does not know"
        for name in sorted(artifact.model.keys() - known)
    ]
    try:
        shape = record_of(ModelConfig, {n: v for n, v in artifact.model.items() if n in known})
    except ValueError as error:
        raise CheckpointError(artifact.folder, [*problems, str(error)]) from None
    if problems := problems or shape.problems():
        raise CheckpointError(artifact.folder, problems)
    return shape


def load_artifact_weights(
    artifact: Artifact, world: World, chunks: Sequence[Any], optimizer: Optimizer | None = None
) -> None:
    """Fill the weights of `chunks` in place, on any layout; every rank calls it.

    Weights of another precision are converted, and adapters start anew: B is zero. optimizer: the
    one that steps these chunks, if it exists already; its fp32 copies are updated too.

    Raises CheckpointError on every rank, naming every part that is missing, altered or foreign, and
    every difference between the models. Only altered weights are found after the first of them
    have replaced the model's: then it must not be used.
    """
    manifest, index = read_folder(artifact.folder, world, KIND)
    problems = model_problems(manifest, world, chunks, cast=True)
    if manifest["digest"] != artifact.digest:
        problems.append("it is another artifact than the one that was opened: its digest changed")
    shards = model_shards(base_parts(chunks, world))
    fill(artifact.folder, world, manifest["files"], index, shards, problems, cast=(MODEL,))
    reset_adapters(chunks)
    if optimizer is not None:
        with cuda_names():
            optimizer.inner.reload_model_params()


def artifact_of_manifest(folder: Path, manifest: dict[str, Any]) -> Artifact:
    """The entries of a manifest that was read and checked."""
    fields = [f for f in dataclasses.fields(Artifact) if f.name != "folder"]
    # Artifacts of older versions lack the fields that have a default.
    later = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    return Artifact(folder=folder, **{f.name: {**later, **manifest}[f.name] for f in fields})


def _tokenizer_name(path: Path) -> str:
    """The file name that a tokenizer gets in an artifact."""
    return f"tokenizer{path.suffix}"


def _tokenizer_files(path: Path) -> dict[str, bytes]:
    """A tokenizer's file and its companions, by the names that an artifact gives them."""
    files = {_tokenizer_name(path): path.read_bytes()}
    # A tokenizer.json may have been made from a tokenizer.model in the same folder.
    names = (*TOKENIZER_COMPANIONS, *(["tokenizer.model"] if path.suffix == ".json" else []))
    for name in names:
        companion = path.with_name(name)
        if companion.is_file():
            files[name] = companion.read_bytes()
    return files
