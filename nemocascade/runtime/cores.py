"""Processor cores of a rank, which shares its host with others."""

from __future__ import annotations

import os

from nemocascade.runtime.launcher import ranks_of_node


def slots_of_rank(workers: int = 0) -> int:
    """Number of programs that a rank runs at a time: `workers`, or with 0 its share of the cores.

    The cores that the process may use are shared by the ranks of its host, unless each is bound to
    its own. At least 1.
    """
    if workers:
        return workers
    usable, ranks = len(os.sched_getaffinity(0)), ranks_of_node()
    bound = usable * ranks <= (os.cpu_count() or 1)
    return usable if bound else max(1, usable // ranks)
