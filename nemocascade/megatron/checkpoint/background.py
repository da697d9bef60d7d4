"""Checkpoints that are written while training continues.

Training waits for a copy of the state in host memory. A thread of each rank writes the rank's part
from it, and tells rank 0 through the job's store. When all parts are on disk, the thread of rank 0
completes the folder. One save at a time is in progress.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
import time
import uuid
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nemocascade.megatron.checkpoint.errors import StorageProblem, storage_problem
from nemocascade.megatron.checkpoint.storage import copied_to_host
from nemocascade.megatron.checkpoint.writing import FolderTask, Report, WriteOutcome, write_now
from nemocascade.runtime.host_memory import available_memory
from nemocascade.runtime.launcher import ranks_of_node
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.watchdog import job_store
from nemocascade.runtime.world import World

HOST_SHARE = 0.5
"""Largest share of a node's available memory that the copies of its ranks may take."""
GIVE_UP_S = 1800.0
"""Rank 0 gives a save up if no part of it was finished for so long."""
ABANDONED_S = 60.0
"""The same after an error, when other ranks may have ended in the middle of their parts."""
_POLL_S = 0.2


@dataclass(eq=False)
class _Save:
    """A save in progress. reported: number of parts that rank 0 knows of. outcome: set at the end,
    on ranks other than 0 only if they could not send their report."""

    task: FolderTask
    thread: threading.Thread | None = None
    reported: int = 0
    outcome: WriteOutcome = field(default_factory=WriteOutcome)


class Writer:
    """Writes opened checkpoints. Every rank makes one and calls its methods alike.

    asynchronous: write while training continues. Where that is unsafe, the reason is logged once
    and saves are synchronous.
    """

    def __init__(self, world: World, *, asynchronous: bool) -> None:
        self.world = world
        self._asynchronous = asynchronous
        self._buffer: Tensor | None = None
        self._store: Any = None
        self._name = ""
        self._number = 0
        self._save: _Save | None = None
        self._give_up_s = GIVE_UP_S
        world.at_close.callback(self.abandon)

    @property
    def is_busy(self) -> bool:
        """True if there is a save whose `finish` was not called yet."""
        return self._save is not None

    @property
    def is_done(self) -> bool:
        """True on rank 0 if a save has ended whose `finish` was not called yet."""
        return self._save is not None and not _is_running(self._save)

    def write(self, task: FolderTask) -> None:
        """Write the checkpoint, or copy it and return while it is written.

        The save before must be finished. Raises CheckpointError like `write_folder`.
        """
        if self._asynchronous and not self._name:
            self._prepare(task)
        if not self._asynchronous:
            write_now(task, self.world)
            return
        shards = copied_to_host(task.shards, self._host_memory(task))
        save = _Save(replace(task, shards=shards))
        self._number += 1
        save.thread = threading.Thread(target=self._run, args=(save,), name="checkpoint")
        self._save = save
        save.thread.start()

    def finish(self) -> bool:
        """Wait until the save in progress is complete; False if there was none.

        Raises CheckpointError on every rank, or NonFiniteWeightsError, if it could not be written.
        """
        save = self._save
        if save is None:
            return False
        self._wait(save)
        self._save = None
        self.world.watch.meet()
        outcomes: list[WriteOutcome] = self.world.all_gather_object(save.outcome)
        for outcome in outcomes:
            outcome.check(save.task.final)
        return True

    def abandon(self) -> None:
        """Wait on this rank alone until the running save, if there is one, has finished.

        After an error, so that a run completes its last save if its ranks can, and nothing writes
        to a folder that another job may own.
        """
        save, self._save = self._save, None
        self._give_up_s = ABANDONED_S
        if save is not None and save.thread is not None:
            save.thread.join()

    def _prepare(self, task: FolderTask) -> None:
        """Check on all ranks that saves can be asynchronous, and get the memory for the copy."""
        self._store = job_store() if self.world.size > 1 else None
        reason = ""
        if self.world.size > 1 and self._store is None:
            reason = "the ranks share no TCP store"
        needed = sum(p.tensor.nbytes for p in task.shards)
        ranks = ranks_of_node()
        free = available_memory()
        if needed * ranks > HOST_SHARE * free:
            reason = (
                f"copies of {needed * ranks / 2**30:.1f} GiB need more than {HOST_SHARE:.0%} of "
                f"the {free / 2**30:.1f} GiB of host memory that is available"
            )
        reasons = self.world.all_gather_object((reason, uuid.uuid4().hex))
        self._name = f"nemocascade/checkpoints/{reasons[0][1]}"
        for rank, (found, _) in enumerate(reasons):
            if found:
                LOGGER.warning(
                    "checkpoints are written synchronously, because on rank %d %s: give the nodes "
                    "more memory, or set --checkpoint.asynchronous False",
                    rank,
                    found,
                )
                self._asynchronous = False
                return

    def _host_memory(self, task: FolderTask) -> Tensor:
        """Memory of the copy, kept from one save to the next."""
        needed = sum(p.tensor.nbytes for p in task.shards)
        if self._buffer is None or self._buffer.numel() < needed:
            self._buffer = None
            # States of random generators differ in length by a few bytes.
            needed += 1 << 16
            pinned = self.world.device.type == "cuda"
            self._buffer = torch.empty(needed, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        return self._buffer

    def _run(self, save: _Save) -> None:
        """Write this rank's part, and complete the save on rank 0; in the save's thread."""
        started = time.monotonic()
        name = save.task.final.name
        try:
            self._complete(save)
        except Exception as error:  # raised by `finish`
            problem = f"rank {self.world.rank} cannot write its part: {error!r}"
            save.outcome = WriteOutcome(problems=[storage_problem(problem, error)])
        if save.outcome.problems:
            LOGGER.error("%s: %s", name, "; ".join(save.outcome.problems))
        elif self.world.is_main:
            LOGGER.info("%s is complete after %.1f s", name, time.monotonic() - started)

    def _complete(self, save: _Save) -> None:
        report = save.task.write()
        if self.world.size == 1:
            save.outcome = save.task.finish([report])
            return
        store, key = self._store, f"{self._name}/{self._number}"
        store.set(f"{key}/{self.world.rank}", pickle.dumps(report))
        store.add(f"{key}/reported", 1)
        if self.world.is_main:
            save.outcome = save.task.finish(self._reports(save, key))

    def _reports(self, save: _Save, key: str) -> list[Report]:
        """The reports of all ranks, on rank 0."""
        store, size = self._store, self.world.size
        moved = time.monotonic()
        while save.reported < size:
            reported = store.add(f"{key}/reported", 0)
            if reported > save.reported:
                save.reported, moved = reported, time.monotonic()
            elif time.monotonic() - moved > self._give_up_s:
                problem = f"{size - reported} ranks do not finish their files"
                return [WriteOutcome(problems=[StorageProblem(problem)])]
            else:
                time.sleep(min(_POLL_S, 0.005 + (time.monotonic() - moved) / 20))
        keys = [f"{key}/{rank}" for rank in range(size)]
        reports = [pickle.loads(data) for data in store.multi_get(keys)]
        for name in (*keys, f"{key}/reported"):
            store.delete_key(name)
        return reports

    def _wait(self, save: _Save) -> None:
        """Wait for this rank's thread, and report its progress to the watchdog."""
        seen: tuple[int, int] | None = None
        while _is_running(save):
            assert save.thread is not None
            save.thread.join(_POLL_S)
            size = 0
            with contextlib.suppress(OSError):
                size = save.task.file.stat().st_size
            if seen != (seen := (size, save.reported)):
                self.world.watch.progress(f"{size} bytes written, {save.reported} parts are done")


def _is_running(save: _Save) -> bool:
    return save.thread is not None and save.thread.is_alive()
