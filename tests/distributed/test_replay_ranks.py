"""Router replay under every parallel axis: records equal those of one process, and so does training
on another run's record, with the global load-balance loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import run_ranks

TOLERANCE = 1e-5
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"parallel": {"tp": 2}},
    "PP2 VPP2": {"parallel": {"pp": 2, "vpp": 2}},
    "EP2": {"parallel": {"ep": 2}},
    "TP2 EP2, recompute": {"parallel": {"tp": 2, "ep": 2}, "recompute": True},
}


def replay_each(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {name: replay_once(**settings) for name, settings in runs.items()}


def replay_once(parallel: dict[str, Any], recompute: bool = False) -> dict[str, Any]:
    """Choices that a pass records; loss and gradient norm of a step on choices of no router."""
    from dataclasses import replace

    import torch
    from helpers.equivalence import CAPACITY, random_batches

    from nemocascade.megatron.accelerators import detect
    from nemocascade.megatron.microbatch import Microbatch
    from nemocascade.megatron.replay import RouteRecorder, RouteReplay
    from nemocascade.megatron.schedule import run_schedule
    from nemocascade.megatron.world import start_world
    from nemocascade.recipe import (
        EngineConfig,
        MoeTrainingConfig,
        OptimizerConfig,
        ParallelConfig,
        tiny,
    )
    from nemocascade.train.evaluation import (
        batch_of,
        sum_of_losses,
    )
    from nemocascade.train.objectives import nll_objective
    from nemocascade.train.trainer import Trainer

    engine = EngineConfig(precision="fp32", recompute=recompute)
    world = start_world(ParallelConfig(**parallel), engine)
    shape = replace(tiny(), vocab_size=512, hidden_size=64)
    trainer = Trainer(
        world,
        shape,
        engine=engine,
        moe=MoeTrainingConfig(load_balance="global", load_balance_coef=1e-2, z_loss_coef=1e-3),
        optimizer=OptimizerConfig(lr=1e-3, schedule="constant"),
        accelerators=detect(engine, world.device).accelerators,
        seed=3,
        run_dir=Path("/nonexistent"),
    )
    batches = random_batches(2, shape.vocab_size)
    batches = [replace(b, token_weight=b.token_weight / 100) for b in batches]
    batches = batches[world.dp_rank :: world.dp_size]

    def run(micro: list[Microbatch], forward_only: bool) -> float:
        outputs = run_schedule(
            world, trainer.config, trainer.chunks, micro,
            lambda m: nll_objective(batch_of(m)), forward_only=forward_only,
        )  # fmt: skip
        return float(sum_of_losses(world, outputs))

    def microbatch(batch: Any, choices: torch.Tensor | None) -> Microbatch:
        replay = None
        if choices is not None:
            replay = RouteReplay.from_choices(shape, choices, batch.num_tokens, world.device)
        recorder = RouteRecorder(shape, CAPACITY, world.device)
        return Microbatch.from_batch(batch, world.device, 0.05, replay=replay, recorder=recorder)

    def gathered(micro: list[Microbatch]) -> list[Any]:
        parts = [m.recorder.gathered(world.groups) for m in micro if m.recorder is not None]
        every = world.all_gather_object((world.dp_rank, [part.tolist() for part in parts]))
        of_replica: dict[int, Any] = {}
        for replica, records in every:
            assert of_replica.setdefault(replica, records) == records
        # Micro-batch i of the step is with data-parallel rank i % dp.
        turns = zip(*(of_replica[i] for i in range(world.dp_size)), strict=True)
        return [part for turn in turns for part in turn]

    free = [microbatch(batch, None) for batch in batches]
    loss_free = run(free, forward_only=True)
    generator = torch.Generator().manual_seed(7)
    layers = shape.pattern.count("E")
    scores = torch.rand(2, CAPACITY, layers, shape.num_experts, generator=generator)
    foreign = scores.argsort(-1)[..., : shape.experts_per_token]
    mine = foreign[world.dp_rank :: world.dp_size]
    trainer.optimizer.zero_grad()
    for chunk in trainer.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    replayed = [microbatch(b, c) for b, c in zip(batches, mine, strict=True)]
    loss = run(replayed, forward_only=False)
    norm = trainer.optimizer.step(1e-3)
    return {
        "loss_free": loss_free,
        "loss": loss,
        "norm": norm,
        "recorded": gathered(free),
        "replayed": gathered(replayed),
        "foreign": foreign.tolist(),
        "real": [b.num_tokens for b in random_batches(2, shape.vocab_size)],
    }


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found: dict[str, Any] = run_ranks(replay_each, 1, {"runs": {"one": {"parallel": {}}}})[0]
    of_rank = run_ranks(replay_each, 2, {"runs": LAYOUTS}, timeout_s=300)
    assert of_rank[0] == of_rank[1], "ranks disagree"
    found |= of_rank[0]
    return found


def test_one_process_replays_and_that_matters(results: dict[str, Any]) -> None:
    one = results["one"]
    for index, real in enumerate(one["real"]):
        assert one["replayed"][index][:real] == one["foreign"][index][:real]
        assert one["recorded"][index][:real] != one["foreign"][index][:real]
    assert abs(one["loss"] / one["loss_free"] - 1) > 10 * TOLERANCE


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name: str, results: dict[str, Any]) -> None:
    found, expected = results[name], results["one"]
    assert found["recorded"] == expected["recorded"]
    assert found["replayed"] == expected["replayed"]
    for key in ("loss_free", "loss", "norm"):
        assert found[key] == pytest.approx(expected[key], rel=TOLERANCE), key
