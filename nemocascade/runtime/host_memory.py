"""Memory that this process may use: the host's, within the limits of its control groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import psutil


def total_memory() -> int:
    """Bytes of memory: of the host, or of the smallest limit of a control group."""
    limits = [limit for limit, _ in _limits(Path("/"))]
    return min([int(psutil.virtual_memory().total), *limits])


def available_memory() -> int:
    """Bytes of memory that can be had: of the host, or of the control group with the least left."""
    left = [max(0, limit - used) for limit, used in _limits(Path("/"))]
    return min([int(psutil.virtual_memory().available), *left])


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of each control group of this process that has a limit, and of their
    parents. Files that can be dropped from memory are not in use. root: of the file system."""
    mount = root / "sys" / "fs" / "cgroup"
    for controllers, name in _groups(root):
        if controllers:
            # Version 1: unlimited is a number beyond any memory.
            folder, limit, use, cached = (
                mount / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            folder, limit, use, cached = mount, "memory.max", "memory.current", "inactive_file"
        # In a container the name may be the host's: what is missing is skipped, up to the root.
        path = folder / name.strip("/")
        for group in (path, *path.parents[: len(path.parts) - len(folder.parts)]):
            most = _number(group / limit)
            if most is not None:
                dropped = _statistics(group / "memory.stat").get(cached, 0)
                yield most, max(0, (_number(group / use) or 0) - dropped)


def _groups(root: Path) -> Iterator[tuple[str, str]]:
    """Controllers and name of each group that limits memory; version 2 names no controllers."""
    with suppress(OSError):
        for line in (root / "proc" / "self" / "cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, name = line.split(":", 2)
            if not controllers or "memory" in controllers.split(","):
                yield controllers, name


def _number(file: Path) -> int | None:
    """The number in a file; None without the file, or for `max`."""
    with suppress(OSError):
        text = file.read_text(encoding="utf-8").strip()
        return int(text) if text.isdigit() else None
    return None


def _statistics(file: Path) -> Mapping[str, int]:
    """Numbers by name of a file of lines `name number`; {} without it."""
    with suppress(OSError):
        rows = (line.split() for line in file.read_text(encoding="utf-8").splitlines())
        return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}
    return {}
