"""Tests with packages of the extra `integrations`, which `make test-integrations` installs.

@pytest.mark.integration
def test_it() -> None:
    wandb = installed("wandb")
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest


def installed(name: str) -> Any:
    """The package, imported; without it the test is skipped."""
    # A test may have put another module in its place, so its import would tell nothing.
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: `make test-integrations` installs and tests it")
    return importlib.import_module(name)
