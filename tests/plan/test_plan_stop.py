"""A run that is asked to stop saves at the end of its step; the next start resumes from there."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemocascade.recipe import SftRecipe, load_recipe
from nemocascade.runtime.stopping import Stopped, StopRequest
from nemocascade.stages.sft import run_sft
from nemocascade.train.trainer import Trainer

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "tiny" / "sft.py"


def test_a_run_stops_on_request_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(RECIPE, SftRecipe)
    recipe = replace(
        recipe,
        steps=4,
        run_dir=str(tmp_path),
        model=replace(recipe.model, pattern="M*E", hidden_size=32, num_heads=2, head_dim=16),
        data=replace(recipe.data, capacity=128, heldout_rows=0, max_rows=64),
        checkpoint=replace(recipe.checkpoint, every=0),
        log=replace(recipe.log, tensorboard=False),
    )
    # A request that a run before this one left: it is not meant for this one.
    (tmp_path / "stop").touch()
    os.utime(tmp_path / "stop", (0, 0))
    train_step = Trainer.train_step

    def asked_in_the_second(self: Trainer, *arguments: Any, **options: Any) -> Any:
        result = train_step(self, *arguments, **options)
        if self.step_number == 2:
            (tmp_path / "stop").touch()
        return result

    monkeypatch.setattr(Trainer, "train_step", asked_in_the_second)
    with pytest.raises(Stopped) as caught:
        run_sft(recipe)
    assert (caught.value.code, caught.value.step) == (75, 2)
    assert [p.name for p in (tmp_path / "checkpoints").glob("step_*")] == ["step_00000002"]
    assert (tmp_path / "stop.done").exists()
    assert not (tmp_path / "stop").exists()
    monkeypatch.undo()
    assert run_sft(recipe) == tmp_path / "artifact"
    assert not (tmp_path / "stop.done").exists()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert "preflight:" in (tmp_path / "log.txt").read_text()


def test_a_request_during_the_start_counts(tmp_path: Path) -> None:
    request = StopRequest(tmp_path)
    (tmp_path / "stop").touch()
    request.clear()
    assert request.poll()
    os.utime(tmp_path / "stop", (0, 0))
    again = StopRequest(tmp_path)
    again.clear()
    assert not again.poll()
