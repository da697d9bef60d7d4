"""A policy artifact that multi-rank tests of RL and MOPD stages start from."""

from __future__ import annotations

from typing import Any

LAYERS = "ME*E"
"""Each kind of layer, and few of them: the time of these tests is that of their layers."""


def start_policy(folder: str, domains: tuple[str, ...] = ("instruction_following",)) -> str:
    """An artifact to start from: a small model after two steps of SFT."""
    from nemocascade.stages.sft import run_sft

    return str(run_sft(sft_recipe(folder, domains)))


def sft_recipe(folder: str, domains: tuple[str, ...]) -> Any:
    from dataclasses import replace

    from nemocascade.recipe import (
        CheckpointConfig,
        DataConfig,
        DemonstrationConfig,
        DomainConfig,
        EngineConfig,
        OptimizerConfig,
        SftRecipe,
        TokenizerConfig,
        tiny,
    )

    return SftRecipe(
        steps=2,
        run_dir=folder,
        model=replace(tiny(), pattern=LAYERS, hidden_size=64, vocab_size=512),
        data=DataConfig(capacity=512, sequences_per_step=2, balance_group=2),
        demonstrations=DemonstrationConfig(
            domains=tuple(DomainConfig(domain=name, tasks=64) for name in domains), heldout=8
        ),
        tokenizer=TokenizerConfig(train_vocab_size=400),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=0, schedule="constant"),
        engine=EngineConfig(precision="fp32"),
        checkpoint=CheckpointConfig(every=0),
    )
