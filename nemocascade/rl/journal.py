"""The journal of a step's rollouts, from which a killed step resumes.

Every rank appends what it verifies to a file of its own, RUN/journal/NAME/rank_N.rollouts: a
rollout once it is complete, its verdict once it is known. A later start reads all files of the
folder, whatever its layout; rank r reads those of the former ranks r, r + size, and so on.

**What a rollout is bound to.** `bound_to.json` in the folder names the weights and the settings
that decide its rollouts. Another start with others drops the folder. Each record names its request:
the prompt, the verifier's data and the sampling. So nothing is restored that would be another.

**What is not kept.** Rollouts that a server gave up or whose tools failed because of the host, and
verdicts that the host failed to give: a later start tries them again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import numpy as np
import torch

from nemocascade.rl.rollout_records import (
    DamagedRecordError,
    Head,
    read_record,
    read_records,
    record_bytes,
    rollout_of,
    rollout_record,
    scored_outcome,
    verdict_of,
    verdict_record,
)
from nemocascade.rl.rollouts import Rollout
from nemocascade.rl.tasks import GroupRequest
from nemocascade.runtime.files import naming, replace_text
from nemocascade.runtime.jsonl import json_text
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.world import World

FOLDER = "journal"
SYNC_S = 10.0
"""Interval at which a file is forced to its disk. A killed process loses nothing in between; a host
that fails may."""
_BOUND = "bound_to.json"
_FILE = re.compile(r"rank_(\d{5,})\.rollouts")
_SHOWN = 5


@dataclass(frozen=True)
class RecordPosition:
    """A rollout in the journal: number of its file, and first byte of its record."""

    file: int
    start: int


@dataclass(frozen=True)
class Kept:
    """The records of some requests in the journal, by id; the same on every rank.

    rollouts, verdicts: places of their records. rewards: of those with a verdict, as groups compare
    them; None without one.
    """

    rollouts: Mapping[int, RecordPosition] = field(default_factory=dict)
    verdicts: Mapping[int, RecordPosition] = field(default_factory=dict)
    rewards: Mapping[int, float | None] = field(default_factory=dict)


def step_journal(step: int) -> str:
    """Name of the journal of a step's rollouts. step: counted from 0; the name counts from 1."""
    return f"step_{step + 1:08d}"


def heldout_journal(steps: int) -> str:
    """Name of the journal of the held-out answers after `steps` steps."""
    return f"heldout_{steps:08d}"


class Journal:
    """One folder of the journal; every rank opens and closes it. Appending is thread-safe.

    files: numbers of the files that it holds. bound_to: digest of what decides all rollouts;
    records of another are not used, should another job write to the folder. failure: the reason why
    nothing is appended any more.
    """

    def __init__(self, folder: Path, world: World, files: Sequence[int], bound_to: str) -> None:
        self.folder, self.world, self.bound_to = folder, world, bound_to
        self.failure = ""
        self._files = files
        self._groups: dict[int, GroupRequest] = {}
        self._keys: dict[int, str] = {}
        self._lock = Lock()
        self._file: BinaryIO | None = None
        self._is_open = True
        self._synced = time.monotonic()
        self._ends: dict[int, int] = {}
        self._found: dict[tuple[str, int], tuple[RecordPosition, str, Rollout | None]] = {}
        self._read()

    def kept(
        self, wanted: Sequence[GroupRequest], reward_of: Callable[[Rollout], float | None]
    ) -> Kept:
        """The records of the requests of `wanted`; every rank calls it. Records are then appended
        for these requests.

        reward_of: the reward of a scored rollout in its group.
        """
        self._groups |= {number: group for group in wanted for number in group.ids}
        if not self._files:
            return Kept()
        numbers = [number for group in wanted for number in group.ids]
        # Count, file and start of the rollout and of the verdict; is there a reward; the reward.
        table = np.zeros((len(numbers) + 1, 8), dtype=np.int64)
        for row, number in zip(table, numbers, strict=False):
            for first, kind in ((0, "rollout"), (3, "verdict")):
                place, key, outcome = self._found.get(
                    (kind, number), (RecordPosition(0, 0), "", None)
                )
                if not key:
                    continue
                if key != self._key(number):
                    table[-1, 0] += 1
                    continue
                row[first : first + 3] = 1, place.file, place.start
                reward = None if outcome is None else reward_of(outcome)
                if reward is not None:
                    row[6:] = 1, np.float64(reward).view(np.int64)
        self.world.watch.meet()
        self.world.sum_over_ranks(torch.from_numpy(table))
        # Two files may hold a rollout, if one could not be read in between: it is made again.
        rollouts = {n: RecordPosition(*r[1:3]) for n, r in _rows(numbers, table) if r[0] == 1}
        scored = {n: r for n, r in _rows(numbers, table) if r[3] == 1 and n in rollouts}
        if table[-1, 0]:
            LOGGER.warning(
                "%s: %d records are of other prompts or sampling, and are not used",
                self.folder,
                table[-1, 0],
            )
        return Kept(
            rollouts,
            {n: RecordPosition(*r[4:6]) for n, r in scored.items()},
            {n: _float(r[7]) if r[6] else None for n, r in scored.items()},
        )

    def owner(self, place: RecordPosition) -> int:
        """The rank that restores the rollout at `place`."""
        return place.file % self.world.size

    def load(self, place: RecordPosition, verdict: RecordPosition | None, domain: str) -> Rollout:
        """The rollout at `place` with its verdict, from any rank's file. domain: of its task."""
        rollout = rollout_of(read_record(self._path(place.file), place.start))
        if verdict is None:
            return rollout
        record = read_record(self._path(verdict.file), verdict.start)
        return rollout.scored(verdict_of(record), domain)

    def add(self, number: int, rollout: Rollout) -> None:
        """Append a complete rollout, which need not have its verdict."""
        head, data = rollout_record(rollout)
        self._append("rollout", number, head, data)

    def add_verdict(self, number: int, rollout: Rollout) -> None:
        """Append a rollout's verdict, unless the host failed to give one."""
        if rollout.verdict.reward is not None or rollout.verdict.fault == "row":
            self._append("verdict", number, verdict_record(rollout))

    def close(self) -> None:
        """Close the file; later records are dropped."""
        with self._lock:
            self._is_open = False
            if self._file is not None:
                with contextlib.suppress(OSError):
                    self._file.close()

    def _append(self, kind: str, number: int, head: Head, data: bytes | memoryview = b"") -> None:
        named = {"kind": kind, "id": number, "key": self._key(number), **head}
        try:
            parts = record_bytes(named, data)
            is_exact = kind != "verdict" or json.loads(json.dumps(head)) == head
        except (TypeError, ValueError):
            is_exact = False
        if not is_exact:
            # Details of a verdict that JSON does not have: a later start verifies again.
            return
        with self._lock:
            if not self._is_open:
                return
            path = self._path(self.world.rank)
            try:
                with naming(path):
                    self._file = self._file or self._open(path)
                    for part in parts:
                        self._file.write(part)
                    self._file.flush()
            except OSError as error:
                self.failure = f"{error.filename}: {error.strerror}"
                self._is_open = False
                return
            is_due = time.monotonic() - self._synced > SYNC_S
            if is_due:
                self._synced = time.monotonic()
            descriptor = self._file.fileno()
        if is_due:
            # Outside the lock: it may take long, and the file may be closed meanwhile.
            with contextlib.suppress(OSError):
                os.fdatasync(descriptor)

    def _open(self, path: Path) -> BinaryIO:
        # Another host may have made the folder, and this one not know it yet.
        self.folder.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
        if self.world.rank in self._ends:
            # Bytes after the last complete record would hide later records.
            file.truncate(self._ends[self.world.rank])
        return file

    def _read(self) -> None:
        """Find the records of this rank's share of the files."""
        if not self._files:
            return
        faults = []
        for file in self._files:
            if file % self.world.size == self.world.rank:
                fault = self._read_file(file)
                faults += [f"{self._path(file)}: {fault}"] if fault else []
        every = [fault for found in self.world.all_gather_object(faults) for fault in found]
        for fault in every[:_SHOWN]:
            LOGGER.warning("%s; what follows is dropped", fault)
        if len(every) > _SHOWN:
            LOGGER.warning("and %d files more", len(every) - _SHOWN)

    def _read_file(self, file: int) -> str:
        """Find the records of a file; returns what ended it early, if something did."""
        self._ends[file] = 0
        try:
            for record in read_records(self._path(file)):
                head = record.head
                outcome = scored_outcome(record) if head["kind"] == "verdict" else None
                place = RecordPosition(file, record.start)
                self._found[head["kind"], head["id"]] = (place, head["key"], outcome)
                self._ends[file] = record.end
        except DamagedRecordError as error:
            return str(error)
        except (KeyError, TypeError, ValueError) as error:
            return f"a record that is not a rollout ({type(error).__name__}: {error})"
        except OSError as error:
            if file == self.world.rank:
                # It may be whole: nothing is appended, and nothing cut off.
                self._is_open, self.failure = False, f"{self._path(file)}: {error.strerror}"
            return f"it cannot be read ({error.strerror})"
        return ""

    def _path(self, file: int) -> Path:
        return self.folder / f"rank_{file:05d}.rollouts"

    def _key(self, number: int) -> str:
        """Digest of what decides a request's rollout and its verdict, besides the settings."""
        group = self._groups[number]
        first = group.ids[0]
        if first not in self._keys:
            prompt = group.task.prompt
            data = json.dumps(dict(prompt.answer), sort_keys=True, default=str)
            thinking = group.task.thinking
            parts = [self.bound_to, prompt.id, prompt.domain, group.sampling, thinking, data]
            text = "\n".join(map(str, parts))
            digest = hashlib.sha256(text.encode(errors="backslashreplace"))
            digest.update(group.task.ids.tobytes())
            self._keys[first] = digest.hexdigest()[:32]
        return self._keys[first]


class Journals:
    """The journal of a run, RUN/journal; every rank makes the same calls.

    bound_to: what decides all rollouts, besides each request, as JSON values by name; evaluated
    whenever a folder is opened.
    """

    def __init__(
        self, run_dir: Path, world: World, bound_to: Callable[[], Mapping[str, Any]]
    ) -> None:
        self.root, self.world, self.bound_to = run_dir / FOLDER, world, bound_to
        self.is_on = True

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[Journal | None]:
        """Context manager: the journal `name`; None once a file could not be written."""
        if not self.is_on:
            yield None
            return
        self.world.watch.enter("journal")
        folder, bound_to = self.root / name, dict(self.bound_to())
        files: list[int] = []
        if self.world.is_main:
            files = self._prepare(folder, bound_to)
        found = files, hashlib.sha256(json_text(bound_to).encode()).hexdigest()
        journal = Journal(folder, self.world, *self.world.broadcast_object(found))
        try:
            yield journal
        finally:
            journal.close()
        self._check(journal)

    def prune(self, step: int) -> None:
        """Delete what a checkpoint of `step` finished steps covers."""
        if not self.world.is_main:
            return
        for folder in self.root.glob("*_*"):
            kind, _, number = folder.name.partition("_")
            last = step if kind == "step" else step - 1
            if number.isdigit() and int(number) <= last:
                shutil.rmtree(folder, ignore_errors=True)

    def clear(self, name: str = "") -> None:
        """Delete the journal `name`, or all of them."""
        if self.world.is_main:
            shutil.rmtree(self.root / name, ignore_errors=True)
            with contextlib.suppress(OSError):
                # Other jobs may have theirs.
                self.root.rmdir()

    def _prepare(self, folder: Path, bound_to: Mapping[str, Any]) -> list[int]:
        """Make the folder, unless it is there and bound to the same; returns its files' numbers."""
        new = json.loads(json_text(bound_to))
        try:
            had = json.loads((folder / _BOUND).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            had = None
        if had == new:
            found = (_FILE.fullmatch(path.name) for path in folder.iterdir())
            return sorted(int(match[1]) for match in found if match)
        if isinstance(had, dict):
            names = [n for n in new.keys() | had.keys() if new.get(n) != had.get(n)]
            LOGGER.warning(
                "%s is of other %s: its rollouts are dropped", folder, ", ".join(sorted(names))
            )
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            replace_text(folder / _BOUND, json_text(new, indent=1) + "\n")
        except OSError as error:
            LOGGER.debug("%s: %s", error.filename, error.strerror)
        return []

    def _check(self, journal: Journal) -> None:
        """Switch the journal off if a rank could not write."""
        failed = torch.tensor([int(bool(journal.failure))])
        self.world.watch.meet()
        if not int(self.world.sum_over_ranks(failed)):
            return
        self.is_on = False
        every = [text for text in self.world.all_gather_object(journal.failure) if text]
        LOGGER.warning(
            "%s: the journal of rollouts is off from here on, and a killed step starts again: free "
            "space, or set --rollout.journal False",
            every[0],
        )


def _rows(
    numbers: Sequence[int], table: np.ndarray[Any, np.dtype[np.int64]]
) -> Iterator[tuple[int, list[int]]]:
    return zip(numbers, table.tolist(), strict=False)


def _float(bits: int) -> float:
    return float(np.int64(bits).view(np.float64))
