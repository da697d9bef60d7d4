"""Trusted side of the sandbox: a pool of workers that run programs and sessions."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import selectors
import signal
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from nemocascade.recipe.envs import SandboxConfig
from nemocascade.runtime.cores import slots_of_rank
from nemocascade.runtime.logging import LOGGER
from nemocascade.sandbox import launch
from nemocascade.sandbox.fair_slots import FairSlots
from nemocascade.sandbox.pipes import Fd, pipe, receive_answer
from nemocascade.sandbox.series import run_series
from nemocascade.sandbox.session import SandboxSession
from nemocascade.types import Outcome, Program, SandboxError, SandboxUnavailable, Status

WALL_FACTOR = 2.0
"""Wall-clock limit of a program, in units of its CPU time limit."""
ALONE_FACTOR = 10.0
"""The same for a program that is repeated alone because it got too little CPU time."""
GRACE_S = 5.0
"""A worker that is silent for this long after a program's wall-clock limit is killed."""
_CHUNK = 1 << 16
_PAGE = 4096


class _StarvedError(SandboxError):
    """A program exceeded its wall-clock limit because it got too little CPU time."""


class SandboxPool:
    """A pool of workers. `run` blocks; threads share the pool.

    modules: installed modules that programs may import, besides the standard library.

    Raises ValueError for a module that is not installed, and SandboxUnavailable at once if the host
    forbids isolation and `allow_unsafe` is off.
    """

    def __init__(self, config: SandboxConfig | None = None, *, modules: Sequence[str] = ()) -> None:
        self.config = config or SandboxConfig()
        if problems := self.config.problems():
            raise ValueError("; ".join(problems))
        if missing := [path for path in self.config.packages if not os.path.isdir(path)]:
            raise ValueError(f"sandbox.packages: {', '.join(missing)} is not a folder here")
        self._modules = launch.installed(modules)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.isolation, first = self._choose()
        self.size = slots_of_rank(self.config.local_workers)
        self._slots = FairSlots[launch.Worker | None]([*([None] * (self.size - 1)), first])
        self._lock = threading.Lock()
        self._sessions: set[SandboxSession] = set()
        self._spare: list[launch.Worker] = []
        """Workers of ended sessions: they hold nothing of these, and start the next one at once."""

    def run(self, program: Program) -> Outcome:
        """Run one program; threads are served in the order of their calls.

        A program that got too little CPU time is repeated once, while no other runs in this pool.
        Raises SandboxError if it gets too little again, if a worker is lost or silent, and at once
        if the program's files exceed its folder's capacity.
        """
        _check_size(program.files, self.config)
        time_s = self.config.time_s
        try:
            return self._run(program, 1, WALL_FACTOR * time_s)
        except _StarvedError:
            return self._run(program, self.size, ALONE_FACTOR * time_s)

    def run_until(
        self, programs: Sequence[Program], stops: Callable[[int, Outcome], bool]
    ) -> list[Outcome]:
        """Run programs in order up to the first that `stops` the series, see `run_series`."""
        return run_series(self.run, self._slots, programs, stops)

    def session(self, cells: int) -> SandboxSession:
        """Open a session of at most `cells` cells, in a worker of its own. Its caller closes it.

        `time_s` and `output_kib` are limits of each cell. Raises SandboxError if none can be
        started.
        """
        try:
            with self._lock:
                worker = self._spare.pop() if self._spare else None
            worker = worker or self._start(self.isolation)
        except (launch.IsolationError, OSError) as error:
            raise SandboxError(f"no worker could be started: {error}") from error
        try:
            opened = SandboxSession(worker, self.config, cells, self._slots, self._take_back)
        except BaseException:
            worker.kill()
            raise
        with self._lock:
            self._sessions.add(opened)
        return opened

    def process_ids(self) -> list[int]:
        """Process ids of the idle workers."""
        with self._lock:
            return [w.pid for w in (*self._slots.idle(), *self._spare) if w is not None]

    def close(self) -> None:
        """End all workers and sessions; a later run starts new ones."""
        with self._lock:
            sessions = list(self._sessions)
        for session in sessions:
            session.close()
        with self._lock:
            while self._spare:
                self._spare.pop().kill()
        with self._slots.take(self.size) as workers:
            for i, worker in enumerate(workers):
                if worker is not None:
                    worker.kill()
                workers[i] = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _take_back(self, session: SandboxSession, worker: launch.Worker | None) -> None:
        with self._lock:
            self._sessions.discard(session)
            if worker is not None:
                self._spare.append(worker)

    def _run(self, program: Program, slots: int, wall_s: float) -> Outcome:
        with self._slots.take(slots) as workers:
            try:
                worker = workers[0]
                if worker is None:
                    worker = workers[0] = self._start(self.isolation)
                return _run(worker, program, self.config, wall_s)
            except _StarvedError:
                raise
            except launch.IsolationError as error:
                raise SandboxError(f"no worker could be started: {error}") from error
            except BaseException:
                # A worker with an unfinished exchange cannot be reused.
                if workers[0] is not None:
                    workers[0].kill()
                    workers[0] = None
                raise

    def _choose(self) -> tuple[launch.Isolation, launch.Worker]:
        asked = self.config.isolation
        kinds: tuple[launch.Isolation, ...] = (
            ("bubblewrap", "namespaces") if asked == "auto" else (asked,)
        )
        reasons = []
        for kind in kinds:
            reason = launch.missing(kind)
            if reason is None:
                try:
                    return kind, _proven(self._start(kind), self.config)
                except launch.IsolationError as error:
                    reason = str(error)
            reasons.append(f"{kind}: {reason}")
            if launch.missing(kind) is None:
                LOGGER.warning("the sandbox cannot use %s", reasons[-1])
        if not self.config.allow_unsafe:
            raise SandboxUnavailable(
                f"programs cannot be isolated here ({'; '.join(reasons)}). Allow user namespaces "
                "(sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns), "
                "install bubblewrap, or set sandbox.allow_unsafe to run them unprotected"
            )
        warnings.warn(
            f"programs run WITHOUT isolation, as this user ({'; '.join(reasons)}): they can read "
            "and delete whatever this user can",
            RuntimeWarning,
            stacklevel=3,
        )
        return "none", self._start("none")

    def _start(self, isolation: launch.Isolation) -> launch.Worker:
        if isolation == "none" and self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="nemocascade-")
        scratch = None if self._folder is None else self._folder.name
        return launch.start(isolation, self.config, scratch, self._modules)


# Self-test of an isolation backend, run inside; it ends with "isolated" if the isolation holds, and
# if programs can do what they may.
_PROBE = """
import mmap, multiprocessing, os, socket, tempfile, threading
assert os.getpid() == 1 and not os.path.exists("/proc/self") and os.listdir(".") == []
assert not os.access("/usr", os.W_OK)
try:
    socket.socket()
    raise SystemExit("a socket could be opened")
except PermissionError:
    pass
for name in ("null", "zero", "full", "random", "urandom"):
    open("/dev/" + name, "rb").close()
open(os.devnull, "w").write("x")
open("/dev/stdin").close()
with tempfile.TemporaryFile() as file:
    file.truncate(4096)
    mmap.mmap(file.fileno(), 4096).flush()
lock = multiprocessing.Lock()
thread = threading.Thread(target=lock.acquire)
thread.start()
thread.join()
for n in range({processes} + 1):
    try:
        if os.fork() == 0:
            os.read(0, 1)
            os._exit(0)
    except OSError:
        break
else:
    raise SystemExit("the number of processes is not limited")
print("isolated")
"""


def _proven(worker: launch.Worker, config: SandboxConfig) -> launch.Worker:
    """Return the worker if it passes the self-test. Raises IsolationError."""
    try:
        probe = Program(_PROBE.format(processes=config.processes))
        outcome = _run(worker, probe, config, ALONE_FACTOR * config.time_s)
    except SandboxError as error:
        worker.kill()
        raise launch.IsolationError(str(error)) from error
    if outcome.stdout.strip() != "isolated":
        worker.kill()
        said = outcome.stderr.strip().splitlines()
        raise launch.IsolationError(
            f"the isolation does not hold: {said[-1] if said else outcome.status}"
        )
    return worker


def _run(worker: launch.Worker, program: Program, config: SandboxConfig, wall_s: float) -> Outcome:
    """Pass the program's pipes to the worker, feed and drain them, and wait for its answer."""
    job = {
        "source": program.source,
        "function": program.function,
        "calls": program.calls,
        "preamble": program.preamble,
        "any_exit": program.any_exit,
        "files": {path: base64.b64encode(data).decode() for path, data in program.files.items()},
    }
    with contextlib.ExitStack() as stack:
        # The pool writes stdin and the job; it reads stdout, stderr and results.
        stdin_r, stdin_w = pipe(stack)
        out_r, out_w = pipe(stack)
        err_r, err_w = pipe(stack)
        result_r, result_w = pipe(stack)
        job_r, job_w = pipe(stack)
        theirs = [stdin_r, out_w, err_w, result_w, job_r]
        try:
            socket.send_fds(worker.channel, [b"run %g" % wall_s], [fd.number for fd in theirs])
        except OSError as error:
            raise SandboxError(f"a worker is gone: {error}") from error
        for fd in theirs:
            fd.close()
        exchange = _Exchange(
            worker.channel,
            {job_w: json.dumps(job).encode(), stdin_w: program.stdin.encode(errors="replace")},
            {out_r: bytearray(), err_r: bytearray(), result_r: bytearray()},
            config.output_kib << 10,
        )
        answer = exchange.run(time.monotonic() + wall_s + GRACE_S)
        out, err, results = exchange.read.values()
    if "status" not in answer:
        raise SandboxError(f"a program could not be isolated: {answer.get('unavailable')}")
    # Without its waits for a CPU, it had less wall-clock time than the CPU time it may use.
    if answer["over_time"] == "wall" and wall_s - answer["waited_s"] < config.time_s:
        raise _StarvedError(
            f"a program waited {answer['waited_s']:.1f} of {wall_s:g} s for a CPU: the host is too "
            "busy, lower sandbox.workers"
        )
    return Outcome(
        "output" if exchange.over else _status(answer, config),
        answer["status"],
        out.decode(errors="replace"),
        err.decode(errors="replace"),
        _parse(bytes(results)),
        answer["wall_s"],
        answer["cpu_s"],
    )


def _status(answer: Mapping[str, Any], config: SandboxConfig) -> Status:
    """How a program ended that did not write too much."""
    # The kernel kills a program over its CPU time, which threads use up faster than wall time.
    killed = answer["status"] == -signal.SIGKILL
    if answer["over_time"] or (killed and answer["cpu_s"] >= config.time_s):
        return "time"
    return "ok" if answer["status"] == 0 else "failed"


def _check_size(files: Mapping[str, bytes], config: SandboxConfig) -> None:
    """Raise SandboxError if `files` do not fit into half of the scratch folder."""
    folders = {str(parent) for path in files for parent in PurePosixPath(path).parents}
    pages = sum(-(-len(data) // _PAGE) for data in files.values()) + len(folders)
    entries = len(files) + len(folders)
    scratch_bytes = config.scratch_mib << 20
    if 2 * pages * _PAGE > scratch_bytes or 2 * entries > config.scratch_entries:
        raise SandboxError(
            f"{len(files)} files of {pages * _PAGE / 2**20:.1f} MiB are more than half of what "
            f"sandbox.scratch_mib({config.scratch_mib}) holds: raise it"
        )


class _Exchange:
    """Feeds and drains a program's pipes until its worker answers."""

    def __init__(
        self,
        channel: socket.socket,
        write: dict[Fd, bytes],
        read: dict[Fd, bytearray],
        limit: int,
    ) -> None:
        self._channel = channel
        self._write = {fd: memoryview(data) for fd, data in write.items()}
        self.read = read
        self._limit = limit
        self.over = False

    def run(self, deadline: float) -> dict[str, Any]:
        """Return the worker's answer. Raises SandboxError if there is none by `deadline`."""
        with selectors.DefaultSelector() as selector:
            for fd in self._write:
                os.set_blocking(fd.number, False)
                selector.register(fd, selectors.EVENT_WRITE)
            for fd in self.read:
                selector.register(fd, selectors.EVENT_READ)
            selector.register(self._channel, selectors.EVENT_READ)
            answer: dict[str, Any] | None = None
            # Once the program has ended, nobody holds the pipes, so they can be fully drained.
            while answer is None or any(fd in selector.get_map() for fd in self.read):
                events = selector.select(max(0.0, deadline - time.monotonic()))
                if not events and time.monotonic() >= deadline:
                    raise SandboxError("a worker did not answer in time and was killed")
                for key, _ in events:
                    if key.fileobj is self._channel:
                        answer = receive_answer(self._channel, "a program")
                        selector.unregister(self._channel)
                    elif not self._move(key.fileobj):
                        selector.unregister(key.fileobj)
        return answer

    def _move(self, fd: Any) -> bool:
        """Transfer some bytes; return False when the pipe is finished."""
        if fd in self._write:
            try:
                written = os.write(fd.number, self._write[fd][:_CHUNK])
            except BrokenPipeError:
                written = len(self._write[fd])  # the program closed its end
            self._write[fd] = self._write[fd][written:]
            if not self._write[fd]:
                fd.close()
                return False
            return True
        data = os.read(fd.number, _CHUNK)
        kept = self.read[fd]
        kept += data[: self._limit - len(kept)]
        if len(kept) >= self._limit and data and not self.over:
            self.over = True
            with contextlib.suppress(OSError):  # a dead worker shows when the answer is read
                self._channel.send(b"kill")
        return bool(data)


def _parse(lines: bytes) -> tuple[Any, ...]:
    """Parse results, one JSON value per line. A program may write anything: stop at bad lines."""
    values = []
    for line in lines.splitlines():
        try:
            values.append(json.loads(line))
        except (ValueError, RecursionError):
            break
    return tuple(values)
