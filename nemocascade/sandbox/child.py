"""Checks in killable children, with a time and a memory limit.

Regular expressions, symbolic algebra and schemas of unknown origin can run forever. They run in
persistent child processes. A child that exceeds its time is killed; the next call starts another.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import resource
import selectors
import subprocess
import sys
import time
from typing import Any

DEFAULT_TIMEOUT_S = 5.0
DEFAULT_MEMORY_MIB = 2048
START_TIMEOUT_S = 60.0
"""Timeout of a check's imports, on a machine that may be busy."""


class ChildError(RuntimeError):
    """A check gave no answer: it exceeded its time, was killed, crashed, or raised."""


class ChildPool:
    """Pool of up to `size` children that run `call`, started on demand. Threads may share one."""

    def __init__(
        self,
        size: int = 1,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        memory_mib: int = DEFAULT_MEMORY_MIB,
    ) -> None:
        self._timeout_s = timeout_s
        self._memory_mib = memory_mib
        self._slots: queue.Queue[_Child | None] = queue.Queue()
        for _ in range(size):
            self._slots.put(None)
        self._size = size

    def call(self, function: str, *arguments: Any) -> Any:
        """Run `module:name` with JSON `arguments`. Returns, or raises ChildError, within limits."""
        child = self._slots.get()
        try:
            if child is None or not child.alive:
                child = _Child(self._memory_mib)
            return child.call(function, arguments, self._timeout_s)
        finally:
            self._slots.put(child)

    def process_ids(self) -> list[int]:
        """Process ids of the running idle children."""
        return [c.process.pid for c in list(self._slots.queue) if c is not None and c.alive]

    def close(self) -> None:
        """End all children; a later call starts new ones."""
        for _ in range(self._size):
            child = self._slots.get()
            if child is not None:
                child.kill()
            self._slots.put(None)


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
        try:
            # A check's time limit starts after its imports.
            if module not in self._imported:
                limit = START_TIMEOUT_S
                self._ask([f"{module}:", []], limit)
                self._imported.add(module)
            limit = timeout_s
            status, value = self._ask([function, list(arguments)], limit)
        except TimeoutError:
            self.kill()
            raise ChildError(f"{function} was killed after {limit:g} s") from None
        except (EOFError, BrokenPipeError, ValueError) as error:
            code = self.kill()
            raise ChildError(f"the child of {function} died with status {code}") from error
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
        name, arguments = json.loads(line)
        module, _, function = name.partition(":")
        try:
            loaded = importlib.import_module(module)
            # A request without a function only imports.
            value = getattr(loaded, function)(*arguments) if function else None
            answer = json.dumps(["ok", value])
        except Exception as error:  # the parent turns it into an error verdict
            answer = json.dumps(["error", f"{type(error).__name__}: {error}"])
        print(answer, file=channel, flush=True)
