"""The lock of a run folder: one owner at a time, whatever becomes of the one before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from nemocascade.runtime import run_lock as lock_module
from nemocascade.runtime.run_lock import FolderInUseError, Owner, RunLock

OWN = """
import sys, time
from pathlib import Path
from nemocascade.runtime.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]), interval_s=0.1, stale_s=1.0)
lock.acquire()
print("held", lock.note, flush=True)
exec(sys.argv[2])
"""


def lock_of(folder: Path) -> RunLock:
    return RunLock(folder, interval_s=0.1, stale_s=0.6)


@pytest.fixture
def owned(tmp_path: Path) -> Iterator[RunLock]:
    lock = lock_of(tmp_path / "run")
    lock.acquire()
    yield lock
    lock.release()


def job(folder: Path, then: str, **environment: str) -> subprocess.Popen[str]:
    """Another process that owns the folder, and then does as told."""
    command = [sys.executable, "-c", OWN, str(folder), then]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )


def says(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def forge(folder: Path, **changes: Any) -> Owner:
    """A lock that another job has left behind."""
    owner = replace(Owner(), token="another", **changes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lock").write_text(json.dumps(asdict(owner)))
    return owner


def test_the_second_job_is_rejected_by_name_and_touches_nothing(owned: RunLock) -> None:
    before = sorted(owned.folder.iterdir())
    with pytest.raises(FolderInUseError, match=f"in use by process {os.getpid()} on "):
        lock_of(owned.folder).acquire()
    assert sorted(owned.folder.iterdir()) == before == [owned.path]
    owned.acquire()  # its own job again
    owned.release()
    assert list(owned.folder.iterdir()) == []


@pytest.mark.parametrize("changes", [{"pid": "1"}, {"pid": -1}, {"host": None}, {"job": 5}])
def test_a_damaged_lock_names_no_owner(tmp_path: Path, changes: dict[str, Any]) -> None:
    forge(tmp_path, **changes)
    assert lock_module._owner_of(tmp_path / "lock") is None


@pytest.mark.parametrize("content", ["{}", "[]", "null", "[" * 3000, "{"])
def test_a_lock_without_an_owner_is_not_this_process(tmp_path: Path, content: str) -> None:
    """Fields that the file lacks are not those of the reader."""
    (tmp_path / "lock").write_text(content)
    assert lock_module._owner_of(tmp_path / "lock") is None


def test_a_killed_owner_on_this_host_is_replaced_at_once(tmp_path: Path) -> None:
    process = job(tmp_path, "time.sleep(60)")
    assert says(process) == "held"
    with pytest.raises(FolderInUseError, match=f"process {process.pid}"):
        lock_of(tmp_path).acquire()
    process.kill()
    process.wait()
    started, lock = time.monotonic(), RunLock(tmp_path, interval_s=10.0, stale_s=60.0)
    lock.acquire()
    assert time.monotonic() - started < 30, "less than a silent owner is waited for"
    assert f"taken over from process {process.pid}" in lock.note
    assert "has ended" in lock.note
    lock.release()


@pytest.mark.parametrize(
    ("then", "code"),
    [
        ("sys.exit(2)", 2),
        ("raise ValueError", 1),
        ("time.sleep(60)", 128 + signal.SIGTERM),
        (
            "from nemocascade.runtime.watchdog import Watchdog as W; W()._end([], [])",
            4,
        ),
    ],
    ids=["exit", "error", "sigterm", "watchdog"],
)
def test_every_end_of_a_job_releases(tmp_path: Path, then: str, code: int) -> None:
    process = job(tmp_path, then)
    assert says(process) == "held"
    if code > 128:
        process.send_signal(code - 128)
    assert process.wait(20) == code
    assert list(tmp_path.iterdir()) == []


def test_an_owner_elsewhere_is_judged_by_its_heartbeat(owned: RunLock) -> None:
    """Its clock may be wrong by hours; only a change of its heartbeat counts."""
    owned.owner = forge(owned.folder, host="elsewhere", job="77")
    os.utime(owned.path, (0, 0))
    with pytest.raises(FolderInUseError, match=r"process .* of Slurm job 77 on elsewhere"):
        lock_of(owned.folder).acquire()


@pytest.mark.parametrize("ahead_s", [-7200, 7200])
def test_a_silent_owner_elsewhere_is_replaced(tmp_path: Path, ahead_s: float) -> None:
    forge(tmp_path, host="elsewhere")
    now = time.time()
    os.utime(tmp_path / "lock", (now + ahead_s, now + ahead_s))
    lock = lock_of(tmp_path)
    lock.acquire()
    assert "no heartbeat for 1 s" in lock.note
    lock.release()


def test_a_requeued_job_takes_over_at_once(tmp_path: Path) -> None:
    """Its first run may still seem alive, for example on a node that has failed."""
    forge(tmp_path, host="elsewhere", job="77", restarts=0)
    started = time.monotonic()
    again = job(tmp_path, "pass", SLURM_JOB_ID="77", SLURM_RESTART_COUNT="1")
    assert "the job was requeued" in says(again)
    assert time.monotonic() - started < 20
    forge(tmp_path, job="77", restarts=1)
    # A second step of the same job is another job here.
    step = job(tmp_path, "pass", SLURM_JOB_ID="77", SLURM_RESTART_COUNT="1")
    assert says(step) == ""
    assert (again.wait(), step.wait()) == (0, 1)


def test_setting_the_clock_does_not_end_an_owner() -> None:
    """Processes are told apart by seconds since the boot."""
    assert 0 < Owner().started_s < time.clock_gettime(time.CLOCK_BOOTTIME)


def test_a_reused_process_number_is_no_owner(tmp_path: Path) -> None:
    forge(tmp_path, started_s=Owner().started_s - 1000)
    lock = lock_of(tmp_path)
    lock.acquire()
    lock.release()


def test_one_of_many_takes_a_stale_lock(tmp_path: Path) -> None:
    forge(tmp_path, started_s=0.0)
    jobs = [job(tmp_path, "time.sleep(60)") for _ in range(4)]
    words = sorted(says(process)[:4] for process in jobs)
    for process in jobs:
        process.kill()
        process.wait()
    assert words == ["", "", "", "held"]


def test_an_owner_that_lost_its_lock_ends(tmp_path: Path) -> None:
    process = job(tmp_path, "time.sleep(60)")
    assert says(process) == "held"
    forge(tmp_path, host="elsewhere")
    assert process.wait(20) == 128 + signal.SIGTERM
    assert json.loads((tmp_path / "lock").read_text())["host"] == "elsewhere"


def test_a_cascade_owns_the_folders_of_its_stages(owned: RunLock) -> None:
    stage = owned.folder / "stages" / "sft"
    inner = lock_of(stage)
    inner.acquire()
    inner.release()
    process = job(stage, "pass")
    assert (says(process), process.wait()) == ("", 1)
    assert list(stage.iterdir()) == []


def test_without_links_there_is_one_owner_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*_: object) -> None:
        raise OSError(1, "no links here")

    monkeypatch.setattr("nemocascade.runtime.run_lock.os.link", no_link)
    lock = lock_of(tmp_path)
    lock.acquire()
    with pytest.raises(FolderInUseError):
        lock_of(tmp_path).acquire()
    lock.release()
    assert list(tmp_path.iterdir()) == []
