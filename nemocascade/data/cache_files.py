"""File layout of tokenised documents, and how their files are written and checked.

    tokens.bin    uint32 [n]    token id; the top bit is set where the token is trained
    offsets.bin   int64  [D+1]  start of each document in the tokens; n at the end
    trained.bin   int64  [D]    trained tokens of each document
    first.bin     int64  [D]    position of each document's first trained token
    numbers.bin   int64  [D]    row of each document in its source
    sources.bin   int64  [D]    source of each document, an index into the manifest's list
    digests.bin   uint64 [D]    hash of each document's words

All arrays are flat and little-endian. The tokens may be cut into several files, the shards, between
documents. `manifest.json` holds the sizes of all files, the sha256 of their blocks, and the shards.
`times.json` holds the files' modification times: a file whose size and time are those of its
hash is not read again. Files are written and synced in a temporary folder, which is then renamed: a
folder under its final name is complete, even if the machine stops at any moment.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemocascade.data.tokenization import TokenizedChunk
from nemocascade.runtime.files import naming
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.row_errors import BadRows, DataError

BLOCK_BYTES = 256 << 20
READ_BYTES = 4 << 20

_SHARD = re.compile(r"tokens(/\d+)?\.bin")
TOKENS = np.dtype("<u4")
COLUMNS: dict[str, np.dtype[Any]] = {
    "offsets.bin": np.dtype("<i8"),
    "trained.bin": np.dtype("<i8"),
    "first.bin": np.dtype("<i8"),
    "numbers.bin": np.dtype("<i8"),
    "sources.bin": np.dtype("<i8"),
    "digests.bin": np.dtype("<u8"),
}

Progress = Callable[[str], object]
"""Called with completed work, in words."""


class CacheDamagedError(DataError):
    """A folder of tokenised documents is incomplete or was altered."""


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of the documents in folder `path`. Raises CacheDamagedError."""
    try:
        manifest: dict[str, Any] = json.loads((path / "manifest.json").read_bytes())
        names = [shard["file"] for shard in manifest["shards"]]
        counts = [shard["documents"] + shard["tokens"] for shard in manifest["shards"]]
        if not sum(counts) or not all(map(_SHARD.fullmatch, names)):
            raise ValueError("shards")
        for entry in (manifest["files"][name] for name in [*COLUMNS, *names]):
            entry["bytes"], entry["sha256"]
        missing = {"settings", "sources", "without_thinking"} - {*manifest["key"]}
        missing |= {"sources", "bad_rows", "bad_examples", "documents_with_reasoning"} - {*manifest}
        if missing:
            raise KeyError(*missing)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise CacheDamagedError(f"{path}: not a complete token cache ({error!r})") from error
    return manifest


def check_sizes(path: Path, files: dict[str, Any]) -> set[str]:
    """Compare the size of every file with the manifest's entry. Returns the files whose
    modification time is not that of their hash. Raises CacheDamagedError."""
    try:
        times = json.loads((path / "times.json").read_bytes())
        known = times if isinstance(times, dict) else {}
    except (OSError, ValueError, RecursionError):
        known = {}

    def look(name: str) -> bool:
        try:
            found = (path / name).stat()
        except OSError as error:
            raise CacheDamagedError(f"{path}: not a complete token cache ({error!r})") from error
        if found.st_size != files[name]["bytes"]:
            raise CacheDamagedError(
                f"{path / name} has {found.st_size} bytes, its manifest says {files[name]['bytes']}"
            )
        return known.get(name) == found.st_mtime_ns

    with ThreadPoolExecutor(8) as pool:
        same = pool.map(look, files)
        return {name for name, unchanged in zip(files, same, strict=True) if not unchanged}


def check_hashes(
    path: Path, files: dict[str, Any], names: Collection[str], progress: Progress
) -> None:
    """Read the files `names`, compare their hashes with the manifest's, and write down their
    modification times, unless the folder cannot be written. Raises CacheDamagedError."""
    for number, name in enumerate(sorted(names), start=1):
        said = f"checking file {number} of {len(names)}"
        if block_hashes(path / name, said, progress) != files[name]["sha256"]:
            raise CacheDamagedError(f"{path / name} does not match the sha256 of its manifest")
    try:
        write_times(path, files)
    except OSError as error:
        LOGGER.warning("%s: its hashes are right, but every start reads it again: %s", path, error)


def write_times(path: Path, names: Iterable[str]) -> None:
    """Write the modification times of files whose hashes are known to be right."""
    times = {name: (path / name).stat().st_mtime_ns for name in names}
    write_json(path / "times.json", times)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file under a temporary name, sync it, and rename it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with naming(partial), partial.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(path)


def map_file(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Memory-map one array, [n] of `dtype`."""
    # An empty file cannot be mapped.
    if not path.stat().st_size:
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)


def write_files(
    path: Path,
    key: dict[str, Any],
    sources: Sequence[str],
    chunks: Iterable[TokenizedChunk],
    bad: BadRows,
    progress: Progress,
) -> None:
    """Write the documents of `chunks` to the folder `path`; bad rows are counted in `bad`.

    If another builder finishes first, its folder is kept. Raises DataError for too many bad rows
    and for no documents.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    building = path.with_name(f"{path.name}.building-{socket.gethostname()}-{os.getpid()}")
    building.mkdir()
    try:
        tokens = FileWriter(building / "tokens.bin", TOKENS)
        columns = ColumnWriter(building, sources, bad)
        for chunk in chunks:
            for number, reason in chunk.bad:
                bad.add(f"{sources[chunk.source]}:{number}", reason)
            bad.check()
            tokens.append(chunk.tokens)
            columns.append(
                chunk.lengths,
                chunk.trained,
                chunk.first,
                chunk.numbers,
                np.full(len(chunk.lengths), chunk.source),
                chunk.digests,
            )
            columns.reasoned += chunk.reasoned
            progress(f"tokenised {columns.documents:,} documents, {columns.tokens:,} tokens")
        shard = {"file": "tokens.bin", "documents": columns.documents, "tokens": columns.tokens}
        columns.finish(key, [shard], {"tokens.bin": tokens.close()})
        try:
            building.rename(path)
        except OSError:
            # Another machine on the same disk finished first; its documents are the same.
            check_sizes(path, read_manifest(path)["files"])
        sync_folder(path.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


class ColumnWriter:
    """Writes the columns of documents, one after another, and the manifest."""

    def __init__(self, folder: Path, sources: Sequence[str], bad: BadRows) -> None:
        self._folder, self._sources, self._bad = folder, sources, bad
        self._files = {name: FileWriter(folder / name, dtype) for name, dtype in COLUMNS.items()}
        self._files["offsets.bin"].append(np.zeros(1))
        self.tokens = self.trained = self.documents = self.reasoned = 0

    def append(self, lengths: NDArray[np.int64], *columns: NDArray[Any]) -> None:
        """Append documents: `lengths` [D] int64 and the columns after `offsets.bin`, [D] each."""
        self._files["offsets.bin"].append(self.tokens + np.cumsum(lengths))
        for name, values in zip([*COLUMNS][1:], columns, strict=True):
            self._files[name].append(values)
        self.tokens += int(lengths.sum())
        self.trained += int(columns[0].sum())
        self.documents += len(lengths)

    def finish(
        self, key: dict[str, Any], shards: list[dict[str, Any]], files: dict[str, Any]
    ) -> None:
        """Write the manifest. files: entries of the shards' files. Raises DataError without any
        document."""
        if not self.documents:
            raise DataError(f"no documents in {', '.join(self._sources)}")
        entries = files | {name: file.close() for name, file in self._files.items()}
        manifest = {
            "key": key,
            "sources": list(self._sources),
            "documents": self.documents,
            "tokens": self.tokens,
            "trained_tokens": self.trained,
            "documents_with_reasoning": self.reasoned,
            "bad_rows": self._bad.count,
            "bad_examples": self._bad.examples,
            "shards": shards,
            "files": entries,
        }
        write_json(self._folder / "manifest.json", manifest)
        write_times(self._folder, entries)
        sync_folder(self._folder)


class FileWriter:
    """An array file that is being written."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._path = path
        self._stream = path.open("wb")
        self._dtype = dtype
        self._hashes: list[str] = []
        self._block, self._filled = hashlib.sha256(), 0

    def append(self, values: NDArray[Any]) -> None:
        """Append `values`, of any shape and dtype, as the file's dtype."""
        data = memoryview(np.ascontiguousarray(values, dtype=self._dtype).tobytes())
        with naming(self._path):
            self._stream.write(data)
        while len(data):
            part = data[: BLOCK_BYTES - self._filled]
            self._block.update(part)
            self._filled += len(part)
            data = data[len(part) :]
            if self._filled == BLOCK_BYTES:
                self._end_block()

    def _end_block(self) -> None:
        self._hashes.append(self._block.hexdigest())
        self._block, self._filled = hashlib.sha256(), 0

    def close(self) -> dict[str, Any]:
        """Sync the file to disk and return its entry in the manifest."""
        with naming(self._path):
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
        if self._filled:
            self._end_block()
        return {"bytes": self._path.stat().st_size, "sha256": self._hashes}


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


def block_hashes(path: Path, what: str, progress: Progress) -> list[str]:
    """sha256 of each block of a file; blocks let all cores share the check of a large file.

    what: words for `progress`, which is called after each block.
    """

    def block(start: int) -> str:
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            stream.seek(start)
            for _ in range(BLOCK_BYTES // READ_BYTES):
                digest.update(stream.read(READ_BYTES))
        return digest.hexdigest()

    hashes = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for digest in pool.map(block, range(0, path.stat().st_size, BLOCK_BYTES)):
            hashes.append(digest)
            progress(f"{what}, block {len(hashes)}")
    return hashes


def sync_folder(path: Path) -> None:
    """Sync a folder's entries to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
