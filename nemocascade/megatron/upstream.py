"""Import of Megatron-Core without its developer warnings.

The import changes process state only while it lasts. `hide_notes`, which `start_world` calls, hides
warnings for the whole run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = "megatron.core"


def quieten_import() -> None:
    """Let Megatron-Core be imported without its torch.compile decorators and without its warnings,
    by whichever module needs it first. Modules of this package that do not need it stay cheap.

    The decorators load the compiler for functions that our layers never call: 4 s of an import
    of 7 s, and 800 modules. During the import `torch.compile` returns its function unchanged. The
    warnings name missing packages, which `accelerators` lists in one table.
    """
    if PACKAGE not in sys.modules and not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds Megatron-Core once, and wraps its loading."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != PACKAGE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module
            spec.loader.exec_module = partial(_load, load)  # type: ignore[method-assign]
        return spec


def _load(load: Callable[[ModuleType], None], module: ModuleType) -> None:
    with without_compiler(), without_notes():
        load(module)
        importlib.import_module(f"{PACKAGE}.models.hybrid.hybrid_model")


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Context in which `torch.compile` returns its function unchanged."""

    import torch

    def keep(function: Callable[..., Any] | None = None, **_options: Any) -> Any:
        return keep if function is None else function

    compiler, torch.compile = torch.compile, keep  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler


@contextlib.contextmanager
def without_notes() -> Iterator[None]:
    """Context in which Megatron-Core's developer warnings are hidden."""
    with warnings.catch_warnings():
        _ignore_warnings()
        yield


def hide_notes() -> None:
    """Hide Megatron-Core's developer warnings for the rest of the process.

    They concern its internal deprecations and a layout that its DDP computes by itself. Safe to
    call twice.
    """
    _ignore_warnings()
    logging.getLogger("megatron.core.distributed.distributed_data_parallel").addFilter(
        _is_no_layout_note
    )


def _ignore_warnings() -> None:
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+_tensor` is deprecated")
    warnings.filterwarnings(
        "ignore", message=r"The \.grad attribute of a Tensor that is not a leaf"
    )


def _is_no_layout_note(record: logging.LogRecord) -> bool:
    return "full_param_layout" not in record.getMessage()
