"""A sandbox for tests, or the reason why it is unavailable on this host; ends of processes."""

from __future__ import annotations

import contextlib
import time

import psutil
import pytest

from nemocascade.recipe.envs import SandboxConfig
from nemocascade.sandbox.pool import SandboxPool
from nemocascade.types import SandboxUnavailable


def sandbox_or_skip(config: SandboxConfig) -> SandboxPool:
    """The pool; skips the test, with the host's reasons, where nothing can be isolated."""
    try:
        return SandboxPool(config)
    except SandboxUnavailable as error:
        if "does not hold" in str(error):
            raise  # the backend starts, but fails its self-test
        pytest.skip(str(error))


def open_sessions(pool: SandboxPool) -> int:
    """Number of the pool's open sessions."""
    with pool._lock:
        return len(pool._sessions)


def wait_for_end(process: int) -> None:
    """Until the process has ended, reaped or not: a kill does not wait for it."""
    deadline = time.monotonic() + 10
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, f"process {process} still runs"
            time.sleep(0.02)
