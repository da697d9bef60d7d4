"""A sandbox for tests, or the reason why this host has none."""

from __future__ import annotations

import pytest

from nemocascade.envs.sandbox.pool import Sandbox, SandboxUnavailable
from nemocascade.recipe.envs import SandboxConfig


def sandbox_or_skip(config: SandboxConfig) -> Sandbox:
    """The pool; skips the test, with the host's reasons, where nothing can be isolated."""
    try:
        return Sandbox(config)
    except SandboxUnavailable as error:
        pytest.skip(str(error))
