"""Input makers, poisoned memory and error measures, shared by the tests and the benchmarks of every
op.

An op's result `ours` and torch's own result `torchs` (same inputs, same dtype, plain operators) are
both compared with `exact`, the reference run on the same inputs in float64. The error of `ours` may
be at most a small factor times the error of `torchs`. So the tolerance follows from the dtype and
the sizes, and no test has a hand-picked tolerance that hides a bug.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def kernel_device() -> torch.device:
    """Device of Triton kernels in tests: a GPU if there is one, else the CPU, interpreted."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_normal(
    *shape: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    scale: float = 1.0,
    requires_grad: bool = False,
) -> Tensor:
    """Normal numbers of standard deviation `scale`, drawn on the CPU: the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
    return values.to(device=device, dtype=dtype).requires_grad_(requires_grad)


def random_integers(
    *shape: int, low: int = 0, high: int, seed: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Random int64 numbers in [low, high), the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int64).to(device)


class PoisonedMemory(TorchDispatchMode):
    """Context in which uninitialised memory, as from `torch.empty`, holds NaN (integers: their most
    negative value), also in backward.

    It reveals kernels that read uninitialised memory or do not write all of their output.

    >>> with PoisonedMemory():
    ...     out = linear_logprob(hidden, weight, target)
    """

    _MAKERS = frozenset(
        {
            torch.ops.aten.empty.memory_format,
            torch.ops.aten.empty_like.default,
            torch.ops.aten.empty_strided.default,
            torch.ops.aten.empty_permuted.default,
            torch.ops.aten.new_empty.default,
            torch.ops.aten.new_empty_strided.default,
        }
    )

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return poison(result) if func in self._MAKERS else result


def poison(tensor: Tensor) -> Tensor:
    """Fill with values that no result has: NaN, or the most negative integer."""
    with torch.no_grad():
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.fill_(math.nan)
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        return tensor.fill_(torch.iinfo(tensor.dtype).min if tensor.dtype.is_signed else 255)


def rms_error(actual: Tensor, exact: Tensor) -> float:
    """`||actual - exact|| / ||exact||` in float64; 0 for equal tensors, NaN if one holds NaN."""
    return _relative(torch.linalg.vector_norm, actual, exact)


def max_error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference, divided by the largest absolute exact value."""
    return _relative(lambda values: values.abs().max(), actual, exact)


def _relative(size_of: Callable[[Tensor], Tensor], actual: Tensor, exact: Tensor) -> float:
    if actual.shape != exact.shape:
        raise AssertionError(f"shapes differ: {tuple(actual.shape)} and {tuple(exact.shape)}")
    if exact.numel() == 0:
        return 0.0
    actual64, exact64 = actual.detach().double().cpu(), exact.detach().double().cpu()
    difference = float(size_of(actual64 - exact64))
    return 0.0 if difference == 0.0 else difference / max(float(size_of(exact64)), 1e-300)


def assert_as_accurate(
    name: str,
    ours: Tensor,
    torchs: Tensor,
    exact: Tensor,
    *,
    factor: float = 2.0,
    floor: float | None = None,
) -> None:
    """Fail if the error of `ours` exceeds `factor` times the error of `torchs`, by either measure.

    `floor` is an error that is always allowed; default: the rounding of `ours`'s own dtype, since
    torch may happen to be exact.
    """
    allowed_anyway = torch.finfo(ours.dtype).eps if floor is None else floor
    for label, measure in (("rms", rms_error), ("max", max_error)):
        error, torch_error = measure(ours, exact), measure(torchs, exact)
        limit = max(factor * torch_error, allowed_anyway)
        if not error <= limit:
            raise AssertionError(
                f"{name}: {label} error {error:.3e} exceeds {limit:.3e} "
                f"(torch's own {torch_error:.3e}, factor {factor}, floor {allowed_anyway:.1e})"
            )


def assert_same_bits(name: str, actual: Tensor, expected: Tensor) -> None:
    """Fail unless both tensors are bit-identical (NaN equals the same NaN)."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        raise AssertionError(
            f"{name}: {actual.dtype} {tuple(actual.shape)}, "
            f"and expected {expected.dtype} {tuple(expected.shape)}"
        )
    same = _bytes(actual) == _bytes(expected)
    if not bool(same.all()):
        raise AssertionError(f"{name}: {int((~same).sum())} of {same.numel()} bytes differ")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def without_interpreter(environment: dict[str, str] | None = None) -> dict[str, str]:
    """A copy of the environment in which Triton compiles kernels, for subprocesses."""
    copy = dict(os.environ if environment is None else environment)
    copy.pop("TRITON_INTERPRET", None)
    return copy
