"""Atomically written folders with a manifest that holds every file's hash.

A folder is written under a temporary name, `.tmp-<name>`. When every rank's file is on disk, rank 0
writes `manifest.json`, flushes the folder and renames it. A kill at any moment leaves either the
old state or the new one. It may also leave a `.tmp-` folder, which `clean_leftovers` removes.

manifest.json:
    format, version, kind     "nemocascade", 1, "checkpoint", "artifact"
                              or "adapter"
    fields of the kind        step, model shape, layout, provenance
    files                     name -> sha256 and bytes, of every other file
    digest                    sha256 of all of the above: the manifest cannot be altered either
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemocascade.megatron.checkpoint.errors import CheckpointError, storage_problem
from nemocascade.megatron.checkpoint.index import Index, index_from_json
from nemocascade.recipe.paths import is_file_name
from nemocascade.runtime.files import naming
from nemocascade.runtime.world import World

FORMAT = "nemocascade"
VERSION = 1
MANIFEST = "manifest.json"
INDEX = "index.json"
TEMPORARY = ".tmp-"
MODEL_FIELDS: dict[str, Any] = {
    "model": dict,
    "model_sha256": str,
    "precision": str,
    "layout": dict,
}
ARTIFACT_FIELDS: dict[str, Any] = {
    "stage": str,
    "step": int,
    "recipe": dict,
    "data": dict,
    "scores": dict,
    "parent": str | None,
    "parent_digest": str | None,
    "tokenizer": str | None,
    **MODEL_FIELDS,
}
FIELDS: dict[str, dict[str, Any]] = {
    "checkpoint": {"step": int, "optimizer_step": int, **MODEL_FIELDS},
    "artifact": ARTIFACT_FIELDS,
    "adapter": {**ARTIFACT_FIELDS, "lora": dict},
}
"""Type of each field of a kind's manifest."""


def flush(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and fsync it."""
    with naming(path), path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_weights(name: str) -> bool:
    """True for a file of weights; the other files of a folder are small."""
    return name.endswith(".safetensors")


def altered(name: str) -> str:
    """The problem of a file that has other bytes than were written."""
    return f"{name} was altered: its sha256 does not match the manifest"


def canonical_json(value: Any) -> bytes:
    """The canonical byte string of a JSON value, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def clean_leftovers(parent: Path) -> list[str]:
    """Remove the remains of interrupted saves and deletions in `parent`; returns their names."""
    names = sorted(p.name for p in parent.glob(f"{TEMPORARY}*"))
    for name in names:
        remove(parent / name)
    return names


def remove(path: Path) -> None:
    """Delete a file or folder. It is renamed first, so that no partial folder keeps its name."""
    if not path.name.startswith(TEMPORARY):
        aside = path.with_name(f"{TEMPORARY}delete-{path.name}")
        if aside.exists():
            shutil.rmtree(aside)
        path.rename(aside)
        path = aside
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def fresh_folder(final: Path) -> Path:
    """Create an empty folder under the temporary name of `final`."""
    temporary = final.with_name(TEMPORARY + final.name)
    if temporary.exists():
        remove(temporary)
    temporary.mkdir(parents=True)
    return temporary


def agree(
    world: World,
    where: object,
    problems: Iterable[str],
) -> None:
    """Raise CheckpointError on every rank if any rank has a problem; each is named once."""
    ranks = world.all_gather_object(list(problems))
    found = list(dict.fromkeys(p for mine in ranks for p in mine))
    if found:
        raise CheckpointError(where, found)


def kind_of(folder: Path) -> str | None:
    """The kind that the manifest of `folder` says, unchecked; None without a readable manifest."""
    try:
        found = json.loads((folder / MANIFEST).read_bytes()).get("kind")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def _remedy(folder: Path, kind: str) -> str:
    """Name the folder to use instead of one without a manifest: often it is that of the run."""
    inner = folder / kind
    if (inner / MANIFEST).is_file():
        return f"; name {inner}"
    return f"; name the folder {kind} of a run" if kind in ("artifact", "adapter") else ""


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """Read the manifest of `folder` and check its digest.

    Raises CheckpointError if it is missing, altered, of another kind or of an unknown version.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        claimed = manifest.pop("digest")
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            folder,
            [f"{MANIFEST} is missing: this is not a complete {kind}{_remedy(folder, kind)}"],
        ) from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        problem = f"{MANIFEST} cannot be read: {error!r}"
        raise CheckpointError(folder, [storage_problem(problem, error)]) from error
    found = (manifest.get("format"), manifest.get("version"))
    if found != (FORMAT, VERSION):
        raise CheckpointError(
            folder,
            [
                f"{MANIFEST} has format {found[0]!r} version {found[1]!r}, this program reads "
                f"{FORMAT!r} version {VERSION}"
            ],
        )
    problems = []
    if manifest.get("kind") != kind:
        remedy = ""
        if (manifest.get("kind"), kind) == ("adapter", "artifact"):
            remedy = ": merge it with its base (nemocascade merge ADAPTER ARTIFACT)"
        problems.append(f"{MANIFEST} is of kind {manifest.get('kind')!r}, not {kind!r}{remedy}")
    try:
        altered = digest_of(manifest) != claimed
    # No program writes NaN, nor levels without number.
    except (ValueError, RecursionError):
        altered = True
    if altered:
        problems.append(f"{MANIFEST} was altered: its digest does not match its content")
    problems = problems or _malformed(manifest, kind)
    if problems:
        raise CheckpointError(folder, problems)
    return {**manifest, "digest": claimed}


def _malformed(manifest: dict[str, Any], kind: str) -> list[str]:
    """Fields that are missing or of another type, and entries that describe no file of the
    folder."""
    problems = [
        f"{MANIFEST} has no {name!r}"
        if name not in manifest
        else f"{MANIFEST} has {name}({manifest[name]!r}), which is of another type"
        for name, types in FIELDS[kind].items()
        if not isinstance(manifest.get(name, ...), types)
    ]
    files = manifest.get("files")
    if not isinstance(files, dict):
        return [*problems, f"{MANIFEST} lists no files"]
    if manifest.get("tokenizer") not in (None, *files):
        problems.append(f"{MANIFEST} names a tokenizer that is not a file of the folder")
    return problems + [
        f"{MANIFEST} has a wrong entry for the file {name!r}"
        for name, record in files.items()
        if not is_file_name(name)
        or not isinstance(record, dict)
        or not isinstance(record.get("sha256"), str)
        or not isinstance(record.get("bytes"), int)
    ]


def read_index_json(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Read and check the index of a folder; returns it as JSON values.

    Raises CheckpointError if it is malformed or names a file that the manifest does not list.
    """
    try:
        value: dict[str, Any] = json.loads((folder / INDEX).read_bytes())
        index_from_json(value, manifest["files"])
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(folder, [storage_problem(f"{INDEX}: {error}", error)]) from error
    return value


def listing_problems(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Files that are missing, of another size or not in the manifest. Reads no content."""
    files = manifest["files"]
    problems = []
    for name, record in sorted(files.items()):
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != record["bytes"]:
            problems.append(
                f"{name} has {path.stat().st_size} bytes, the manifest says {record['bytes']}"
            )
    # Network file systems keep deleted files under names with a dot.
    present = {p.name for p in folder.iterdir() if not p.name.startswith(".")}
    problems += [
        f"{name} is foreign: the manifest does not know it"
        for name in sorted(present - set(files) - {MANIFEST})
    ]
    return problems


def hash_problems(folder: Path, manifest: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Files of `names` whose hash differs from the manifest's."""
    problems = []
    for name in names:
        path, record = folder / name, manifest["files"][name]
        # A missing or truncated file is already named by listing_problems.
        whole = path.is_file() and path.stat().st_size == record["bytes"]
        if whole and file_sha256(path) != record["sha256"]:
            problems.append(altered(name))
    return problems


def read_folder(folder: Path, world: World, kind: str) -> tuple[dict[str, Any], Index]:
    """Verify a folder but for its weights, which `weights.fill` verifies while it reads them, and
    return its manifest and index on every rank; ranks share the hashing.

    Raises CheckpointError on every rank, naming all parts that are missing, altered or foreign;
    altered weights too.
    """
    manifest: dict[str, Any] = {}
    problems: list[str] = []
    if world.is_main:
        try:
            manifest = read_manifest(folder, kind)
            problems = listing_problems(folder, manifest)
        except CheckpointError as error:
            problems = error.problems
    manifest = world.broadcast_object(manifest)
    if manifest:
        by_size = sorted(manifest["files"], key=lambda n: (-manifest["files"][n]["bytes"], n))
        small = [name for name in by_size if not is_weights(name)]
        problems += hash_problems(folder, manifest, small[world.rank :: world.size])
        if any(world.all_gather_object(bool(problems))):
            weights = [name for name in by_size if is_weights(name)]
            problems += hash_problems(folder, manifest, weights[world.rank :: world.size])
    agree(world, folder, problems)
    index = None
    if world.is_main:
        try:
            index = read_index_json(folder, manifest)
        except CheckpointError as error:
            problems = error.problems
    agree(world, folder, problems)
    return manifest, index_from_json(world.broadcast_object(index), manifest["files"])
