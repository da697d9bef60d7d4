"""One HTTP request in bounded time."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from urllib.parse import urlsplit

MAX_BYTES = 16 * 2**20
"""Of a reply that is read; a longer one is a fault."""


class TransportError(Exception):
    """No reply was had. kind: `unreachable` where nobody listens, `connection` where a connection
    broke, `timeout`, `closed`, or `protocol` for what is not HTTP."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(f"{kind}: {reason}")
        self.kind = kind


@dataclass(frozen=True)
class Reply:
    """A status, the body, and what two headers say: the seconds after which the server asks to try
    again, and where it redirects to."""

    status: int
    body: bytes
    retry_after_s: float | None = None
    location: str | None = None


class Lines:
    """Requests under way, which `close` cuts off. Threads share one."""

    def __init__(self) -> None:
        self._open: set[_Line] = set()
        self._lock = threading.Lock()
        self._closed = False

    def post(self, url: str, body: bytes, headers: dict[str, str], timeout_s: float) -> Reply:
        """POST `body` to `url`, over and done with after `timeout_s`, whatever the server does.

        Raises TransportError.
        """
        line = _Line(url, timeout_s)
        with self._lock:
            if self._closed:
                raise TransportError("closed", "no further request is sent")
            self._open.add(line)
        try:
            return line.post(body, headers)
        finally:
            with self._lock:
                self._open.discard(line)

    def close(self) -> None:
        """Cut what is under way, and send nothing more."""
        with self._lock:
            self._closed = True
            under_way = list(self._open)
        for line in under_way:
            line.cut("closed")


class _Line:
    """One request.

    A socket's own time limit starts again with every byte that trickles in, so the line is cut from
    another thread.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        parts = urlsplit(url)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._connection = kind(parts.hostname or "", parts.port, timeout=timeout_s)
        self._path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._timeout_s = timeout_s
        # The connection lets go of its socket once a reply has begun.
        self._socket: socket.socket | None = None
        self._cut: str | None = None

    def cut(self, why: str) -> None:
        """End it, from another thread. why: kind of the error that it ends with."""
        self._cut = self._cut or why
        # Before that it is the connection's, while TLS is agreed on.
        found = self._socket or self._connection.sock
        if found is not None:
            with contextlib.suppress(OSError):
                found.shutdown(socket.SHUT_RDWR)

    def post(self, body: bytes, headers: dict[str, str]) -> Reply:
        connection = self._connection
        timer = threading.Timer(self._timeout_s, self.cut, ("timeout",))
        timer.daemon = True
        timer.start()
        try:
            connection.connect()
            self._socket = connection.sock
            # The time may have been up before there was a socket to cut.
            self._stop_if_cut()
            connection.request("POST", self._path, body, headers)
            response = connection.getresponse()
            found = response.read(MAX_BYTES + 1)
            self._stop_if_cut()
            if len(found) > MAX_BYTES:
                raise TransportError("protocol", f"the reply is longer than {MAX_BYTES} bytes")
            if response.length:
                raise TransportError("connection", f"the reply ended {response.length} bytes early")
            return Reply(
                response.status,
                found,
                _seconds(response.getheader("Retry-After")),
                response.getheader("Location"),
            )
        except (OSError, HTTPException, ValueError) as error:
            self._stop_if_cut()
            if isinstance(error, TimeoutError):
                raise self._late() from None
            raise TransportError(_kind(error), f"{type(error).__name__}: {error}") from None
        finally:
            timer.cancel()
            connection.close()

    def _stop_if_cut(self) -> None:
        if self._cut == "timeout":
            raise self._late() from None
        if self._cut is not None:
            raise TransportError(self._cut, "the request was cut off") from None

    def _late(self) -> TransportError:
        return TransportError("timeout", f"no whole reply in {self._timeout_s:g} s")


def _kind(error: Exception) -> str:
    if isinstance(error, ConnectionRefusedError | socket.gaierror):
        return "unreachable"
    if isinstance(error, OSError) and error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH):
        return "unreachable"
    return "connection" if isinstance(error, OSError) else "protocol"


def _seconds(value: str | None) -> float | None:
    """The seconds of a Retry-After header; its other form, a date, is not read."""
    if value is None or not value.strip().isdigit():
        return None
    return float(value)
