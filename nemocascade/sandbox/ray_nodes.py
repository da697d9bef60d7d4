"""Nodes of a Ray cluster that run programs for one sandbox, each with an actor.

Ray places the actors, watches them and starts them again. A call that was lost with its node is
made again on another one; an error that the sandbox raised is not.
"""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nemocascade.recipe.envs import SandboxConfig
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.ray_cluster import (
    ClusterError,
    RayNode,
    connect,
    on_node,
    own_versions,
    wait_for_nodes,
    worker_nodes,
)
from nemocascade.sandbox.ray_actor import NodeSandboxes, PoolSettings
from nemocascade.types import SandboxError, SandboxUnavailable

LOSSES = 3
"""A call that was lost with this many nodes is not made again: it may be what ends them."""
RETRIES = 1
"""Retries by Ray of a call whose actor died on a node that lives, or was not reached. Cells have
none."""
REFRESH_S = 5.0
"""Interval at which nodes that have joined the cluster are looked for."""
REMIND_S = 60.0
"""Time from the first warning of a lost cluster to the second; the next come at twice the time."""
LONGEST_REMIND_S = 3600.0
"""Longest interval between two warnings of a lost cluster."""
EXCLUDED_S = 30.0
"""A node that lost a call is not used for this long: Ray may not know yet that it is lost."""
OPEN_S = 120.0
"""Timeout of a node's actor and its first worker."""
SHOWN = 200
"""Characters of an error of Ray in a message."""
CONTROL_CALLS = 16
"""Concurrent calls of an actor that take no slot."""
_KEPT: list[Any] = []
"""Handles of actors that this process started: without one, Ray ends an actor that other ranks
use. Ray ends it with this process."""


class NodeLostError(SandboxError):
    """A call was lost with its node, or with the actor there."""


@dataclass
class Node:
    """A node with its actor. busy: calls of this sandbox that it has now."""

    about: RayNode
    actor: Any
    busy: int = 0


class _Outage:
    """Failed look-ups of the cluster's nodes: the first is logged at once, later ones ever more
    rarely."""

    def __init__(self) -> None:
        self._failures, self._start, self._due_s = 0, 0.0, 0.0

    def failed(self, error: Exception) -> None:
        """Count a failed look-up, and log it if a warning is due."""
        now = time.monotonic()
        self._start = self._start if self._failures else now
        self._failures += 1
        if now - self._start >= self._due_s:
            LOGGER.warning(
                "the nodes of the Ray cluster are unknown: %s (%d failed look-ups in %.0f s)",
                *(error, self._failures, now - self._start),
            )
            self._due_s = min(max(REMIND_S, 2 * self._due_s), self._due_s + LONGEST_REMIND_S)

    def succeeded(self) -> None:
        """End of an outage, if there is one."""
        if self._failures:
            LOGGER.info(
                "the Ray cluster answers again, after %d failed look-ups in %.0f s",
                *(self._failures, time.monotonic() - self._start),
            )
        self._failures, self._due_s = 0, 0.0


class RayNodes:
    """The nodes of a sandbox. Thread-safe. Raises SandboxUnavailable if no node can be used, or if
    one is unsuitable: it cannot isolate programs, has no such folder or module, or has other
    versions."""

    def __init__(self, config: SandboxConfig, settings: PoolSettings) -> None:
        self._settings, self._wait_s = settings, config.ray.wait_s
        self._ray = connect(config.ray)
        self._client = uuid.uuid4().hex
        self._changed = threading.Condition()
        self._nodes: dict[str, Node] = {}
        self._excluded: dict[str, float] = {}
        """Time at which a node may be used again, by id."""
        self.gone = ""
        """Why no call can be made any more; empty if it can."""
        self._closed = threading.Event()
        reasons = self._add(wait_for_nodes(config.ray), is_first=True)
        if not self._nodes:
            raise ClusterError(f"no node of the Ray cluster runs programs: {reasons[-1]}")
        threading.Thread(target=self._refresh, name="ray-nodes", daemon=True).start()

    def call(self, method: str, *arguments: Any, takes_slot: bool = True) -> tuple[Any, Node]:
        """Call a method of the least busy node's actor; returns its result, and the node.

        Raises what the method raises, and SandboxError if the call was lost too often or if there
        is no node for `wait_s`.
        """
        for _ in range(LOSSES):
            node = self._least_busy()
            try:
                return self.call_on(node, method, *arguments, takes_slot=takes_slot), node
            except NodeLostError as error:
                lost = error
            finally:
                self._count(node, -1)
        raise SandboxError(f"a program was lost with {LOSSES} nodes, the last time: {lost}")

    def call_on(self, node: Node, method: str, *arguments: Any, takes_slot: bool = True) -> Any:
        """Call a method on this node. Raises what the method raises, and NodeLostError."""
        called = getattr(node.actor, method)
        if takes_slot:
            # A session would see a cell twice whose answer alone was lost.
            retries = 0 if method == "run_cell" else RETRIES
            called = called.options(
                concurrency_group="programs", max_task_retries=retries, enable_task_events=False
            )
        with self._losing(node.about):
            return self._ray.get(called.remote(*arguments))

    def tell(self, node: Node, method: str, *arguments: Any) -> None:
        """Call a method on this node, which may be lost; nothing waits for it."""
        getattr(node.actor, method).remote(*arguments)

    @contextmanager
    def busy(self, node: Node) -> Iterator[None]:
        """Context manager of a call on this node."""
        self._count(node, 1)
        try:
            yield
        finally:
            self._count(node, -1)

    def close(self) -> None:
        """Let the nodes end the pools; nothing waits for it."""
        self._closed.set()
        with self._changed:
            for node in self._nodes.values():
                self.tell(node, "release", self._client, self._settings)
            self._nodes.clear()

    def _count(self, node: Node, change: int) -> None:
        with self._changed:
            node.busy += change

    def _least_busy(self) -> Node:
        """The node with the fewest of this sandbox's calls for its slots, with one more; waits
        while there is none."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._nodes or self.gone, self._wait_s):
                self.gone = f"no node of the Ray cluster has run programs for {self._wait_s:g} s"
            if self.gone:
                raise SandboxError(self.gone)
            # Many ranks choose at the same time: equal nodes are drawn.
            node = min(
                self._nodes.values(), key=lambda n: (n.busy / n.about.slots, random.random())
            )
            node.busy += 1
            return node

    @contextmanager
    def _losing(self, about: RayNode) -> Iterator[None]:
        """Raise the errors of a call as they were raised on the node, and NodeLostError for a lost
        one, whose node is not used for some time."""
        errors = self._ray.exceptions
        try:
            yield
        except errors.RayTaskError as error:
            raise error.cause from None
        except errors.RayError as error:
            said = str(error).strip().splitlines()
            reason = f"{about.host}: {said[0][:SHOWN] if said else type(error).__name__}"
            self._exclude(about, EXCLUDED_S, f"node {reason}")
            raise NodeLostError(reason) from None

    def _exclude(self, about: RayNode, seconds: float, reason: str) -> None:
        with self._changed:
            is_new = self._excluded.get(about.id, 0.0) < time.monotonic()
            self._excluded[about.id] = time.monotonic() + seconds
            self._nodes.pop(about.id, None)
        if is_new and not self._closed.is_set():
            LOGGER.warning("programs do not run on %s", reason)

    def _refresh(self) -> None:
        """Until `close`, use nodes that have joined, and forget those that have left."""
        outage = _Outage()
        while not self._closed.wait(REFRESH_S):
            try:
                found = worker_nodes(self._ray)
                now = time.monotonic()
                with self._changed:
                    known = set(self._nodes)
                    for gone in known - {node.id for node in found}:
                        del self._nodes[gone]
                    later = self._excluded
                    new = [n for n in found if n.id not in known and later.get(n.id, 0) < now]
                self._add(new)
            except Exception as error:  # the cluster itself is lost: calls say so
                outage.failed(error)
            else:
                outage.succeeded()

    def _add(self, nodes: Sequence[RayNode], *, is_first: bool = False) -> list[str]:
        """Start actors on nodes and use those that answer; returns why others do not.

        is_first: raise the error of a node that rejects the settings. Later, such a node is
        excluded for good.
        """
        started = [(about, actor := self._actor(about), self._opening(actor)) for about in nodes]
        deadline, reasons = time.monotonic() + OPEN_S, []
        for about, actor, answer in started:
            try:
                with self._losing(about):
                    timeout = max(0.0, deadline - time.monotonic())
                    _check(about, self._ray.get(answer, timeout=timeout))
            except NodeLostError as error:
                reasons.append(str(error))
                continue
            except Exception as error:  # the node rejects the settings
                if is_first:
                    raise SandboxUnavailable(f"node {about.host}: {error}") from error
                self._exclude(about, float("inf"), f"node {about.host}: {error}")
                continue
            with self._changed:
                self._nodes[about.id], self.gone = Node(about, actor), ""
                self._changed.notify_all()
        return reasons

    def _actor(self, about: RayNode) -> Any:
        """The actor of a node, which the ranks of the job share; the first to ask starts it."""
        kind = self._ray.remote(concurrency_groups={"programs": about.slots})(NodeSandboxes)
        actor = kind.options(
            name=f"sandboxes-{about.id}",
            get_if_exists=True,
            # Two jobs share a node: a claim on its CPUs would keep the second one waiting.
            num_cpus=0,
            max_concurrency=CONTROL_CALLS,
            max_restarts=-1,
            max_task_retries=RETRIES,
            # Ray would keep a record of each program, for its dashboard.
            enable_task_events=False,
            scheduling_strategy=on_node(about),
        ).remote(about.slots)
        _KEPT.append(actor)
        return actor

    def _opening(self, actor: Any) -> Any:
        return actor.open.remote(self._client, self._settings)


def _check(about: RayNode, found: dict[str, str]) -> None:
    """Raise SandboxUnavailable for a node with other versions; warn if it isolates nothing."""
    for name, own in own_versions().items():
        if found[name] != own:
            raise SandboxUnavailable(f"it has {name} {found[name]}, and this rank {own}")
    if found["isolation"] == "none":
        LOGGER.warning("programs run WITHOUT isolation on %s, as its user", about.host)
