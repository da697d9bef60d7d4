"""Adapters on disk: the factors that a stage trained, and their base artifact.

    adapter/manifest.json               as an artifact's, and `lora`; the parent is its base
    adapter/index.json                  file and position of each box of each factor
    adapter/rank_00000.safetensors ...  the factors, in the run's precision
    adapter/huggingface.json            settings of the folder that the base came from

The factors of a weight NAME.weight, or NAME of experts, are NAME.lora_a and NAME.lora_b; B is
stored by the same parts as the weight. Any parallel layout reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemocascade.megatron.adapter import adapter_parts
from nemocascade.megatron.artifact import ORIGIN, Provenance, artifact_of_manifest
from nemocascade.megatron.checkpoint.errors import CheckpointError
from nemocascade.megatron.checkpoint.folder import (
    agree,
    hash_problems,
    kind_of,
    listing_problems,
    read_folder,
    read_index_json,
    read_manifest,
)
from nemocascade.megatron.checkpoint.index import Index, index_from_json
from nemocascade.megatron.checkpoint.state import MODEL, model_shards, unwrap
from nemocascade.megatron.checkpoint.weights import describe_model, fill, model_problems
from nemocascade.megatron.checkpoint.writing import write_folder
from nemocascade.megatron.cpu import cuda_names
from nemocascade.megatron.layers.lora import FACTOR_A, FACTOR_B
from nemocascade.megatron.optimizer import Optimizer
from nemocascade.recipe import LoraConfig
from nemocascade.recipe.rules import number_problems
from nemocascade.runtime.stored_records import record_of
from nemocascade.runtime.world import World
from nemocascade.types import Artifact

KIND = "adapter"


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter folder. artifact: its manifest; the parent is its base. lora: its settings."""

    artifact: Artifact
    lora: LoraConfig

    @property
    def folder(self) -> Path:
        return self.artifact.folder

    def base_problems(self, base: Artifact) -> list[str]:
        """The reason why `base` is not what the adapter was trained on; empty if it is."""
        if base.digest == self.artifact.parent_digest:
            return []
        return [
            f"its base is the artifact {_short(self.artifact.parent_digest)} "
            f"({self.artifact.parent}), and {base.folder} is {_short(base.digest)}: on other "
            "weights it means another change; name the artifact that it was trained on"
        ]


def is_adapter(folder: Path) -> bool:
    """True for an adapter's folder; it may be damaged."""
    return kind_of(folder) == KIND


def write_adapter(
    folder: Path,
    world: World,
    chunks: Sequence[Any],
    provenance: Provenance,
    *,
    origin: Path | None = None,
) -> str:
    """Write the adapters of `chunks` to `folder`, and return the digest; every rank calls it.

    provenance: its parent is the base. origin: the base's `huggingface.json`, if there is one. An
    existing folder is replaced.

    Raises CheckpointError on every rank if it cannot be written.
    """
    documents = {}
    if world.is_main and origin is not None and origin.is_file():
        documents[ORIGIN] = origin.read_bytes()
    fields = {
        **describe_model(world, chunks),
        **vars(provenance),
        "lora": dataclasses.asdict(_settings(chunks)),
        "tokenizer": None,
    }
    shards = model_shards(adapter_parts(chunks, world))
    return write_folder(folder, world, KIND, shards, documents, fields)


def read_adapter(folder: Path) -> StoredAdapter:
    """Read the adapter of `folder`, without a process group; loading checks the factors' hashes.

    Raises CheckpointError naming every file that is missing, truncated, altered or foreign.
    """
    manifest = read_manifest(folder, KIND)
    if problems := listing_problems(folder, manifest):
        raise CheckpointError(folder, problems)
    try:
        lora = record_of(LoraConfig, manifest["lora"])
        if problems := number_problems(lora, "lora"):
            raise ValueError(problems[0])
    except ValueError as error:
        raise CheckpointError(folder, [f"its lora settings are damaged: {error}"]) from None
    return StoredAdapter(artifact_of_manifest(folder, manifest), lora)


def open_adapter(folder: Path) -> tuple[StoredAdapter, Index]:
    """The adapter and its index, after a check of every file's hash. Raises CheckpointError."""
    adapter, manifest = read_adapter(folder), read_manifest(folder, KIND)
    if problems := hash_problems(folder, manifest, manifest["files"]):
        raise CheckpointError(folder, problems)
    return adapter, index_from_json(read_index_json(folder, manifest), manifest["files"])


def load_adapter(
    adapter: StoredAdapter,
    base: Artifact,
    world: World,
    chunks: Sequence[Any],
    optimizer: Optimizer | None = None,
) -> None:
    """Fill the factors of `chunks`, whose weights are those of `base`; every rank calls it.

    optimizer: the one that steps these chunks; its fp32 copies are updated too.

    Raises CheckpointError on every rank, naming another base, other settings, and every part that
    is missing, altered or foreign. After altered factors the model must not be used.
    """
    manifest, index = read_folder(adapter.folder, world, KIND)
    here = _settings(chunks)
    problems = adapter.base_problems(base) + model_problems(manifest, world, chunks, cast=True)
    problems += [
        f"lora.{name} is {getattr(here, name)} in this run and {value} in the adapter: set "
        f"--lora.{name} as it was"
        for name, value in (("rank", adapter.lora.rank), ("alpha", adapter.lora.alpha))
        if getattr(here, name) != value
    ]
    agree(world, adapter.folder, problems)
    shards = model_shards(adapter_parts(chunks, world))
    fill(adapter.folder, world, manifest["files"], index, shards, (), cast=(MODEL,))
    if optimizer is not None:
        with cuda_names():
            optimizer.inner.reload_model_params()


def factors_of(index: Index, base: Index) -> dict[str, tuple[str, str]]:
    """Keys of A and B of every adapted weight, by the key of the weight in the base's index."""
    found = {}
    for key in index:
        name, is_b, part = key.partition(f".{FACTOR_B}")
        if is_b:
            weight = f"{name}.weight{part}"
            found[weight if weight in base else f"{name}{part}"] = (f"{name}.{FACTOR_A}", key)
    return found


def index_problems(index: Index, base: Index) -> list[str]:
    """Factors without a weight of their shape in the base."""
    problems = []
    for weight, (a, b) in factors_of(index, base).items():
        entry = base.get(weight)
        if entry is None or a not in index:
            problems.append(f"{b} has no weight or no A: {weight}")
            continue
        *lead, outputs, inputs = entry.shape
        rank = index[a].shape[-2]
        if (index[a].shape, index[b].shape) != ((*lead, rank, inputs), (*lead, outputs, rank)):
            problems.append(
                f"{b} {list(index[b].shape)} and A {list(index[a].shape)} do not fit the weight "
                f"{list(entry.shape)}"
            )
    return problems


def _settings(chunks: Sequence[Any]) -> LoraConfig:
    settings: LoraConfig = unwrap(chunks[0]).config.lora
    return settings


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:12]
