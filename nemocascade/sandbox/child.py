"""Checks in killable children, with limits of CPU time and memory.

Regular expressions, symbolic algebra and schemas of unknown origin can run forever. They run in
persistent child processes. A child that exceeds its time is killed; the next call starts another.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
from typing import Any

from nemocascade.sandbox.fair_slots import FairSlots

DEFAULT_TIMEOUT_S = 5.0
DEFAULT_MEMORY_MIB = 2048
START_TIMEOUT_S = 60.0
"""Timeout of a check's imports, on a machine that may be busy."""
WALL_FACTOR = 4.0
"""Wall-clock limit of a check, in units of its CPU time limit: a busy machine is not its fault."""


class ChildError(RuntimeError):
    """A check gave no answer: it exceeded its CPU time, crashed, or raised."""


class ChildHostError(ChildError):
    """A check gave no answer because of the host: it got no CPU time, or was killed."""


class _WallTimeoutError(ChildHostError):
    """A check exceeded its wall-clock limit, but not its CPU time limit."""


class ChildPool:
    """Pool of up to `size` children that run `call`, started on demand. Threads may share one.

    timeout_s: limit of a check's CPU time.
    """

    def __init__(
        self,
        size: int = 1,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        memory_mib: int = DEFAULT_MEMORY_MIB,
    ) -> None:
        self._timeout_s = timeout_s
        self._memory_mib = memory_mib
        self._slots = FairSlots[_Child | None]([None] * size)

    def call(self, function: str, *arguments: Any) -> Any:
        """Run `module:name` with JSON `arguments`. Returns, or raises ChildError, within limits.

        A check at its wall-clock limit is repeated once without other checks beside it. Raises
        ChildHostError if it is again stopped by that limit.
        """
        try:
            return self._call(function, arguments, 1)
        except _WallTimeoutError:
            return self._call(function, arguments, self._slots.size)

    def process_ids(self) -> list[int]:
        """Process ids of the running idle children."""
        return [c.process.pid for c in self._slots.idle() if c is not None and c.alive]

    def close(self) -> None:
        """End all children; a later call starts new ones."""
        with self._slots.take(self._slots.size) as children:
            for i, child in enumerate(children):
                if child is not None:
                    child.kill()
                children[i] = None

    def _call(self, function: str, arguments: tuple[Any, ...], slots: int) -> Any:
        with self._slots.take(slots) as children:
            child = children[0]
            if child is None or not child.alive:
                child = children[0] = _Child(self._memory_mib)
            return child.call(function, arguments, self._timeout_s)


class _Child:
    def __init__(self, memory_mib: int) -> None:
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(p or "." for p in sys.path)
        environment.setdefault("OPENBLAS_NUM_THREADS", "1")
        code = "import sys; from nemocascade.sandbox.child import serve; serve(int(sys.argv[1]))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(memory_mib)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            # Ctrl-C in the terminal is for the run, which lets its verdicts finish.
            start_new_session=True,
        )
        self.alive = True
        self._buffer = b""
        self._imported: set[str] = set()

    def call(self, function: str, arguments: tuple[Any, ...], timeout_s: float) -> Any:
        module = function.partition(":")[0]
        limit = START_TIMEOUT_S
        try:
            # A check's time limit starts after its imports.
            if module not in self._imported:
                self._ask([f"{module}:", [], 0.0], limit)
                self._imported.add(module)
            limit = WALL_FACTOR * timeout_s
            status, value = self._ask([function, list(arguments), timeout_s], limit)
        except TimeoutError:
            self.kill()
            message = f"{function} was killed after {limit:g} s of wall time"
            raise _WallTimeoutError(message) from None
        except (EOFError, BrokenPipeError, ValueError) as error:
            code = self.kill()
            if code == -signal.SIGPROF:
                message = f"{function} was killed after {timeout_s:g} s of CPU time"
                raise ChildError(message) from None
            kind = ChildHostError if code == -signal.SIGKILL else ChildError
            raise kind(f"the child of {function} died with status {code}") from error
        except BaseException:
            self.kill()
            raise
        if status != "ok":
            raise ChildError(f"{function}: {value}")
        return value

    def kill(self) -> int:
        """Kill and reap the child; return its exit status."""
        self.alive = False
        self.process.kill()
        status = self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                continue  # a request that the dead child never read
        return status

    def _ask(self, request: list[Any], timeout_s: float) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        return json.loads(self._line(timeout_s))

    def _line(self, timeout_s: float) -> bytes:
        deadline = time.monotonic() + timeout_s
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                data = os.read(fd, 1 << 16)
                if not data:
                    raise EOFError
                self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


def serve(memory_mib: int) -> None:
    """Run the child's loop: one request and one answer per line, until the pipe closes."""
    limit = memory_mib << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Output of a check must not be mistaken for an answer.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        name, arguments, cpu_s = json.loads(line)
        module, _, function = name.partition(":")
        try:
            loaded = importlib.import_module(module)
            # The signal's default action ends this process, even inside a long C function.
            signal.setitimer(signal.ITIMER_PROF, cpu_s)
            # A request without a function only imports.
            value = getattr(loaded, function)(*arguments) if function else None
            answer = json.dumps(["ok", value])
        except Exception as error:  # the parent turns it into an error verdict
            answer = json.dumps(["error", f"{type(error).__name__}: {error}"])
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        print(answer, file=channel, flush=True)
