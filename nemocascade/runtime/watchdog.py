"""Names the rank that stalls or dies, on every rank, before a collective's own time-out.

Each rank has a thread that tells the job's store, every `interval`, that the rank lives, in which
phase its main thread is, in which collective, and where in the code; and that reads what the others
told. A rank that is silent for `limit_s` is stopped or dead. When a rank has waited in one
collective for `limit_s`, those outside of any, or in another one than the rest, are what it waits
for; they stall if they have reported no progress for as long. Then every rank logs who it is,
writes the stacks of its own threads and the last known stack of the silent ones, and ends with
EXIT_CODE.

A rank that raises says so to the others, and waits a moment so that they can log it.

Where ranks wait for one that is at work on something else than the model, a verifier for instance,
they `meet` instead of entering a collective: that has no time-out of its own, and the rank that is
waited for counts as stuck only if it reports no progress.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from nemocascade.runtime.logging import LOGGER

EXIT_CODE = 4
GRACE_S = 20.0
_MEETING_S = 1.0
"""A rank in a meeting asks at least so often whether the others are there."""
_ENDED = "ended by its launcher (SIGTERM)"
# Frames of the main thread that travel with each sign of life.
_FRAMES = 12


@dataclass
class Sign:
    """The heartbeat of a rank.

    beat: rises with every sign. since_s: how long its main thread has been in the phase. progress:
    how far it is there. still_s: how long it has reported neither a phase nor progress.
    collective: the one it is in, empty outside. waits_s: how long it has been seen there without a
    break. failed: why it ends. done: it leaves, in order or because it names another rank.
    verdict: what it says of that rank; all ranks join in.
    """

    rank: int
    host: str
    pid: int
    beat: int = 0
    phase: str = "start"
    since_s: float = 0.0
    progress: str = ""
    still_s: float = 0.0
    collective: str = ""
    waits_s: float = 0.0
    stack: list[str] = field(default_factory=list)
    failed: str = ""
    done: bool = False
    verdict: list[str] = field(default_factory=list)

    def where(self) -> str:
        """The rank and what it was doing, for people."""
        inside = f", in {self.collective}" if self.collective else ", outside any collective"
        far = f" ({self.progress})" if self.progress else ""
        return (
            f"rank {self.rank} ({self.host}, process {self.pid}), phase {self.phase!r}{far} for "
            f"{self.since_s:.1f} s{inside}"
        )


class Watchdog:
    """Watches the ranks of a job. Without a store it does nothing but hold the phase's name.

    name: of the job, the same on all ranks and new for each: a store may outlive a job. limit_s:
    silence or stall that ends the job. stacks: folder for the stacks of all ranks.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        store: Any = None,
        name: str = "",
        limit_s: float = 0.0,
        stacks: Path | None = None,
    ) -> None:
        self.rank, self.size, self.store = rank, size, store
        self.prefix = f"nemocascade/watchdog/{name}"
        self.limit_s, self.stacks = limit_s, stacks
        # Every rank reads the signs of all: the more there are, the more rarely.
        self.interval = max(0.05, min(limit_s / 10, max(5.0, size / 100)))
        self._own = Sign(rank, socket.gethostname(), os.getpid())
        self._entered = self._moved = self._waiting_since = time.monotonic()
        self._seen: dict[int, tuple[Sign, float]] = {}
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._main = threading.main_thread().ident
        self._thread: threading.Thread | None = None
        self._wake: tuple[int, int] | None = None
        self._meetings = 0

    def start(self) -> None:
        """Begin to watch. Call it in the main thread."""
        if self.store is None:
            return
        read, write = os.pipe()
        os.set_blocking(write, False)
        self._wake = (read, write)
        # C code of the handler writes to the pipe even while the main thread waits in a collective.
        signal.signal(signal.SIGTERM, _leave)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Leave in order: the others must not take the silence for death."""
        if self._thread is None:
            return
        assert self._wake is not None
        self._own.done = not self._own.failed
        self._stop.set()
        with contextlib.suppress(OSError):
            os.write(self._wake[1], b"\0")
        self._thread.join(timeout=2 * self.interval + 5)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._thread = None
        with contextlib.suppress(Exception):
            self._tell()
        for descriptor in self._wake:
            os.close(descriptor)

    def enter(self, phase: str) -> None:
        """The main thread begins `phase`: what a report will say it was doing."""
        with self._lock:
            self._own.phase, self._own.progress = phase, ""
            self._entered = self._moved = self._waiting_since = time.monotonic()

    def progress(self, progress: str) -> None:
        """The main thread has got so far in its phase: whoever waits for it does so rightly.

        Cheap; but say it only where something was done, or a rank that is stuck is never named.
        """
        with self._lock:
            self._own.progress = progress
            self._moved = self._waiting_since = time.monotonic()

    def meet(self) -> None:
        """Wait until every rank has come here as often as this one, however long that takes."""
        self._meetings += 1
        if self.store is None or self._thread is None:
            return
        name = f"{self.prefix}/meeting"
        arrived = self.store.add(f"{name}_{self._meetings}", 1)
        started = time.monotonic()
        while arrived < self.size:
            # Short waits are asked after often, long ones as rarely as signs of life are told.
            waited = time.monotonic() - started
            time.sleep(min(max(0.001, waited / 20), self.interval, _MEETING_S))
            arrived = self.store.add(f"{name}_{self._meetings}", 0)
        if self.rank == 0 and self._meetings > 1:
            # Who is here has left the meeting before.
            self.store.delete_key(f"{name}_{self._meetings - 1}")

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank ends because of `error`, and name whom it died of.

        Called while the error is handled; a second call does nothing. A broken connection is
        another rank's doing: so this waits until a silent rank shows, or a few intervals.
        """
        if self._thread is None or self._own.failed:
            return
        with self._lock:
            self._own.failed = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            frames = _frames(traceback.walk_tb(error.__traceback__))[::-1]
            self._own.stack, self._own.collective = _summary(frames), _collective(frames)
        deadline = time.monotonic() + max(1.0, 6 * self.interval)
        with contextlib.suppress(Exception):  # without a store there is nobody to tell
            self._tell()
            while time.monotonic() < deadline and not self._others_know():
                time.sleep(min(0.1, self.interval))
                self._listen()
                if self._silent(4 * self.interval):
                    break
        if self._all_failed():
            return  # a fault of the job, not of a rank: each says it by itself
        silent = self._silent(4 * self.interval)
        self._log(_died(silent) or [f"failed: {self._own.where()}: {self._own.failed}"])
        self._dump([sign for sign, _ in silent])

    def _others_know(self) -> bool:
        """True if every other rank has failed or left as well, so that nobody is left to tell."""
        others = self._others()
        return len(others) == self.size - 1 and all(s.failed or s.done for s in others)

    def _all_failed(self) -> bool:
        others = self._others()
        return len(others) == self.size - 1 and all(s.failed for s in others)

    def _others(self) -> list[Sign]:
        with self._lock:
            return [s for r, (s, _) in self._seen.items() if r != self.rank]

    def _run(self) -> None:
        assert self._wake is not None
        import select

        while True:
            try:
                ready, _, _ = select.select([self._wake[0]], [], [], self.interval)
                self._tell()
                self._listen()
                problem = None if self._own.failed else self._problem()
            except Exception as error:  # the store's host is gone, and the job with it
                if not self._stop.is_set():
                    self._end([f"the job's store does not answer: {error}"], [])
                return
            if self._stop.is_set():
                return
            if ready and signal.SIGTERM in os.read(self._wake[0], 64):
                self._terminated()
            if problem is not None:
                self._end(*problem)

    def _tell(self) -> None:
        with self._lock:
            own = self._own
            own.beat += 1
            own.since_s = time.monotonic() - self._entered
            own.still_s = time.monotonic() - self._moved
            if not own.failed:
                frame = sys._current_frames().get(self._main or 0)
                frames = _frames(traceback.walk_stack(frame) if frame else ())
                collective = _collective(frames)
                if not collective or collective != own.collective:
                    self._waiting_since = time.monotonic()
                own.stack, own.collective = _summary(frames), collective
                own.waits_s = time.monotonic() - self._waiting_since
            text = json.dumps(asdict(own))
        self.store.set(f"{self.prefix}/{self.rank}", text)

    def _listen(self) -> None:
        keys = [f"{self.prefix}/{r}" for r in range(self.size)]
        if not self.store.check(keys):
            return
        now = time.monotonic()
        for text in self.store.multi_get(keys):
            sign = Sign(**json.loads(text))
            with self._lock:
                old = self._seen.get(sign.rank)
                if old is None or old[0].beat != sign.beat:
                    self._seen[sign.rank] = (sign, now)

    def _silent(self, limit_s: float) -> list[tuple[Sign, float]]:
        now = time.monotonic()
        with self._lock:
            seen = list(self._seen.values())
        return [(s, now - at) for s, at in seen if not (s.done or s.failed) and now - at > limit_s]

    def _problem(self) -> tuple[list[str], list[Sign]] | None:
        """The problem of the job, if any, and the ranks that cannot speak for themselves."""
        with self._lock:
            signs = [sign for sign, _ in self._seen.values()]
        quiet = self._silent(3 * self.interval)
        missing = [sign for sign, _ in quiet]
        for sign in signs:
            if sign.verdict and sign.rank != self.rank:
                return sign.verdict, missing
        silent = self._silent(self.limit_s)
        if silent:
            return _died(silent), missing
        failed = [s for s in signs if s.failed]
        if failed:
            return [f"failed: {s.where()}: {s.failed}" for s in failed], missing
        busy = [s for s in signs if not s.done]
        longest = max(busy, key=lambda s: s.waits_s, default=None)
        if longest is None or longest.waits_s < self.limit_s:
            return None
        culprits = _culprits(busy, self.limit_s)
        gone = [pair for pair in quiet if pair[0] in culprits]
        waited = f"; rank {longest.rank} has waited {longest.waits_s:.1f} s in {longest.collective}"
        # A rank that gets on is slower than the others, and not stuck.
        stuck = [s for s in culprits if s.still_s >= self.limit_s]
        lines = _died(gone) or [f"stalls: {s.where()}" for s in stuck]
        if not lines:
            return None
        return [line + waited for line in lines], missing

    def _terminated(self) -> None:
        """The launcher ends this rank, mostly because another one is gone: which one shows when it
        has been silent for a while. Launchers wait longer than GRACE_S before they kill."""
        self._own.failed = _ENDED
        deadline = time.monotonic() + GRACE_S
        silent: list[tuple[Sign, float]] = []
        failed: list[Sign] = []
        with contextlib.suppress(Exception):  # the store may be gone with the launcher
            while time.monotonic() < deadline and not (silent or failed or self._all_failed()):
                self._tell()
                time.sleep(self.interval / 4)
                self._listen()
                silent = self._silent(3 * self.interval)
                failed = [s for s in self._others() if s.failed and s.failed != _ENDED]
        lines = _died(silent) + [f"failed: {s.where()}: {s.failed}" for s in failed]
        lines = lines or [f"was ended by its launcher: {self._own.where()}"]
        self._end(lines, [s for s, _ in silent], code=128 + signal.SIGTERM)

    def _end(self, lines: list[str], silent: list[Sign], code: int = EXIT_CODE) -> None:
        self._log(lines)
        self._dump(silent)
        # The others must not take this rank for the one that died: they name the same one.
        with contextlib.suppress(Exception):
            self._own.done, self._own.verdict = True, lines
            self._tell()
            time.sleep(2 * self.interval)
        for handler in LOGGER.handlers:
            handler.flush()
        os._exit(code)

    def _log(self, lines: list[str]) -> None:
        for line in lines:
            LOGGER.error("watchdog on rank %d: %s", self.rank, line)

    def _dump(self, silent: list[Sign]) -> None:
        """Stacks of this rank's threads, and the last known ones of ranks that cannot write."""
        if self.stacks is None:
            return
        with contextlib.suppress(OSError):
            self.stacks.mkdir(parents=True, exist_ok=True)
            path = self.stacks / f"rank_{self.rank:05d}.txt"
            with path.open("w") as file:
                lines = [self._own.where(), *self._own.stack, "", "all threads:"]
                print("\n".join(lines), file=file, flush=True)
                faulthandler.dump_traceback(file=file, all_threads=True)
            for sign in silent:
                text = "\n".join([f"{sign.where()}, as it was last heard of", *sign.stack])
                (self.stacks / f"rank_{sign.rank:05d}.txt").write_text(text + "\n")
            LOGGER.error("watchdog on rank %d: stacks are in %s", self.rank, self.stacks)


def job_store() -> Any:
    """A connection of its own to the store of the default process group; None in one process.

    The main thread may hold the group's own connection for as long as a rank is missing.
    """
    import torch.distributed as dist

    store: Any = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    tcp: Any = store if isinstance(store, dist.TCPStore) else None
    return None if tcp is None else tcp.clone()


def _died(silent: list[tuple[Sign, float]]) -> list[str]:
    return [f"has died or was stopped: {s.where()}; silent for {q:.1f} s" for s, q in silent]


def _culprits(signs: list[Sign], limit_s: float) -> list[Sign]:
    """Those the others wait for: outside a collective, or in one that the fewest are in.

    Nobody while one has just come to its collective: it may be the one that the others waited for.
    """
    outside = [s for s in signs if not s.collective]
    if outside or min(s.waits_s for s in signs) < limit_s:
        return outside
    counts = Counter((s.phase, s.collective) for s in signs)
    fewest = min(counts.values())
    return [s for s in signs if counts[s.phase, s.collective] == fewest]


def _frames(walk: Iterable[tuple[FrameType, int]]) -> list[tuple[str, int, str]]:
    """File, line and function of each frame."""
    return [(frame.f_code.co_filename, line, frame.f_code.co_name) for frame, line in walk]


def _summary(frames: list[tuple[str, int, str]]) -> list[str]:
    return [f"  {file}:{line} in {name}" for file, line, name in frames[:_FRAMES]]


def _collective(frames: list[tuple[str, int, str]]) -> str:
    """The outermost function of torch.distributed that the thread is in, or the meeting, and who
    called it."""
    inside = [
        i
        for i, (file, _, name) in enumerate(frames)
        if file.endswith("distributed_c10d.py") or (file == __file__ and name == "meet")
    ]
    if not inside:
        return ""
    name = frames[inside[-1]][2]
    for file, line, caller in frames[inside[-1] + 1 :]:
        if not file.endswith(("c10d_logger.py", "contextlib.py")):
            return f"{name} called by {Path(file).name}:{line} in {caller}"
    return name


def _leave(_number: int, _frame: FrameType | None) -> None:
    """The watchdog's thread ends the process; see `Watchdog._terminated`."""
