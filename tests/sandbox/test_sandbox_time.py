"""The limits of a program's time: CPU time of all its processes, and wall-clock time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.sandbox import sandbox_or_skip

from nemocascade.recipe.envs import SandboxConfig
from nemocascade.sandbox.pool import SandboxPool
from nemocascade.types import Program

HONEST = "x = 0\nfor i in range(2_000_000): x += i\nprint(x)"
FORKS = """
import os
for _ in range(7):
    if os.fork() == 0:
        while True: pass
while True: pass
"""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[SandboxPool]:
    made = sandbox_or_skip(SandboxConfig(time_s=1.0, workers=8))
    yield made
    made.close()


def test_a_right_program_beside_seven_that_fork(sandbox: SandboxPool) -> None:
    with ThreadPoolExecutor(8) as threads:
        others = [threads.submit(sandbox.run, Program(FORKS)) for _ in range(7)]
        outcome = threads.submit(sandbox.run, Program(HONEST)).result()
        assert (outcome.status, outcome.stdout) == ("ok", "1999999000000\n")
        assert {other.result().status for other in others} == {"time"}


def test_the_cpu_time_of_all_processes_counts(sandbox: SandboxPool) -> None:
    outcome = sandbox.run(Program(FORKS))
    assert outcome.status == "time"
    # Eight processes with a limit of their own would use eight times as much.
    assert outcome.wall_s < 8


def test_a_sleeping_program_is_not_repeated(sandbox: SandboxPool) -> None:
    start = time.monotonic()
    outcome = sandbox.run(Program("import time\nprint(1, flush=True)\ntime.sleep(100)"))
    assert (outcome.status, outcome.stdout) == ("time", "1\n")
    assert time.monotonic() - start < 3.9
