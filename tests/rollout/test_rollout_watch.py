"""Progress reports of a rollout to the watchdog: a rank that makes progress is not stalled."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from helpers.rollout import ODD, draw_tokens, make_model

from nemocascade.megatron.world import start_world
from nemocascade.recipe import EngineConfig, ParallelConfig
from nemocascade.rollout import generation
from nemocascade.rollout.engine import Request, Sampling
from nemocascade.rollout.live import LiveEngine
from nemocascade.runtime.watchdog import Sign, Watchdog
from nemocascade.runtime.world import World

LIMIT_S = 10.0


class Heard(Watchdog):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.phases: list[str] = []
        self.reports: list[str] = []

    def enter(self, phase: str) -> None:
        super().enter(phase)
        self.phases.append(phase)

    def progress(self, progress: str) -> None:
        super().progress(progress)
        self.reports.append(progress)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = start_world(ParallelConfig(), EngineConfig(precision="fp32"))
    yield world
    world.close()


@pytest.mark.parametrize("every_s", [0.0, 1000.0])
def test_a_run_reports_its_progress(
    world: World, every_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "TELL_S", every_s)
    heard = Heard()
    engine = LiveEngine(
        replace(world, watch=heard), make_model(world, ODD), slots=2, prefill_chunk=4
    )
    requests = [Request(i, tuple(draw_tokens(ODD.vocab_size, 9, i).tolist())) for i in range(3)]
    for _ in range(2):
        assert len(list(engine.run(requests, Sampling(max_tokens=5)))) == 3
    assert heard.phases == ["rollout: generation"] * 2
    if every_s:
        assert len(heard.reports) <= 2
        return
    # A pass each: three pieces a prompt, and four steps for two texts, then for the third.
    one = heard.reports[: len(heard.reports) // 2]
    assert len(one) == 3 * 3 + 4 + 4
    assert one[0] == "0 of 3 sequences done, 1 in progress, 4 tokens read and 0 written"
    assert one[-1] == "3 of 3 sequences done, 0 in progress, 27 tokens read and 15 written"
    assert one == heard.reports[len(one) :]


def named(*signs: Sign) -> list[str]:
    """Report of rank 0 on the job when it has heard these signs just now."""
    dog = Watchdog(0, len(signs), limit_s=LIMIT_S)
    dog._seen = {sign.rank: (sign, time.monotonic()) for sign in signs}
    problem = dog._problem()
    return [] if problem is None else problem[0]


def test_a_rank_that_gets_on_is_not_named() -> None:
    waits = Sign(
        0, "a", 1, phase="rollout: exchange", collective="all_gather", waits_s=11, still_s=11
    )
    busy = Sign(1, "b", 2, phase="rollout: generation", since_s=500, progress="7 of 9", still_s=1)
    stuck = replace(busy, rank=2, still_s=12)
    assert named(waits, busy) == []
    [line] = named(waits, busy, stuck)
    assert line.startswith(
        "stalls: rank 2 (b, process 2), phase 'rollout: generation' (7 of 9) for"
    )
    assert "rank 0 has waited 11.0 s in all_gather" in line


def test_all_ranks_in_one_collective_are_named() -> None:
    """None of them is outside: the collective itself hangs."""
    signs = [
        Sign(rank, "a", 1, phase="x", collective="all_reduce", waits_s=11, still_s=11)
        for rank in range(2)
    ]
    assert len(named(*signs)) == 2
    assert named(*(replace(s, still_s=3, waits_s=3) for s in signs)) == []


def test_progress_ends_with_its_phase() -> None:
    dog = Watchdog(limit_s=LIMIT_S)
    dog.enter("one")
    dog.progress("half")
    assert "phase 'one' (half) for" in dog._own.where()
    dog.enter("two")
    assert "phase 'two' for" in dog._own.where()
