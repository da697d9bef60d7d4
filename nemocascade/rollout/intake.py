"""The requests that a replica takes from `Work`: polled by its first rank, broadcast to the others.

Ranks of a replica must start and cancel the same requests before the same pass. So all of them poll
after the same passes, and the first rank's answer holds for all. Ordered work gives every rank the
same answer without a broadcast.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from nemocascade.rollout.engine import Request, Supply, Work
from nemocascade.runtime.world import World

# Most passes between two polls of a replica of several ranks: a broadcast costs as much as a pass.
PASSES = 16
# Pause of a replica that has nothing to generate.
WAIT_S = 0.01


class Intake:
    """Takes requests of `work` for one replica.

    taken: number of requests so far. is_open: more may follow, or be cancelled.
    """

    def __init__(self, world: World, work: Work) -> None:
        self.world, self.work = world, work
        self.taken, self.is_open = 0, True
        self._group = world.groups.mp
        self._is_alone = self._group.size() == 1 or work.is_ordered
        self._polls = self._is_alone or self._group.rank() == 0
        self._passes = self._finished = self._looks = 0

    def poll(
        self, free_slots: int, busy: int, *, idle: bool, finished: int
    ) -> tuple[list[Request], set[int]]:
        """Requests to start, and ids that are cancelled; the same on every rank of the replica.

        free_slots: number of free slots that no request waits for. busy, idle: see `Work`.
        finished: number of requests that have finished so far.
        """
        self._passes += 1
        is_freed = free_slots > 0 and finished != self._finished
        is_due = self._is_alone or idle or is_freed or self._passes >= PASSES
        if not (self.is_open and is_due):
            if self._passes % PASSES == 0:
                self.work.check()
            return [], set()
        self._passes, self._finished = 0, finished
        supply = self._supply(free_slots, busy)
        self.is_open = supply.is_open
        self.taken += len(supply.taken)
        return [self.work.requests[i] for i in supply.taken], set(supply.cancelled)

    def is_stopped(self) -> bool:
        """True once the job was asked to stop, at the same pass on every rank of the replica; every
        pass asks once."""
        if self._group.size() == 1:
            return self.world.stop.asked()
        self._looks += 1
        if self._looks % PASSES:
            return False
        asked = torch.tensor([int(self.world.stop.asked())])
        # On the host: nothing waits for the device.
        dist.broadcast(asked, src=dist.get_global_rank(self._group, 0), group=self._group)
        return bool(asked)

    def wait(self) -> None:
        """Pause, because there is nothing to generate until another rank or a verdict decides."""
        self.work.idle()
        time.sleep(WAIT_S)

    def _supply(self, free_slots: int, busy: int) -> Supply:
        self.work.check()
        supply = self.work.poll(free_slots, busy) if self._polls else Supply()
        if self._is_alone:
            return supply
        box = [supply]
        dist.broadcast_object_list(box, src=dist.get_global_rank(self._group, 0), group=self._group)
        return box[0]
