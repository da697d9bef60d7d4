"""A rank that is stopped, killed, stalled or failing is named on every other rank, with its phase
and collective, and the job ends with an error and the stacks of all ranks."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import Rank, run_ranks
from helpers.start_policy import start_policy

RANKS = 3
VICTIM = 1
LIMIT_S = 5.0
STEP = 4
SCORING_S = 12.0
"""Limit in scoring, where ranks build a model."""
# Beside the limit: the interpreter's start, imports, and a machine with other work.
PATIENCE_S = 90.0


def fall_silent(fault: str, folder: str) -> None:
    """Stop or kill the calling rank, the victim."""
    (Path(folder) / f"reached.{VICTIM}").write_text(str(time.monotonic()))
    os.kill(os.getpid(), signal.SIGKILL if fault.startswith("killed") else signal.SIGSTOP)


def work_until_a_fault(fault: str, folder: str) -> None:
    """All-reduce in a loop; in one step of it the victim fails in its own way."""
    import logging
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
    if fault.endswith("before its first heartbeat") and rank == VICTIM:
        fall_silent(fault, folder)
    watch.start()
    try:
        for step in range(1000):
            watch.enter(f"step {step}: work")
            if step == STEP:
                (Path(folder) / f"reached.{rank}").write_text(str(time.monotonic()))
            if rank == VICTIM and step == STEP:
                time.sleep(1.5)
                if fault in ("stopped", "killed"):
                    fall_silent(fault, folder)
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


def fall_between_stages(fault: str, folder: str) -> None:
    """The main rank falls silent in its own work, which the others wait for."""
    from nemocascade.recipe import EngineConfig
    from nemocascade.runtime.run_lock import RunLock
    from nemocascade.stages.setup import on_main_rank

    def work() -> None:
        # Work that takes longer than the limit is not a fault.
        time.sleep(LIMIT_S + 1)
        fall_silent(fault, folder)

    # The main rank is the harness's victim.
    os.environ["RANK"] = str((int(os.environ["RANK"]) - VICTIM) % RANKS)
    on_main_rank(RunLock(Path(folder)), EngineConfig(timeout_s=LIMIT_S / 0.8), work)


def fall_at_the_start(fault: str, folder: str) -> None:
    """The victim falls silent before it joins the process group, or while it does, and the others
    wait for it."""
    from unittest import mock

    from nemocascade.recipe import EngineConfig, ParallelConfig
    from nemocascade.stages import setup

    rank = int(os.environ["RANK"])
    (Path(folder) / f"started.{rank}").touch()
    # A process may start much later than the first one.
    while len(list(Path(folder).glob("started.*"))) < RANKS:
        time.sleep(0.05)
    if rank == VICTIM and fault.endswith("before the start"):
        fall_silent(fault, folder)
    elif rank == VICTIM:
        fall = mock.patch.object(setup, "start_world")
        fall.start().side_effect = lambda *_: fall_silent(fault, folder)
    engine = EngineConfig(timeout_s=LIMIT_S / 0.8, precision="fp32")
    with setup.watched_world(Path(folder), ParallelConfig(), engine) as (world, _):
        world.barrier()


def fall_in_scoring(fault: str, folder: str) -> None:
    """The victim falls silent at its first answer to held-out tasks."""
    from unittest import mock

    from nemocascade.recipe import EngineConfig, EnvConfig, ScoreConfig, ScoredDomain
    from nemocascade.rollout.live import LiveEngine
    from nemocascade.stages.scoring import score_artifact

    answers = LiveEngine.run

    def first_answer(*args: Any, **settings: Any) -> Iterator[Any]:
        for answer in answers(*args, **settings):
            fall_silent(fault, folder)
            yield answer

    if int(os.environ["RANK"]) == VICTIM:
        mock.patch.object(LiveEngine, "run", first_answer).start()
    config = ScoreConfig(
        domains=(ScoredDomain("instruction_following"),),
        tasks=6,
        max_prompt_tokens=128,
        max_response_tokens=12,
        thinking=False,
        slots=2,
        envs=EnvConfig(if_grading="fraction", if_language_check="letters", check_workers=1),
        engine=EngineConfig(precision="fp32", timeout_s=SCORING_S / 0.8),
    )
    artifact = Path(folder, "start").read_text()
    score_artifact(Path(artifact), config, Path(folder))


JOBS = {
    "between stages": "fall_between_stages",
    "before the start": "fall_at_the_start",
    "in the first seconds": "fall_at_the_start",
    "in scoring": "fall_in_scoring",
}
"""Work of the ranks by the end of the fault's name; `work_until_a_fault` of the others."""


def run_with(fault: str, folder: Path) -> tuple[list[int], list[str], float]:
    """Exit codes and logs of all ranks, and the seconds from the fault to the last rank's end.

    A victim that is stopped is killed when the others have ended, as a launcher does.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    work = next((job for when, job in JOBS.items() if fault.endswith(when)), "work_until_a_fault")
    target = f"{Path(__file__).resolve()}:{work}"
    request = {"target": target, "kwargs": {"fault": fault, "folder": str(folder)}}
    (folder / "request.json").write_text(json.dumps(request))
    ranks = [Rank(rank, RANKS, folder, store.port) for rank in range(RANKS)]
    is_silent = fault.startswith(("stopped", "killed"))
    others = [p for i, p in enumerate(ranks) if i != VICTIM or not is_silent]
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


UNHEARD = f"rank {VICTIM}, before its first heartbeat"
BETWEEN = "phase 'between stages'"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("stopped before its first heartbeat", UNHEARD),
        ("stopped before the start", UNHEARD),
        ("killed before the start", UNHEARD),
        ("killed in the first seconds", "phase 'start'"),
        ("stopped between stages", BETWEEN),
        ("killed between stages", BETWEEN),
    ],
)
def test_a_rank_that_falls_silent_outside_of_a_stage_is_named(
    fault: str, said: str, tmp_path: Path
) -> None:
    is_named(fault, said, LIMIT_S, tmp_path)


def start_of_scoring(folder: str) -> str:
    return start_policy(folder)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("start"))
    [found] = run_ranks(start_of_scoring, 1, {"folder": folder})
    return str(found)


@pytest.mark.parametrize("fault", ["stopped in scoring", "killed in scoring"])
def test_a_rank_that_falls_silent_in_scoring_is_named(
    fault: str, artifact: str, tmp_path: Path
) -> None:
    (tmp_path / "start").write_text(artifact)
    is_named(fault, f"rank {VICTIM} (", SCORING_S, tmp_path)


def is_named(fault: str, said: str, limit_s: float, folder: Path) -> None:
    """Every other rank names the victim in time, and the host is a suspect."""
    codes, logs, seconds = run_with(fault, folder)
    assert all(codes), codes
    assert seconds < 4 * limit_s + 10, "\n".join(logs)
    for rank in range(RANKS):
        if rank != VICTIM:
            [line, *_] = [x for x in logs[rank].splitlines() if "watchdog on rank " in x]
            assert "has died or was stopped" in line, logs[rank]
            assert said in line, logs[rank]
    # The host of a rank that was never heard is that of its launcher's other ranks.
    assert (folder / "suspect_nodes").read_text().split()[0] == socket.gethostname()


def wait_for_the_main_rank(timeout_s: float, work_s: float) -> tuple[str, float]:
    """The main rank works for longer than collectives and the watchdog wait, and shows progress."""
    from datetime import timedelta

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
