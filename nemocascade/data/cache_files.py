"""File layout of a token cache, and how its files are written and checked.

    tokens.bin   uint32 [n]    token id; the top bit is set where the token is trained
    offsets.bin  int64  [D+1]  start of each document in tokens.bin; n at the end
    trained.bin  int64  [D]    trained tokens of each document
    numbers.bin  int64  [D]    row of each document in its source
    sources.bin  int64  [D]    source of each document, an index into the manifest's list

All arrays are flat and little-endian. `manifest.json` holds their sizes and the sha256 of their
blocks. Files are written and synced in a temporary folder, which is then renamed: a folder under
its final name is complete, even if the machine stops at any moment.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemocascade.data.tokenization import TokenizedPiece
from nemocascade.runtime.files import naming
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.row_errors import BadRows, DataError

BLOCK_BYTES = 256 << 20
READ_BYTES = 4 << 20

COLUMNS: dict[str, np.dtype[Any]] = {
    "tokens.bin": np.dtype("<u4"),
    "offsets.bin": np.dtype("<i8"),
    "trained.bin": np.dtype("<i8"),
    "numbers.bin": np.dtype("<i8"),
    "sources.bin": np.dtype("<i8"),
}


class CacheDamagedError(DataError):
    """A cache folder is incomplete or was altered."""


def read_manifest(path: Path, *, hashes: bool) -> dict[str, Any]:
    """Return the manifest of the cache in folder `path`, after checking its files against it.

    hashes: read and hash every file; otherwise only sizes are compared.
    Raises CacheDamagedError.
    """
    try:
        manifest: dict[str, Any] = json.loads((path / "manifest.json").read_bytes())
        files = {name: manifest["files"][name] for name in COLUMNS}
        expected = {name: {"bytes": f["bytes"], "sha256": f["sha256"]} for name, f in files.items()}
        missing = {"sources", "bad_rows", "bad_examples", "documents_with_reasoning"} - {*manifest}
        if missing:
            raise KeyError(*missing)
        found = {name: (path / name).stat().st_size for name in COLUMNS}
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise CacheDamagedError(f"{path}: not a complete token cache ({error!r})") from error
    for name, size in found.items():
        if size != expected[name]["bytes"]:
            raise CacheDamagedError(
                f"{path / name} has {size} bytes, its manifest says {expected[name]['bytes']}"
            )
        if hashes and _block_hashes(path / name) != expected[name]["sha256"]:
            raise CacheDamagedError(f"{path / name} does not match the sha256 of its manifest")
    return manifest


def map_column(path: Path, name: str) -> NDArray[Any]:
    """Memory-map one array."""
    return np.memmap(path / name, dtype=COLUMNS[name], mode="r").view(np.ndarray)


def write_files(
    path: Path,
    key: dict[str, Any],
    sources: Sequence[str],
    pieces: Iterable[TokenizedPiece],
    bad: BadRows,
) -> None:
    """Write the documents of `pieces` to the folder `path`; bad rows are counted in `bad`.

    If another builder finishes first, its folder is kept. Raises DataError for too many bad rows
    and for no documents.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    building = path.with_name(f"{path.name}.building-{socket.gethostname()}-{os.getpid()}")
    building.mkdir()
    try:
        manifest = {"key": key, "sources": list(sources)}
        manifest |= _write_columns(building, sources, pieces, bad)
        stored = building / "manifest.json"
        with naming(stored), stored.open("w") as stream:
            json.dump(manifest, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        _sync_folder(building)
        try:
            building.rename(path)
        except OSError:
            # Another machine on the same disk finished first; its documents are the same.
            read_manifest(path, hashes=False)
        _sync_folder(path.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_columns(
    folder: Path, sources: Sequence[str], pieces: Iterable[TokenizedPiece], bad: BadRows
) -> dict[str, Any]:
    """Write the arrays and return the manifest's entries."""
    columns = {name: _Column(folder / name, dtype) for name, dtype in COLUMNS.items()}
    tokens = trained = documents = reasoned = 0
    columns["offsets.bin"].append(np.zeros(1))
    for piece in pieces:
        for number, reason in piece.bad:
            bad.add(f"{sources[piece.source]}:{number}", reason)
        bad.check()
        columns["tokens.bin"].append(piece.tokens)
        columns["offsets.bin"].append(tokens + np.cumsum(piece.lengths))
        columns["trained.bin"].append(piece.trained)
        columns["numbers.bin"].append(piece.numbers)
        columns["sources.bin"].append(np.full(len(piece.lengths), piece.source))
        tokens += len(piece.tokens)
        trained += int(piece.trained.sum())
        documents += len(piece.lengths)
        reasoned += piece.reasoned
    if not documents:
        raise DataError(f"no documents in {', '.join(sources)}")
    return {
        "documents": documents,
        "tokens": tokens,
        "trained_tokens": trained,
        "documents_with_reasoning": reasoned,
        "bad_rows": bad.count,
        "bad_examples": bad.examples,
        "files": {name: column.close() for name, column in columns.items()},
    }


class _Column:
    """An array file that is being written."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._path = path
        self._stream = path.open("wb")
        self._dtype = dtype

    def append(self, values: NDArray[Any]) -> None:
        with naming(self._path):
            self._stream.write(np.ascontiguousarray(values, dtype=self._dtype).tobytes())

    def close(self) -> dict[str, Any]:
        """Sync the file to disk and return its entry in the manifest."""
        with naming(self._path):
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
        return {"bytes": self._path.stat().st_size, "sha256": _block_hashes(self._path)}


def _remove_leftovers(path: Path) -> None:
    """Remove folders of builders on this machine that were killed."""
    prefix = f"{path.name}.building-{socket.gethostname()}-"
    for folder in path.parent.glob(f"{path.name}.building-*"):
        pid = folder.name.removeprefix(prefix)
        # In a container, the killed process may have had the same pid as this one.
        gone = pid.isdigit() and (int(pid) == os.getpid() or not Path(f"/proc/{pid}").exists())
        if gone:
            LOGGER.warning("%s: left by a build that was killed; removed", folder)
            shutil.rmtree(folder, ignore_errors=True)


def _block_hashes(path: Path) -> list[str]:
    """sha256 of each block of a file; blocks let all cores share the check of a large file."""

    def block(start: int) -> str:
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            stream.seek(start)
            for _ in range(BLOCK_BYTES // READ_BYTES):
                digest.update(stream.read(READ_BYTES))
        return digest.hexdigest()

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(block, range(0, path.stat().st_size, BLOCK_BYTES)))


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
