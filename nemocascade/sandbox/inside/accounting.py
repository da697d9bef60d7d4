"""CPU time of a program's processes, and the time for which they waited for a CPU, from /proc.

The worker sees the /proc of an outer process namespace, so the ids here are those of that one.
"""

from __future__ import annotations

import math
import os
from contextlib import suppress

_TICKS = os.sysconf("SC_CLK_TCK")
_TIMES = slice(11, 15)
"""utime, stime, cutime and cstime in /proc/PID/stat, counted from the field after the name."""


def descendants() -> list[str]:
    """Return the ids of all processes below the calling one; empty if the kernel hides them."""
    found: list[str] = []
    parents = ["self"]
    while parents:
        parent = parents.pop()
        children = [c for task in _tasks(parent) for c in _read(f"{task}/children").split()]
        found += children
        parents += children
    return found


def usage() -> tuple[float, float]:
    """CPU seconds of all processes below the calling one together, and the longest that one of them
    has waited for a CPU."""
    processes = descendants()
    waits = max(map(waited_s, processes), default=0.0)
    return sum(map(cpu_s, processes)), waits


def cpu_s(process: str) -> float:
    """CPU seconds of a process and of its children that have ended and were waited for."""
    fields = _read(f"/proc/{process}/stat").rpartition(")")[2].split()
    return sum(map(int, fields[_TIMES])) / _TICKS


def waited_s(process: str) -> float:
    """Seconds for which a thread of a process was ready but had no CPU; the largest of all threads.

    Infinite on kernels that do not count it.
    """
    counts = [_read(f"{task}/schedstat").split() for task in _tasks(process)]
    return max((int(c[1]) / 1e9 if len(c) > 1 else math.inf for c in counts), default=0.0)


def _tasks(process: str) -> list[str]:
    folder = f"/proc/{process}/task"
    with suppress(OSError):
        return [f"{folder}/{task}" for task in os.listdir(folder)]
    return []


def _read(path: str) -> str:
    """Return a file's text; empty for a process that has ended."""
    with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        return file.read()
    return ""
