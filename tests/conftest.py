"""Puts Triton in its interpreter where there is no GPU, keeps the logger of one test from the next,
and prints the equivalence matrix."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# Triton reads this at its first import, which may be in any test's imports.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _own_logger() -> Iterator[None]:
    """`start_logging` replaces the handlers, and then `caplog` would see nothing."""
    logger = logging.getLogger("nemocascade")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A line for each layout; tests hand it over as the property `equivalence`."""
    rows = [
        value
        for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
        for name, value in report.user_properties
        if name == "equivalence" and report.when == "call"
    ]
    if rows:
        terminalreporter.section("equivalence matrix: 10 steps in fp32, against one process")
        terminalreporter.line("| layout | ranks | loss, relative | gradient norm, relative |")
        terminalreporter.line("|---|---|---|---|")
        for row in sorted(set(rows)):
            terminalreporter.line(row)
