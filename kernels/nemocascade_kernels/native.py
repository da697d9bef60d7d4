"""The compiled library of the package (csrc/), loaded at first use and never required.

`op(name)` returns an operator; `missing(name)` returns the reason if it is unavailable.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).parent / "_native.so"


@functools.cache
def limitation() -> str | None:
    """The reason why the compiled library is unavailable, or None once it is loaded."""
    if not LIBRARY.exists():
        return f"{LIBRARY.name} is not built: run `make setup`, or `pip install` the package"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} cannot be loaded ({error}): build it again with `make setup`"
    return None


def missing(*names: str) -> str | None:
    """The reason why these operators are unavailable, or None if the library has them."""
    reason = limitation()
    if reason is not None:
        return reason
    absent = [name for name in names if not hasattr(torch.ops.nemocascade_kernels, name)]
    return (
        f"{LIBRARY.name} is older than {absent}: build it again with `make setup`"
        if absent
        else None
    )


@functools.cache
def op(name: str) -> Any:
    """An operator of the library. Raises ImportError, with the reason, if it is missing."""
    reason = missing(name)
    if reason is not None:
        raise ImportError(reason)
    return getattr(torch.ops.nemocascade_kernels, name).default
