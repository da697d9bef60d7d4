"""Repositories as files by path: reading from folders, and checks of paths."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from nemocascade.runtime.logging import LOGGER

Files = Mapping[str, bytes]
"""A repository: contents by relative path, with `/` between folders."""

MOST_MIB = 256
_EXCLUDED = {".git", "__pycache__"}
_LONGEST_NAME, _LONGEST_PATH = 255, 1000
"""Maximum bytes of a name and of a path; file systems allow the first and more than the second."""


def check_path(path: str) -> str:
    """Return the normalised path. Raises ValueError if it leads out of the repository.

    Also raises ValueError for invalid file names.
    """
    pure = PurePosixPath(path)
    if not path or "\0" in path or "\\" in path or pure.is_absolute() or ".." in pure.parts:
        raise ValueError(f"{path!r} is not a path inside of the repository: name it from its root")
    if str(pure) == ".":
        raise ValueError(f"{path!r} names no file")
    try:
        sizes = [len(part.encode(errors="surrogateescape")) for part in pure.parts]
    except UnicodeEncodeError:
        raise ValueError(f"{path!r} holds half a surrogate pair: no file has such a name") from None
    if max(sizes) > _LONGEST_NAME or sum(sizes) + len(sizes) > _LONGEST_PATH:
        raise ValueError(
            f"the path {path[:40]!r}... is too long: a name may have {_LONGEST_NAME} bytes, a path "
            f"{_LONGEST_PATH}"
        )
    return str(pure)


def misfit(paths: Iterable[str]) -> str:
    """Return why files of these paths cannot be in one folder; empty if they can."""
    known = set(paths)
    for path in sorted(known):
        try:
            check_path(path)
        except ValueError as error:
            return str(error)
        start = path
        while "/" in start:
            start = start.rpartition("/")[0]
            if start in known:
                return f"{start} is a file, so {path} cannot be one"
    return ""


def snapshot_paths(folder: str | Path, *, most_mib: int = MOST_MIB) -> list[str]:
    """Return the paths that `read_snapshot` reads, or raise its ValueError; opens no file."""
    return [path.as_posix() for path, _ in _listed(Path(folder), most_mib)]


def read_snapshot(folder: str | Path, *, most_mib: int = MOST_MIB) -> dict[str, bytes]:
    """Read the files below a folder, without links, version control and compiled files.

    Raises ValueError if there is no file, more than `most_mib`, or an unreadable file.
    """
    root = Path(folder)
    found: dict[str, bytes] = {}
    for path, _ in _listed(root, most_mib):
        try:
            found[path.as_posix()] = (root / path).read_bytes()
        except OSError as error:
            raise ValueError(f"{root / path} cannot be read: {error}") from error
    return found


def _listed(root: Path, most_mib: int) -> list[tuple[Path, int]]:
    """List files by relative path, with their sizes."""
    found: list[tuple[Path, int]] = []
    links = 0
    for path in _below(root):
        if path.is_symlink():
            links += 1
        elif path.is_file():
            found.append((path.relative_to(root), path.stat().st_size))
    if not found:
        raise ValueError(f"{root} holds no file: a snapshot is a folder with the repository's")
    if sum(size for _, size in found) > most_mib << 20:
        raise ValueError(f"{root} holds more than {most_mib} MiB: is it a repository?")
    if links:
        LOGGER.warning("%s: %d links are skipped", root, links)
    return found


def _below(root: Path) -> Iterator[Path]:
    """Yield files and links; folders only if they are links."""

    def fail(error: OSError) -> None:
        if error.filename != str(root):
            raise ValueError(f"{error.filename} cannot be read: {error}") from error

    for folder, folders, files in os.walk(root, onerror=fail):
        folders[:] = sorted(set(folders) - _EXCLUDED)
        yield from (path for name in folders if (path := Path(folder, name)).is_symlink())
        yield from (Path(folder, name) for name in sorted(set(files) - _EXCLUDED))
