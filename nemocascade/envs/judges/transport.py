"""One HTTP request in bounded time."""

from __future__ import annotations

import contextlib
import socket
import threading
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from urllib.parse import urlsplit

MAX_BYTES = 16 * 2**20
"""Of a reply that is read; a longer one is a fault."""


class TransportError(Exception):
    """No reply was had. kind: `timeout`, `connection`, or `protocol` for what is not HTTP."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(f"{kind}: {reason}")
        self.kind = kind


@dataclass(frozen=True)
class Reply:
    """A status, the body, and the seconds after which the server asks to try again, if it does."""

    status: int
    body: bytes
    retry_after_s: float | None = None


def post(url: str, body: bytes, headers: dict[str, str], timeout_s: float) -> Reply:
    """POST `body` to `url`, over and done with after `timeout_s`, whatever the server does.

    A socket's own time limit starts again with every byte that trickles in, so the line is cut from
    another thread. Raises TransportError.
    """
    parts = urlsplit(url)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=timeout_s)
    late = threading.Event()
    # The connection lets go of its socket once a reply has begun.
    line: list[socket.socket] = []

    def cut() -> None:
        late.set()
        for sock in line:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(timeout_s, cut)
    timer.daemon = True
    timer.start()
    try:
        connection.connect()
        line.append(connection.sock)
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        connection.request("POST", path or "/", body, headers)
        response = connection.getresponse()
        found = response.read(MAX_BYTES + 1)
        if not late.is_set() and response.length:
            raise TransportError("connection", f"the reply ended {response.length} bytes early")
        if len(found) > MAX_BYTES:
            raise TransportError("protocol", f"the reply is longer than {MAX_BYTES} bytes")
    except (OSError, HTTPException, ValueError) as error:
        if late.is_set() or isinstance(error, TimeoutError):
            raise TransportError("timeout", f"no whole reply in {timeout_s:g} s") from None
        fault = "connection" if isinstance(error, OSError) else "protocol"
        raise TransportError(fault, f"{type(error).__name__}: {error}") from None
    finally:
        timer.cancel()
        connection.close()
    if late.is_set():
        raise TransportError("timeout", f"no whole reply in {timeout_s:g} s")
    return Reply(response.status, found, _seconds(response.getheader("Retry-After")))


def _seconds(value: str | None) -> float | None:
    """The seconds of a Retry-After header; its other form, a date, is not read."""
    if value is None or not value.strip().isdigit():
        return None
    return float(value)
