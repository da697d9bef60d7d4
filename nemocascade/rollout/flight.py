"""Requests in flight to inference servers: their completions in order, and cancellation."""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Event

from nemocascade.rollout.engine import Completion
from nemocascade.rollout.servers import ServerPool


class Flight:
    """The requests of a run that have not finished.

    pool: the servers. threads: number of requests at the same time.
    """

    def __init__(self, pool: ServerPool, threads: int) -> None:
        self.pool = pool
        self.asked: dict[Future[Completion], tuple[int, Event]] = {}
        self._cancelled: dict[Future[Completion], str] = {}
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="server")

    def ask(self, number: int, complete: Callable[[Event], Completion]) -> None:
        """Start request `number` as soon as a thread is free. complete: makes the rollout, and ends
        early once the event is set."""
        stop = Event()
        self.asked[self._threads.submit(complete, stop)] = (number, stop)

    def take(self, done: Collection[Future[Completion]]) -> list[Completion]:
        """Finished rollouts in the order of their requests, without those that were cancelled.

        Raises the error of one that failed.
        """
        self._cut_off()
        # A request that was cancelled while it finished is in `done`, but no longer here.
        mine = [future for future in done if self.asked.pop(future, None) is not None]
        mine.sort(key=lambda f: -1 if f.exception() else f.result().request.id)
        return [future.result() for future in mine]

    def cancel(self, numbers: Collection[int]) -> None:
        """Cut off these requests, if they are still in flight: nobody needs their rollouts."""
        found = {f: (n, stop) for f, (n, stop) in self.asked.items() if n in numbers}
        for future, (number, stop) in found.items():
            stop.set()
            del self.asked[future]
            if not future.cancel():
                self._cancelled[future] = request_name(number)
        self._cut_off()

    def _cut_off(self) -> None:
        """Cut off what cancelled requests have at the servers. One that was just about to ask is
        met at the next call."""
        self._cancelled = {f: name for f, name in self._cancelled.items() if not f.done()}
        if self._cancelled:
            self.pool.cancel(set(self._cancelled.values()))

    def close(self) -> None:
        """Cut off all requests, so that no server works in vain, and wait for their threads."""
        for _, stop in self.asked.values():
            stop.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        # `wait` would also wait for those that were cancelled before they began.
        while left := {f for f in (*self.asked, *self._cancelled) if not f.done()}:
            self.pool.cancel()
            wait(left, timeout=0.2)


def request_name(number: int) -> str:
    """Name of a request at the HTTP client."""
    return f"request {number}"
