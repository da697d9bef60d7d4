"""The SFT stage on a folder of `nemocascade data build` trains bit for bit as on the rows."""

from __future__ import annotations

import os
from pathlib import Path

from helpers.ranks import join_group, run_ranks
from helpers.stored import unequal

STEPS = 2


def train_on_both(root: str) -> list[str]:
    """Train on rows, which the main rank tokenises, and on the built folder. Returns what this rank
    has told the watchdog about the rows."""
    from dataclasses import replace
    from unittest import mock

    import torch.distributed as dist
    from helpers.checkpoint_jobs import small_model
    from helpers.data import qa_rows, write_jsonl

    from nemocascade.data.building import join_shards, plan_build, tokenize_shard, work_folder
    from nemocascade.data.tokenizer import load_tokenizer
    from nemocascade.data.tokenizer_training import train_tokenizer
    from nemocascade.recipe import (
        CheckpointConfig,
        DataConfig,
        EngineConfig,
        OptimizerConfig,
        SftRecipe,
        TokenizerConfig,
    )
    from nemocascade.runtime.watchdog import Watchdog
    from nemocascade.stages.sft import run_sft

    rows, tokenizer, built = (str(Path(root, n)) for n in ("rows.jsonl", "t.model", "built"))
    data = DataConfig(path=(rows,), capacity=256, sequences_per_step=4, heldout_rows=8)
    join_group("rows")
    if os.environ["RANK"] == "0":
        write_jsonl(Path(rows), qa_rows(700))
        train_tokenizer(data, 400, tokenizer)
        plan = plan_build(Path(built), data, load_tokenizer(tokenizer), seed=1, size=20_000)
        assert len(plan.shards) > 5
        for number in range(len(plan.shards)):
            tokenize_shard(work_folder(Path(built)), number)
        join_shards(work_folder(Path(built)), Path(built))
    dist.barrier()
    recipe = SftRecipe(
        steps=STEPS,
        run_dir=f"{root}/rows",
        model=small_model("relu2", vocab_size=512),
        data=data,
        tokenizer=TokenizerConfig(path=tokenizer),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=1),
        engine=EngineConfig(precision="fp32", preflight=False, timeout_s=300),
        checkpoint=CheckpointConfig(every=1, keep=0),
    )
    told: list[str] = []
    with mock.patch.object(Watchdog, "progress", lambda _, text: told.append(text)):
        run_sft(recipe)
        tokenised = [text for text in told if "tokenised" in text]
        join_group("tokens")
        run_sft(replace(recipe, run_dir=f"{root}/tokens", data=replace(data, path=(built,))))
    assert not Path(root, "tokens", "cache").exists()
    return tokenised


def test_steps_on_a_built_folder_are_those_on_its_rows(tmp_path: Path) -> None:
    told, others = run_ranks(train_on_both, 2, {"root": str(tmp_path)}, timeout_s=200)
    assert len(told) == 2, "a piece of 512 rows, and one of the rest"
    assert others == []
    for step in range(1, STEPS + 1):
        folders = [tmp_path / n / "checkpoints" / f"step_{step:08d}" for n in ("rows", "tokens")]
        # The second run of a process continues with its random state, which nothing uses here.
        assert not unequal(*folders, ignore=("rng/",))
