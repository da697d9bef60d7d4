"""Buffers in which Transformer Engine overlaps linear layers and tensor-parallel communication."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nemocascade.runtime.world import World

TE = "transformer_engine.pytorch"


@contextmanager
def user_buffers(world: World, hidden_size: int, rows: int) -> Iterator[None]:
    """Context in which linears built with `tp_comm_overlap` can run; every rank enters it.

    rows: of a training micro-batch on all tensor-parallel ranks together. The buffers hold
    [rows, hidden_size] bf16, and belong to the process.
    """
    te: Any = importlib.import_module(TE)
    known = inspect.signature(te.initialize_ub).parameters
    precision: dict[str, Any] = {"use_fp8": False}
    if "quantization_modes" in known:
        precision = {"quantization_modes": [te.UserBufferQuantizationMode.NONE]}
    te.initialize_ub(
        shape=[rows, hidden_size],
        tp_size=world.parallel.tp,
        bootstrap_backend="nccl",
        **precision,
    )
    try:
        yield
    finally:
        te.destroy_ub()


def check_user_buffers() -> None:
    """Raise RuntimeError if the installed version cannot make the buffers without MPI."""
    te: Any = importlib.import_module(TE)
    initialize = getattr(te, "initialize_ub", None)
    if initialize is None or "bootstrap_backend" not in inspect.signature(initialize).parameters:
        raise RuntimeError("its user buffers need MPI: install 1.9 or newer")
