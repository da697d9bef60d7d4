"""Stand-in of the module `ray` in this process: actors are objects, and their calls threads.

Arguments, results and errors are pickled, as they are between hosts. A node can be killed: calls
under way there fail as Ray's do, and later ones too.
"""

from __future__ import annotations

import pickle
import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class ActorDiedError(RayError):
    pass


class GetTimeoutError(RayError):
    pass


@dataclass
class FakeNode:
    id: str
    slots: int
    alive: bool = True
    gpus: int = 0
    open_calls: set[Future[bytes]] = field(default_factory=set)
    started: list[str] = field(default_factory=list)
    """Names of the methods called on it, in order."""
    retries: dict[str, int] = field(default_factory=dict)
    """Retries that were asked for, by method."""

    def kill(self) -> None:
        self.alive = False
        self.lose_calls()

    def lose_calls(self) -> None:
        """Fail the calls under way; their methods run on."""
        for call in list(self.open_calls):
            if not call.done():
                call.set_exception(ActorDiedError(f"the node {self.id} has died"))


class FakeRay(types.ModuleType):
    """A cluster. connect: replaces what `init` does."""

    def __init__(self, *slots: int) -> None:
        super().__init__("ray")
        self.__version__ = "2.60.0"
        self.cluster = [FakeNode(f"node{i}", count) for i, count in enumerate(slots)]
        self.actors: dict[str, _Actor] = {}
        self.addresses: list[str] = []
        self.exceptions = sys.modules[__name__]
        self.connect: Callable[[], object] = lambda: None

    def is_initialized(self) -> bool:
        return bool(self.addresses)

    def init(self, address: str, **options: Any) -> None:
        self.connect()
        self.addresses.append(address)

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {
                "NodeID": node.id,
                "NodeManagerHostname": node.id,
                "Alive": node.alive,
                "Resources": {"CPU": float(node.slots), "GPU": float(node.gpus)},
            }
            for node in self.cluster
        ]

    def remote(self, concurrency_groups: dict[str, int]) -> Callable[[type], _Kind]:
        return lambda kind: _Kind(self, kind, concurrency_groups)

    def get(self, call: Future[bytes], timeout: float | None = None) -> Any:
        try:
            return pickle.loads(call.result(timeout))
        except FutureTimeoutError:
            raise GetTimeoutError("no answer in time") from None


class _Kind:
    def __init__(self, ray: FakeRay, kind: type, groups: dict[str, int], **options: Any) -> None:
        self.ray, self.kind, self.groups, self.said = ray, kind, groups, options

    def options(self, **options: Any) -> _Kind:
        return _Kind(self.ray, self.kind, self.groups, **options)

    def remote(self, *arguments: Any) -> _Actor:
        found = self.ray.actors.get(self.said["name"])
        if found is None or not found.node.alive:
            [node] = [n for n in self.ray.cluster if n.id == self.said["scheduling_strategy"][0]]
            assert self.said["num_cpus"] == 0
            found = _Actor(node, self.kind(*arguments), self.groups)
            self.ray.actors[self.said["name"]] = found
        return found


class _Actor:
    def __init__(self, node: FakeNode, target: Any, groups: dict[str, int]) -> None:
        self.node, self.target = node, target
        self.limits = {name: threading.Semaphore(count) for name, count in groups.items()}

    def __getattr__(self, name: str) -> _Method:
        return _Method(self, name, None)


@dataclass
class _Method:
    actor: _Actor
    name: str
    group: str | None

    def options(
        self, concurrency_group: str, max_task_retries: int, enable_task_events: bool
    ) -> _Method:
        self.actor.node.retries[self.name] = max_task_retries
        return _Method(self.actor, self.name, concurrency_group)

    def remote(self, *arguments: Any) -> Future[bytes]:
        call: Future[bytes] = Future()
        node, sent = self.actor.node, pickle.dumps(arguments)
        if not node.alive:
            call.set_exception(ActorDiedError(f"the node {node.id} has died"))
            return call
        node.open_calls.add(call)
        threading.Thread(target=self._run, args=(call, sent), daemon=True).start()
        return call

    def _run(self, call: Future[bytes], sent: bytes) -> None:
        with self._slot():
            self.actor.node.started.append(self.name)
            try:
                result = getattr(self.actor.target, self.name)(*pickle.loads(sent))
                found: Any = pickle.dumps(result)
            except Exception as error:
                found = RayTaskError(pickle.loads(pickle.dumps(error)))
        self.actor.node.open_calls.discard(call)
        if not call.done():
            (call.set_exception if isinstance(found, Exception) else call.set_result)(found)

    @contextmanager
    def _slot(self) -> Iterator[None]:
        if self.group is None:
            yield
        else:
            with self.actor.limits[self.group]:
                yield


def install(monkeypatch: pytest.MonkeyPatch, *slots: int) -> FakeRay:
    """Make `import ray` give a cluster of nodes with these slots."""
    made = FakeRay(*slots)
    strategies: Any = types.ModuleType("ray.util.scheduling_strategies")
    strategies.NodeAffinitySchedulingStrategy = lambda node, soft: (node, soft)
    monkeypatch.setitem(sys.modules, "ray", made)
    monkeypatch.setitem(sys.modules, "ray.util", types.ModuleType("ray.util"))
    monkeypatch.setitem(sys.modules, "ray.util.scheduling_strategies", strategies)
    return made
