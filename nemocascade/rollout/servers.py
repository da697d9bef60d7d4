"""The inference servers of a run: where they are, which ones work, and how busy each is."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from nemocascade.recipe import UserError
from nemocascade.recipe.server import RolloutServerConfig
from nemocascade.runtime.http import (
    HttpClient,
    HttpError,
    announced_servers,
    base_url,
    key_problem,
    read_key,
)
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.stopping import AGAIN

MAX_BYTES = 256 << 20
"""Limit on a reply: enough for ids, names and log-probabilities of 256K tokens."""
STRIKES = 3
"""Failures in a row after which a server that still answers counts as lost."""
REST_S = 30.0
"""Pause of a lost server that needs no weights, before it is tried again."""
_POLL_S = 1.0


class ServerError(UserError, RuntimeError):
    """No server can be used, or one rejects a request."""


class ServersLostError(ServerError):
    """Every server has stopped to answer; another start may find them."""

    exit_code = AGAIN


class Server:
    """One server. load, asked: requests in flight from this rank, and all. strikes: failures in a
    row. lost: why it is not used; empty if it is."""

    def __init__(self, url: str, key: str, connections: int) -> None:
        self.url = base_url(url)
        self.http = HttpClient(key=key, connections=connections, max_bytes=MAX_BYTES)
        self.load, self.asked, self.strikes = 0, 0, 0
        self.lost, self.lost_at = "", 0.0

    def post(self, path: str, body: bytes, timeout_s: float, name: str = "") -> bytes:
        """The body of a 2xx reply. name: for `ServerPool.cancel`. Raises HttpError."""
        return self.http.post(self.url + path, body, timeout_s, name)

    def call(self, path: str, fields: dict[str, Any] | None, timeout_s: float) -> None:
        """Post JSON whose reply does not matter. Raises HttpError."""
        self.post(path, b"" if fields is None else json.dumps(fields).encode(), timeout_s)


class ServerPool:
    """The servers that this rank sends requests to. Thread-safe.

    rank: spreads the first requests of the ranks over the servers. counts: by kind of failure,
    `lost` servers, and rollouts `dropped`.
    """

    def __init__(self, settings: RolloutServerConfig, *, rank: int = 0) -> None:
        self.settings, self._rank = settings, rank
        self.counts: Counter[str] = Counter()
        self._servers: dict[str, Server] = {}
        self._lock = threading.Lock()
        key = read_key(settings.api_key_env)
        if settings.api_key_env and (problem := key_problem(key) if key else "is not set"):
            raise ServerError(f"rollout.server.api_key_env({settings.api_key_env}) {problem}")
        self._key = key

    def named(self) -> dict[str, str]:
        """Key of every server that is named or has announced itself, by URL."""
        found = {base_url(url): self._key for url in self.settings.urls}
        if self.settings.announce:
            found |= announced_servers(Path(self.settings.announce))
        return found

    def use(self, keys: dict[str, str]) -> list[Server]:
        """Use these servers and no others, as working ones; returns them in order of URL."""
        with self._lock:
            for url in self._servers.keys() - keys.keys():
                self._servers.pop(url).http.close()
            for url, key in keys.items():
                if url not in self._servers:
                    self._servers[url] = Server(url, key, self.settings.concurrency)
                server = self._servers[url]
                server.strikes, server.lost = 0, ""
            return [self._servers[url] for url in sorted(self._servers)]

    def take(self, avoid: Collection[Server] = (), *, may_rest: bool) -> Server:
        """The working server with the fewest requests; `give_back` it.

        avoid: servers to use only if no other works. may_rest: lost servers are tried again after
        a rest, because their weights cannot have changed.

        Raises ServerError if all are lost.
        """
        with self._lock:
            every = list(self._servers.values())
            if may_rest:
                for server in every:
                    if server.lost and time.monotonic() - server.lost_at > REST_S:
                        server.lost, server.strikes = "", 0
            working = [s for s in every if not s.lost]
            if not working:
                reasons = "; ".join(f"{s.url}: {s.lost}" for s in every) or "none is named"
                raise ServersLostError(f"all {len(every)} rollout servers are lost: {reasons}")
            fresh = [s for s in working if s not in avoid] or working
            first = self._rank % len(fresh)
            order = fresh[first:] + fresh[:first]
            server = min(order, key=lambda s: (s.load, s.asked))
            server.load += 1
            server.asked += 1
            return server

    def give_back(self, server: Server, failure: str = "", *, gone: bool = False) -> None:
        """End a request. failure: what went wrong. gone: the server does not answer at all."""
        with self._lock:
            server.load -= 1
            if not failure:
                server.strikes = 0
                return
            server.strikes += 1
            if (gone or server.strikes >= STRIKES) and not server.lost:
                server.lost, server.lost_at = failure, time.monotonic()
                self.counts["lost"] += 1
                LOGGER.warning("rollout server %s is lost: %s", server.url, failure)

    def count(self, kind: str) -> None:
        with self._lock:
            self.counts[kind] += 1

    def wait_for_first(self, progress: Any) -> dict[str, str]:
        """URLs and keys of the servers that answer, once the wanted number does.

        progress: called with a line while waiting. Raises ServerError after `wait_s`.
        """
        settings = self.settings
        wanted = settings.servers or max(1, len(settings.urls))
        deadline = time.monotonic() + settings.wait_s
        while True:
            keys = self.named()
            answering, reasons = self.answering(keys)
            if len(answering) >= wanted:
                return answering
            if time.monotonic() >= deadline:
                where = f" in {settings.announce}" if settings.announce else ""
                told = "; ".join(reasons) or f"none is announced{where}"
                raise ServerError(
                    f"{len(answering)} of {wanted} rollout servers answer after "
                    f"rollout.server.wait_s({settings.wait_s:g}): {told}"
                )
            progress(f"{len(answering)} of {wanted} rollout servers answer")
            time.sleep(_POLL_S)

    def answering(self, keys: dict[str, str]) -> tuple[dict[str, str], list[str]]:
        """Those of these servers that serve the model, and why the others do not."""
        found, reasons = {}, []
        for url, key in sorted(keys.items()):
            reason = self._reason(url, key)
            if reason:
                reasons.append(f"{url}: {reason}")
            else:
                found[url] = key
        return found, reasons

    def _reason(self, url: str, key: str) -> str:
        """Why a server cannot be used; empty if it can."""
        http = HttpClient(key=key, connections=1)
        try:
            models = json.loads(http.get(f"{url}/v1/models", 10.0))["data"]
            names = [model["id"] for model in models]
        except HttpError as error:
            if error.status in (404, 405, 501):
                # It answers, and lists no models.
                return ""
            if error.final and error.status:
                raise ServerError(f"a rollout server rejects its key or path: {error}") from None
            return str(error)
        except (ValueError, LookupError, TypeError) as error:
            return f"/v1/models is not a list of models ({type(error).__name__})"
        finally:
            http.close()
        if self.settings.model not in names:
            raise ServerError(
                f"{url} serves {', '.join(map(repr, names)) or 'no model'}, and "
                f"rollout.server.model is {self.settings.model!r}: name the model as the server "
                "does"
            )
        return ""

    def cancel(self, names: Collection[str] | None = None) -> None:
        """Cut off the requests in flight. names: only these."""
        with self._lock:
            servers = list(self._servers.values())
        for server in servers:
            server.http.cancel(names)

    def close(self) -> None:
        """Cut off all requests, and send no more."""
        with self._lock:
            for server in self._servers.values():
                server.http.close()
            self._servers.clear()
