"""Selection of the implementation of an op, and the reasons why others are unavailable.

An op has some of these implementations, each a module. In order of preference:

=========== =====================================================================
``cuda``      a compiled CUDA kernel (``csrc/<op>/``)
``triton``    Triton kernels; on CPU only if required by name, in Triton's interpreter
``native``    compiled C++ for the CPU (``csrc/<op>/``)
``fla``       Triton kernels of the package fla-core; only if required by name
``quack``     CuTe kernels of the package quack-kernels; only if required by name
``torch``     torch operators arranged for speed and memory; the default on CPU without ``native``
``reference`` plain torch, readable beside the paper: the definition
=========== =====================================================================

The first one available for the call runs. ``backend="triton"`` in a call, or the variable
``NEMOCASCADE_BACKEND``, requires a specific one; if it is unavailable, an error gives the reason.

``NEMOCASCADE_BACKEND`` holds entries separated by commas. ``triton`` requires Triton for every op
that has a Triton implementation. ``moe_router=reference`` applies to one op and overrides an entry
without a name.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from nemocascade_kernels import native

ORDER = ("cuda", "triton", "native", "fla", "quack", "torch", "reference")
VARIABLE = "NEMOCASCADE_BACKEND"
_ABSENT = "the op has no such implementation"

#: Checks the tensors of a call; returns why the implementation is unavailable for it, or None.
Check = Callable[..., str | None]


class BackendUnavailableError(RuntimeError):
    """The required implementation is unavailable for the call."""


@dataclass(frozen=True)
class Implementation:
    """One implementation of an op. limit: the check whether it is available. by_name: it runs only
    where it is named."""

    backend: str
    module: str
    limit: Check | None = None
    by_name: bool = False


#: Dtypes that Triton kernels support.
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


def takes(*dtypes: torch.dtype, operators: tuple[str, ...] = ()) -> Check:
    """A check that excludes other floating-point dtypes and missing compiled operators."""

    def check(*tensors: Tensor) -> str | None:
        others = {str(t.dtype) for t in tensors if t.is_floating_point() and t.dtype not in dtypes}
        if others:
            names = ", ".join(str(dtype) for dtype in dtypes)
            return f"it takes {names}, and got {', '.join(sorted(others))}"
        return native.missing(*operators) if operators else None

    return check


class Op:
    """The implementations of one op.

    >>> OP = Op("moe_router")
    >>> OP.register("triton", limit=too_many_experts)
    >>> module = OP.choose(logits, backend=backend)  # then: module.forward(...)

    ``limit(*tensors)`` gets the tensors of ``choose`` and must not read their values: that would
    synchronise the device.
    """

    def __init__(self, name: str) -> None:
        if name in _OPS:
            raise ValueError(f"op {name!r} is registered twice: an op has one Op object")
        self.name = name
        self._implementations: dict[str, Implementation] = {}
        _OPS[name] = self

    @property
    def backends(self) -> tuple[str, ...]:
        """The implementations this op has, best first."""
        return tuple(name for name in ORDER if name in self._implementations)

    def register(
        self,
        backend: str,
        module: str | None = None,
        limit: Check | None = None,
        *,
        by_name: bool = False,
    ) -> None:
        """Add an implementation. `module` is imported at its first use; the default is the one in
        the op's folder that is named like the backend. by_name: it runs only where it is named."""
        if backend not in ORDER:
            raise ValueError(f"backend {backend!r} is not one of {ORDER}")
        if backend in self._implementations:
            raise ValueError(f"{self.name} already has an implementation {backend!r}")
        module = module or f"nemocascade_kernels.{self.name}.{backend}"
        self._implementations[backend] = Implementation(backend, module, limit, by_name)

    def choose(self, *tensors: Tensor, backend: str | None = None) -> ModuleType:
        """Import and return the module that runs a call on these tensors."""
        return self.module(self.chosen(*tensors, backend=backend))

    def module(self, backend: str) -> ModuleType:
        """The module of one implementation, imported at its first use."""
        return importlib.import_module(self._implementations[backend].module)

    def chosen(self, *tensors: Tensor, backend: str | None = None) -> str:
        """Name of the implementation that runs a call on these tensors.

        Raises `BackendUnavailableError` if the required one is unavailable, or if all are;
        `ValueError` for a name that the op does not have.
        """
        demanded = self._demanded(backend)
        if demanded is not None:
            reason = self._limitation(demanded, tensors, demanded=True)
            if reason is not None:
                raise BackendUnavailableError(
                    f"{self.name}: backend {demanded!r} is unavailable: {reason}"
                )
            return demanded
        for name in self.backends:
            if self._limitation(name, tensors, demanded=False) is None:
                return name
        raise BackendUnavailableError(
            f"{self.name}: no implementation takes this call\n{self.unavailable_because(*tensors)}"
        )

    def serves(self, *tensors: Tensor, backend: str) -> bool:
        """True if an implementation, when required, is available for a call on these tensors."""
        return self.limitation(*tensors, backend=backend) is None

    def limitation(self, *tensors: Tensor, backend: str) -> str | None:
        """The reason why a required implementation is unavailable for these tensors, or None."""
        if backend not in self._implementations:
            return _ABSENT
        return self._limitation(backend, tensors, demanded=True)

    def unavailable_because(self, *tensors: Tensor) -> str:
        """A line for each implementation: available, or the reason why it is unavailable."""
        lines = []
        chosen = False
        for name in ORDER:
            if name not in self._implementations:
                reason: str | None = _ABSENT
            else:
                reason = self._limitation(name, tensors, demanded=False)
            if reason is None:
                reason = "available" if chosen else "runs"
                chosen = True
            lines.append(f"{self.name:20s} {name:10s} {reason}")
        return "\n".join(lines)

    def _demanded(self, argument: str | None) -> str | None:
        if argument is not None:
            if argument not in self._implementations:
                raise ValueError(
                    f"{self.name} has no backend {argument!r}: choose one of {self.backends}"
                )
            return argument
        anyone, by_op = _parse_variable(os.environ.get(VARIABLE, ""))
        if self.name in by_op:
            name = by_op[self.name]
            if name not in self._implementations:
                raise ValueError(
                    f"{VARIABLE} demands {self.name}={name}, which the op does not have: "
                    f"choose one of {self.backends}"
                )
            return name
        return anyone if anyone in self._implementations else None

    def _limitation(
        self, backend: str, tensors: tuple[Tensor, ...], *, demanded: bool
    ) -> str | None:
        implementation = self._implementations[backend]
        if backend == "triton":
            reason = _triton_limitation(tensors, demanded)
        elif backend == "cuda":
            reason = _cuda_limitation(tensors)
        elif backend == "native":
            reason = _native_limitation(tensors)
        elif backend in _PACKAGES:
            reason = _package_limitation(tensors, *_PACKAGES[backend])
        else:
            reason = None
        if reason is None and implementation.by_name and not demanded:
            reason = f"it runs only when asked for by name: backend={backend!r}"
        if reason is None and implementation.limit is not None:
            reason = implementation.limit(*tensors)
        return reason


_OPS: dict[str, Op] = {}


def ops() -> dict[str, Op]:
    """Every registered op by name. Import `nemocascade_kernels` first."""
    return dict(_OPS)


def unavailable_because(*tensors: Tensor) -> str:
    """`Op.unavailable_because` of every op, for calls on these tensors."""
    return "\n".join(op.unavailable_because(*tensors) for op in _OPS.values())


def interpreting() -> bool:
    """True if Triton kernels are interpreted on CPU. Read before a kernel is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def _triton_import_error() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported ({error}): pip install 'triton>=3.6'"
    return None


def _triton_limitation(tensors: tuple[Tensor, ...], demanded: bool) -> str | None:
    missing = _triton_import_error()
    if missing is not None:
        return missing
    if interpreting():
        return (
            None
            if demanded
            else "TRITON_INTERPRET is set: the interpreter runs only when asked for by name"
        )
    if not all(tensor.is_cuda for tensor in tensors) or not tensors:
        return (
            f"it needs CUDA tensors, and got {_devices(tensors)}: "
            "set TRITON_INTERPRET=1 to interpret it on CPU"
        )
    capability = torch.cuda.get_device_capability(tensors[0].device)
    return (
        None
        if capability >= (8, 0)
        else f"it needs compute capability >= 8.0, and the device has {capability}"
    )


def _cuda_limitation(tensors: tuple[Tensor, ...]) -> str | None:
    if not all(tensor.is_cuda for tensor in tensors) or not tensors:
        return f"it needs CUDA tensors, and got {_devices(tensors)}"
    return None


def _native_limitation(tensors: tuple[Tensor, ...]) -> str | None:
    if not all(tensor.device.type == "cpu" for tensor in tensors):
        return f"it needs CPU tensors, and got {_devices(tensors)}"
    return native.limitation()


#: Module and name in the package index of the optional packages behind implementations.
_PACKAGES = {"fla": ("fla", "fla-core"), "quack": ("quack", "quack-kernels")}


def _package_limitation(tensors: tuple[Tensor, ...], module: str, package: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return f"{package} is not installed: pip install {package}"
    if not all(tensor.is_cuda for tensor in tensors) or not tensors:
        return f"it needs CUDA tensors, and got {_devices(tensors)}"
    return None


def _devices(tensors: tuple[Tensor, ...]) -> str:
    return ", ".join(sorted({str(tensor.device) for tensor in tensors})) or "no tensor"


@functools.cache
def _parse_variable(value: str) -> tuple[str | None, dict[str, str]]:
    anyone: str | None = None
    by_op: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in value.split(","))):
        op, _, backend = entry.rpartition("=")
        if backend not in ORDER:
            raise ValueError(f"{VARIABLE}={value!r}: {backend!r} is not one of {ORDER}")
        if op:
            by_op[op] = backend
        else:
            anyone = backend
    unknown = sorted(set(by_op) - set(_OPS))
    if unknown:
        raise ValueError(
            f"{VARIABLE}={value!r}: no op is named {unknown}: choose among {sorted(_OPS)}"
        )
    return anyone, by_op
