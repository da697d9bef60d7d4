"""A sandbox for tests, or the reason why it is unavailable on this host."""

from __future__ import annotations

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
