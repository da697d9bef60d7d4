"""A request to stop a job: the file RUN/stop, or Ctrl-C. The main rank tells the others of it.

Ranks leave a step together. Each rank that knows of the request raises `StopAsked` outside of
collectives, and the others follow where all meet, see `World.leaving_together`.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from nemocascade.runtime.interrupt import EXIT_CODE, Interrupt

STOP = "stop"
"""A file of this name in the run folder asks the run to save a checkpoint and stop. Schedulers
create it before a time limit. The run renames it to `stop.done` once it has saved."""
POLL_S = 1.0
"""Poll interval of the file, or of the job's store."""


_LOADED_AT = time.time()
# Clocks of a host and of its file server may differ by so much.
_SKEW_S = 2.0

AGAIN = 75
"""Exit code that asks a scheduler to try again: EX_TEMPFAIL."""


class Stopped(SystemExit):
    """The job stopped on request, and the same command resumes it.

    step: number of finished steps, all of which are saved. Exit code 75 asks a scheduler to try
    again (sysexits); 130 follows Ctrl-C.
    """

    def __init__(self, step: int, *, interrupted: bool) -> None:
        super().__init__(EXIT_CODE if interrupted else AGAIN)
        self.step = step


class StopAsked(BaseException):
    """The job was asked to stop during rollouts, verification or scoring, which end here.

    Not an Exception: nothing has failed, and no handler of failures may take it.
    """


class StopRequest:
    """Knowledge of this rank of a request to stop.

    folder: the run's; None: only Ctrl-C counts. is_main: this rank looks for the request. store: of
    the job, where it tells the others; None without other ranks.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        is_main: bool = True,
        store: Any = None,
    ) -> None:
        self.file = None if folder is None else folder / STOP
        self.interrupt = Interrupt(speaks=is_main)
        self._is_main, self._store = is_main, store
        self._key = "nemocascade/stop"
        self._is_asked = False
        self._polled = float("-inf")

    def asked(self) -> bool:
        """True once this rank knows of a request. It polls at most every `POLL_S`. Cheap."""
        if not self._is_asked and time.monotonic() - self._polled >= POLL_S:
            self.poll()
        return self._is_asked

    def poll(self) -> bool:
        """Poll at once; see `asked`."""
        if self._is_main and not self._is_asked:
            named = self.file is not None and self.file.exists()
            self._is_asked = named or self.interrupt.asked
            if self._is_asked and self._store is not None:
                self._store.set(self._key, "1")
        elif self._store is not None and not self._is_asked:
            self._is_asked = self._store.check([self._key])
        self._polled = time.monotonic()
        return self._is_asked

    def clear(self) -> None:
        """Forget the requests of earlier jobs in the folder; on the main rank. One that came since
        this process started is kept."""
        if self.file is None or not self._is_main:
            return
        self._done.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if self.file.stat().st_mtime < _LOADED_AT - _SKEW_S:
                self.file.unlink()

    def finish(self) -> bool:
        """Mark the request as fulfilled, on the main rank, and give Ctrl-C back to Python. True if
        it was Ctrl-C."""
        if self.file is not None and self._is_main and self.file.exists():
            self.file.replace(self._done)
        self.interrupt.disarm()
        return self.interrupt.asked

    @property
    def _done(self) -> Path:
        assert self.file is not None
        return self.file.with_name(f"{STOP}.done")
