"""A rank that is stopped, killed, stalled or failing is named on every other rank, with its phase
and collective, and the job ends with an error and the stacks of all ranks."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest
from helpers.ranks import Rank, run_ranks

RANKS = 3
VICTIM = 1
LIMIT_S = 5.0
STEP = 4
SILENT = ("stopped", "killed", "never heard", "before the start", "between stages")
# Beside the limit: the interpreter's start, imports, and a machine with other work.
PATIENCE_S = 90.0


def work_until_a_fault(fault: str, folder: str) -> None:
    """All-reduce in a loop; in one step of it the victim fails in its own way."""
    import logging
    import signal
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from nemocascade.runtime.watchdog import Watchdog, job_store

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    other = dist.new_group(backend="gloo")
    logging.getLogger("nemocascade").addHandler(logging.StreamHandler())
    watch = Watchdog(
        rank, RANKS, store=job_store(), limit_s=LIMIT_S, stacks=Path(folder) / "stacks"
    )
    if fault == "never heard" and rank == VICTIM:
        (Path(folder) / f"reached.{rank}").write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGSTOP)
    watch.start()
    try:
        for step in range(1000):
            watch.enter(f"step {step}: work")
            if step == STEP:
                (Path(folder) / f"reached.{rank}").write_text(str(time.monotonic()))
            if rank == VICTIM and step == STEP:
                time.sleep(1.5)
                if fault == "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                elif fault == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif fault.startswith("stuck"):
                    time.sleep(1000)
                elif fault == "raises":
                    raise ValueError("the victim's own fault")
            if fault == "stuck beside a meeting":
                watch.meet()
            while fault == "stuck beside a queue" and step == STEP:
                watch.waits("verdicts of other replicas")
                time.sleep(0.01)
            if fault == "other collective" and rank == VICTIM and step == STEP:
                dist.broadcast(torch.ones(8), src=0, group=other)
            dist.all_reduce(torch.ones(8))
    except Exception as error:
        watch.fail(error)
        raise
    finally:
        watch.close()


def stop_between_stages(fault: str, folder: str) -> None:
    """The main rank is stopped in its own work, which the others wait for."""
    import signal

    from nemocascade.recipe import EngineConfig
    from nemocascade.runtime.run_lock import RunLock
    from nemocascade.stages.setup import on_main_rank

    def work() -> None:
        # Work that takes longer than the limit is no fault.
        time.sleep(LIMIT_S + 1)
        (Path(folder) / f"reached.{VICTIM}").write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGSTOP)

    # The main rank is the harness's victim.
    os.environ["RANK"] = str((int(os.environ["RANK"]) - VICTIM) % RANKS)
    on_main_rank(RunLock(Path(folder)), EngineConfig(timeout_s=LIMIT_S / 0.8), work)


def stop_before_the_start(fault: str, folder: str) -> None:
    """The victim is stopped before it joins the process group, which the others wait for."""
    import signal

    from nemocascade.recipe import EngineConfig, ParallelConfig
    from nemocascade.stages.setup import watched_world

    rank = int(os.environ["RANK"])
    (Path(folder) / f"started.{rank}").touch()
    # A process may start much later than the first one.
    while len(list(Path(folder).glob("started.*"))) < RANKS:
        time.sleep(0.05)
    if rank == VICTIM:
        (Path(folder) / f"reached.{VICTIM}").write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGSTOP)
    engine = EngineConfig(timeout_s=LIMIT_S / 0.8, precision="fp32")
    with watched_world(Path(folder), ParallelConfig(), engine) as (world, _):
        world.barrier()


JOBS = {
    "between stages": "stop_between_stages",
    "before the start": "stop_before_the_start",
}
"""Work of the ranks by its fault; `work_until_a_fault` of the others."""


def run_with(fault: str, folder: Path) -> tuple[list[int], list[str], float]:
    """Exit codes and logs of all ranks, and the seconds from the fault to the last rank's end.

    A victim that is stopped is killed when the others have ended, as a launcher does.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    target = f"{Path(__file__).resolve()}:{JOBS.get(fault, 'work_until_a_fault')}"
    request = {"target": target, "kwargs": {"fault": fault, "folder": str(folder)}}
    (folder / "request.json").write_text(json.dumps(request))
    ranks = [Rank(rank, RANKS, folder, store.port) for rank in range(RANKS)]
    others = [p for i, p in enumerate(ranks) if i != VICTIM or fault not in SILENT]
    try:
        deadline = time.monotonic() + PATIENCE_S
        while (running := [r for r in others if r.poll() is None]) and time.monotonic() < deadline:
            time.sleep(0.05)
        ended = float("inf") if running else time.monotonic()
    finally:
        for process in ranks:
            process.kill()
    logs = [(folder / f"stderr.{rank}").read_text() for rank in range(RANKS)]
    began = float((folder / f"reached.{VICTIM}").read_text())
    return [p.poll() or 0 for p in ranks], logs, ended - began


@pytest.mark.parametrize(
    "fault",
    [
        "stopped",
        "killed",
        "raises",
        "stuck beside a meeting",
        "stuck beside a queue",
        pytest.param("stuck", marks=pytest.mark.slow),
        pytest.param("other collective", marks=pytest.mark.slow),
    ],
)
def test_the_victim_is_named_by_every_other_rank(fault: str, tmp_path: Path) -> None:
    codes, logs, seconds = run_with(fault, tmp_path)
    assert seconds < 4 * LIMIT_S + 10, "\n".join(logs)
    for rank in range(RANKS):
        if rank == VICTIM:
            continue
        assert codes[rank] != 0
        [line, *_] = [x for x in logs[rank].splitlines() if f"watchdog on rank {rank}" in x]
        assert f"rank {VICTIM} (" in line, line
        assert f"phase 'step {STEP}: work'" in line, line
        stack = (tmp_path / "stacks" / f"rank_{rank:05d}.txt").read_text()
        place = {"meeting": "in meet", "queue": "in work_until_a_fault"}
        assert place.get(fault.split()[-1], "all_reduce") in stack, stack
    assert codes[VICTIM] != 0
    victim = (tmp_path / "stacks" / f"rank_{VICTIM:05d}.txt").read_text()
    assert "work_until_a_fault" in victim
    suspects = tmp_path.joinpath("suspect_nodes")
    is_host = fault != "raises"
    assert suspects.exists() == is_host
    assert not is_host or set(suspects.read_text().split()) == {socket.gethostname()}
    named = {
        "raises": "the victim's own fault",
        "other collective": "in broadcast called by",
    }.get(fault, "outside any collective")
    assert named in logs[0]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("never heard", f"rank {VICTIM}, before its first heartbeat"),
        ("before the start", f"rank {VICTIM}, before its first heartbeat"),
        ("between stages", "phase 'between stages'"),
    ],
)
def test_a_rank_that_is_stopped_outside_of_a_stage_is_named(
    fault: str, said: str, tmp_path: Path
) -> None:
    codes, logs, seconds = run_with(fault, tmp_path)
    assert seconds < 4 * LIMIT_S + 10, "\n".join(logs)
    for rank in range(RANKS):
        if rank != VICTIM:
            assert codes[rank] != 0
            assert "has died or was stopped" in logs[rank], logs[rank]
            assert said in logs[rank]
    # The host of a rank that was never heard is that of its launcher's other ranks.
    assert (tmp_path / "suspect_nodes").read_text().split()[0] == socket.gethostname()


def wait_for_the_main_rank(timeout_s: float, work_s: float) -> tuple[str, float]:
    """The main rank works for longer than collectives and the watchdog wait, and shows progress."""
    from datetime import timedelta
    from typing import Any

    import torch
    import torch.distributed as dist

    from nemocascade.recipe import ParallelConfig
    from nemocascade.runtime.watchdog import Watchdog, job_store
    from nemocascade.runtime.world import World, main_first

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    watch = Watchdog(rank, size, store=job_store(), limit_s=0.8 * timeout_s)
    groups: Any = None
    world = World(rank, size, torch.device("cpu"), ParallelConfig(), groups, watch)
    watch.start()

    def work() -> str:
        for step in range(int(work_s / 0.1)):
            time.sleep(0.1)
            watch.progress(f"tokenised {step} documents")
        return "main"

    started = time.monotonic()
    try:
        return main_first(world, work, lambda: "other"), time.monotonic() - started
    finally:
        watch.close()
        dist.destroy_process_group()


def test_work_of_the_main_rank_may_take_longer_than_a_collective() -> None:
    found = run_ranks(wait_for_the_main_rank, 2, {"timeout_s": 4.0, "work_s": 7.0}, timeout_s=60)
    assert [name for name, _ in found] == ["main", "other"]
    assert all(seconds >= 7 for _, seconds in found)
