"""Weight swap: other weights run in the model, and its own are restored bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nemocascade.megatron.config import Accelerators
from nemocascade.megatron.world import start_world
from nemocascade.recipe import (
    EngineConfig,
    MoeTrainingConfig,
    OptimizerConfig,
    ParallelConfig,
    tiny,
)
from nemocascade.runtime.world import World
from nemocascade.train.trainer import Trainer
from nemocascade.train.weight_swap import SwapError, WeightSwap, live_tensors
from nemocascade.types import Document, PackedBatch, pack_documents

ENGINE = EngineConfig(precision="fp32")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = start_world(ParallelConfig(), ENGINE)
    yield world
    world.close()


@pytest.fixture
def trainer(world: World, tmp_path: Path) -> Trainer:
    return Trainer(
        world,
        replace(tiny(), pattern="M*E", vocab_size=64, hidden_size=64),
        engine=ENGINE,
        moe=MoeTrainingConfig(),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=0, schedule="constant"),
        accelerators=Accelerators(),
        seed=1,
        run_dir=tmp_path,
    )


def batch(seed: int) -> PackedBatch:
    tokens = torch.randint(64, (48,), generator=torch.Generator().manual_seed(seed))
    return pack_documents([Document(tokens.int(), torch.arange(48) > 5, "x")], 64)


def bits(trainer: Trainer) -> list[Tensor]:
    return [t.detach().clone() for t in live_tensors(trainer.chunks)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def loss(trainer: Trainer) -> float:
    return trainer.evaluate([[batch(9)]])[0]


def test_every_weight_is_swapped_and_comes_back(trainer: Trainer) -> None:
    """Training continues as if nothing had happened, expert biases included."""
    swap = WeightSwap(trainer.world, trainer.chunks)
    swap.keep("start")
    start, before = bits(trainer), loss(trainer)
    trainer.train_step([batch(1)])
    own, after = bits(trainer), loss(trainer)
    assert not any(
        torch.equal(a, b) for a, b in zip(start, own, strict=True) if a.dim() > 1 and a.numel() > 64
    )
    for _ in range(3):
        with swap.using("start"):
            assert swap.current == "start"
            assert same(bits(trainer), start)
            assert loss(trainer) == before
        assert same(bits(trainer), own)
        assert loss(trainer) == after
    size = swap.num_bytes
    with swap.using("start"):
        pass
    assert swap.num_bytes == size, "memory must not grow with the number of swaps"


def test_an_undisturbed_step_follows(trainer: Trainer, world: World, tmp_path: Path) -> None:
    swap = WeightSwap(world, trainer.chunks)
    swap.keep("start")
    trainer.train_step([batch(1)])
    with swap.using("start"):
        loss(trainer)
    trainer.train_step([batch(2)])
    swapped = bits(trainer)
    with swap.using("start"):
        start = bits(trainer)
    other = Trainer(
        world,
        trainer.config.shape,
        engine=ENGINE,
        moe=MoeTrainingConfig(),
        optimizer=trainer.optimizer.settings,
        accelerators=Accelerators(),
        seed=1,
        run_dir=tmp_path,
    )
    assert same(bits(other), start)
    other.train_step([batch(1)])
    other.train_step([batch(2)])
    assert same(bits(other), swapped)


def test_an_exception_inside_restores_too(trainer: Trainer) -> None:
    swap = WeightSwap(trainer.world, trainer.chunks)
    swap.keep("start")
    trainer.train_step([batch(1)])
    own = bits(trainer)
    with pytest.raises(RuntimeError, match="inside"), swap.using("start"):
        raise RuntimeError("inside")
    assert same(bits(trainer), own)


def test_swaps_do_not_nest(trainer: Trainer) -> None:
    swap = WeightSwap(trainer.world, trainer.chunks)
    swap.keep("a")
    with swap.using("a"):
        with pytest.raises(SwapError, match="'a' is in place"), swap.using("a"):
            pass
        with pytest.raises(SwapError, match="keep"):
            swap.keep("b")
    swap.drop("a")
    assert swap.names == []
    with pytest.raises(KeyError), swap.using("a"):
        pass
