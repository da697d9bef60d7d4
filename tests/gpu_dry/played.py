"""torch.cuda on the device that is played: streams, events, graphs, reads and memory figures."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from gpu_dry.device import DEVICE, MEMORY, PROPERTIES, RECORD, DryRun, Host, is_fake
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_map


class _Stream:
    """Stands for torch.cuda.Stream; nothing is ordered."""

    cuda_stream = 0
    device = DEVICE

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def wait_stream(self, *_args: Any) -> None:
        pass

    def wait_event(self, *_args: Any) -> None:
        pass

    def record_event(self, *_args: Any) -> _Event:
        return _Event()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        RECORD.add("sync", "stream.synchronize")


class _Event:
    """Stands for torch.cuda.Event."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def record(self, *_args: Any) -> None:
        pass

    def wait(self, *_args: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, *_args: Any) -> float:
        return 1.0

    def synchronize(self) -> None:
        RECORD.add("sync", "event.synchronize")


class _Graph:
    """Stands for torch.cuda.CUDAGraph. owners: living graphs of each pool."""

    owners: ClassVar[Counter[int]] = Counter()

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self._pool = id(self)

    def pool(self) -> int:
        return self._pool

    def captured_in(self, pool: int) -> None:
        self._pool = pool
        self.owners[pool] += 1
        weakref.finalize(self, self._left, pool)

    @classmethod
    def _left(cls, pool: int) -> None:
        cls.owners[pool] -= 1
        if not cls.owners[pool]:
            MEMORY.release(pool)

    def replay(self) -> None:
        RECORD.add("launch", "graph replay")

    def reset(self) -> None:
        pass


@contextlib.contextmanager
def _capture(graph: _Graph, pool: Any = None, **_kwargs: Any) -> Iterator[None]:
    graph.captured_in(graph.pool() if pool is None else hash(pool))
    RECORD.captured.clear()
    MEMORY.pool = graph.pool()
    try:
        yield
    finally:
        MEMORY.pool = None


_HANDLES = itertools.count(1)


def _memory_stats(*_device: Any) -> dict[str, int]:
    return {"allocated_bytes.all.current": MEMORY.live, "allocated_bytes.all.peak": MEMORY.peak}


def _install_cuda() -> None:
    """Let torch.cuda answer for the device that is played."""
    stream = _Stream()

    def nothing(*_args: Any, **_kwargs: Any) -> None:
        pass

    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": nothing,
        "get_device_capability": lambda *_: (PROPERTIES.major, PROPERTIES.minor),
        "get_device_properties": lambda *_: PROPERTIES,
        "get_device_name": lambda *_: PROPERTIES.name,
        "current_stream": lambda *_: stream,
        "default_stream": lambda *_: stream,
        "stream": lambda *_: contextlib.nullcontext(),
        "device": lambda *_: contextlib.nullcontext(),
        "Stream": _Stream,
        "Event": _Event,
        "CUDAGraph": _Graph,
        "graph": _capture,
        "graph_pool_handle": lambda: (0, next(_HANDLES)),
        "synchronize": lambda *_: RECORD.add("sync", "cuda.synchronize"),
        "empty_cache": nothing,
        "mem_get_info": lambda *_: (PROPERTIES.total_memory - MEMORY.live, PROPERTIES.total_memory),
        "memory_stats": _memory_stats,
        "memory_allocated": lambda *_: MEMORY.live,
        "max_memory_allocated": lambda *_: MEMORY.peak,
        "reset_peak_memory_stats": lambda *_: MEMORY.reset_peak(),
        "is_current_stream_capturing": lambda: MEMORY.pool is not None,
        "_lazy_init": nothing,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.Tensor.record_stream = nothing  # type: ignore[method-assign]


def _install_reads(mode: DryRun) -> None:
    """Catch what reads the device without an operator: Tensor.tolist, torch.tensor."""
    tolist, tensor = torch.Tensor.tolist, torch.tensor

    def listed(self: torch.Tensor) -> Any:
        mode.synchronise("tolist")
        with unset_fake_temporarily():
            return tolist(Host.read(self))

    def of_values(data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        read = tree_map(lambda x: x.item() if is_fake(x) else x, data)
        return tensor(read, *args, **kwargs)

    patched: Any = FakeTensor
    patched.tolist = listed
    torch.tensor = of_values


def _install_objects() -> None:
    """Objects that ranks exchange are this rank's own."""

    def gather(values: list[Any], own: Any, group: Any = None) -> None:
        values[:] = [own] * len(values)

    def keep(_values: list[Any], *_args: Any, **_kwargs: Any) -> None:
        pass

    for module in (dist, dist.distributed_c10d):
        module.all_gather_object = gather  # type: ignore[attr-defined]
        module.broadcast_object_list = keep  # type: ignore[attr-defined]


def to_device(module: torch.nn.Module, *_device: Any, **_kwargs: Any) -> torch.nn.Module:
    """Stands for Module.to: parameters of the host or the meta device become fake ones.

    The marks that Megatron-Core leaves on parameters stay.
    """

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        out = torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device=DEVICE)
        MEMORY.see(out)
        return out

    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None and not is_fake(parameter):
                made = torch.nn.Parameter(fake(parameter), requires_grad=parameter.requires_grad)
                made.__dict__.update(parameter.__dict__)
                part._parameters[name] = made
        for name, buffer in list(part._buffers.items()):
            if buffer is not None and not is_fake(buffer):
                part._buffers[name] = fake(buffer)
    return module


@contextlib.contextmanager
def dry_run(axes: Callable[[str], str] = lambda name: name) -> Iterator[DryRun]:
    """The device in this process, for good; torch.cuda answers for it.

    axes: the layout's axis of a process group's name, for the names of collectives.
    """
    stub = ctypes.CDLL("libcuda.so.1")
    mode = DryRun(axes)
    with mode:
        _install_cuda()
        _install_reads(mode)
        _install_objects()
        torch.nn.Module.to = to_device  # type: ignore[method-assign,assignment]
        stub.set_device_count(127)
        yield mode
