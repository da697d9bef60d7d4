"""Environment replies during generation: requested in threads of one rank, broadcast to all."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType

import torch
import torch.distributed as dist

from nemocascade.rollout.engine import Completion, Request, Respond
from nemocascade.runtime.world import World

# Timeout of a wait for replies while there is nothing else to do.
WAIT_S = 0.02

Reply = tuple[int, list[int] | None]


def home_of(request: Request, ranks: int) -> int:
    """Index of the rank of a replica that answers the tool calls of a request, and verifies it.

    ranks: of the replica.
    """
    return mixed(request.id if request.home is None else request.home, ranks)


def mixed(number: int, ranks: int) -> int:
    """An index below `ranks` that spreads numbers, also every so-many-th one."""
    return (number * 0x9E3779B1 >> 16) % ranks


class RespondError(RuntimeError):
    """`respond` failed on the rank that called it."""


class Replies:
    """Environment replies to stopped sequences, by slot.

    Each rank of a replica calls `respond` for its own requests, see `home_of`, in `threads`
    threads. The ranks share the replies, so that all continue identically.
    """

    def __init__(self, world: World, respond: Respond | None, threads: int) -> None:
        self._group = world.groups.mp
        self._respond, self._threads = respond, threads
        self._pool: ThreadPoolExecutor | None = None
        self._open: dict[int, Future[Sequence[int] | None] | None] = {}

    def __enter__(self) -> Replies:
        if self.wanted:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="respond")
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
        mine = home_of(completion.request, self._group.size()) == self._group.rank()
        if mine and self._pool is not None and self._respond is not None:
            self._open[slot] = self._pool.submit(self._respond, completion)

    def take(self, idle: bool) -> list[Reply]:
        """Replies that have arrived, the same on every rank. idle: wait a moment for one.

        Raises RespondError on every rank if one failed.
        """
        if not self._open:
            return []
        found: list[Reply] = []
        failure: tuple[str, BaseException] | None = None
        futures = {f: slot for slot, f in self._open.items() if f is not None}
        done, _ = wait(futures, WAIT_S if idle else 0, FIRST_COMPLETED)
        for future in sorted(done, key=lambda f: futures[f]):
            error = future.exception()
            if error is not None:
                failure = (f"slot {futures[future]}: {type(error).__name__}: {error}", error)
                break
            tokens = future.result()
            found.append((futures[future], None if tokens is None else list(tokens)))
        messages = ["" if failure is None else failure[0]]
        if self._group.size() > 1:
            found, messages = _shared(self._group, found, messages[0])
        if message := next(filter(None, messages), ""):
            raise RespondError(f"the environment could not continue a text: {message}") from (
                failure[1] if failure else None
            )
        for slot, _ in found:
            del self._open[slot]
        return found


def _shared(
    group: dist.ProcessGroup, found: Sequence[Reply], message: str
) -> tuple[list[Reply], list[str]]:
    """The replies of all ranks in order of slots, and the messages of failed ones.

    Usually there are none, and the ranks exchange one number.
    """
    rows = [[slot, -1 if ids is None else len(ids), *(ids or ())] for slot, ids in found]
    rows += [[-1, len(message), *map(ord, message)]] if message else []
    mine = torch.tensor([n for row in rows for n in row], dtype=torch.int64)
    each = [torch.zeros(1, dtype=torch.int64) for _ in range(group.size())]
    dist.all_gather(each, torch.tensor([mine.numel()]), group=group)
    sizes = torch.cat(each).tolist()
    if not (largest := max(sizes)):
        return [], []
    each = [torch.zeros(largest, dtype=torch.int64) for _ in sizes]
    dist.all_gather(each, torch.nn.functional.pad(mine, (0, largest - mine.numel())), group=group)
    replies, messages = [], []
    for size, values in zip(sizes, each, strict=True):
        left = values[:size].tolist()
        while left:
            slot, count = left[:2]
            row, left = left[2 : 2 + max(0, count)], left[2 + max(0, count) :]
            if slot < 0:
                messages.append("".join(map(chr, row)))
            else:
                replies.append((slot, None if count < 0 else row))
    return sorted(replies, key=lambda reply: reply[0]), messages
