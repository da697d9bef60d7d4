"""Honest programs run on every isolation backend, and find nothing of the host's packages."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.honest_programs import HONEST
from helpers.sandbox import sandbox_or_skip

from nemocascade.recipe.envs import SandboxConfig
from nemocascade.sandbox import launch
from nemocascade.sandbox.pool import SandboxPool
from nemocascade.types import Program, SandboxUnavailable


@pytest.fixture(scope="module", params=["bubblewrap", "namespaces"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[SandboxPool]:
    made = sandbox_or_skip(SandboxConfig(isolation=request.param, workers=1))
    yield made
    made.close()


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_program_runs(sandbox: SandboxPool, name: str) -> None:
    source, stdin, expected = HONEST[name]
    outcome = sandbox.run(Program(source, stdin=stdin))
    assert (outcome.status, outcome.stdout) == ("ok", expected), outcome.stderr


FIND = """
import glob, sys
found = set()
for root in (sys.base_prefix, sys.base_exec_prefix, "/usr", "/usr/local"):
    for name in ("site-packages", "dist-packages"):
        found.update(glob.glob(f"{root}/lib*/python*/{name}/*"))
print(sorted(found))
"""


def test_the_hosts_packages_are_not_readable(sandbox: SandboxPool) -> None:
    assert launch.hidden_packages(launch.visible(), []), "an interpreter has a site-packages"
    assert sandbox.run(Program(FIND)).stdout == "[]\n"


def test_packages_that_are_asked_for_stay(sandbox: SandboxPool) -> None:
    (folder, *_) = launch.hidden_packages(launch.visible(), [])
    config = SandboxConfig(isolation=sandbox.isolation, workers=1, packages=(folder,))  # type: ignore[arg-type]
    other = SandboxPool(config)
    try:
        found = other.run(Program(f"import os\nprint(sorted(os.listdir({folder!r})))")).stdout
    finally:
        other.close()
    assert found == f"{sorted(os.listdir(folder))}\n"


def test_bubblewrap_is_found_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker's own PATH does not decide, and a program that is none is not a crash."""
    real = shutil.which("bwrap")
    launch._bwrap.cache_clear()
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    fake = tmp_path / "bwrap"
    fake.write_text("not a program")
    fake.chmod(0o755)
    try:
        assert launch._bwrap() == str(fake)
        with pytest.raises(SandboxUnavailable, match="bwrap cannot be started"):
            SandboxPool(SandboxConfig(isolation="bubblewrap", workers=1))
        sandbox_or_skip(SandboxConfig(workers=1)).close()
        fake.write_text(f'#!/bin/sh\nexec {real or "/none/bwrap"} "$@"\n')
        if real is not None:
            SandboxPool(SandboxConfig(isolation="bubblewrap", workers=1)).close()
    finally:
        launch._bwrap.cache_clear()


def test_a_backend_that_breaks_honest_programs_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sandbox_or_skip(SandboxConfig(isolation="namespaces", workers=1)).close()
    monkeypatch.setattr(launch, "_bwrap", lambda: sys.executable)
    sandbox_or_skip(SandboxConfig(workers=1)).close()
    assert "the sandbox cannot use bubblewrap" in caplog.text
