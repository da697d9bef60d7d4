"""The training step: its loss, its rejection of NaN, its measurements."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemocascade.megatron.config import Accelerators
from nemocascade.megatron.world import start_world
from nemocascade.recipe import (
    EngineConfig,
    LogConfig,
    MoeTrainingConfig,
    OptimizerConfig,
    ParallelConfig,
    SftRecipe,
    tiny,
)
from nemocascade.runtime.world import World
from nemocascade.train import evaluation
from nemocascade.train import trainer as trainer_module
from nemocascade.train.dump import NonFiniteError
from nemocascade.train.evaluation import on_host, policy_metrics
from nemocascade.train.metrics import MetricsWriter, is_due, load_imbalance
from nemocascade.train.trainer import NothingToTrainError, Trainer
from nemocascade.types import Document, PackedBatch, pack_documents

ENGINE = EngineConfig(precision="fp32")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = start_world(ParallelConfig(), ENGINE)
    yield world
    world.close()


def trainer(
    world: World, run_dir: Path, *, engine: EngineConfig = ENGINE, **moe: object
) -> Trainer:
    return Trainer(
        world,
        replace(tiny(), pattern="M*E", vocab_size=64, hidden_size=64),
        engine=engine,
        moe=MoeTrainingConfig(**moe),  # type: ignore[arg-type]
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=0, schedule="constant"),
        accelerators=Accelerators(),
        seed=1,
        run_dir=run_dir,
    )


def batch(seed: int = 0) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    docs = [
        Document(
            torch.randint(64, (n,), generator=generator, dtype=torch.int32),
            torch.arange(n) >= n // 2,
            "x",
        )
        for n in (20, 33, 7)
    ]
    return pack_documents(docs, 64)


def weights(t: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for m in t.modules for p in m.parameters()]


def test_loss_is_the_mean_over_trained_tokens(world: World, tmp_path: Path) -> None:
    """The first loss of a model of near-zero logits is log V, however many batches there are."""
    t = trainer(world, tmp_path)
    result = t.train_step([batch(0), batch(1)])
    assert result.loss == pytest.approx(math.log(64), abs=0.05)
    assert result.tokens == 120
    assert result.trained_tokens == sum(b.num_trained() for b in (batch(0), batch(1)))
    assert result.flops > 0
    load = result.expert_load
    assert load is not None
    assert load.sum().item() == 120 * 2, "padding was routed"
    bias, mean = result.expert_bias, load.mean()
    assert bias is not None
    # One step from 0: up by the rate where an expert had too little, down where it had too much.
    assert torch.allclose(bias, 1e-3 * (mean - load).sign())


def test_steps_lower_the_loss_and_evaluate_agrees(world: World, tmp_path: Path) -> None:
    t = trainer(world, tmp_path)
    first = t.train_step([batch()]).loss
    for _ in range(8):
        last = t.train_step([batch()]).loss
    assert last < first - 0.5
    before = weights(t)
    loss, tokens = t.evaluate([[batch()]])
    assert loss < last
    assert tokens == batch().num_trained()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(t), strict=True))


def test_fp8_experts_lower_the_loss_alike(world: World, tmp_path: Path) -> None:
    """Eight steps, before the rounding of either has led to another model."""
    losses, heldout = {}, set()
    for experts in ("bf16", "fp8"):
        t = trainer(world, tmp_path, engine=replace(ENGINE, experts=experts))
        heldout.add(t.evaluate([[batch()]]))
        losses[experts] = [t.train_step([batch(step % 3)]).loss for step in range(8)]
    assert losses["bf16"][-1] < losses["bf16"][0] - 0.5
    assert losses["fp8"] != losses["bf16"]
    assert len(heldout) == 1, "held-out losses have no FP8"
    for ours, exact in zip(losses["fp8"], losses["bf16"], strict=True):
        assert ours == pytest.approx(exact, rel=0.01)


def test_nan_stops_before_the_optimizer_and_keeps_the_batch(world: World, tmp_path: Path) -> None:
    t = trainer(world, tmp_path)
    t.train_step([batch()])
    poisoned = t.modules[0].decoder.layers[0].mixer.in_proj.weight
    poisoned.data[0, 0] = math.nan
    before = weights(t)
    with pytest.raises(NonFiniteError, match="rank 0: micro-batch 0"):
        t.train_step([batch()])
    assert t.step_number == 1
    for a, b in zip(before, weights(t), strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    (dumped,) = (tmp_path / "nonfinite").iterdir()
    assert torch.equal(load_file(dumped)["tokens"], batch().tokens)


def test_a_step_without_a_trained_token_stops(world: World, tmp_path: Path) -> None:
    """Auxiliary losses alone must not move the weights."""
    t = trainer(world, tmp_path)
    before = weights(t)
    masked = replace(batch(), token_weight=torch.zeros_like(batch().token_weight))
    with pytest.raises(NothingToTrainError, match=r"step 1: none of its .* tokens trains"):
        t.train_step([masked])
    assert all(torch.equal(a, b) for a, b in zip(before, weights(t), strict=True))


def test_infinite_gradient_stops_too(world: World, tmp_path: Path) -> None:
    t = trainer(world, tmp_path)
    huge = replace(batch(), token_weight=batch().token_weight)
    t.modules[0].output_layer.weight.register_hook(lambda g: g)
    router = t.routers()[0].router.weight
    router.register_hook(lambda g: g * math.inf)
    before = weights(t)
    with pytest.raises(NonFiniteError, match="gradient norm"):
        t.train_step([huge])
    assert all(torch.equal(a, b) for a, b in zip(before, weights(t), strict=True))
    assert not t.routers()[0].router.expert_bias.any()


def test_results_are_read_together_before_anything_changes(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, norm and load by one copy; log-probabilities, for those who measure, by another."""
    t = trainer(world, tmp_path)
    before = [*weights(t), t.routers()[0].router.expert_bias.clone()]
    reads: list[Sequence[torch.Tensor]] = []

    def read(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        now = [*weights(t), t.routers()[0].router.expert_bias]
        assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
        reads.append(tensors)
        return on_host(tensors)

    monkeypatch.setattr(trainer_module, "on_host", read)
    monkeypatch.setattr(evaluation, "on_host", read)
    result = t.train_step([batch()], measure=policy_metrics)
    assert len(reads) == 2
    assert result.metrics["logprob"] == pytest.approx(-result.loss, rel=1e-5)
    assert t.routers()[0].router.expert_bias.any()


def test_reading_keeps_every_bit() -> None:
    tensors = [
        torch.randn(2, 3),
        torch.tensor([math.nan, -math.inf, -0.0, 1e-45]),
        torch.randn((), dtype=torch.float64),
        torch.randn(4, dtype=torch.bfloat16),
        torch.empty(2, 0, 3),
        torch.tensor([2**31 - 1, -5]),
    ]
    for found, expected in zip(on_host(tensors), tensors, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        if expected.is_floating_point():
            assert torch.equal(found.signbit(), expected.signbit())
    assert on_host([]) == [], "stages without a loss"


def test_frozen_router_keeps_its_weights_and_moves_its_bias(world: World, tmp_path: Path) -> None:
    t = trainer(world, tmp_path, freeze_router=True, bias_update_rate=1e-2)
    router = t.routers()[0].router
    weight = router.weight.detach().clone()
    t.train_step([batch()])
    assert torch.equal(router.weight, weight)
    moved = router.expert_bias.abs()
    assert bool(((moved == 0) | torch.isclose(moved, torch.tensor(1e-2))).all())
    assert moved.sum() > 0
    assert router.load.sum() == 0


def test_load_imbalance() -> None:
    even, one = torch.full((2, 4), 5.0), torch.tensor([[20.0, 0, 0, 0], [20.0, 0, 0, 0]])
    half = torch.tensor([[6.0, 6.0, 0.0, 0.0]])
    assert load_imbalance(even) == {
        "moe_max_load": 1.0,
        "moe_max_load_by_layer": [1.0, 1.0],
        "moe_load_entropy": pytest.approx(1.0),
        "moe_idle_experts": 0.0,
    }
    assert load_imbalance(one)["moe_max_load"] == 4.0
    assert load_imbalance(one)["moe_load_entropy"] == pytest.approx(0.0)
    assert load_imbalance(one)["moe_idle_experts"] == 0.75
    assert load_imbalance(half)["moe_load_entropy"] == pytest.approx(0.5)
    mixed = load_imbalance(torch.cat([half, even[:1]]))
    assert mixed["moe_max_load_by_layer"] == [2.0, 1.0]
    assert mixed["moe_max_load"] == 1.5


def test_is_due() -> None:
    assert [s for s in range(10) if is_due(s, 3)] == [2, 5, 8]
    assert not any(is_due(s, 0) for s in range(10))


def test_metrics_hold_each_step_once_after_a_crash(world: World, tmp_path: Path) -> None:
    recipe = SftRecipe(run_dir=str(tmp_path), steps=4, log=LogConfig(trackers=()))

    def writer(first: int) -> MetricsWriter:
        return MetricsWriter(recipe, world, first)

    one = writer(0)
    for step in range(3):
        one.write(step, {"loss": step})
    one.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    two = writer(2)
    two.write(2, {"loss": 9})
    two.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 1, "loss": 0}', '{"step": 2, "loss": 1}', '{"step": 3, "loss": 9}']
