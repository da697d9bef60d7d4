"""Pipes to a program in the sandbox."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from typing import Any

from nemocascade.types import SandboxError


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


def receive_answer(channel: socket.socket, what: str) -> dict[str, Any]:
    """The worker's answer on its channel, which is ready. Raises SandboxError if the worker died
    while it ran `what`."""
    try:
        data = channel.recv(1 << 16)
    except OSError:
        data = b""
    if not data:
        raise SandboxError(f"a worker died while it ran {what}")
    return dict(json.loads(data))
