"""Stand-ins for the graphs of torch.cuda on a CPU.

A capture records the operators, and a replay runs them again on the same tensors. Graphs of one
pool overwrite each other's memory.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork, Work
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


def tensors_of(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


def finished(out: Any) -> Any:
    """The output of an operator, after the collective that it may be.

    gloo copies results while the host waits; those copies belong to the collective.
    """

    def wait(value: Any) -> Any:
        if not isinstance(value, torch.ScriptObject):
            return value
        Work.unbox(value).wait()
        return FakeWork().boxed()

    return tree_map(wait, out)


class Graph(TorchDispatchMode):
    """Stands for torch.cuda.CUDAGraph: the recorded operators, in a pool with other graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.pool: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = finished(func(*args, **kwargs))
        found = tensors_of(out)
        self.calls.append((func, args, kwargs, found))
        inputs = {t.untyped_storage().data_ptr() for t in tensors_of((args, kwargs))}
        self.pool += [t for t in found if t.untyped_storage().data_ptr() not in inputs]
        return out

    def replay(self) -> None:
        for made in self.pool:
            if made.dtype.is_floating_point:
                made.fill_(float("nan"))
        for func, args, kwargs, found in self.calls:
            again = finished(func(*args, **kwargs))
            for old, new in zip(found, tensors_of(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Cuda:
    """The part of torch.cuda that captures graphs.

    captured: the pool and the rows of each capture.
    """

    def __init__(self) -> None:
        self.captured: list[tuple[int, int]] = []
        self.graphs: dict[int, weakref.WeakSet[Graph]] = {}
        self.memory: dict[int, list[Tensor]] = {}
        self.rows = 0
        self.handles = zip(itertools.count(1), itertools.repeat(0))

    @contextmanager
    def graph(
        self, graph: Graph, *, pool: tuple[int, int], capture_error_mode: str
    ) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        assert not gc.isenabled()
        number = pool[0]
        if number in self.graphs and not self.graphs[number]:
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")  # as torch's allocator
        self.graphs.setdefault(number, weakref.WeakSet()).add(graph)
        graph.pool = self.memory.setdefault(number, [])
        with graph:
            yield
        self.captured.append((number, self.rows))


def install(set_attribute: Callable[[Any, str, Any], None]) -> Cuda:
    """Let torch.cuda capture graphs by `Cuda`. set_attribute: such as `setattr`."""
    cuda = Cuda()
    stream = SimpleNamespace(wait_stream=lambda _: None)
    for name, value in {
        "CUDAGraph": Graph,
        "graph": cuda.graph,
        "graph_pool_handle": lambda: next(cuda.handles),
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda _: nullcontext(),
    }.items():
        set_attribute(torch.cuda, name, value)
    return cuda
