"""Programs that several threads run in order, up to the first that stops them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Condition, Thread
from typing import Any

from nemocascade.sandbox.fair_slots import FairSlots
from nemocascade.types import Outcome, Program

Finish = Callable[[Outcome, bool], None]
"""Takes the outcome of a program, and if it stops the series."""


def run_series(
    run: Callable[[Program], Outcome],
    slots: FairSlots[Any],
    programs: Sequence[Program],
    stops: Callable[[int, Outcome], bool],
) -> list[Outcome]:
    """Run programs in order up to the first whose number and outcome `stops` the series. Returns
    the outcomes, with that one. Raises as `run`.

    After the first, they run side by side while slots are free that nobody waits for. The result
    does not depend on it: outcomes after the one that stops are dropped.
    """
    series = ProgramSeries(len(programs))

    def run_next() -> bool:
        if (number := series.take()) is None:
            return False
        with series.finishing(number) as finish:
            outcome = run(programs[number])
            finish(outcome, stops(number, outcome))
        return True

    def run_beside() -> None:
        while slots.spare and run_next():
            pass

    # Most wrong programs fail at once: the first runs by itself.
    if run_next():
        for _ in range(min(series.left, slots.spare) - 1):
            Thread(target=run_beside, name="tests", daemon=True).start()
    while run_next():
        pass
    return series.outcomes()


class ProgramSeries:
    """Dispatches the numbers 0, 1, .. below `count`, and collects the outcomes. Thread-safe."""

    def __init__(self, count: int) -> None:
        self._changed = Condition()
        self._next, self._end = 0, count
        self._found: dict[int, Outcome | BaseException] = {}

    def take(self) -> int | None:
        """The next number; None if none is left, or the series is stopped."""
        with self._changed:
            if self._next >= self._end:
                return None
            self._next += 1
            return self._next - 1

    @property
    def left(self) -> int:
        """Count of the numbers that are left."""
        with self._changed:
            return max(0, self._end - self._next)

    @contextmanager
    def finishing(self, number: int) -> Iterator[Finish]:
        """Context manager of a program's run, whose result is passed on; an error stops the series.

        The error is raised by `outcomes`, unless an earlier program stops the series.
        """

        def finish(found: Outcome | BaseException, is_last: bool) -> None:
            with self._changed:
                self._found[number] = found
                if is_last:
                    self._end = min(self._end, number + 1)
                self._changed.notify_all()

        try:
            yield finish
        except BaseException as error:
            finish(error, True)

    def outcomes(self) -> list[Outcome]:
        """Wait for the outcomes up to the first that stops the series. Raises the first error."""
        with self._changed:
            self._changed.wait_for(lambda: all(n in self._found for n in range(self._end)))
            found = [self._found[n] for n in range(self._end)]
        for outcome in found:
            if isinstance(outcome, BaseException):
                raise outcome
        return [outcome for outcome in found if isinstance(outcome, Outcome)]
