"""The fuzz run: `python tests/fuzz/run.py`, or `make fuzz`.

Every target reads mutated inputs, in one of two processes. A failure is printed whole: the case as
a Python expression, and the traceback. The same seed makes the same cases.

    python tests/fuzz/run.py --only 'rows*' --examples 5000 --seed 7
    python tests/fuzz/run.py --only 'rows of SFT' --case 00ff...     # one case again
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import os
import queue
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
PATHS = [str(path) for path in (HERE.parent, REPOSITORY, REPOSITORY / "kernels")]
EXAMPLES = 100_000
MEMORY_GIB = 12
"""Address space of a process: a case that needs more fails."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate")


class OutsideError(BaseException):
    """A case has written outside of the temporary folder."""


class Formatted(logging.Handler):
    """Formats every message and shows none: a message that cannot be formatted is an error."""

    def emit(self, record: logging.LogRecord) -> None:
        record.getMessage()


def shares(names: Sequence[str], examples: int) -> dict[str, int]:
    """Cases of each target: at least `examples` together."""
    from fuzz.targets import TARGETS

    total = sum(TARGETS[name].share for name in names)
    return {name: int(examples * TARGETS[name].share / total) + 1 for name in names}


def confine() -> None:
    """Limit the memory of this process, and end every case that writes outside of its folder."""
    limit = MEMORY_GIB << 30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.dont_write_bytecode = True
    inside = (os.path.realpath(tempfile.gettempdir()) + os.sep, "/dev/", "/proc/")

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        written = event in CHANGES
        if event == "open":
            flags = arguments[2]
            written = isinstance(flags, int) and bool(flags & WRITES)
        if written and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith(inside):
                raise OutsideError(f"{event} {path!r}")

    sys.addaudithook(hook)


def work(last: Path) -> None:
    """Run the targets that standard input names; the outcome of each is a line of JSON.

    last: file that holds the bytes of the current case.
    """
    from fuzz.harness import fuzz
    from fuzz.targets import TARGETS

    from nemocascade.runtime.logging import LOGGER

    LOGGER.handlers, LOGGER.propagate = [Formatted()], False
    # What a reader prints must not be taken for an outcome.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    confine()
    with last.open("r+b") as file:
        for line in sys.stdin:
            name, examples, seed = json.loads(line)
            start = time.monotonic()
            count, failures = fuzz(
                TARGETS[name],
                examples,
                seed,
                tell=lambda data: os.pwrite(file.fileno(), data, 0),
            )
            took = time.monotonic() - start
            said = {"count": count, "seconds": took, "failures": [vars(f) for f in failures]}
            print(json.dumps(said), file=channel, flush=True)


class Worker:
    """A process that runs targets; a new one is started after it crashed."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._last = folder, folder / "last case"
        self._process: subprocess.Popen[str] | None = None
        folder.mkdir()

    def run(self, name: str, examples: int, seed: int) -> tuple[int, int]:
        """Run a target and print its outcome; returns its cases and its failures."""
        if self._process is None:
            self._process = self._started()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        print(json.dumps([name, examples, seed]), file=process.stdin, flush=True)
        line = process.stdout.readline()
        if not line.startswith("{"):
            self._process = None
            status, case = process.wait(), self._last.read_bytes().hex()
            print(f"FAILED {name}: the process ended with status {status}\ndata: {case}")
            return 0, 1
        found = json.loads(line)
        took = f"{found['seconds']:.0f} s"
        said = [f"{name}: {found['count']:,} cases, {len(found['failures'])} failures, {took}"]
        for failure in found["failures"]:
            said.append(f"\nFAILED {name}: {failure['what']}\ndata: {failure['data']}")
            said.append(f"case: {failure['case']}\n{failure['trace']}")
        print("\n".join(said), flush=True)
        return found["count"], len(found["failures"])

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()

    def _started(self) -> subprocess.Popen[str]:
        self._last.write_bytes(b"")
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "TMPDIR": str(self._folder)}
        environment["PYTHONPATH"] = os.pathsep.join([*PATHS, environment.get("PYTHONPATH", "")])
        return subprocess.Popen(
            [sys.executable, __file__, "--worker", str(self._last)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=self._folder,
        )


def run(names: Sequence[str], examples: int, seed: int, jobs: int) -> int:
    """Run the targets in `jobs` processes; returns the number of failures."""
    counts = shares(names, examples)
    # The longest first, so that all processes end at about the same time.
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in sorted(counts, key=counts.__getitem__, reverse=True):
        waiting.put(name)
    done: list[tuple[int, int]] = []
    start = time.monotonic()

    def serve(worker: Worker) -> None:
        while not waiting.empty():
            try:
                name = waiting.get_nowait()
            except queue.Empty:
                break
            done.append(worker.run(name, counts[name], seed))
        worker.close()

    with tempfile.TemporaryDirectory(prefix="nemocascade_fuzz_") as folder:
        workers = [Worker(Path(folder, str(number))) for number in range(jobs)]
        threads = [threading.Thread(target=serve, args=(worker,)) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    failed = sum(wrong for _, wrong in done)
    took = time.monotonic() - start
    print(f"{sum(n for n, _ in done):,} cases, {failed} failures, {took:.0f} s, seed {seed}")
    return failed


def repeat(names: Sequence[str], data: bytes) -> int:
    """Run one case of one target in this process; returns the number of failures."""
    from fuzz.harness import fuzz, shown
    from fuzz.mutations import Choices
    from fuzz.targets import TARGETS

    (name,) = names
    print(f"case: {shown(TARGETS[name].make(Choices(data)))}", flush=True)
    _, failures = fuzz(TARGETS[name], 1, 0, only=data)
    for failure in failures:
        print(f"FAILED {name}: {failure.what}\n{failure.trace}")
    return len(failures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="cases of all targets")
    parser.add_argument("--only", default="*", help="targets by name, with * and ?")
    parser.add_argument("--seed", type=int, help="makes the same cases again; default: random")
    parser.add_argument("--case", type=bytes.fromhex, help="the data of one case, to run it again")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    sys.path[:0] = PATHS
    if given.worker:
        work(given.worker)
        return 0
    from fuzz.targets import TARGETS

    names = [name for name in TARGETS if fnmatch.fnmatch(name, given.only)]
    if not names or (given.case and len(names) > 1):
        parser.error(f"--only {given.only}: the targets are {', '.join(TARGETS)}")
    if given.case:
        return min(1, repeat(names, given.case))
    seed = random.randrange(2**32) if given.seed is None else given.seed
    print(f"{given.examples:,} cases of {len(names)} targets, seed {seed}", flush=True)
    return min(1, run(names, given.examples, seed, max(1, given.jobs)))


if __name__ == "__main__":
    sys.exit(main())
