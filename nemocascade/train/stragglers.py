"""Stragglers: the time of each rank's own work in a step, and a warning of the rank that is slow.

Ranks reduce their gradients together, so all have the step time of the slowest. A rank's own time
ends before that reduction. Ranks that exchange activations, by tensor, pipeline, context or expert
parallelism, wait for one another within it too: there a slow rank shows in its whole group.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median_low
from typing import Any

import torch

from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.watchdog import Watchdog

SLOW = 1.25
"""A straggler's time over the median of all ranks."""
STEPS = 5
"""Steps in a row of the same straggler before a warning names it, and between warnings."""


class WorkClock:
    """Time of this rank's forward and backward passes in a step, on its device."""

    def __init__(self, device: torch.device) -> None:
        self._marks: list[Any] = [0.0, 0.0]
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            self._marks = [torch.cuda.Event(enable_timing=True) for _ in self._marks]

    def start(self) -> None:
        """Mark the start of the work."""
        self._mark(0)

    def stop(self) -> None:
        """Mark the end of the work, before the ranks reduce their gradients."""
        self._mark(1)

    def _mark(self, index: int) -> None:
        if self._on_gpu:
            self._marks[index].record()
        else:
            self._marks[index] = time.perf_counter()

    def seconds(self) -> float:
        """Seconds between both marks; on a GPU, once the host has waited for it."""
        start, stop = self._marks
        return float(start.elapsed_time(stop) / 1000 if self._on_gpu else stop - start)


def straggler_values(times: Sequence[float]) -> dict[str, Any]:
    """Metrics of the own times of all ranks in seconds; {} without any.

    `straggler_ratio`: the longest time over the median. `straggler`: its rank, or None below
    `SLOW`.
    """
    if not times:
        return {}
    # The lower one of two in the middle, so that one of two ranks may be slow.
    ratio = max(times) / max(median_low(times), 1e-9)
    slow = times.index(max(times)) if ratio >= SLOW else None
    return {"straggler": slow, "straggler_ratio": ratio}


class StragglerWarnings:
    """Warns of a rank that is the straggler in `STEPS` steps in a row, with its host."""

    def __init__(self) -> None:
        self._rank: int | None = None
        self._steps = 0

    def after_step(self, values: dict[str, Any], watch: Watchdog) -> None:
        """Count a step. values: of `straggler_values`."""
        rank = values.get("straggler")
        self._steps = self._steps + 1 if rank == self._rank else 1
        self._rank = rank
        if rank is not None and self._steps % STEPS == 0:
            LOGGER.warning(
                "rank %d (%s) is slow in %d steps in a row: its forward and backward takes %.2f x "
                "the median of all ranks: look at its device (nvidia-smi -q -d PERFORMANCE), or "
                "exclude its host",
                rank,
                watch.host_of(rank) or "host unknown",
                self._steps,
                values["straggler_ratio"],
            )
