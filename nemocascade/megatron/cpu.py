"""Support for running Megatron-Core without a CUDA device.

Megatron-Core names the CUDA device in its code. On a machine without one, `install()` makes
`torch.cuda.current_device()` and the stream functions answer for the CPU. The pipeline schedules
and, under `cuda_names()`, the optimizers get CPU tensors where they ask for CUDA ones. Nothing here
runs where CUDA is available.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch

# torch.optim imports it anyway, and it must see the original torch.cuda functions.
import torch._dynamo
from megatron.core.pipeline_parallel import schedules
from torch.overrides import TorchFunctionMode


class _NoStream:
    """Stands in for streams and events: the CPU runs everything in order."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def _nothing(self, *_args: Any, **_kwargs: Any) -> None:
        return None

    wait_stream = wait_event = synchronize = record = wait = _nothing

    def record_event(self, *_args: Any) -> _NoStream:
        return self


_ONE_STREAM = _NoStream()


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    return None


def install() -> None:
    """Make torch.cuda's stream and device functions answer for the CPU. Safe to call twice.

    Raises RuntimeError where CUDA is available, because the real functions are needed there.
    """
    if torch.cuda.is_available():
        raise RuntimeError(
            "megatron.cpu.install() on a machine with CUDA would hide its devices: "
            "use --engine.device cuda, or hide them with CUDA_VISIBLE_DEVICES="
        )
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.current_stream = lambda *_: _ONE_STREAM
    cuda.default_stream = lambda *_: _ONE_STREAM
    cuda.stream = lambda *_: contextlib.nullcontext()
    cuda.Stream = _NoStream
    cuda.Event = _NoStream
    cuda.synchronize = _nothing
    cuda.empty_cache = _nothing
    cuda.set_device = _nothing
    schedules.torch = _TorchOnCpu("torch")


class _TorchOnCpu(types.ModuleType):
    """`torch` for one of Megatron's modules: its factories make CPU tensors instead of CUDA ones.

    It is cheaper than a TorchFunctionMode, which slows every operation of a step.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        cuda = device is not None and torch.device(device).type == "cuda"
        return torch.zeros(*args, device="cpu" if cuda else device, **kwargs)


class CudaOnCpu(TorchFunctionMode):
    """While active, tensors requested on "cuda" are made on the CPU.

    It also answers `Tensor.type()` with the CUDA name, by which Megatron's optimizers sort
    parameters. It is active only around Megatron's optimizer, so the model has no overhead.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def cuda_names() -> contextlib.AbstractContextManager[Any]:
    """Context in which Megatron may name the CUDA device; does nothing where there is one."""
    return contextlib.nullcontext() if torch.cuda.is_available() else CudaOnCpu()
