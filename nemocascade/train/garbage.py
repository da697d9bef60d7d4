"""Python's garbage collection at chosen steps, so that all ranks stop for it together."""

from __future__ import annotations

import gc


class GarbageCollection:
    """Collects after every `every` steps and switches Python's own collections off.

    Python collects when a rank has made enough objects. Ranks do so at different times, and in a
    step with collectives all of them wait for each. every: 0 leaves it to Python.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        # An earlier stage of the process may have switched it off.
        if every:
            gc.disable()
        else:
            gc.enable()

    def after_step(self, step: int) -> None:
        """Collect if `step`, counted from 1, is a multiple of `every`."""
        if self.every and step % self.every == 0:
            gc.collect()
