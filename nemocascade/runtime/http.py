"""The HTTP client for judges and inference servers: JSON requests with a total timeout and retries.

Requests run on an event loop in a thread of the client, because asyncio can cancel a whole request.
A socket timeout restarts with every byte received.

Proxies from the environment are not used: these servers belong to the job.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import json
import os
import random
import re
import ssl
import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from nemocascade.recipe.paths import is_url

MAX_BYTES = 16 << 20
LONGEST_WAIT_S = 60.0
"""Longest back-off between two attempts, unless the server asks for more."""
BUSY = frozenset({"unreachable", "status_429", "status_502", "status_503", "status_504"})
"""Failures of a restarting or overloaded server, which do not depend on the request."""
_RETRIED = frozenset({408, 409, 425, 429})
"""Statuses below 500 that are worth a retry."""
_CUT_OFF = re.compile("closed connection|disconnected")
_SHOWN = 300


@dataclass(eq=False)
class HttpError(Exception):
    """A request failed without a usable reply.

    kind: `unreachable` if nobody listens, `connection` if a connection broke, `timeout`, `closed`
    by `HttpClient.close`, `protocol` for invalid HTTP or a reply that is too long, or `status_503`
    and the like; callers add their own kinds. final: a retry cannot succeed. status: HTTP status of
    the reply, 0 without one. wait_s: delay that the server asked for.
    """

    kind: str
    reason: str
    final: bool = False
    status: int = 0
    wait_s: float | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}"


_AGAIN_S = 0.1
"""Interval of cancellations of a request that is not yet finished."""


class HttpClient:
    """Sends JSON over at most `connections` kept-alive connections. Thread-safe.

    key: the server's key, sent as a bearer token and never logged. max_bytes: limit on a reply;
    longer ones are an error. Raises ValueError for a key that is invalid in a header.
    """

    def __init__(self, *, key: str = "", connections: int = 64, max_bytes: int = MAX_BYTES) -> None:
        if problem := key_problem(key):
            raise ValueError(f"the server's key {problem}")
        self._max_bytes = max_bytes
        # max_bytes applies to the bytes received, so compression is off.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        self._client = httpx2.AsyncClient(
            headers=headers,
            timeout=None,
            trust_env=False,
            verify=_certificates(),
            # Servers close idle connections, often after 5 s; a request must not hit a closed one.
            limits=httpx2.Limits(max_connections=connections, keepalive_expiry=2.0),
        )
        self._lock = threading.Lock()
        self._is_closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="http", daemon=True)
        self._thread.start()

    def post(self, url: str, body: bytes, timeout_s: float, name: str = "") -> bytes:
        """Make one attempt within `timeout_s` and return the body of a 2xx reply.

        name: for `cancel`. Raises HttpError.
        """
        return self._ask("POST", url, body, timeout_s, name)

    def get(self, url: str, timeout_s: float) -> bytes:
        """`post` for a request without a body, by GET."""
        return self._ask("GET", url, b"", timeout_s)

    def _ask(self, method: str, url: str, body: bytes, timeout_s: float, name: str = "") -> bytes:
        with self._lock:
            if self._is_closed:
                raise HttpError("closed", "no further request is sent", final=True)
            sent = self._send(method, url, body, timeout_s, name)
            future = asyncio.run_coroutine_threadsafe(sent, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise HttpError("closed", "the request was cut off", final=True) from None

    def close(self) -> None:
        """Cancel running requests, which raise HttpError, and reject new ones."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        self.cancel()
        asyncio.run_coroutine_threadsafe(self._client.aclose(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cancel(self, names: Collection[str] | None = None) -> None:
        """Cancel running requests, which raise HttpError of kind `closed`. names: only these."""
        asyncio.run_coroutine_threadsafe(self._cancel_all(names), self._loop).result()

    async def _cancel_all(self, names: Collection[str] | None) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        if names is not None:
            tasks = {task for task in tasks if task.get_name() in names}
        while tasks:
            for task in tasks:
                task.cancel()
            # A task that is just connecting may swallow its cancellation.
            _, tasks = await asyncio.wait(tasks, timeout=_AGAIN_S)

    async def _send(self, method: str, url: str, body: bytes, timeout_s: float, name: str) -> bytes:
        task = asyncio.current_task()
        if name and task is not None:
            task.set_name(name)
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    steps = _Steps()
                    try:
                        reply, found = await self._attempt(method, url, body, steps)
                    except (httpx2.NetworkError, httpx2.RemoteProtocolError):
                        # A server may close a kept connection at the moment that it is used.
                        if steps.connected or steps.answered:
                            raise
                    else:
                        break
        except TimeoutError:
            raise HttpError("timeout", f"no whole reply in {timeout_s:g} s") from None
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
            raise _connection_error(url, error) from None
        if not reply.is_success:
            raise _status_error(url, reply, found)
        return found

    async def _attempt(
        self, method: str, url: str, body: bytes, steps: _Steps
    ) -> tuple[httpx2.Response, bytes]:
        """One request on one connection: the reply and its body."""
        more = {"trace": steps}
        async with self._client.stream(method, url, content=body or None, extensions=more) as reply:
            found = bytearray()
            self._check_size(int(reply.headers.get("Content-Length", 0)))
            async for chunk in reply.aiter_raw():
                found += chunk
                self._check_size(len(found))
        return reply, bytes(found)

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise HttpError("protocol", f"the reply is longer than {self._max_bytes} bytes")


class _Steps:
    """Progress of a request, as httpx2 traces it: a connection was made, a reply began."""

    connected = answered = False

    async def __call__(self, name: str, _: Any) -> None:
        self.connected |= name.startswith("connection.connect_")
        self.answered |= name.endswith("receive_response_headers.complete")


def backoff(attempt: int, first_s: float, asked_s: float | None = None) -> float:
    """Back-off in seconds after attempt `attempt`, from 0. It doubles each time, minus random
    jitter, and is at least what the server asked for."""
    wait = min(first_s * 2.0 ** min(attempt, 30), LONGEST_WAIT_S)
    return max(wait * random.uniform(0.5, 1.0), asked_s or 0.0)


def base_url(url: str) -> str:
    """A server's URL without the version of its API and a final slash."""
    return url.rstrip("/").removesuffix("/v1")


def announced_servers(folder: Path) -> dict[str, str]:
    """Key of every server that has announced itself in `folder`, by URL.

    A file is JSON with `url` and `key`; files that are not, or not yet complete, are skipped.
    """
    found = {}
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            url, key = fields["url"], fields.get("key", "")
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue
        if isinstance(url, str) and isinstance(key, str) and is_url(url) and not key_problem(key):
            found[base_url(url)] = key
    return found


def read_key(variable: str) -> str:
    """Read a key from an environment variable, without surrounding white space such as a final line
    break. Empty if no variable is named or it is not set."""
    return os.environ.get(variable, "").strip() if variable else ""


def key_problem(key: str) -> str | None:
    """Reason why `key` is invalid in an HTTP header, to follow its name; never shows the key."""
    if key.isascii() and key.isprintable():
        return None
    return "holds characters that no HTTP header may have: export the key alone, on one line"


@functools.cache
def _certificates() -> ssl.SSLContext:
    """System certificates, or those of SSL_CERT_FILE, which trust_env=False would ignore."""
    return httpx2.create_ssl_context()


def _status_error(url: str, reply: httpx2.Response, body: bytes) -> HttpError:
    status, location = reply.status_code, reply.headers.get("Location")
    moved = f", it has moved to {location}" if location else ""
    # The date form of Retry-After is ignored.
    asked = reply.headers.get("Retry-After", "").strip()
    return HttpError(
        f"status_{status}",
        f"{url} answered status {status}: {body[:_SHOWN].decode(errors='replace')!r}{moved}",
        status=status,
        final=status < 500 and status not in _RETRIED,
        wait_s=float(asked) if asked.isascii() and asked.isdigit() else None,
    )


def _connection_error(url: str, error: Any) -> HttpError:
    cause = error
    while inner := cause.__cause__ or cause.__context__:
        cause = inner.exceptions[0] if isinstance(inner, BaseExceptionGroup) else inner
    if isinstance(error, httpx2.ConnectError) and not isinstance(cause, ssl.SSLError):
        kind = "unreachable"
    elif isinstance(error, httpx2.NetworkError) or _CUT_OFF.search(str(error)):
        kind = "connection"
    else:
        kind = "protocol"
    # asyncio's messages name the failed operation, but not the reason.
    errno = cause.errno if isinstance(cause, ConnectionError) else None
    why = cause if errno is None else os.strerror(errno)
    return HttpError(kind, f"{url}: {type(cause).__name__}: {why}")
