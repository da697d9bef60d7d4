"""Calls of all ranks to the servers: the main rank makes them, and every rank gets the failures."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from nemocascade.rollout.completions import BadReplyError
from nemocascade.rollout.servers import Server, ServerError
from nemocascade.runtime.http import HttpError
from nemocascade.runtime.stopping import StopAsked
from nemocascade.runtime.world import World

CALL_S = 60.0
"""Timeout of a call that changes a server's state."""


@dataclass
class Failures:
    """Servers that did not do what they should, by URL.

    reasons: they did not answer, or rejected a call. alarms: their log-probabilities are wrong.
    """

    reasons: dict[str, str] = field(default_factory=dict)
    alarms: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """All of them, in one line."""
        return "; ".join(f"{url}: {why}" for url, why in {**self.reasons, **self.alarms}.items())

    def without(self, servers: Sequence[Server]) -> list[Server]:
        """The servers that have answered so far."""
        return [s for s in servers if s.url not in self.reasons]

    def all_failed(self, servers: Sequence[Server], reason: str) -> None:
        """Give every server without a reason this one."""
        self.reasons |= {s.url: reason for s in self.without(servers)}


class Calls:
    """Calls by the main rank of a world."""

    def __init__(self, world: World) -> None:
        self.world = world

    def main(self, work: Callable[[], Any]) -> Any:
        """The result of `work()` on the main rank, on every rank.

        Raises ServerError or StopAsked on every rank if it did.
        """
        box: tuple[Any, str, bool] = (None, "", False)
        if self.world.is_main:
            try:
                box = work(), "", False
            except ServerError as error:
                box = None, str(error), False
            except StopAsked:
                box = None, "", True
        value, problem, is_stopped = self.world.broadcast_object(box)
        if is_stopped:
            raise StopAsked
        if problem:
            raise ServerError(problem)
        return value

    def each(
        self, servers: Sequence[Server], work: Callable[[Server], object], failures: Failures
    ) -> None:
        """Call `work` of every server at once."""
        with self.beside(servers, work, failures):
            pass

    @contextmanager
    def beside(
        self, servers: Sequence[Server], work: Callable[[Server], object], failures: Failures
    ) -> Iterator[None]:
        """Context manager: `each`, beside what the ranks do in it."""
        found: dict[str, str] = {}
        lock = threading.Lock()

        def one(server: Server) -> None:
            try:
                work(server)
            except (HttpError, BadReplyError) as error:
                reason = str(error)
            except Exception as error:
                reason = short(error)
            else:
                return
            with lock:
                found[server.url] = reason

        if not (self.world.is_main and servers):
            yield
        else:
            with ThreadPoolExecutor(len(servers), thread_name_prefix="servers") as pool:
                for server in servers:
                    pool.submit(one, server)
                yield
        # The first reason of a server explains the later ones.
        failures.reasons = {**self.world.broadcast_object(found), **failures.reasons}

    def first_problem(self, problem: str) -> str:
        """The first rank's problem that is not empty, on every rank."""
        return next(filter(None, self.world.all_gather_object(problem)), "")


def short(error: Exception) -> str:
    """The kind of an error and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
