"""Runs a target on generated cases, with a watchdog, and keeps what fails.

A target is a reader and the errors that it promises. Every other exception is a failure, as is a
case without an end within `LIMIT_S` seconds. Each kind of failure (its type and the line that
raised it) is kept once, with the smallest case that is found for it.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import hypothesis
from fuzz.mutations import ENTROPY, Choices
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st

LIMIT_S = 10.0
"""Longest CPU time of one case."""
WAIT_FACTOR = 6.0
"""Longest wall-clock time of a case, in units of its CPU time limit: the machine may be busy."""
GRACE_S = 20.0
"""Time after it, in which the case must react to a signal; then the process ends."""
MOST_HANGS = 2
"""A target stops after this many cases without an end."""
MOST_TRIES = 120
"""Cases that are tried to make a failing one smaller."""
_RUNS: dict[type, Any] = {
    str: re.compile(r"(.{1,8}?)\1{30,}", re.DOTALL),
    bytes: re.compile(rb"(.{1,8}?)\1{30,}", re.DOTALL),
}
"""Texts of up to 8 characters that are repeated more than 30 times."""


class HangError(BaseException):
    """A case has not ended within its limit; no handler of the reader may catch it."""


@dataclass(frozen=True)
class Target:
    """A reader under test.

    make: builds a case from choices. run: reads the case; the folder is empty. rejections: the
    errors that the reader promises. share: cases of this target, in relation to the others'.
    """

    name: str
    make: Callable[[Choices], Any]
    run: Callable[[Any, Path], object]
    rejections: tuple[type[BaseException], ...]
    share: float = 1.0


@dataclass(frozen=True)
class Failure:
    """A kind of failure: what was raised, where, and the smallest case.

    case: a Python expression. data: the bytes that the case was made from, in hex.
    """

    what: str
    case: str
    data: str
    trace: str


class Watchdog:
    """Ends a case that takes too long with `HangError`, in the main thread.

    A case that never returns to the interpreter is printed, and the process ends.
    """

    def __init__(self, limit_s: float = LIMIT_S, grace_s: float = GRACE_S) -> None:
        self._limit_s, self._grace_s = limit_s, grace_s
        self._case = b""
        self._since: tuple[float, float] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fuzz watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._before = signal.signal(signal.SIGUSR1, self._end)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        signal.signal(signal.SIGUSR1, self._before)

    @contextmanager
    def timing(self, data: bytes) -> Iterator[None]:
        """Time limit of one case, made from `data`."""
        self._case, self._since = data, (time.process_time(), time.monotonic())
        try:
            yield
        finally:
            self._since = None

    def _end(self, number: int, frame: FrameType | None) -> None:
        if self._since is not None:
            raise HangError(f"no end within {self._limit_s:g} s")

    def _watch(self) -> None:
        while not self._stop.wait(min(0.5, self._limit_s / 4)):
            since = self._since
            if since is None:
                continue
            cpu_s, wall_s = time.process_time() - since[0], time.monotonic() - since[1]
            late_s = max(cpu_s - self._limit_s, wall_s - WAIT_FACTOR * self._limit_s)
            if late_s > self._grace_s:
                said = f"no end within {wall_s:.0f} s, case {self._case.hex()}"
                print(said, file=sys.stderr, flush=True)
                faulthandler.dump_traceback()
                os._exit(3)
            if late_s > 0:
                # Again and again: the error is lost if it is raised in a callback.
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)


def fuzz(
    target: Target,
    examples: int,
    seed: int,
    *,
    tell: Callable[[bytes], object] | None = None,
    limit_s: float = LIMIT_S,
    only: bytes | None = None,
) -> tuple[int, list[Failure]]:
    """Run `examples` cases of a target; returns how many have run, and the failures.

    tell: called with the bytes of every case before it runs, for a process that may crash. only:
    run the case of these bytes alone.
    """
    found: dict[str, Failure] = {}
    count = hangs = 0
    watch = Watchdog(limit_s)

    def failure(data: bytes) -> Failure | None:
        nonlocal hangs
        case: Any = None
        try:
            with watch.timing(data), tempfile.TemporaryDirectory(dir=folder) as inner:
                if tell is not None:
                    tell(data)
                case = target.make(Choices(data))
                target.run(case, Path(inner))
        except KeyboardInterrupt:
            raise
        except target.rejections:
            return None
        # A reader's worst errors, such as a panic of a library, are not `Exception`.
        except BaseException as error:
            hangs += isinstance(error, HangError)
            return Failure(_origin(error), shown(case), data.hex(), traceback.format_exc())
        return None

    def check(data: bytes) -> None:
        nonlocal count
        count += 1
        failed = failure(data) if hangs < MOST_HANGS else None
        if failed is not None:
            known = found.setdefault(failed.what, failed)
            if len(failed.case) < len(known.case):
                found[failed.what] = failed

    with tempfile.TemporaryDirectory(prefix="nemocascade_fuzz_") as folder, watch:
        if only is not None:
            check(only)
        else:
            _play(check, examples, seed)
            for what, failed in found.items():
                if what != HangError.__name__:
                    found[what] = _smallest(failed, failure)
    return count, list(found.values())


def _smallest(failed: Failure, failure: Callable[[bytes], Failure | None]) -> Failure:
    """A smaller case with the same failure: choices become the first option, many at once first."""
    tries, size = 0, ENTROPY // 2
    while size >= 2:
        for start in range(0, ENTROPY, size):
            data = bytes.fromhex(failed.data)
            smaller = data[:start] + bytes(size) + data[start + size :]
            if smaller == data or tries >= MOST_TRIES:
                continue
            tries += 1
            found = failure(smaller)
            if found is not None and found.what == failed.what:
                failed = found
        size //= 2
    return failed


def shown(value: Any) -> str:
    """The value as a Python expression. Long repetitions are written as products."""
    if isinstance(value, list | tuple):
        inner = ", ".join(map(shown, value))
        if isinstance(value, list):
            return f"[{inner}]"
        return f"({inner},)" if value else "()"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{shown(k)}: {shown(v)}" for k, v in value.items()) + "}"
    if not isinstance(value, str | bytes):
        return repr(value)
    runs: Any = _RUNS[type(value)]
    parts, at = [], 0
    for run in runs.finditer(value):
        parts += [repr(value[at : run.start()])] if run.start() > at else []
        parts.append(f"{run[1]!r} * {len(run[0]) // len(run[1])}")
        at = run.end()
    return " + ".join([*parts, repr(value[at:])] if at < len(value) or not parts else parts)


def _play(check: Callable[[bytes], None], examples: int, seed: int) -> None:
    settings = hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
        verbosity=hypothesis.Verbosity.quiet,
    )
    made = st.binary(min_size=ENTROPY, max_size=ENTROPY)
    hypothesis.seed(seed)(settings(hypothesis.given(made)(check)))()


def _origin(error: BaseException) -> str:
    """Kind of a failure: its type and the last line of this repository that it passed."""
    if isinstance(error, HangError):
        return "HangError"
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if "nemocascade" in f.filename and "site-packages" not in f.filename
    ] or list(traceback.extract_tb(error.__traceback__))
    last = frames[-1]
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
