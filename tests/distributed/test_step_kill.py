"""A step that is killed with signal 9 resumes from its journal; a request to stop ends it together.

One series of kills goes through a single run: each start restores what the ones before have left.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from helpers.journal_jobs import metric_lines, start_and_teacher
from helpers.ranks import RankError, run_ranks

Moment = dict[str, Any]
"""The ranks that die, by number, and where; the others are killed because one is gone."""

ONE, TWO = "step_00000001", "step_00000002"
MOMENTS: list[Moment] = [
    {"0": ["record", ONE, 3], "1": ["record", ONE, 2]},
    {"1": ["torn", ONE, 3]},
    {"0": ["record", ONE, 4]},
    {"0": ["torn", ONE, 2], "1": ["torn", ONE, 1]},
    {"1": ["call", "nemocascade.rl.collector:share_outcomes", 2]},
    {"0": ["call", "nemocascade.train.trainer:Trainer.train_step", 1]},
    {"0": ["call", "nemocascade.rl.journal:write_text", 1]},
    {"1": ["torn", TWO, 3]},
    {"0": ["record", TWO, 2], "1": ["record", TWO, 4]},
    {"0": ["call", "nemocascade.rl.collector:share_outcomes", 3], "1": ["record", TWO, 200]},
]


def run(
    kind: str, artifacts: dict[str, str], folder: str, moment: Moment, parallel: dict[str, int]
) -> dict[str, str]:
    """Hashes of a stage's weights, if nothing kills it."""
    import os

    from helpers.journal_jobs import (
        before_append,
        before_call,
        die,
        run_and_hash,
        slow_generation,
        stage_recipe,
        tear_and_die,
    )

    how, where, number = moment.get(os.environ["RANK"], ("", "", 0))
    if how == "call":
        before_call(where, number, die)
    elif how:
        before_append(where, number, tear_and_die if how == "torn" else die)
    # Both ranks get their share of the rollouts.
    slow_generation(0.02)
    recipe = stage_recipe(kind, artifacts, folder, prompts_per_step=12)
    return run_and_hash(with_layout(recipe, parallel))


def with_layout(recipe: Any, parallel: dict[str, Any]) -> Any:
    from dataclasses import replace

    from nemocascade.recipe import ParallelConfig

    return replace(recipe, parallel=ParallelConfig(**parallel))


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = str(tmp_path_factory.mktemp("sft"))
    (found,) = run_ranks(start_and_teacher, 1, {"folder": folder})
    return dict(found)


@pytest.mark.parametrize(
    ("kind", "moments"),
    [
        ("grpo", [1, 3]),
        pytest.param("grpo", range(10), marks=pytest.mark.slow),
        pytest.param("mopd", range(10), marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_moment_of_a_step(
    kind: str, moments: range, artifacts: dict[str, str], tmp_path: Path
) -> None:
    def start(name: str, moment: Moment) -> list[dict[str, str]]:
        arguments = {"kind": kind, "artifacts": artifacts, "folder": f"{tmp_path}/{name}"}
        return run_ranks(run, 2, {**arguments, "moment": moment, "parallel": {}}, timeout_s=120)

    whole = start("whole", {})
    for moment in (MOMENTS[n] for n in moments):
        with pytest.raises(RankError, match="failed on rank"):
            pytest.fail(f"not killed at {moment}: {start('killed', moment)}")
    assert start("killed", {}) == whole
    undisturbed, lines = (metric_lines(f"{tmp_path}/{name}") for name in ("whole", "killed"))
    assert all(line["grad_norm"] > 0 for line in undisturbed), "nothing was trained"
    assert [line["loss"] for line in lines] == [line["loss"] for line in undisturbed]
    assert lines[0]["rollouts_restored"] > 0


def restored_elsewhere(artifacts: dict[str, str], folder: str) -> None:
    """Resume on one rank what two had begun."""
    from helpers.journal_jobs import run_and_hash, stage_recipe

    run_and_hash(stage_recipe("plain", artifacts, folder, prompts_per_step=12))


@pytest.mark.parametrize("parallel", [{"tp": 2}, pytest.param({"ep": 2}, marks=pytest.mark.slow)])
def test_another_layout_resumes_the_step(
    parallel: dict[str, int], artifacts: dict[str, str], tmp_path: Path
) -> None:
    """The weights have the same fingerprint there."""
    arguments = {"kind": "plain", "artifacts": artifacts, "folder": str(tmp_path)}
    moment = {"0": ["record", ONE, 9], "1": ["record", ONE, 9]}
    with pytest.raises(RankError, match="failed on rank"):
        run_ranks(run, 2, {**arguments, "moment": moment, "parallel": parallel})
    run_ranks(restored_elsewhere, 1, {"artifacts": artifacts, "folder": str(tmp_path)})
    assert metric_lines(str(tmp_path))[0]["rollouts_restored"] >= 6


LAYOUTS: dict[str, dict[str, int]] = {
    "DP2": {},
    "TP2": {"tp": 2},
    "PP2": {"pp": 2},
    "EP2": {"ep": 2},
}


def stopped(artifacts: dict[str, str], folder: str, layouts: list[str]) -> dict[str, Any]:
    """Exit code, steps and seconds of a stop on each layout, and metrics of the resumed stage."""
    import os

    from helpers.journal_jobs import before_append, run_and_hash, slow_generation, stage_recipe

    from nemocascade.runtime.stopping import Stopped

    found: dict[str, Any] = {}
    for name in layouts:
        parallel = LAYOUTS[name]
        run_dir = f"{folder}/{name}"

        def ask(_journal: Any, _record: bytes, run_dir: str = run_dir) -> None:
            Path(run_dir, "stop").touch()
            Path(run_dir, "asked").write_text(str(time.monotonic()))
            slow_generation(0.3)

        if os.environ["RANK"] == "0":
            before_append(TWO, 2, ask)
        else:
            # It would finish the step before it learns of the request.
            before_append(TWO, 1, lambda *_: slow_generation(0.3))
        recipe = stage_recipe("plain", artifacts, run_dir, prompts_per_step=8, slots=4)
        try:
            run_and_hash(with_layout(recipe, parallel))
        except Stopped as stop:
            asked = float(Path(run_dir, "asked").read_text())
            found[name] = [stop.code, stop.step, time.monotonic() - asked]
        slow_generation(0.0)
        run_and_hash(with_layout(recipe, parallel))
        found[f"{name} resumed"] = [line["rollouts_restored"] for line in metric_lines(run_dir)]
    return found


@pytest.mark.parametrize(
    "layouts", [["PP2", "EP2"], pytest.param([*LAYOUTS], marks=pytest.mark.slow)]
)
def test_all_ranks_stop_together_within_seconds(
    layouts: list[str], artifacts: dict[str, str], tmp_path: Path
) -> None:
    """Ranks of one replica, which decode together, and replicas, which exchange rows."""
    arguments = {"artifacts": artifacts, "folder": str(tmp_path), "layouts": layouts}
    ranks = run_ranks(stopped, 2, arguments, timeout_s=170)
    for found in ranks:
        for name in layouts:
            code, step, seconds = found[name]
            assert (code, step) == (75, 1), name
            assert seconds < 60, name
            first, second = found[f"{name} resumed"]
            assert first == 0
            assert 0 < second < 32, name


def left_early(folder: str) -> list[Any]:
    """How long a rank worked after the request, while the main rank had no work left."""
    from nemocascade.recipe import EngineConfig, ParallelConfig
    from nemocascade.runtime.stopping import StopAsked
    from nemocascade.stages.setup import watched_world

    seconds = 0.0
    with watched_world(Path(folder), ParallelConfig(), EngineConfig(precision="fp32")) as (
        world,
        _,
    ):
        try:
            with world.leaving_together():
                if not world.is_main:
                    Path(folder, "stop").touch()
                    started = time.monotonic()
                    while not world.stop.asked() and seconds < 60:
                        time.sleep(0.05)
                        seconds = time.monotonic() - started
                    raise StopAsked
        except StopAsked:
            return [True, seconds]
    return [False, seconds]


def test_a_main_rank_without_work_still_looks_for_a_request(tmp_path: Path) -> None:
    for is_stopped, seconds in run_ranks(left_early, 2, {"folder": str(tmp_path)}):
        assert is_stopped
        assert seconds < 60
