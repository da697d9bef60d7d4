"""Slots of a pool, assigned to waiting threads in the order of their requests."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class FairSlots[T]:
    """A fixed number of slots. The last one returned is taken first: it is warm.

    A returned slot belongs to the oldest request at once, so no thread can overtake another.
    """

    def __init__(self, slots: Iterable[T]) -> None:
        self._free = list(slots)
        self.size = len(self._free)
        self._waiting: deque[_Request[T]] = deque()
        self._lock = threading.Lock()

    @contextmanager
    def take(self, count: int = 1) -> Iterator[list[T]]:
        """Hold `count` slots. What the list contains at the end is returned to the pool.

        The caller may replace the list's items, but not their number.
        """
        request = _Request[T](count)
        with self._lock:
            self._waiting.append(request)
            self._serve()
        try:
            request.served.wait()
            yield request.slots
        finally:
            with self._lock:
                # An interrupted wait leaves the queue.
                if not request.served.is_set():
                    self._waiting.remove(request)
                self._free += reversed(request.slots)
                self._serve()

    def idle(self) -> list[T]:
        """Return the free slots."""
        with self._lock:
            return list(self._free)

    @property
    def spare(self) -> int:
        """Number of free slots; 0 while a request waits."""
        with self._lock:
            return 0 if self._waiting else len(self._free)

    def _serve(self) -> None:
        while self._waiting and len(self._free) >= self._waiting[0].count:
            request = self._waiting.popleft()
            request.slots += [self._free.pop() for _ in range(request.count)]
            request.served.set()


class _Request[T]:
    def __init__(self, count: int) -> None:
        self.count = count
        self.slots: list[T] = []
        self.served = threading.Event()
