"""Sandboxes of one node of a Ray cluster: an actor, whose calls take the node's slots.

Ray runs as many calls of `run` and `run_cell` at a time as the node has slots, in threads of the
actor's process; further ones wait in its queue. The isolation is that of `SandboxPool`.
"""

from __future__ import annotations

import threading
import uuid
from dataclasses import dataclass, replace

from nemocascade.recipe.envs import RayConfig, SandboxConfig
from nemocascade.runtime.ray_cluster import own_versions
from nemocascade.sandbox.pool import SandboxPool
from nemocascade.sandbox.session import CellOutcome, SandboxSession
from nemocascade.types import Outcome, Program, SandboxError


@dataclass(frozen=True)
class PoolSettings:
    """Settings of a pool of workers, which the clients with equal ones share."""

    config: SandboxConfig
    modules: tuple[str, ...]

    @classmethod
    def of(cls, config: SandboxConfig, modules: tuple[str, ...]) -> PoolSettings:
        """The settings without those that say where programs run."""
        return cls(replace(config, workers="local", ray=RayConfig()), modules)


class NodeSandboxes:
    """The pools and sessions of a node. Thread-safe. slots: programs and cells at a time."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._lock = threading.Lock()
        self._pools: dict[PoolSettings, SandboxPool] = {}
        self._clients: dict[PoolSettings, set[str]] = {}
        self._sessions: dict[str, SandboxSession] = {}

    def open(self, client: str, settings: PoolSettings) -> dict[str, str]:
        """Start a pool unless it runs, until the last client releases it. Returns the node's
        versions, and its isolation backend as `isolation`. Raises like `SandboxPool`."""
        isolation = self._pool(settings).isolation
        with self._lock:
            self._clients.setdefault(settings, set()).add(client)
        return {**own_versions(), "isolation": isolation}

    def release(self, client: str, settings: PoolSettings) -> None:
        """End a pool if no other client has opened it."""
        with self._lock:
            clients = self._clients.get(settings, set())
            clients.discard(client)
            pool = None if clients else self._pools.pop(settings, None)
        if pool is not None:
            pool.close()

    def run(self, settings: PoolSettings, program: Program) -> Outcome:
        """Run one program. Raises as `SandboxPool.run`."""
        return self._pool(settings).run(program)

    def open_session(self, settings: PoolSettings, cells: int) -> str:
        """Open a session and return its id. Raises as `SandboxPool.session`."""
        opened, name = self._pool(settings).session(cells), uuid.uuid4().hex
        with self._lock:
            self._sessions[name] = opened
        return name

    def run_cell(self, session: str, source: str) -> CellOutcome:
        """Run a cell of a session. Raises as `SandboxSession.run`."""
        with self._lock:
            opened = self._sessions.get(session)
        if opened is None:
            raise SandboxError("the session was lost when its node's actor was started again")
        try:
            return opened.run(source)
        finally:
            if not opened.alive:
                self.close_session(session)

    def close_session(self, session: str) -> None:
        """End a session; one that has ended does nothing."""
        with self._lock:
            opened = self._sessions.pop(session, None)
        if opened is not None:
            opened.close()

    def _pool(self, settings: PoolSettings) -> SandboxPool:
        # An actor that Ray has started again gets calls of clients which opened the one before.
        with self._lock:
            if settings not in self._pools:
                config = replace(settings.config, workers=self._slots)
                self._pools[settings] = SandboxPool(config, modules=settings.modules)
            return self._pools[settings]
