"""Watchdog: names a stalled or dead rank, on every rank, before a collective times out.

On each rank a thread writes a heartbeat to the job's store every `interval` and reads those of the
other ranks. A heartbeat holds the main thread's phase, progress, collective and stack. A rank
without heartbeats for `limit_s` is stopped or dead. When a rank has waited in one collective for
`limit_s`, the ranks outside it are suspects. A suspect stalls if it has reported no progress for
`limit_s`. Then every rank logs the culprit, writes the stacks of its own threads and the last known
stack of silent ranks, and exits with EXIT_CODE.

A rank that raises reports its error to the others, and waits a moment so that they can log it.

Where ranks wait for work outside the model, such as a verifier, they call `meet` before a
collective. A meeting has no timeout, and a rank counts as stalled only if it reports no progress.
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
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from nemocascade.runtime.launcher import ranks_of_node
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.run_lock import release_locks

EXIT_CODE = 4
SUSPECTS = "suspect_nodes"
"""File in the run folder with the hosts of ranks that died, were stopped or stalled, a line each;
the job's script excludes them from further starts. The variable NEMOCASCADE_SUSPECTS names another
file."""
GRACE_S = 20.0
_MEETING_S = 1.0
"""Longest poll interval in a meeting, in seconds."""
_ENDED = "ended by its launcher (SIGTERM)"
# Frames of the main thread's stack in each heartbeat.
_FRAMES = 12


@dataclass
class Sign:
    """The heartbeat of a rank.

    beat: counter of heartbeats. since_s: time since the main thread entered the phase. progress:
    description of the progress within it. still_s: time without a new phase or progress.
    collective: the current one, empty outside. waits_s: time seen in that collective without a
    break. failed: the rank's error. done: the rank exits, regularly or after naming a culprit.
    verdict: its lines about the culprit, which all ranks adopt.
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
        """Description of the rank and its activity, for messages."""
        if not self.pid:
            return f"rank {self.rank}, {self.phase}"
        inside = f", in {self.collective}" if self.collective else ", outside any collective"
        far = f" ({self.progress})" if self.progress else ""
        return (
            f"rank {self.rank} ({self.host}, process {self.pid}), phase {self.phase!r}{far} for "
            f"{self.since_s:.1f} s{inside}"
        )


class Watchdog:
    """Watches the ranks of a job. Without a store it only records the phase.

    store: of this watchdog alone. limit_s: seconds of silence or stall that end the job. stacks:
    folder for stack dumps; the hosts of culprits are written beside it, to `SUSPECTS`. stalls:
    False for work that may take any time, of which a rank is named only if it is silent.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        store: Any = None,
        limit_s: float = 0.0,
        stacks: Path | None = None,
        stalls: bool = True,
    ) -> None:
        self.rank, self.size, self.store = rank, size, store
        self._stalls = stalls
        self.prefix = "nemocascade/watchdog"
        self.limit_s, self.stacks = limit_s, stacks
        # Every rank reads all heartbeats, so the interval grows with the number of ranks.
        self.interval = max(0.05, min(limit_s / 10, max(5.0, size / 100)))
        self._own = Sign(rank, _host(), os.getpid())
        self._entered = self._moved = self._waiting_since = time.monotonic()
        self._seen: dict[int, tuple[Sign, float]] = {}
        self._unheard = set(range(size))
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._main = threading.main_thread().ident
        self._thread: threading.Thread | None = None
        self._wake: tuple[int, int] | None = None
        self._before: Any = signal.SIG_DFL
        self._meetings = 0
        self._waits_for = ""
        self.on_change: Callable[[str, str], object] = lambda phase, progress: None
        """Called with each new phase and progress, in the thread that reports it."""

    def start(self) -> None:
        """Start watching. Call it in the main thread."""
        if self.store is None:
            return
        # A rank that is never heard is silent from here on.
        now = time.monotonic()
        for rank in self._unheard:
            self._seen[rank] = Sign(rank, "", 0, phase="before its first heartbeat"), now
        self._tell()
        read, write = os.pipe()
        os.set_blocking(write, False)
        self._wake = (read, write)
        # C code of the handler writes to the pipe even while the main thread waits in a collective.
        self._before = signal.signal(signal.SIGTERM, _leave)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop regularly, so that the other ranks do not take the silence for a failure."""
        if self._thread is None:
            return
        assert self._wake is not None
        self._own.done = not self._own.failed
        self._stop.set()
        with contextlib.suppress(OSError):
            os.write(self._wake[1], b"\0")
        self._thread.join(timeout=2 * self.interval + 5)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, self._before)
        self._thread = None
        with contextlib.suppress(Exception):
            self._tell()
        for descriptor in self._wake:
            os.close(descriptor)

    def enter(self, phase: str) -> None:
        """Record that the main thread enters `phase`, which reports will name."""
        with self._lock:
            self._own.phase, self._own.progress, self._waits_for = phase, "", ""
            self._entered = self._moved = self._waiting_since = time.monotonic()
        self.on_change(phase, "")

    def progress(self, progress: str) -> None:
        """Report progress within the phase: a rank that makes progress is not stalled.

        Cheap. Report only completed work, or a stalled rank is never found.
        """
        with self._lock:
            self._own.progress, self._waits_for = progress, ""
            self._moved = self._waiting_since = time.monotonic()
        self.on_change(self._own.phase, progress)

    def waits(self, what: str) -> None:
        """Record that the main thread waits for `what` of other ranks, outside a collective, until
        the next phase or progress; empty if it does not wait. A rank that waits is not a suspect.
        """
        self._waits_for = what

    def meet(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Wait, without a timeout, until every rank has called this as often as this one.

        meanwhile: called again and again while this rank waits.
        """
        self._meetings += 1
        if self.store is None or self._thread is None:
            return
        name = f"{self.prefix}/meeting"
        arrived = self.store.add(f"{name}_{self._meetings}", 1)
        started = time.monotonic()
        while arrived < self.size:
            # The poll interval grows with the time waited, up to the heartbeat interval.
            waited = time.monotonic() - started
            time.sleep(min(max(0.001, waited / 20), self.interval, _MEETING_S))
            meanwhile()
            arrived = self.store.add(f"{name}_{self._meetings}", 0)
        if self.rank == 0 and self._meetings > 1:
            # Every rank has left the previous meeting before it enters this one.
            self.store.delete_key(f"{name}_{self._meetings - 1}")

    def tell_time(self, seconds: float) -> None:
        """Tell the other ranks the time of this rank's own work in a step; see `rank_times`."""
        if self.store is not None and self._thread is not None:
            self.store.set(f"{self.prefix}/time/{self.rank}", repr(seconds))

    def rank_times(self) -> list[float]:
        """The newest time that each rank has reported, by rank; [] until all have."""
        keys = [f"{self.prefix}/time/{rank}" for rank in range(self.size)]
        if self.store is None or self._thread is None or not self.store.check(keys):
            return []
        return [float(text) for text in self.store.multi_get(keys)]

    def host_of(self, rank: int) -> str:
        """Host of a rank: as its heartbeat names it, or one of another rank that the same launcher
        has started; empty if none is known."""
        with self._lock:
            hosts = {r: s.host for r, (s, _) in self._seen.items() if s.host}
        count = ranks_of_node()
        first = rank - rank % count
        return hosts.get(rank) or next(
            (hosts[r] for r in range(first, first + count) if r in hosts), ""
        )

    def fail(self, error: BaseException) -> None:
        """Report to the other ranks that this rank fails with `error`, and log the culprit.

        Call it while the error is handled; a second call does nothing. A broken connection is
        usually the fault of another rank, so this waits a few intervals for a silent rank.
        """
        if self._thread is None or self._own.failed:
            return
        with self._lock:
            self._own.failed = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            frames = _frames(traceback.walk_tb(error.__traceback__))[::-1]
            self._own.stack, self._own.collective = _summary(frames), _collective(frames)
        deadline = time.monotonic() + max(1.0, 6 * self.interval)
        with contextlib.suppress(Exception):  # without a store there is nobody to report to
            self._tell()
            while time.monotonic() < deadline and not self._others_know():
                time.sleep(min(0.1, self.interval))
                self._listen()
                if self._silent(4 * self.interval):
                    break
        if self._all_failed():
            return  # the whole job failed, not one rank: each rank shows its own error
        silent = self._silent(4 * self.interval)
        self._suspect([s for s, _ in silent])
        self._log(_died(silent) or [f"failed: {self._own.where()}: {self._own.failed}"])
        self._dump([sign for sign, _ in silent])

    def _others_know(self) -> bool:
        """True if every other rank has failed or left as well, so that nobody needs the report."""
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
            except Exception as error:  # the store's host has failed, so the job has too
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
                collective = self._waits_for or _collective(frames)
                if not collective or collective != own.collective:
                    self._waiting_since = time.monotonic()
                own.stack, own.collective = _summary(frames), collective
                own.waits_s = time.monotonic() - self._waiting_since
            text = json.dumps(asdict(own))
        self.store.set(f"{self.prefix}/{self.rank}", text)

    def _listen(self) -> None:
        self._unheard = {r for r in self._unheard if not self.store.check([f"{self.prefix}/{r}"])}
        keys = [f"{self.prefix}/{r}" for r in range(self.size) if r not in self._unheard]
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
        return [
            (s, now - at)
            for s, at in seen
            # Ranks do not start at the same moment.
            if not (s.done or s.failed) and now - at > (limit_s if s.pid else self.limit_s)
        ]

    def _problem(self) -> tuple[list[str], list[Sign]] | None:
        """Messages about the job's problem, and the silent ranks; None without a problem."""
        with self._lock:
            signs = [sign for sign, _ in self._seen.values()]
        quiet = self._silent(3 * self.interval)
        missing = [sign for sign, _ in quiet]
        for sign in signs:
            if sign.verdict and sign.rank != self.rank:
                return sign.verdict, missing
        silent = self._silent(self.limit_s)
        if silent:
            self._suspect([s for s, _ in silent])
            return _died(silent), missing
        failed = [s for s in signs if s.failed]
        if failed:
            return [f"failed: {s.where()}: {s.failed}" for s in failed], missing
        busy = [s for s in signs if not s.done]
        longest = max(busy, key=lambda s: s.waits_s, default=None)
        if longest is None or longest.waits_s < self.limit_s or not self._stalls:
            return None
        culprits = _culprits(busy, self.limit_s)
        gone = [pair for pair in quiet if pair[0] in culprits]
        waited = f"; rank {longest.rank} has waited {longest.waits_s:.1f} s in {longest.collective}"
        # A rank that makes progress is slow, not stalled.
        stuck = [s for s in culprits if s.still_s >= self.limit_s]
        lines = _died(gone) or [f"stalls: {s.where()}" for s in stuck]
        if not lines:
            return None
        self._suspect([s for s, _ in gone] or stuck)
        return [line + waited for line in lines], missing

    def _terminated(self) -> None:
        """Exit after SIGTERM from the launcher, and name the rank that failed, if one did.

        That rank shows by its silence after a while. Launchers send SIGKILL later than GRACE_S.
        """
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
        self._suspect([s for s, _ in silent])
        lines = _died(silent) + [f"failed: {s.where()}: {s.failed}" for s in failed]
        lines = lines or [f"was ended by its launcher: {self._own.where()}"]
        self._end(lines, [s for s, _ in silent], code=128 + signal.SIGTERM)

    def _end(self, lines: list[str], silent: list[Sign], code: int = EXIT_CODE) -> None:
        self._log(lines)
        self._dump(silent)
        # Share the verdict first: the others must not take this rank for the culprit.
        with contextlib.suppress(Exception):
            self._own.done, self._own.verdict = True, lines
            self._tell()
            time.sleep(2 * self.interval)
        for handler in LOGGER.handlers:
            handler.flush()
        release_locks()
        os._exit(code)

    def _suspect(self, signs: list[Sign]) -> None:
        """Write down the hosts of culprits."""
        hosts = sorted({host for s in signs if (host := self.host_of(s.rank))})
        if self.stacks is None or not hosts:
            return
        path = Path(os.environ.get("NEMOCASCADE_SUSPECTS") or self.stacks.parent / SUSPECTS)
        with contextlib.suppress(OSError), path.open("a") as file:
            file.write("".join(f"{host}\n" for host in hosts))

    def _log(self, lines: list[str]) -> None:
        for line in lines:
            LOGGER.error("watchdog on rank %d: %s", self.rank, line)

    def _dump(self, silent: list[Sign]) -> None:
        """Write the stacks of this rank's threads, and the last known ones of silent ranks."""
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


def _host() -> str:
    """Name of this host, as Slurm knows it where Slurm started the process."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def job_store(store: Any = None) -> Any:
    """A new connection to `store`, or to the launcher's store beneath the default process group;
    None without a TCP store.

    The main thread may block the group's own connection for as long as a rank is missing.
    """
    import torch.distributed as dist

    launchers: Any = dist.distributed_c10d._get_default_store() if store is None else store
    while hasattr(launchers, "underlying_store"):
        launchers = launchers.underlying_store
    if not isinstance(launchers, dist.TCPStore):
        return None
    chosen: Any = launchers if store is None else store
    return chosen.clone()


def _died(silent: list[tuple[Sign, float]]) -> list[str]:
    return [f"has died or was stopped: {s.where()}; silent for {q:.1f} s" for s, q in silent]


def _culprits(signs: list[Sign], limit_s: float) -> list[Sign]:
    """Ranks that the others wait for: outside a collective, or in the one with the fewest ranks.

    Empty while a rank has only just entered its collective: the others may have waited for it.
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
    """The outermost torch.distributed function on the stack, or `meet`, with its caller; empty if
    there is none."""
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
    """Signal handler that does nothing: the watchdog's thread exits, see `_terminated`."""
