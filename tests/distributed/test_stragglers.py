"""A rank whose own work takes longer than that of the others is named in metrics and log."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import run_ranks

from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.watchdog import Watchdog
from nemocascade.train.stragglers import STEPS, StragglerWarnings, straggler_values

SLOW = 1


def train_with_a_slow_rank(run_dir: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, on the main rank."""
    from dataclasses import replace

    from helpers.checkpoint_jobs import small_model

    from nemocascade.recipe import DataConfig, EngineConfig, OptimizerConfig, SftRecipe
    from nemocascade.stages.sft import run_sft
    from nemocascade.train import trainer as module

    trainer: Any = module
    if int(os.environ["RANK"]) == SLOW:
        run = trainer.run_schedule

        def slowly(world: Any, config: Any, chunks: Any, micro: Any, objective: Any) -> Any:
            def later(packed: Any) -> Any:
                time.sleep(1.0)
                return objective(packed)

            return run(world, config, chunks, micro, later)

        trainer.run_schedule = slowly
    recipe = SftRecipe(
        steps=STEPS,
        run_dir=run_dir,
        model=small_model("relu2", vocab_size=512),
        data=DataConfig(
            path=("synthetic:arithmetic",),
            max_rows=200,
            capacity=256,
            sequences_per_step=3,
            heldout_rows=0,
        ),
        optimizer=OptimizerConfig(lr=1e-3),
        engine=EngineConfig(precision="fp32", preflight=False),
    )
    run_sft(replace(recipe, tokenizer=replace(recipe.tokenizer, train_vocab_size=400)))
    lines = Path(run_dir, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_rank_with_slow_passes_is_named(tmp_path: Path) -> None:
    rows = run_ranks(train_with_a_slow_rank, 3, {"run_dir": str(tmp_path)}, timeout_s=300)[0]
    assert [row["straggler"] for row in rows] == [SLOW] * STEPS
    assert min(row["straggler_ratio"] for row in rows) > 1.25
    assert f"rank {SLOW} (" in (tmp_path / "log.txt").read_text()


def test_the_slowest_rank_is_named_if_it_is_slow() -> None:
    assert straggler_values([]) == {}
    assert straggler_values([1.0, 1.2, 1.0]) == {"straggler": None, "straggler_ratio": 1.2}
    assert straggler_values([1.0, 1.0, 1.0, 2.0]) == {"straggler": 3, "straggler_ratio": 2.0}
    assert straggler_values([3.0, 1.0]) == {"straggler": 0, "straggler_ratio": 3.0}


def test_a_rank_is_warned_of_once_in_some_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(LOGGER, "warning", lambda text, *values: said.append(text % values))
    warnings, slow = StragglerWarnings(), {"straggler": 2, "straggler_ratio": 1.5}
    steps = [slow] * (STEPS - 1) + [{}] + [slow] * (2 * STEPS) + [{"straggler": None}] * STEPS
    for values in steps:
        warnings.after_step(values, Watchdog())
    assert len(said) == 2
    assert said[0].startswith("rank 2 (host unknown) is slow in 5 steps in a row: ")
    assert "1.50 x" in said[0]
    assert "10 steps in a row" in said[1]
