"""A sandbox on the nodes of a Ray cluster, with the interface of `SandboxPool`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from nemocascade.recipe.envs import SandboxConfig
from nemocascade.runtime.ray_cluster import ClusterError, program_slots
from nemocascade.sandbox.fair_slots import FairSlots
from nemocascade.sandbox.pool import SandboxPool
from nemocascade.sandbox.ray_actor import PoolSettings
from nemocascade.sandbox.ray_nodes import Node, NodeLostError, RayNodes
from nemocascade.sandbox.series import run_series
from nemocascade.sandbox.session import CellOutcome, SandboxSession
from nemocascade.types import Outcome, Program, SandboxError


class RaySandbox:
    """Runs programs on the nodes of a Ray cluster, as `SandboxPool` does on this host. Thread-safe.

    A program that is lost with its node is repeated on another one. Raises as `RayNodes`.
    """

    def __init__(self, config: SandboxConfig, *, modules: Sequence[str] = ()) -> None:
        if problems := config.problems():
            raise ValueError("; ".join(problems))
        self.config = config
        self.size = program_slots(config)
        self._settings = PoolSettings.of(config, tuple(modules))
        self._slots = FairSlots[None]([None] * self.size)
        self._nodes = RayNodes(config, self._settings)

    def run(self, program: Program) -> Outcome:
        """Run one program. Raises as `SandboxPool.run`, and SandboxError if no node is left."""
        with self._slots.take():
            outcome, _ = self._nodes.call("run", self._settings, program)
        assert isinstance(outcome, Outcome)
        return outcome

    def run_until(
        self, programs: Sequence[Program], stops: Callable[[int, Outcome], bool]
    ) -> list[Outcome]:
        """Run programs in order up to the first that `stops` the series, see `run_series`."""
        return run_series(self.run, self._slots, programs, stops)

    def session(self, cells: int) -> RaySession:
        """Open a session of at most `cells` cells on one node. Its caller closes it. Raises
        SandboxError."""
        name, node = self._nodes.call("open_session", self._settings, cells, takes_slot=False)
        return RaySession(self._nodes, node, name, self._slots)

    def check(self) -> None:
        """Raise ClusterError if every node is lost, so that no program can run any more."""
        if self._nodes.gone:
            raise ClusterError(f"{self._nodes.gone}: start the stage again to resume")

    def close(self) -> None:
        """End the pools and sessions on the nodes, unless other ranks use them."""
        self._nodes.close()


class RaySession:
    """A session on one node, see `SandboxSession`. It is lost with its node. Thread-safe."""

    def __init__(self, nodes: RayNodes, node: Node, name: str, slots: FairSlots[None]) -> None:
        self._nodes, self._node, self._name, self._slots = nodes, node, name, slots
        self._lock = threading.Lock()
        self.alive = True
        """False once the session has ended, by a cell or by `close`."""

    def run(self, source: str) -> CellOutcome:
        """Run a cell and wait for its end. Raises as `SandboxSession.run`."""
        with self._slots.take(), self._lock, self._nodes.busy(self._node):
            if not self.alive:
                raise SandboxError("the session has ended")
            try:
                found = self._nodes.call_on(self._node, "run_cell", self._name, source)
            except BaseException:
                self.alive = False
                # The call may be lost, and not the node.
                self._nodes.tell(self._node, "close_session", self._name)
                raise
            assert isinstance(found, CellOutcome)
            self.alive = found.status == "ok"
            return found

    def close(self) -> None:
        """End the session and every process in it; a second call does nothing."""
        with self._lock:
            if not self.alive:
                return
            self.alive = False
            try:
                self._nodes.call_on(self._node, "close_session", self._name, takes_slot=False)
            except NodeLostError:
                return  # and with its node the session


AnySandbox = SandboxPool | RaySandbox
AnySession = SandboxSession | RaySession


def open_sandbox(config: SandboxConfig, *, modules: Sequence[str] = ()) -> AnySandbox:
    """Open the sandbox that the settings name. Raises as `SandboxPool` and `RaySandbox`."""
    kind = RaySandbox if config.workers == "ray" else SandboxPool
    return kind(config, modules=modules)
