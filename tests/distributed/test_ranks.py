"""The test launcher: results by rank, the failing rank's error message, and the timeout."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from helpers.ranks import RankError, run_ranks


def summed_rank(factor: int) -> dict[str, float]:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    value = torch.tensor([float(dist.get_rank() * factor)])
    dist.all_reduce(value)
    dist.destroy_process_group()
    return {"rank": int(os.environ["RANK"]), "sum": float(value)}


def fail_on_one() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("rank one has had enough")
    time.sleep(600)


def sleep_long() -> None:
    time.sleep(600)


def test_ranks_meet_and_return_by_rank() -> None:
    results = run_ranks(summed_rank, 3, {"factor": 10}, timeout_s=120)
    assert results == [{"rank": rank, "sum": 30.0} for rank in range(3)]


def test_failing_rank_is_shown_and_ends_the_others() -> None:
    begin = time.monotonic()
    with pytest.raises(RankError, match=r"failed on rank 1[\s\S]*rank one has had enough"):
        run_ranks(fail_on_one, 2)
    assert time.monotonic() - begin < 60


def test_time_limit() -> None:
    with pytest.raises(RankError, match="did not finish in 1 s"):
        run_ranks(sleep_long, 1, timeout_s=1.0)


def end_the_server() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)


def variable(name: str) -> str | None:
    return os.environ.get(name)


def leave(message: str) -> None:
    raise SystemExit(message)


def test_ranks_of_a_server_that_dies_have_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = time.monotonic()
    with pytest.raises(RankError, match="failed on rank 0"):
        run_ranks(end_the_server, 1)
    assert time.monotonic() - begin < 60
    monkeypatch.setenv("NEMOCASCADE_TEST", "seen")
    assert run_ranks(variable, 2, {"name": "NEMOCASCADE_TEST"}) == ["seen"] * 2
    monkeypatch.delenv("NEMOCASCADE_TEST")
    assert run_ranks(variable, 2, {"name": "NEMOCASCADE_TEST"}) == [None] * 2


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_crash_is_named_and_located() -> None:
    with pytest.raises(RankError, match=r"failed on rank 0 with SIGSEGV[\s\S]*in crash"):
        run_ranks(crash, 1)


def test_the_message_of_an_exit_is_shown() -> None:
    with pytest.raises(RankError, match=r"on rank 0 with exit status 1[\s\S]*enough of this"):
        run_ranks(leave, 1, {"message": "enough of this"})


def group_threads() -> int:
    names = (Path(f"/proc/self/task/{task}/comm") for task in os.listdir("/proc/self/task"))
    return sum(name.read_text().startswith("gloo") for name in names)


def worlds_in_turn() -> list[int]:
    """Threads of process groups in each of three worlds with a model."""
    from helpers.checkpoint_jobs import make_trainer

    from nemocascade.megatron.world import start_world
    from nemocascade.recipe import EngineConfig, ParallelConfig

    def threads() -> int:
        world = start_world(ParallelConfig(ep=2), EngineConfig(precision="fp32"))
        assert make_trainer({}, world).modules
        found = group_threads()
        world.close()
        return found

    return [threads() for _ in range(3)]


def test_a_world_ends_the_threads_of_an_earlier_one() -> None:
    """They would spin once the other ranks have closed their connections."""
    for found in run_ranks(worlds_in_turn, 2):
        assert found == found[:1] * 3
