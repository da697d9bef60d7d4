"""The shared expert beside the exchanges of rows runs while rows travel, with the same bits."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import pytest
from helpers.ranks import run_ranks

LAYOUTS: dict[str, dict[str, Any]] = {
    "EP2": {"ep": 2},
    "TP2 EP2": {"tp": 2, "ep": 2},
    "ETP2": {"etp": 2},
    "EP2, recomputed": {"ep": 2},
}
FOUR: dict[str, dict[str, Any]] = {
    "EP4, two hops": {"ep": 4},
    "EP4, one hop over nodes": {"ep": 4},
}
EXPECTED = {
    "forward": ["start", "expand", "finish", "start", "contract", "finish"],
    "backward": ["start", "fc2", "finish", "start", "fc1", "finish"],
}


def step_each(layouts: dict[str, dict[str, Any]], node: str) -> dict[str, Any]:
    """Loss, digest of outputs and gradients, and events of a MoE layer, by layout and setting."""
    os.environ["LOCAL_WORLD_SIZE"] = node
    return {
        name: {overlap: _step(name, parallel, overlap) for overlap in ("off", "auto")}
        for name, parallel in layouts.items()
    }


def _step(name: str, parallel: dict[str, Any], overlap: Any) -> dict[str, Any]:
    from dataclasses import replace
    from unittest import mock

    import torch
    from helpers.equivalence import random_batches
    from nemocascade_kernels import Nll

    from nemocascade.megatron.config import Accelerators, make_config
    from nemocascade.megatron.layers.dispatch import RowExchange
    from nemocascade.megatron.layers.mlp import MLP
    from nemocascade.megatron.microbatch import Microbatch
    from nemocascade.megatron.model import build_model
    from nemocascade.megatron.world import start_world
    from nemocascade.recipe import EngineConfig, MoeTrainingConfig, ParallelConfig, tiny

    engine = EngineConfig(
        precision="fp32",
        overlap_shared_expert=overlap,
        recompute="recomputed" in name,
        expert_exchange="direct" if "one hop" in name else "auto",
    )
    world = start_world(ParallelConfig(**parallel), engine)
    shape = replace(tiny(), pattern="E", vocab_size=512, hidden_size=64)
    moe = MoeTrainingConfig(load_balance_coef=1e-2, z_loss_coef=1e-3)
    config = make_config(shape, world.parallel, engine, moe, seed=3)
    [model] = build_model(world, config, Accelerators())
    packed = Microbatch.from_batch(random_batches(4, 512)[world.dp_rank], world.device)
    assert packed.batch is not None
    events: list[str] = []

    def noted(kind: Any, method: str) -> Any:
        original = getattr(kind, method)

        def call(self: Any, *args: Any) -> Any:
            events.append(method)
            return original(self, *args)

        return mock.patch.object(kind, method, call)

    shared = model.decoder.layers[0].mixer.shared_experts
    for linear in ("fc1", "fc2"):
        weight = getattr(shared, f"linear_{linear}").weight
        weight.register_hook(lambda _gradient, linear=linear: events.append(linear))
    found: dict[str, Any] = {}
    with (
        noted(RowExchange, "start"),
        noted(RowExchange, "finish"),
        noted(MLP, "expand"),
        noted(MLP, "contract"),
    ):
        loss = model.train()(packed, Nll(packed.batch.token_weight)).loss
        found["forward"] = events.copy()
        events.clear()
        loss.backward()
        found["backward"] = events
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    found["digest"] = hashlib.sha256(gradients.numpy().tobytes()).hexdigest()
    return found | {"loss": loss.item(), "norm": gradients.norm().item()}


@pytest.fixture(scope="module")
def steps() -> list[dict[str, Any]]:
    two = run_ranks(step_each, 2, {"layouts": LAYOUTS, "node": "2"})
    return two + run_ranks(step_each, 4, {"layouts": FOUR, "node": "2"})


@pytest.mark.parametrize("name", [*LAYOUTS, *FOUR])
def test_the_bits_are_those_without_overlap(name: str, steps: list[dict[str, Any]]) -> None:
    ranks = [rank[name] for rank in steps if name in rank]
    assert len(ranks) == (4 if name in FOUR else 2)
    for rank in ranks:
        assert rank["off"]["norm"] > 0
        for what in ("loss", "digest"):
            assert rank["auto"][what] == rank["off"][what]


@pytest.mark.parametrize("name", [*LAYOUTS, *FOUR])
def test_the_shared_expert_runs_while_rows_travel(name: str, steps: list[dict[str, Any]]) -> None:
    """One product beside each exchange, in forward and, in the reverse order, in backward."""
    again = EXPECTED["forward"] if "recomputed" in name else []
    for rank in steps:
        if name in rank:
            assert rank[name]["auto"]["forward"] == EXPECTED["forward"]
            assert rank[name]["auto"]["backward"] == again + EXPECTED["backward"]
            assert rank[name]["off"]["forward"] == ["expand", "contract"]
