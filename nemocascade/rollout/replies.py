"""Environment replies during generation: requested in threads of one rank, broadcast to all."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType

import torch.distributed as dist

from nemocascade.rollout.engine import Completion, Respond
from nemocascade.runtime.world import World

# Timeout of a wait for replies while there is nothing else to do.
WAIT_S = 0.02
THREADS = 16

Reply = tuple[int, list[int] | None]


class RespondError(RuntimeError):
    """`respond` failed on the rank that called it."""


class Replies:
    """Environment replies to stopped sequences, by slot.

    The first rank of a data-parallel group calls `respond` and broadcasts the replies, so that all
    ranks of the group continue identically.
    """

    def __init__(self, world: World, respond: Respond | None) -> None:
        self._group = world.groups.mp
        self._respond = respond
        self._asks = self._group.rank() == 0
        self._pool: ThreadPoolExecutor | None = None
        self._open: dict[int, Future[Sequence[int] | None] | None] = {}

    def __enter__(self) -> Replies:
        if self.wanted and self._asks:
            self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="respond")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=kind is None, cancel_futures=True)

    @property
    def wanted(self) -> bool:
        """True if stopped sequences may be continued by an environment."""
        return self._respond is not None

    def ask(self, slot: int, completion: Completion) -> None:
        """Request the environment's reply to a slot's sequence."""
        self._open[slot] = None
        if self._pool is not None and self._respond is not None:
            self._open[slot] = self._pool.submit(self._respond, completion)

    def take(self, idle: bool) -> list[Reply]:
        """Replies that have arrived, the same on every rank. idle: wait a moment for one.

        Raises RespondError on every rank if one failed.
        """
        if not self._open:
            return []
        found: list[Reply] = []
        failure: tuple[str, BaseException] | None = None
        if self._asks:
            futures = {f: slot for slot, f in self._open.items() if f is not None}
            done, _ = wait(futures, WAIT_S if idle else 0, FIRST_COMPLETED)
            for future in sorted(done, key=lambda f: futures[f]):
                error = future.exception()
                if error is not None:
                    failure = (f"slot {futures[future]}: {type(error).__name__}: {error}", error)
                    break
                tokens = future.result()
                found.append((futures[future], None if tokens is None else list(tokens)))
        message = None if failure is None else failure[0]
        if self._group.size() > 1:
            box = [(found, message)]
            first = dist.get_global_rank(self._group, 0)
            dist.broadcast_object_list(box, src=first, group=self._group)
            found, message = box[0]
        if message is not None:
            raise RespondError(f"the environment could not continue a text: {message}") from (
                failure[1] if failure else None
            )
        for slot, _ in found:
            del self._open[slot]
        return found
