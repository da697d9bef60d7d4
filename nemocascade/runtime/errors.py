"""Error reporting: user errors as a message, all others as a traceback."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from nemocascade.recipe import UserError
from nemocascade.runtime.files import LASTING
from nemocascade.runtime.interrupt import EXIT_CODE as INTERRUPTED
from nemocascade.runtime.launcher import MainRankError, is_main_process
from nemocascade.runtime.logging import LOGGER, end_status, printable
from nemocascade.runtime.stopping import AGAIN

EXIT_CODE_FILE = "NEMOCASCADE_EXIT_CODE"
"""Environment variable with a file for the exit code, since torchrun ends with 1 whatever has
failed."""
GRACE_S = 5.0
"""Time for the main rank to fail with the same error before another node prints it."""
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_PATH = tuple(code for code in LASTING if code != errno.ENOENT)


def exit_cleanly[T](work: Callable[[], T]) -> T:
    """Return the result of `work()`; a UserError ends the program with its message and exit code.

    The message is printed last, by the main rank; if it has no error itself, then by the first rank
    of each other node that has. torchrun shows it too. Exit codes: 2 in general, 3 for NaN, 5 for a
    cascade's alarm, 75 for what may succeed later, 130 for Ctrl-C. A full disk (75) and a
    path that cannot be used (2) are reported in the same way.
    """
    try:
        return work()
    except MainRankError as error:
        # The main rank prints the reason.
        _tell_torchrun(str(error))
        raise SystemExit(2) from None
    except UserError as error:
        _exit(f"error: {error}", error.exit_code)
    except OSError as error:
        file, reason = error.filename, error.strerror
        if error.errno in _DISK:
            _exit(f"error: {file or 'a file'}: {reason}: free space, or write elsewhere", AGAIN)
        if error.errno not in _PATH or not file:
            raise
        _exit(f"error: {file}: {reason}: name a path that this user can read and write", 2)
    except KeyboardInterrupt:
        said = "interrupted: the same command resumes a run from its newest checkpoint"
        _exit(said, INTERRUPTED)
    finally:
        # A traceback would be printed behind it.
        end_status()


def _exit(message: str, code: int) -> NoReturn:
    """Print the message after all other output, and end the program."""
    _tell_torchrun(message)
    if not is_main_process():
        if os.environ.get("LOCAL_RANK") != "0":
            raise SystemExit(code) from None
        # The launcher ends this rank as soon as the main rank has printed its own.
        time.sleep(GRACE_S)
    record_exit_code(code)
    for handler in LOGGER.handlers:
        handler.flush()
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    clear = "\r\x1b[2K" if sys.stderr.isatty() else ""
    print(f"{clear}{printable(message)}", file=sys.stderr, flush=True)
    raise SystemExit(code) from None


def record_exit_code(code: int) -> None:
    """Write the exit code to the file that the job's script reads, if it has named one."""
    if file := os.environ.get(EXIT_CODE_FILE):
        with contextlib.suppress(OSError):
            Path(file).write_text(f"{code}\n", encoding="ascii")


def _tell_torchrun(message: str) -> None:
    """Write the message to the file whose content torchrun shows for a failed rank."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    text = printable(message)
    extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError):
        Path(file).write_text(
            json.dumps({"message": {"message": text, "extraInfo": extra}}), encoding="utf-8"
        )
