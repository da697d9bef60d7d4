"""Pipes to a program in the sandbox."""

from __future__ import annotations

import contextlib
import os


class Fd:
    """A file descriptor that is closed once."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._open = True

    def fileno(self) -> int:
        return self.number

    def close(self) -> None:
        if self._open:
            self._open = False
            os.close(self.number)


def pipe(stack: contextlib.ExitStack) -> tuple[Fd, Fd]:
    """Read and write end of a new pipe; the stack closes them."""
    ends = tuple(Fd(number) for number in os.pipe())
    for end in ends:
        stack.callback(end.close)
    return ends[0], ends[1]
