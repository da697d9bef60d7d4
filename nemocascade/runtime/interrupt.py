"""Ctrl-C as a request to stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

EXIT_CODE = 128 + signal.SIGINT
AGAIN_S = 3.0
"""A second Ctrl-C within this time is the launcher's copy of the first."""
_NOTE = (
    b"\ninterrupted: stops within seconds where rollouts are made, otherwise after this step, and "
    b"saves the last finished step; Ctrl-C again stops at once\n"
)


class Interrupt:
    """While armed, the first Ctrl-C sets `asked`, and a later one raises KeyboardInterrupt.

    speaks: tell the terminal that the request was heard.
    """

    def __init__(self, *, speaks: bool) -> None:
        self.speaks = speaks
        self.asked = False
        self._asked_at = 0.0

    def arm(self) -> None:
        """Take over Ctrl-C; only in the main thread."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._handle)

    def disarm(self) -> None:
        """Give Ctrl-C back to Python."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._asked_at = True, now
            if self.speaks:
                # The logger may be in the middle of a line.
                os.write(2, _NOTE)
        elif now - self._asked_at > AGAIN_S:
            raise KeyboardInterrupt
