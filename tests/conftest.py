"""Test setup: Triton in its interpreter where there is no GPU, a logger for each test, the longest
files first, short garbage collections; at the end, the equivalence matrix."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.interpreter import accelerate

# Triton reads this at its first import, which may be in any test's imports.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Jobs that a shell starts in the background ignore Ctrl-C, and so would commands that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


FILE_SECONDS = Path(__file__).with_name("file_seconds.json")
"""Seconds of the files that take longest; the others count as 0."""
LEAST_S = 3.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-seconds",
        action="store_true",
        help=f"write the seconds of each file to tests/{FILE_SECONDS.name}",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let workers begin with the longest files, so that none has one left when the others end."""
    if hasattr(config, "workerinput"):
        seconds = json.loads(FILE_SECONDS.read_text(encoding="utf-8"))
        items.sort(key=lambda item: -seconds.get(item.nodeid.partition("::")[0], 0))


def pytest_collection_finish() -> None:
    """Leave modules and tests out of garbage collections, of which every world makes one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _no_idle_groups() -> Iterator[None]:
    """Leave the process groups of a file after it: each has threads that wake a hundred times a
    second, and those of forty files take most of a core."""
    yield
    if torch.distributed.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        gc.collect()


@pytest.fixture(autouse=True)
def _quick_interpreter() -> None:
    """Replace parts of Triton's interpreter before the first test that may use it."""
    accelerate(load="triton" in sys.modules)


@pytest.fixture(autouse=True)
def _own_logger() -> Iterator[None]:
    """`start_logging` replaces the handlers and ends the propagation to the root logger: `caplog`
    would see nothing of a test that calls it, and in later ones every message twice."""
    logger = logging.getLogger("nemocascade")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    logger.propagate = True
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the equivalence matrix; write the seconds of files if asked to."""
    if config.getoption("--record-seconds"):
        _record_seconds(terminalreporter)
    # A line for each layout; tests give it as the property `equivalence`.
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


def _record_seconds(terminalreporter: Any) -> None:
    seconds: dict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    longest = {
        file: round(s)
        for file, s in sorted(seconds.items(), key=itemgetter(1), reverse=True)
        if s >= LEAST_S
    }
    FILE_SECONDS.write_text(json.dumps(longest, indent=1) + "\n", encoding="utf-8")
