"""Error reporting: user errors as a message, all others as a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from nemocascade.recipe import UserError
from nemocascade.runtime.world import MainRankError, is_main_process


def exit_cleanly[T](work: Callable[[], T]) -> T:
    """Return the result of `work()`; a UserError ends the program with its message and exit code.

    Only the main rank prints it. Exit codes: 2 in general, 3 for NaN, 5 for a cascade's alarm.
    """
    try:
        return work()
    except MainRankError:
        # The main rank prints the reason.
        raise SystemExit(2) from None
    except UserError as error:
        if is_main_process():
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
