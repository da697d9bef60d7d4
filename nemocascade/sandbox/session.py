"""Sessions: an interpreter in the sandbox that keeps its state between cells of code."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nemocascade.recipe.envs import SandboxConfig
from nemocascade.sandbox import launch
from nemocascade.sandbox.fair_slots import FairSlots
from nemocascade.sandbox.pipes import Fd, pipe, receive_answer
from nemocascade.types import SandboxError, Status

WALL_FACTOR = 2.0
"""Wall-clock limit of a cell without its waits for a CPU, in units of its CPU time limit."""
STARVED_FACTOR = 4.0
"""A cell whose waits for a CPU are longer than this times its wall-clock limit is not at fault."""
GRACE_S = 5.0
"""A worker that is silent for this long after every limit of a cell is killed."""
_CHUNK = 1 << 16

Release = Callable[["SandboxSession", launch.Worker | None], object]


@dataclass(frozen=True)
class CellOutcome:
    """The outcome of running a cell.

    status: "ok" if the cell has ended, also by an error, which the output then shows. Otherwise the
        session has ended with it: "time", killed at the time limit; "output", killed because it
        wrote too much; "failed", the interpreter crashed.
    output: standard output and error in the order in which they were written, decoded as UTF-8 with
        replacement characters.
    """

    status: Status
    output: str


class SandboxSession:
    """An interpreter of its own, in a worker of its own, that runs one cell at a time. Thread-safe.

    cells: the most that it may run. slots: as many cells run at once as there are slots. release:
    gets the worker back at the end; None if it was lost.

    A cell at its time limit is interrupted and the state is kept; one that still runs is killed,
    and with it the session. `close` ends everything in it, and so does the end of this process.
    """

    def __init__(
        self,
        worker: launch.Worker,
        config: SandboxConfig,
        cells: int,
        slots: FairSlots[Any],
        release: Release,
    ) -> None:
        self._config, self._slots, self._release = config, slots, release
        self._worker: launch.Worker | None = worker
        self._lock = threading.Lock()
        self._cells = 0
        with contextlib.ExitStack() as stack:
            # The first pipe is standard input, which is at its end at once.
            (stdin_r, stdin_w), (self._output, out_w) = pipe(stack), pipe(stack)
            (self._ends, ends_w), (jobs_r, self._jobs) = pipe(stack), pipe(stack)
            stdin_w.close()
            theirs = [stdin_r, out_w, out_w, ends_w, jobs_r]
            try:
                order = b"serve %d" % cells
                socket.send_fds(worker.channel, [order], [fd.number for fd in theirs])
            except OSError as error:
                raise SandboxError(f"a worker is gone: {error}") from error
            for fd in theirs:
                fd.close()
            for fd in (self._output, self._ends, self._jobs):
                os.set_blocking(fd.number, False)
            self._stack = stack.pop_all()

    @property
    def alive(self) -> bool:
        """False once the session has ended, by a cell or by `close`."""
        return self._worker is not None

    def run(self, source: str) -> CellOutcome:
        """Run a cell and wait for its end, within limits.

        Raises SandboxError if the session has ended before, if its worker is lost or silent, and if
        the cell got too little CPU time; the session has then ended.
        """
        with self._slots.take(), self._lock:
            if self._worker is None:
                raise SandboxError("the session has ended")
            try:
                return self._run(self._worker, source)
            except BaseException:
                self._end(lost=True)
                raise

    def close(self) -> None:
        """End the session and every process in it; a second call does nothing."""
        with self._lock:
            if self._worker is None:
                return
            try:
                self._worker.channel.settimeout(GRACE_S)
                self._worker.channel.send(b"kill")
                lost = not self._worker.channel.recv(_CHUNK)
            except OSError:
                lost = True
            self._end(lost=lost)

    def _run(self, worker: launch.Worker, source: str) -> CellOutcome:
        self._cells += 1
        exchange = _CellExchange(worker.channel, self._output, self._config.output_kib << 10)
        job = json.dumps([self._cells, source]) + "\n"
        wall_s = WALL_FACTOR * self._config.time_s
        _order(worker, b"cell %g" % wall_s)
        deadline = time.monotonic() + (1 + STARVED_FACTOR) * wall_s + GRACE_S
        number = str(self._cells).encode()
        answer = exchange.run(self._jobs, job.encode(), self._ends, number, deadline)
        text = exchange.output.decode(errors="replace")
        if answer is None:
            _order(worker, b"rest")
            return CellOutcome("ok", text)
        if "status" not in answer:
            raise SandboxError(f"a session could not be isolated: {answer.get('unavailable')}")
        if answer["over_time"] == "wall" and answer["waited_s"] >= STARVED_FACTOR * wall_s:
            raise SandboxError(
                f"a cell waited {answer['waited_s']:.1f} s for a CPU: the host is too busy, lower "
                "sandbox.workers"
            )
        self._end(lost=False)
        if exchange.over:
            return CellOutcome("output", text)
        # The kernel kills a session whose cells together have used up all of their CPU time.
        killed = answer["over_time"] or (
            answer["status"] == -signal.SIGKILL and answer["cpu_s"] >= self._config.time_s
        )
        return CellOutcome("time" if killed else "failed", text)

    def _end(self, *, lost: bool) -> None:
        worker, self._worker = self._worker, None
        self._stack.close()
        if lost and worker is not None:
            worker.kill()
        self._release(self, None if lost else worker)


def _order(worker: launch.Worker, text: bytes) -> None:
    # A session that has just ended ignores orders: its answer is read next.
    try:
        worker.channel.send(text)
    except OSError as error:
        raise SandboxError(f"a worker is gone: {error}") from error


class _CellExchange:
    """Hands a cell to its session and collects its output until it ends."""

    def __init__(self, channel: socket.socket, output: Fd, limit: int) -> None:
        self._channel, self._source, self._limit = channel, output, limit
        self.output = bytearray()
        self.over = False

    def run(
        self, jobs: Fd, job: bytes, ends: Fd, number: bytes, deadline: float
    ) -> dict[str, Any] | None:
        """Return None if the cell has ended, and the worker's answer if the session has.

        Raises SandboxError if there is neither by `deadline`.
        """
        rest, lines = memoryview(job), b""
        with selectors.DefaultSelector() as selector:
            selector.register(jobs, selectors.EVENT_WRITE)
            for source in (self._source, ends, self._channel):
                selector.register(source, selectors.EVENT_READ)
            while True:
                events = selector.select(max(0.0, deadline - time.monotonic()))
                if not events and time.monotonic() >= deadline:
                    raise SandboxError("a worker did not answer in time and was killed")
                ready = [key.fileobj for key, _ in events]
                if self._source in ready and not self._read():
                    selector.unregister(self._source)
                if jobs in ready:
                    rest = rest[_write(jobs, rest) :]
                    if not rest:
                        selector.unregister(jobs)
                if self._channel in ready:
                    return self._answer()
                if ends in ready:
                    data = _read(ends)
                    if not data:
                        selector.unregister(ends)
                    # A program may write anything here; it can end only its own cell.
                    lines = (lines + data)[-_CHUNK:]
                    if number in lines.split(b"\n")[:-1]:
                        self._drain()
                        if not self.over:  # else the session is being killed
                            return None

    def _answer(self) -> dict[str, Any]:
        found = receive_answer(self._channel, "a cell")
        self._drain()
        return found

    def _drain(self) -> None:
        """Read what has been written so far, up to the limit."""
        while not self.over and self._read():
            continue

    def _read(self) -> bool:
        """Read some output; False if there is none now, or at its end."""
        data = _read(self._source)
        self.output += data[: self._limit - len(self.output)]
        if len(self.output) >= self._limit and data and not self.over:
            self.over = True
            with contextlib.suppress(OSError):  # a dead worker shows when the answer is read
                self._channel.send(b"kill")
        return bool(data)


def _read(fd: Fd) -> bytes:
    try:
        return os.read(fd.number, _CHUNK)
    except BlockingIOError:
        return b""


def _write(fd: Fd, data: memoryview) -> int:
    try:
        return os.write(fd.number, data[:_CHUNK])
    except BlockingIOError:
        return 0
    except BrokenPipeError:
        return len(data)  # the session has ended: its answer comes next
