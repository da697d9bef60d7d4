"""A step that was killed or stopped resumes from its journal, bit for bit."""

from __future__ import annotations

import functools
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.journal_jobs import (
    before_append,
    metric_lines,
    run_and_hash,
    slow_generation,
    stage_recipe,
    start_and_teacher,
)

from nemocascade.envs.base import Domain
from nemocascade.recipe import EngineConfig, EnvConfig, ScoreConfig, ScoredDomain
from nemocascade.rl.journal import Journal
from nemocascade.rollout.generation import Generation
from nemocascade.runtime.stopping import Stopped
from nemocascade.stages.scoring import score_artifact


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return start_and_teacher(str(tmp_path_factory.mktemp("sft")))


Whole = Callable[..., tuple[dict[str, str], Path]]


@pytest.fixture(scope="module")
def whole(artifacts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Hashes of a stage that nothing disturbs and its run folder, by kind and rollout settings."""

    @functools.cache
    def run(kind: str, **rollout: int) -> tuple[dict[str, str], Path]:
        folder = tmp_path_factory.mktemp("whole")
        return run_and_hash(stage_recipe(kind, artifacts, str(folder), **rollout)), folder

    return run


class BrokenError(RuntimeError):
    """Stands for a kill."""


@pytest.fixture
def breaks(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Number of records, by journal, after which the process fails."""
    left: dict[str, int] = {}
    append = Journal._append

    def counted(self: Any, *arguments: Any) -> None:
        append(self, *arguments)
        name = self.folder.name
        if name in left:
            left[name] -= 1
            if not left[name]:
                raise BrokenError

    monkeypatch.setattr(Journal, "_append", counted)
    return left


@pytest.mark.parametrize("kind", ["grpo", pytest.param("plain", marks=pytest.mark.slow), "mopd"])
def test_a_step_from_half_of_its_journal_has_the_same_bits(
    kind: str, artifacts: dict[str, str], whole: Whole, tmp_path: Path, breaks: dict[str, int]
) -> None:
    hashes, undisturbed = whole(kind)
    recipe = stage_recipe(kind, artifacts, f"{tmp_path}/parts")
    for name in ("heldout_00000000", "step_00000001", "step_00000002"):
        breaks.clear()
        breaks[name] = 5 if "heldout" in name else 9
        with pytest.raises(BrokenError):
            run_and_hash(recipe)
    breaks.clear()
    assert run_and_hash(recipe) == hashes
    assert not (tmp_path / "parts/journal").exists()
    every = metric_lines(str(undisturbed))
    assert all(line["grad_norm"] > 0 for line in every), "nothing was trained"
    for ours, theirs in zip(metric_lines(recipe.run_dir), every, strict=True):
        assert theirs["rollouts_restored"] == 0
        assert ours["rollouts_restored"] > 0
        for key in ("loss", "grad_norm", "reward", "response_tokens", "groups_drawn"):
            assert ours[key] == theirs[key], key
    # The first step was finished, so all of it was restored.
    first = metric_lines(recipe.run_dir)[0]
    assert first["rollouts_restored"] >= 4 * first["groups_drawn"]


@pytest.mark.parametrize("changed", ["weights", "rollout.temperature"])
def test_a_step_of_other_weights_or_settings_starts_again(
    changed: str, artifacts: dict[str, str], tmp_path: Path, breaks: dict[str, int]
) -> None:
    breaks["step_00000001"] = 9
    with pytest.raises(BrokenError):
        run_and_hash(stage_recipe("plain", artifacts, f"{tmp_path}/run"))
    breaks.clear()
    others: dict[str, Any] = {"temperature": 0.7} if changed != "weights" else {}
    start = artifacts if others else artifacts | {"start": artifacts["teacher"]}
    found = run_and_hash(stage_recipe("plain", start, f"{tmp_path}/run", **others))
    assert found == run_and_hash(stage_recipe("plain", start, f"{tmp_path}/whole", **others))
    assert metric_lines(f"{tmp_path}/run")[0]["rollouts_restored"] == 0
    log = (tmp_path / "run/log.txt").read_text()
    assert f"journal/step_00000001 is of other {changed}: its rollouts are dropped" in log


def at_record(
    monkeypatch: pytest.MonkeyPatch, name: str, action: Callable[[], object]
) -> list[float]:
    """Call `action` before the second record of the journal `name`; returns when that was. The rest
    of its rollouts takes several seconds, however short they are."""
    monkeypatch.setattr(Journal, "_append", Journal._append)
    monkeypatch.setattr(Generation, "_step", Generation._step)
    when: list[float] = []

    def act(_journal: Any, _record: bytes) -> None:
        when.append(time.monotonic())
        slow_generation(1.5)
        action()

    before_append(name, 2, act)
    return when


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("grpo", "file"),
        ("mopd", "ctrl-c"),
        pytest.param("grpo", "ctrl-c", marks=pytest.mark.slow),
        pytest.param("mopd", "file", marks=pytest.mark.slow),
    ],
)
def test_a_request_to_stop_ends_rollouts_within_seconds(
    kind: str,
    how: str,
    artifacts: dict[str, str],
    whole: Whole,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = stage_recipe(kind, artifacts, str(tmp_path), slots=2)

    def ask() -> None:
        if how == "file":
            (tmp_path / "stop").touch()
        else:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        when = at_record(patch, "step_00000002", ask)
        with pytest.raises(Stopped) as caught:
            run_and_hash(recipe)
        assert time.monotonic() - when[0] < 30
    assert (caught.value.code, caught.value.step) == (75 if how == "file" else 130, 1)
    assert [p.name for p in (tmp_path / "checkpoints").glob("step_*")] == ["step_00000001"]
    assert (tmp_path / "stop.done").exists() == (how == "file")
    assert "stopped on request after step 1, which is saved" in (tmp_path / "log.txt").read_text()
    # What the checkpoint covers is not kept.
    assert [p.name for p in (tmp_path / "journal").iterdir()] == ["step_00000002"]
    monkeypatch.undo()
    parts = run_and_hash(recipe)
    first, second = metric_lines(recipe.run_dir)
    assert (first["step"], second["step"]) == (1, 2)
    assert 0 < second["rollouts_restored"] < 16
    assert parts == whole(kind, slots=2)[0]


def test_a_request_to_stop_ends_the_wait_for_verdicts(
    artifacts: dict[str, str], whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a stop in the first step has nothing to save."""
    recipe = stage_recipe("grpo", artifacts, str(tmp_path))
    release, score = threading.Event(), Domain.score

    def slow_score(self: Any, prompt: Any, response: Any) -> Any:
        if list(tmp_path.glob("journal/step_*")):
            (tmp_path / "stop").touch()
            release.wait(60)
        return score(self, prompt, response)

    with monkeypatch.context() as patch:
        patch.setattr(Domain, "score", slow_score)
        started = time.monotonic()
        with pytest.raises(Stopped) as caught:
            run_and_hash(recipe)
        release.set()
    assert time.monotonic() - started < 30
    assert (caught.value.code, caught.value.step) == (75, 0)
    assert not (tmp_path / "checkpoints").exists()
    assert run_and_hash(recipe) == whole("grpo")[0]
    # Every rollout was there, and no verdict.
    assert metric_lines(recipe.run_dir)[0]["rollouts_restored"] >= 16


def test_a_stopped_evaluation_repeats_no_step(
    artifacts: dict[str, str], whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = stage_recipe("grpo", artifacts, str(tmp_path), slots=2)
    with monkeypatch.context() as patch:
        at_record(patch, "heldout_00000002", (tmp_path / "stop").touch)
        with pytest.raises(Stopped) as caught:
            run_and_hash(recipe)
    assert (caught.value.code, caught.value.step) == (75, 2)
    lines = metric_lines(recipe.run_dir)
    assert [line["step"] for line in lines] == [1, 2]
    parts = run_and_hash(recipe)
    assert metric_lines(recipe.run_dir) == lines
    assert parts == whole("grpo", slots=2)[0]
    log = (tmp_path / "log.txt").read_text()
    assert re.search(r"heldout_00000002: [1-3] of 3 rollouts restored", log)


def test_a_stopped_scoring_resumes(
    artifacts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ScoreConfig(
        domains=(ScoredDomain("instruction_following"),),
        tasks=8,
        samples=2,
        temperature=1.0,
        max_prompt_tokens=128,
        max_response_tokens=12,
        thinking=False,
        slots=2,
        envs=EnvConfig(if_grading="fraction", if_language_check="letters"),
        engine=EngineConfig(precision="fp32"),
    )
    folder = Path(artifacts["start"])
    with monkeypatch.context() as patch:
        when = at_record(patch, "scores", (tmp_path / "stop").touch)
        with pytest.raises(Stopped) as caught:
            score_artifact(folder, config, tmp_path)
        assert time.monotonic() - when[0] < 30
    assert caught.value.code == 75
    assert not (tmp_path / "stop").exists()
    found = score_artifact(folder, config, tmp_path)
    assert "rollouts restored" in (tmp_path / "log.txt").read_text()
    assert not (tmp_path / "journal").exists()
    whole = score_artifact(folder, config, tmp_path / "whole")
    assert (found.scores, found.samples) == (whole.scores, whole.samples)
