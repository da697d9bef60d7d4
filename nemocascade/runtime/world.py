"""The ranks of a run: process groups, device, and this rank's index on every axis."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist

from nemocascade.recipe import ParallelConfig
from nemocascade.runtime.launcher import MainRankError
from nemocascade.runtime.logging import Console
from nemocascade.runtime.stopping import StopAsked, StopRequest
from nemocascade.runtime.watchdog import Watchdog

AXIS = 8
"""Longest axis of the grid over which the ranks of a large world send messages to one another."""

SEND_WINDOW = 64 << 20
"""Most bytes of packed messages that wait for their receivers at a time, on a rank."""


class Groups(Protocol):
    """The process groups of a layout, as Megatron-Core's ProcessGroupCollection names them."""

    tp: Any
    pp: Any
    mp: Any
    dp: Any
    cp: Any
    ep: Any
    dp_cp: Any
    tp_cp: Any
    tp_ep: Any
    tp_dp_cp: Any
    expt_tp: Any
    expt_dp: Any


@dataclass(frozen=True)
class World:
    """This process's ranks, device and groups. It is passed as an argument, never a global."""

    rank: int
    size: int
    device: torch.device
    parallel: ParallelConfig
    groups: Groups
    watch: Watchdog = field(default_factory=Watchdog)
    """Names a rank that stalls or dies."""
    stop: StopRequest = field(default_factory=StopRequest)
    """Knows of a request to stop the job."""
    console: Console = field(default_factory=Console)
    """Knows the stage's place in its cascade, and what the terminal has shown."""
    at_close: ExitStack = field(default_factory=ExitStack)
    """Ends, at `close`, what still works for the run on this rank."""
    leave_engine: Callable[[], None] = lambda: None
    """Destroys the engine's own groups; called before the default process group is destroyed."""

    @property
    def dp_rank(self) -> int:
        return int(dist.get_rank(self.groups.dp))

    @property
    def dp_size(self) -> int:
        return int(dist.get_world_size(self.groups.dp))

    @property
    def cp_rank(self) -> int:
        return int(dist.get_rank(self.groups.cp))

    @property
    def tp_rank(self) -> int:
        return int(dist.get_rank(self.groups.tp))

    @property
    def pp_rank(self) -> int:
        return int(dist.get_rank(self.groups.pp))

    @property
    def replica_rank(self) -> int:
        """Index of this rank among the tensor- and pipeline-parallel ranks of its replica."""
        return int(dist.get_rank(self.groups.mp))

    @property
    def replica_size(self) -> int:
        return int(dist.get_world_size(self.groups.mp))

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.parallel.pp - 1

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes the run's files."""
        return self.rank == 0

    def describe(self) -> str:
        """One line with the size of every axis."""
        p = self.parallel
        return (
            f"world {self.size}: tp {p.tp} x cp {p.cp} x pp {p.pp} (vpp {p.vpp}) x dp "
            f"{self.dp_size}, "
            f"experts etp {p.etp} x ep {p.ep}, {self.device.type}"
        )

    def barrier(self) -> None:
        """Wait for all ranks."""
        # torch's barrier connects more ranks with one another than a ring.
        dist.all_reduce(torch.zeros(1))

    @contextmanager
    def leaving_together(self) -> Iterator[None]:
        """Context manager around work without collectives of all ranks; every rank enters it. If
        `StopAsked` ends the work of one rank, it is raised on all of them, once all have met."""
        asked = torch.zeros(1, dtype=torch.int64)
        try:
            yield
        except StopAsked:
            asked += 1
        # The main rank, which looks for the request, may have no work left.
        self.watch.meet(self.stop.asked)
        if int(self.sum_over_ranks(asked)):
            raise StopAsked

    def broadcast_object(self, value: Any) -> Any:
        """Broadcast a JSON-like object from the main rank to every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """Gather an object from every rank, in rank order."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum_over_data_parallel(self, value: torch.Tensor) -> torch.Tensor:
        """Sum `value`, on the host or the device, in place over the data-parallel and
        context-parallel ranks, which hold different rows.

        The ranks exchange a host tensor without waiting for their devices.
        """
        groups = self.groups
        dist.all_reduce(value, group=groups.dp if self.parallel.cp == 1 else groups.dp_cp)
        return value

    def sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        """Sum `value`, on the host, in place over all ranks."""
        dist.all_reduce(value)
        return value

    def broadcast(self, value: torch.Tensor, src: int) -> None:
        """Overwrite `value`, contiguous on the host, with that of rank `src`."""
        if self.rank != src:
            value.zero_()
        # Trees of many roots connect more ranks with one another than a ring. One rank has bytes
        # other than zero, so their sum is exact.
        dist.all_reduce(value.view(-1).view(torch.uint8))

    def replicas(self) -> list[list[int]]:
        """The ranks of each data-parallel rank, which train alike. Every rank calls it."""
        table = torch.zeros(self.size, dtype=torch.int64)
        table[self.rank] = self.dp_rank
        found: list[list[int]] = [[] for _ in range(self.dp_size)]
        for rank, number in enumerate(self.sum_over_ranks(table).tolist()):
            found[number].append(rank)
        return found

    def deliver(
        self,
        owners: Sequence[int],
        sizes: Sequence[int],
        receivers: Sequence[Collection[int]],
        pack: Callable[[int], torch.Tensor],
    ) -> dict[int, torch.Tensor]:
        """Send message k, of `sizes[k]` bytes, from rank `owners[k]` to the ranks `receivers[k]`.

        Every rank passes the same, and its own `pack`: it returns message k, [sizes[k]] uint8 on
        the host, and is called for the messages that this rank sends. Returns the messages from
        other ranks to this one, by number. At most `SEND_WINDOW` bytes, or one message, are packed
        at a time.

        In a large world a message takes one hop for each axis of `grid`, so that a rank is
        connected to few others.
        """
        arrived: dict[int, torch.Tensor] = {}
        holders: list[Collection[int]] = [[owner] for owner in owners]
        stride = 1
        for axis in grid(self.size):
            hops = [
                _hops(holder, wanted, stride, axis)
                for holder, wanted in zip(holders, receivers, strict=True)
            ]
            self._hop(hops, sizes, lambda k: arrived[k] if k in arrived else pack(k), arrived)
            holders = [{at for at, _ in found} for found in hops]
            stride *= axis
        return {
            k: message
            for k, message in arrived.items()
            if self.rank in receivers[k] and self.rank != owners[k]
        }

    def _hop(
        self,
        hops: Sequence[Collection[tuple[int, int]]],
        sizes: Sequence[int],
        pack: Callable[[int], torch.Tensor],
        arrived: dict[int, torch.Tensor],
    ) -> None:
        """Send message k along `hops[k]`, pairs of receiver and sender, and add those that arrive
        here to `arrived`."""
        mine = {
            k: source
            for k, found in enumerate(hops)
            for target, source in found
            if target == self.rank != source
        }
        empty = {k: torch.empty(sizes[k], dtype=torch.uint8) for k in mine}
        # All receives are posted before the first send, so that no rank waits for another's turn.
        arriving = [dist.irecv(t, src=mine[k], tag=k) for k, t in empty.items() if t.numel()]
        leaving: list[Any] = []
        packed = 0
        for k, found in enumerate(hops):
            targets = sorted(t for t, source in found if source == self.rank != t)
            if not targets or not sizes[k]:
                continue
            if leaving and packed + sizes[k] > SEND_WINDOW:
                for work in leaving:
                    work.wait()
                leaving, packed = [], 0
            message = pack(k)
            leaving += [dist.isend(message, dst=rank, tag=k) for rank in targets]
            packed += sizes[k]
        for work in (*leaving, *arriving):
            work.wait()
        arrived |= empty

    def close(self) -> None:
        """Leave all process groups, so that another layout may start in this process."""
        self.at_close.close()
        self.leave_engine()
        if dist.is_initialized():
            dist.destroy_process_group()


def grid(size: int) -> list[int]:
    """Sizes of the axes of a grid of `size` ranks, the first varies fastest: at most `AXIS` each
    where its factors allow. One axis if the world is small."""
    if size <= 2 * AXIS:
        return [size]
    axes = []
    while size > 1:
        axis = next((n for n in range(AXIS, 1, -1) if size % n == 0), size)
        axes.append(axis)
        size //= axis
    return axes


def _hops(
    holders: Collection[int], receivers: Collection[int], stride: int, axis: int
) -> set[tuple[int, int]]:
    """Pairs of the rank that gets a message and the one that sends it, along an axis of the grid:
    every receiver's coordinate is then held by a rank whose coordinates before it are right too.

    A rank that keeps the message sends it to itself.
    """
    found = set()
    inner = stride * axis
    # Later coordinates are those of the owner.
    by_coordinates = {holder % stride: holder for holder in holders}
    for receiver in receivers:
        source = by_coordinates[receiver % stride]
        found.add((source - source % inner + receiver % inner, source))
    return found


def main_first(world: World, work: Any, rest: Any) -> Any:
    """Run `work()` on the main rank, then `rest()` on the others; a failure fails all ranks.

    The others wait without a timeout: the watchdog ends the job if the work stalls. Long work must
    report its progress.
    """
    failure, result = None, None
    if world.is_main:
        try:
            result = work()
        except Exception as error:
            failure = error
    world.watch.meet()
    message = world.broadcast_object(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    if message is not None:
        raise MainRankError(message)
    return result if world.is_main else rest()
