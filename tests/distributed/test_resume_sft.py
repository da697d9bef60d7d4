"""The SFT stage, stopped and resumed: N + N steps equal 2N bit for bit, data order included."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import join_group, run_ranks
from helpers.stored import unequal

from nemocascade.megatron.checkpoint import checkpoint_name

HALF, STEPS = 3, 6


def train_twice(root: str, parallel: dict[str, Any]) -> None:
    """Train 2N steps in one go, then go on from its checkpoint at N in a run folder of its own."""
    from dataclasses import replace

    from helpers.checkpoint_jobs import small_model

    from nemocascade.recipe import (
        CheckpointConfig,
        DataConfig,
        EngineConfig,
        OptimizerConfig,
        ParallelConfig,
        SftRecipe,
    )
    from nemocascade.stages.sft import run_sft

    recipe = SftRecipe(
        steps=STEPS,
        run_dir=f"{root}/whole",
        model=small_model("relu2", vocab_size=512),
        data=DataConfig(
            path=("synthetic:arithmetic",),
            max_rows=400,
            capacity=256,
            sequences_per_step=4,
            heldout_rows=8,
        ),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=2),
        parallel=ParallelConfig(**parallel),
        engine=EngineConfig(precision="bf16", timeout_s=300),
        checkpoint=CheckpointConfig(every=HALF, keep=0),
    )
    recipe = replace(recipe, tokenizer=replace(recipe.tokenizer, train_vocab_size=400))
    join_group("whole")
    run_sft(recipe)
    join_group("halves")
    if os.environ["RANK"] == "0":
        halves = Path(root, "halves")
        shutil.copytree(Path(root, "whole"), halves)
        shutil.rmtree(halves / "artifact")
        shutil.rmtree(halves / "checkpoints" / checkpoint_name(STEPS))
        (halves / "checkpoints" / "latest").write_text(checkpoint_name(HALF) + "\n")
    import torch.distributed as dist

    dist.barrier()
    run_sft(replace(recipe, run_dir=f"{root}/halves"))


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        pytest.param(1, {}, id="one"),
        pytest.param(2, {}, id="dp2"),
        pytest.param(2, {"cp": 2}, id="cp2"),
        pytest.param(2, {"pp": 2}, id="pp2", marks=pytest.mark.slow),
    ],
)
def test_n_and_n_steps_are_2n(tmp_path: Path, ranks: int, parallel: dict[str, Any]) -> None:
    arguments = {"root": str(tmp_path), "parallel": parallel}
    run_ranks(train_twice, ranks, arguments, timeout_s=400)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    end = Path("checkpoints", checkpoint_name(STEPS))
    assert unequal(whole / end, halves / end) == []
    extra = [json.loads((run / end / "extra.json").read_text()) for run in (whole, halves)]
    assert extra[0] == extra[1]
    assert extra[0]["data"]["position"]["step"] == STEPS
    assert unequal(whole / "artifact", halves / "artifact") == []
    lines = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (whole, halves)
    ]
    for name in ("step", "loss", "grad_norm", "lr", "tokens"):
        assert [line[name] for line in lines[0]] == [line[name] for line in lines[1]], name
