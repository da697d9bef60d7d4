"""Writing of folders by all ranks: each writes its share, and rank 0 completes the folder.

Only `open_folder` and `write_folder` exchange messages of the process group. A rank's share is
written, and the folder completed, by `FolderTask`, in any thread.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemocascade.megatron.checkpoint.balance import Holding, holding, written_shards
from nemocascade.megatron.checkpoint.errors import (
    CheckpointError,
    NonFiniteWeightsError,
    storage_problem,
)
from nemocascade.megatron.checkpoint.folder import (
    FORMAT,
    INDEX,
    MANIFEST,
    TEMPORARY,
    VERSION,
    canonical_json,
    digest_of,
    flush,
    fresh_folder,
    remove,
    write_durably,
)
from nemocascade.megatron.checkpoint.index import index_to_json, merge_indices
from nemocascade.megatron.checkpoint.storage import TensorShard, WrittenFile, write_shards
from nemocascade.runtime.world import World


@dataclass(frozen=True)
class WriteOutcome:
    """The end of a write: the manifest's digest, or the problems. nonfinite: they are of weights
    or optimizer state that are NaN or infinite."""

    digest: str = ""
    problems: list[str] = field(default_factory=list)
    nonfinite: bool = False

    def check(self, where: object) -> None:
        """Raise CheckpointError, or NonFiniteWeightsError, if there are problems."""
        if self.problems:
            raise (NonFiniteWeightsError if self.nonfinite else CheckpointError)(
                where, self.problems
            )


Report = WrittenFile | WriteOutcome
"""A rank's file, or why it could not be written."""


def _nothing() -> None:
    pass


@dataclass(frozen=True, eq=False)
class FolderTask:
    """The work of one rank on a folder. Its methods exchange nothing with other ranks.

    shards: those that this rank writes. documents, fields: see `write_folder`. then: called on
    rank 0 once the folder is complete.
    """

    final: Path
    kind: str
    rank: int
    shards: Sequence[TensorShard]
    documents: dict[str, bytes]
    fields: dict[str, Any]
    then: Callable[[], None] = _nothing

    @property
    def temporary(self) -> Path:
        return self.final.with_name(TEMPORARY + self.final.name)

    @property
    def file(self) -> Path:
        """The file of this rank, while it is written."""
        return self.temporary / f"rank_{self.rank:05d}.safetensors"

    def write(self) -> Report:
        """Write, hash and fsync this rank's file."""
        try:
            return write_shards(self.temporary, self.file.name, self.shards)
        except OSError as error:
            problem = f"rank {self.rank} cannot write its file: {error}"
            return WriteOutcome(problems=[storage_problem(problem, error)])
        except NonFiniteWeightsError as error:
            return WriteOutcome(problems=error.problems, nonfinite=True)

    def finish(self, reports: Sequence[Report]) -> WriteOutcome:
        """Complete the folder on rank 0, or remove what was written if a rank has a problem."""
        failed = [r for r in reports if isinstance(r, WriteOutcome)]
        if found := [f for f in failed if f.nonfinite] or failed:
            problems = list(dict.fromkeys(p for f in found for p in f.problems))
            outcome = WriteOutcome(problems=problems, nonfinite=found[0].nonfinite)
        else:
            outcome = self._complete([r for r in reports if isinstance(r, WrittenFile)])
        if outcome.problems:
            shutil.rmtree(self.temporary, ignore_errors=True)
        return outcome

    def _complete(self, written: Sequence[WrittenFile]) -> WriteOutcome:
        try:
            digest, problems = finish_folder(
                self.temporary, self.final, self.kind, written, self.documents, self.fields
            )
            if not problems:
                self.then()
        except OSError as error:
            digest = ""
            problems = [storage_problem(f"rank 0 cannot complete it: {error}", error)]
        return WriteOutcome(digest, problems)


def open_folder(
    final: Path,
    world: World,
    kind: str,
    shards: Sequence[TensorShard],
    documents: dict[str, bytes],
    fields: dict[str, Any],
    *,
    problems: Iterable[str] = (),
    then: Callable[[], None] = _nothing,
) -> FolderTask:
    """Create the temporary folder and distribute the shards over the ranks; every rank calls it.

    problems: found by this rank before. The others: see `write_folder` and `FolderTask`.

    Raises CheckpointError on every rank if any has a problem.
    """
    temporary = final.with_name(TEMPORARY + final.name)
    found = list(problems)
    if world.is_main and not found:
        try:
            fresh_folder(final)
        except OSError as error:
            found.append(storage_problem(f"rank 0 cannot make {temporary}: {error}", error))
    ranks: list[tuple[list[str], Holding]] = world.all_gather_object(
        (found, holding(world, shards))
    )
    if every := list(dict.fromkeys(p for mine, _ in ranks for p in mine)):
        if world.is_main and not found:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(final, every)
    mine = written_shards(world.rank, [holding for _, holding in ranks], shards)
    return FolderTask(final, kind, world.rank, mine, documents, fields, then)


def write_folder(
    final: Path,
    world: World,
    kind: str,
    shards: Sequence[TensorShard],
    documents: dict[str, bytes],
    fields: dict[str, Any],
) -> str:
    """Write a checkpoint or artifact to the folder `final`; returns the manifest's digest.

    Every rank calls it. shards: those that this rank holds; each is written once, by one of the
    ranks that hold it. documents: small files, and fields: entries of the manifest; both from
    rank 0. An existing folder is replaced.

    Raises CheckpointError on every rank, and leaves `final` as it was, if a rank cannot write or
    the shards of all ranks do not tile their tensors; NonFiniteWeightsError if one is not finite.
    """
    return write_now(open_folder(final, world, kind, shards, documents, fields), world)


def write_now(task: FolderTask, world: World) -> str:
    """Write an opened folder; see `write_folder`. Every rank calls it."""
    reports: list[Report] = world.all_gather_object(task.write())
    outcome: WriteOutcome = world.broadcast_object(task.finish(reports) if world.is_main else None)
    outcome.check(task.final)
    return outcome.digest


def finish_folder(
    temporary: Path,
    final: Path,
    kind: str,
    written: Sequence[WrittenFile],
    documents: dict[str, bytes],
    fields: dict[str, Any],
) -> tuple[str, list[str]]:
    """Complete a folder on rank 0 when all files are written: index, documents, manifest, rename.

    written: the description of each file. Returns the digest and the problems; one of the two is
    empty.
    """
    index, problems = merge_indices([w.index for w in written])
    if problems:
        return "", problems
    files = {w.name: {"sha256": w.sha256, "bytes": w.size} for w in written}
    for name, data in {**documents, INDEX: canonical_json(index_to_json(index))}.items():
        write_durably(temporary / name, data)
        files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    manifest = {"format": FORMAT, "version": VERSION, "kind": kind, **fields, "files": files}
    manifest["digest"] = digest_of(manifest)
    text = json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False)
    write_durably(temporary / MANIFEST, text.encode())
    flush(temporary)
    if final.exists():
        aside = final.with_name(f"{TEMPORARY}old-{final.name}")
        if aside.exists():
            remove(aside)
        final.rename(aside)
        temporary.rename(final)
        remove(aside)
    else:
        temporary.rename(final)
    flush(final.parent)
    return str(manifest["digest"]), []
