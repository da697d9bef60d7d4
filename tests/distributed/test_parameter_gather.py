"""The gather of updated weights beside the next forward pass changes only when ranks wait."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import run_ranks

LAYOUTS: dict[str, dict[str, Any]] = {
    "DP4": {},
    "EP2": {"ep": 2},
    "TP2": {"tp": 2},
    "PP2 VPP2": {"pp": 2, "vpp": 2},
    "PP2, tied": {"pp": 2},
}


def train_each() -> dict[str, Any]:
    return {
        name: [_train(parallel, "tied" in name, overlap) for overlap in (False, True)]
        for name, parallel in LAYOUTS.items()
    }


def _train(parallel: dict[str, Any], tied: bool, overlap: bool) -> dict[str, Any]:
    """Losses of three steps, gathers under way after them, a held-out loss and the weights."""
    from dataclasses import replace

    import torch
    from helpers.equivalence import random_batches

    from nemocascade.megatron.config import Accelerators
    from nemocascade.megatron.world import start_world
    from nemocascade.recipe import (
        EngineConfig,
        MoeTrainingConfig,
        OptimizerConfig,
        ParallelConfig,
        tiny,
    )
    from nemocascade.train.trainer import Trainer

    engine = EngineConfig(precision="fp32", overlap_parameter_gather=overlap)
    world = start_world(ParallelConfig(**parallel), engine)
    trainer = Trainer(
        world,
        replace(tiny(), vocab_size=512, hidden_size=64, pattern="ME*E", tie_embeddings=tied),
        engine=engine,
        moe=MoeTrainingConfig(),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=1),
        accelerators=Accelerators(),
        seed=3,
        run_dir=Path("/nonexistent"),
    )
    batches = random_batches(8, 512, 128)[world.dp_rank :: world.dp_size]
    losses, under_way = [], 0
    for _ in range(3):
        losses.append(trainer.train_step(batches).loss)
        under_way += _handles(trainer)
    heldout, _ = trainer.evaluate([batches])
    losses.append(trainer.train_step(batches).loss)
    weights = torch.cat([p.detach().flatten() for m in trainer.modules for p in m.parameters()])
    world.close()
    return {
        "losses": [*losses, heldout],
        "under way": under_way,
        "left": _handles(trainer),
        "weights": hashlib.sha256(weights.numpy().tobytes()).hexdigest(),
    }


def _handles(trainer: Any) -> int:
    groups = [
        group
        for chunk in trainer._chunks
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups
    ]
    return sum(group.param_gather_handle is not None for group in groups)


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run_ranks(train_each, 4, timeout_s=500)
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_overlapped_gather_gives_the_same_bits(name: str, results: list[dict[str, Any]]) -> None:
    for rank in results:
        waited, overlapped = rank[name]
        assert overlapped["losses"] == waited["losses"]
        assert overlapped["weights"] == waited["weights"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_ends_before_its_gathers(name: str, results: list[dict[str, Any]]) -> None:
    """And whoever asks the trainer for its weights waits for them."""
    for rank in results:
        waited, overlapped = rank[name]
        assert waited["under way"] == 0
        assert overlapped["under way"] >= 3
        assert overlapped["left"] == 0
