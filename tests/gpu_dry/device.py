"""A CUDA device that is not there: fake tensors, whose every operation is recorded.

Operations on CPU tensors run for real. Operations on CUDA tensors compute shapes only; what the
host reads from the device is ones, or the value where all inputs are small integers that the host
itself has sent. Everything that a GPU would charge for is kept in a `Record` with its place: host
synchronisations, copies, operators, launches, collectives, and bytes of memory.

The process needs `driver_stub.c` preloaded; `run.py` starts it so.
"""

from __future__ import annotations

import contextlib
import sys
import types
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch._C._distributed_c10d import FakeWork, ProcessGroup
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

#: The device that is played: an H100 of 80 GiB, as CUDA describes it.
MULTIPROCESSORS, SHARED_BYTES, REGISTERS = 132, 232448, 65536
PROPERTIES = types.SimpleNamespace(
    name="dry-run H100",
    major=9,
    minor=0,
    multi_processor_count=MULTIPROCESSORS,
    total_memory=80 << 30,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=SHARED_BYTES,
    shared_memory_per_multiprocessor=233472,
    regs_per_multiprocessor=REGISTERS,
    max_threads_per_multi_processor=2048,
    warp_size=32,
    L2_cache_size=50 << 20,
    gcnArchName="",
    uuid="dry-run",
    is_integrated=0,
)
DEVICE = torch.device("cuda", 0)
#: Granularity of the caching allocator.
_ROUND = 512
#: Integers of so many elements keep their values.
_SMALL = 1 << 16
#: Folders whose frames name a place, outermost first.
_PACKAGES = ("/nemocascade/", "/nemocascade_kernels/", "/megatron/core/", "/fla/")
_RANDOM = ("normal", "uniform", "rand", "empty", "bernoulli")


@dataclass(frozen=True)
class Place:
    """The innermost frame of the project, of Megatron-Core or of fla-core."""

    function: str
    line: int

    def __str__(self) -> str:
        file, _, name = self.function.partition("::")
        return f"{file}:{self.line} in {name}"


_NOWHERE = Place("autograd::backward", 0)


def place() -> Place:
    """Where the running operation was called from."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/gpu_dry/" not in name:
            for root in _PACKAGES:
                if root in name and not (root == "/nemocascade/" and "/site-packages/" in name):
                    file = root.strip("/") + "/" + name.rsplit(root, 1)[1]
                    return Place(f"{file}::{frame.f_code.co_qualname}", frame.f_lineno)
        if frame.f_back is None:
            break
        frame = frame.f_back
    return _NOWHERE


@dataclass
class Record:
    """Counts since the last `taken`, by kind, name and place.

    counts: of (kind, name, place); kinds are sync, copy, operator, launch and collective.
    faults: things that a GPU would reject or get wrong.
    captured: what the last captured graph launches, of (layer, kind, name, place). layer: name of
    the layer that runs.
    """

    counts: Counter[tuple[str, str, Place]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    captured: Counter[tuple[str, str, str, Place]] = field(default_factory=Counter)
    layer: str = ""

    def add(self, kind: str, name: str, count: int = 1, *, launches: bool = True) -> None:
        """launches: it runs a kernel, unlike a view or an allocation."""
        where = place()
        self.counts[kind, name, where] += count
        if MEMORY.pool is not None and launches:
            self.captured[self.layer, kind, name, where] += count

    def fault(self, text: str) -> None:
        if (line := f"{text}, at {place()}") not in self.faults:
            self.faults.append(line)

    def taken(self) -> Counter[tuple[str, str, Place]]:
        """The counts, which start again from zero."""
        counts, self.counts = self.counts, Counter()
        return counts


class Memory:
    """Bytes of live fake storages, rounded as the caching allocator does.

    Graph captures allocate from a pool, which keeps its largest size while one of its graphs lives.
    live, peak: bytes, pools included. graphs: bytes of all pools, at most. explain: keep what is
    live at the peak, which takes time.
    """

    def __init__(self) -> None:
        self.live = self.peak = self.graphs = 0
        self._at_peak: Counter[tuple[Place, int]] = Counter()
        self._sizes: dict[int, tuple[int, Place, int | None]] = {}
        self._pools: dict[int, list[int]] = {}
        self.pool: int | None = None
        self.explain = False
        self._is_at_peak = False

    def see(self, tensor: torch.Tensor) -> None:
        """Count the storage of a new tensor."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = -(-storage.nbytes() // _ROUND) * _ROUND
        self._sizes[key] = size, place(), self.pool
        weakref.finalize(storage, self._drop, key)
        if self.pool is None:
            self.live += size
        else:
            used = self._pools.setdefault(self.pool, [0, 0])
            used[0] += size
            self.live += max(0, used[0] - used[1])
            used[1] = max(used)
            self.graphs = max(self.graphs, sum(most for _, most in self._pools.values()))
        if self.live > self.peak:
            self.peak = self.live
            self._is_at_peak = True

    def at_peak(self) -> Counter[tuple[Place, int]]:
        """Number of live storages at the peak, by place and bytes; empty without `explain`."""
        if self.explain and self._is_at_peak:
            self._at_peak = Counter((where, size) for size, where, _ in self._sizes.values())
        self._is_at_peak = False
        return self._at_peak

    def _drop(self, key: int) -> None:
        self.at_peak()
        size, _, pool = self._sizes.pop(key, (0, _NOWHERE, None))
        if pool is None:
            self.live -= size
        elif pool in self._pools:
            self._pools[pool][0] -= size

    def release(self, pool: int) -> None:
        """Free a pool whose graphs are gone."""
        self.live -= self._pools.pop(pool, [0, 0])[1]

    def reset_peak(self) -> None:
        self.peak = self.live
        self._is_at_peak = True


RECORD = Record()
MEMORY = Memory()


class Host:
    """Values that the host reads from the device.

    integer: the value of every element of an integer tensor whose values are not known.
    """

    integer: ClassVar[int] = 1
    known: ClassVar[WeakTensorKeyDictionary] = WeakTensorKeyDictionary()

    @classmethod
    def read(cls, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The values of a fake tensor on the host."""
        dtype = dtype or tensor.dtype
        with unset_fake_temporarily():
            if tensor in cls.known:
                found: torch.Tensor = cls.known[tensor].to(dtype).clone()
                return found
            integral = not dtype.is_floating_point and dtype != torch.bool
            value = cls.integer if integral else dtype != torch.bool
            return torch.full(tuple(tensor.shape), value, dtype=dtype)

    @classmethod
    def sent(cls, tensor: torch.Tensor, value: torch.Tensor) -> None:
        if value.numel() <= _SMALL and not tensor.dtype.is_floating_point:
            with unset_fake_temporarily():
                cls.known[tensor] = value.to(tensor.dtype).clone()


def is_fake(value: Any) -> bool:
    return isinstance(value, FakeTensor)


_PINNED = WeakTensorKeyDictionary()


def _launches(func: Any) -> bool:
    """True if the operator runs a kernel: it is no view, no allocation and no question."""
    name = func.name()
    quiet = func.is_view or func.namespace == "prim" or name == "aten::_unsafe_view"
    return not quiet and "empty" not in name


def _reads_size(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True if the operator's output has a size that only the device knows."""
    if name in ("aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim"):
        return True
    if name in ("aten::unique_consecutive", "aten::bincount", "aten::equal"):
        return True
    if name.startswith("aten::repeat_interleave"):
        return "Tensor" in name and kwargs.get("output_size") is None
    if name in ("aten::index.Tensor", "aten::index_put_", "aten::index_put"):
        masked = any(_is_mask(i) for i in args[1] if i is not None)
        # A single value under a mask is a masked_fill.
        return masked and not (name != "aten::index.Tensor" and args[2].numel() == 1)
    return False


def _at_most(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of such an operator at its largest size: every element is chosen."""
    if name == "aten::equal":
        return True
    if name in ("aten::index_put_", "aten::index_put"):
        return args[0]
    if name == "aten::index.Tensor":
        everything = [
            None if i is None else torch.arange(i.numel(), device=DEVICE) if _is_mask(i) else i
            for i in args[1]
        ]
        return func(args[0], everything, **kwargs)
    count = args[0].numel()
    if name == "aten::nonzero":
        return torch.empty(count, args[0].dim(), dtype=torch.int64, device=DEVICE)
    dtype = torch.int64 if "repeat_interleave" in name else args[0].dtype
    return torch.empty(count, dtype=dtype, device=DEVICE)


def _is_mask(index: torch.Tensor) -> bool:
    return is_fake(index) and index.dtype in (torch.bool, torch.uint8)


class DryRun(TorchDispatchMode):
    """Dispatch mode above a FakeTensorMode: CPU tensors are real, CUDA tensors are fake.

    strict: a host synchronisation raises.
    """

    def __init__(self, axes: Callable[[str], str] = lambda name: name) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.axes = axes
        self.strict = False

    def __enter__(self) -> DryRun:
        self.fake.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.fake.__exit__(*error)

    def synchronise(self, name: str) -> None:
        """Record that the host waits for the device."""
        RECORD.add("sync", name)
        if MEMORY.pool is not None:
            RECORD.fault(f"{name} waits for the device while a graph is captured")
        if self.strict:
            raise RuntimeError(f"{name} waits for the device at {place()}")

    def __torch_dispatch__(
        self, func: Any, types_: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs)
        leaves = tree_leaves((args, kwargs))
        fakes = [x for x in leaves if is_fake(x)]
        device = kwargs.get("device")
        to_cuda = device is not None and torch.device(device).type == "cuda"
        if not fakes and not to_cuda:
            return self._on_host(func, args, kwargs)
        name = func.name()
        if name == "aten::is_pinned":
            return False
        if name == "aten::_to_copy" and not fakes:
            return self._to_device(args[0], kwargs)
        if name == "aten::_local_scalar_dense":
            self.synchronise("item")
            with unset_fake_temporarily():
                return Host.read(args[0]).item()
        if device is not None and not to_cuda and fakes:
            self.synchronise("copy to host")
            return Host.read(fakes[0], kwargs.get("dtype"))
        if name == "aten::copy_" and not is_fake(args[0]):
            self.synchronise("copy to host")
            with unset_fake_temporarily():
                return args[0].copy_(Host.read(args[1], args[0].dtype))
        if name == "aten::copy_" and not is_fake(args[1]):
            self._sent(args[1])
            Host.sent(args[0], args[1].expand(args[0].shape))
            return args[0]
        if _reads_size(name, args, kwargs):
            self.synchronise(func._overloadpacket.__name__)
            return _at_most(name, func, args, kwargs)
        return self._on_device(func, args, kwargs, fakes, leaves)

    def _on_host(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func.name()
        if name == "aten::is_pinned":
            return args[0] in _PINNED
        pinned = name == "aten::_pin_memory" or kwargs.pop("pin_memory", False)
        with unset_fake_temporarily():
            out = args[0].clone() if name == "aten::_pin_memory" else func(*args, **kwargs)
        if pinned:
            _PINNED[out] = True
        return out

    def _sent(self, tensor: torch.Tensor) -> None:
        pinned = tensor in _PINNED or (tensor._base is not None and tensor._base in _PINNED)
        RECORD.add("copy", "pinned" if pinned else "pageable")
        if MEMORY.pool is not None:
            RECORD.fault("a copy from the host while a graph is captured")

    def _to_device(self, tensor: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        self._sent(tensor)
        dtype = kwargs.get("dtype") or tensor.dtype
        out = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=DEVICE)
        MEMORY.see(out)
        Host.sent(out, tensor)
        return out

    def _on_device(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        fakes: list[torch.Tensor],
        leaves: list[Any],
    ) -> Any:
        kwargs.pop("pin_memory", None)
        RECORD.add("operator", func.name(), launches=_launches(func))
        for x in leaves:
            if isinstance(x, torch.Tensor) and not is_fake(x) and x.dim() > 0:
                RECORD.fault(f"{func.name()} mixes a CPU tensor with CUDA tensors")
        out = func(*args, **kwargs)
        for t in tree_leaves(out):
            if is_fake(t) and t.device.type == "cuda":
                MEMORY.see(t)
        _follow(func, args, kwargs, fakes, out)
        return out

    def _collective(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        group: ProcessGroup | None = None
        for argument in args:
            if isinstance(argument, torch.ScriptObject):
                with contextlib.suppress(RuntimeError, ValueError):
                    group = ProcessGroup.unbox(argument)
                    break
        tensors = [t for t in tree_leaves(args[:2]) if is_fake(t)]
        name = func._overloadpacket.__name__.strip("_")
        if tensors:
            axis = self.axes(group.group_name) if group is not None else "?"
            RECORD.add("collective", f"{name} {axis}")
            for t in tensors:
                # Every rank does what this one does, so flags stay what they are.
                if func is not torch.ops.c10d.allreduce_.default:
                    Host.known.pop(t, None)
        if func in _WITHOUT_FAKE:
            return FakeWork().boxed()
        if tensors:
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)


_WITHOUT_FAKE = {
    torch.ops.c10d.reduce_scatter_tensor_coalesced_.default,
    torch.ops.c10d.allgather_into_tensor_coalesced_.default,
    torch.ops.c10d.allreduce_coalesced_.default,
}


def _follow(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], fakes: list[Any], out: Any
) -> None:
    """Compute the values of integer outputs where those of all inputs are known."""
    outs = [t for t in tree_leaves(out) if is_fake(t)]
    known = all(t in Host.known for t in fakes) and not any(r in func.name() for r in _RANDOM)
    if not known or not all(t.numel() <= _SMALL and not t.dtype.is_floating_point for t in outs):
        if func._schema.is_mutable:
            for t in fakes:
                Host.known.pop(t, None)
        return

    def real(value: Any) -> Any:
        return Host.known[value] if is_fake(value) else value

    args, kwargs = tree_map(real, args), tree_map(real, kwargs)
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    with unset_fake_temporarily(), torch.no_grad():
        try:
            values = func(*args, **kwargs)
        except Exception:  # an operator of the device alone: its values stay unknown
            return
    found = [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]
    for t, value in zip(outs, found, strict=False):
        Host.known[t] = value
