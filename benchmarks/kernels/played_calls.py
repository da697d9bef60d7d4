"""Plays cases of `predict.py` on a device that does not exist, and records their launches."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.kernels.estimate import Launch, Operator, counts
from benchmarks.kernels.predict_cases import CASES, Case

EVENTS: list[Launch | Operator] = []


class _Operators(TorchDispatchMode):
    """Records torch's operators on the device that is played."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        if any(x.is_cuda for x in tensors) and not is_free(func):
            flops = 0.0
            if func.overloadpacket.__name__ in ("mm", "addmm"):
                left, right = [x for x in tree_leaves(args) if isinstance(x, Tensor)][-2:]
                flops = 2.0 * left.shape[0] * left.shape[1] * right.shape[1]
            elif func.overloadpacket.__name__ == "_grouped_mm":
                left, right = [x for x in tree_leaves(args) if isinstance(x, Tensor)][:2]
                flops = 2.0 * left.shape[0] * left.shape[1] * right.shape[-1]
            EVENTS.append(Operator(func.name(), flops, bytes_of(tensors)))
        return out


def is_free(func: Any) -> bool:
    """True for views, allocations and questions, which launch nothing."""
    name = func.overloadpacket.__name__
    return (
        func.namespace != "aten"
        or bool(func.is_view)
        or name.startswith(("empty", "new_empty", "detach", "_unsafe_view"))
    )


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors, each once."""
    distinct = {id(x): x for x in tensors}
    return sum(x.numel() * x.element_size() for x in distinct.values())


def play(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Call cases on a device that is played: the events of each, as JSON, and bytes of memory
    beyond what existed before: `peak`, and `kept` for the backward."""
    from gpu_dry import played, triton_driver
    from triton.runtime import jit

    triton_driver._examine = lambda compiled: None
    found: dict[str, dict[str, Any]] = {}
    with played.dry_run():
        triton_driver.install()
        launch: Any = jit.JITFunction.run

        def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
            compiled = launch(self, *args, **kwargs)
            if not kwargs.get("warmup"):
                EVENTS.append(launch_of(self, compiled, args, kwargs))
            return compiled

        jit.JITFunction.run = recorded
        with _Operators():
            for name in names:
                found[name] = _play(CASES[name])
    return found


def _play(case: Case) -> dict[str, Any]:
    from gpu_dry.device import MEMORY

    marks: dict[str, int] = {}
    live: dict[str, int] = {}

    def mark(what: str) -> None:
        if what == "ready":
            EVENTS.clear()
            MEMORY.reset_peak()
        marks[what], live[what] = len(EVENTS), MEMORY.live

    mark("ready")
    case.call(mark)
    split = marks.get("backward", len(EVENTS))
    parts = {"forward": EVENTS[:split], "backward": EVENTS[split:], "both": EVENTS}
    before = live["ready"]
    return {
        "events": [event._asdict() for event in parts[case.phase]],
        "peak": MEMORY.peak - before,
        "kept": live.get("backward", before) - before,
    }


def launch_of(kernel: Any, compiled: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Launch:
    """The launch of a compiled kernel with its arguments."""
    names = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    grid = kwargs["grid"]
    sizes = grid(names) if callable(grid) else grid
    programs = 1
    for size in sizes:
        programs *= int(size)
    warps = compiled.metadata.num_warps
    body, once, compute = counts(compiled.asm["ptx"], warps)
    block = next((names[key] for key in ("BLOCK_K", "DEPTH", "BK") if key in names), 64)
    return Launch(
        kernel.__name__,
        programs,
        warps,
        _registers(compiled.asm["cubin"]),
        int(compiled.metadata.shared),
        bytes_of([value for value in names.values() if isinstance(value, Tensor)]),
        body,
        once,
        int(block),
        compute,
        int(names.get("BLOCK_T", 1)),
    )


@functools.cache
def _registers(binary: bytes) -> int:
    from gpu_dry.triton_driver import resources

    return resources(binary)[0]
