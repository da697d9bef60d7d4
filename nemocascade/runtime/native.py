"""The compiled library of the package (csrc/), loaded at first use."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).resolve().parent.parent / "_native.so"


@functools.cache
def limitation() -> str | None:
    """The reason why the library is unavailable, or None once it is loaded."""
    if not LIBRARY.exists():
        return (
            f"{LIBRARY} is not built: run `make setup`, "
            "or `python setup.py build_ext --inplace` in an environment that has torch"
        )
    try:
        torch.ops.load_library(LIBRARY)
    except (OSError, RuntimeError) as error:
        return f"{LIBRARY} cannot be loaded ({error}): build it again with `make setup`"
    return None


def operators() -> Any:
    """The operators of the library. Raises OSError, with the reason, if it is unavailable."""
    if reason := limitation():
        raise OSError(reason)
    return torch.ops.nemocascade
