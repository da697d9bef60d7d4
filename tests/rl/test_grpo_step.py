"""A GRPO step against a plain autograd implementation of Eq. 1, sequence by sequence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.packed import check_batch
from helpers.policy import (
    CAPACITY,
    ENGINE,
    TEMPERATURE,
    VOCABULARY,
    filled,
    gradients,
    plain_logprobs,
    rollout,
    sequence_of,
    sft_batch,
    small_trainer,
)
from nemocascade_kernels import Truncation
from torch import Tensor

from nemocascade.megatron.world import start_world
from nemocascade.recipe import (
    GrpoConfig,
    GrpoRecipe,
    ParallelConfig,
    RolloutConfig,
)
from nemocascade.rl.batches import TrainingSequence, lay_out, pack_sequences
from nemocascade.rl.collector import Group, advantages_of
from nemocascade.rl.policy import training_sequences
from nemocascade.rl.tasks import Task
from nemocascade.rollout.engine import Request, Sampling
from nemocascade.rollout.live import LiveEngine
from nemocascade.runtime.world import World
from nemocascade.train.evaluation import policy_metrics, token_logprobs
from nemocascade.train.objectives import grpo_objective, truncation_of
from nemocascade.train.trainer import Trainer
from nemocascade.train.weight_swap import WeightSwap
from nemocascade.types import PackedBatch, Prompt

KL = 0.3


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = start_world(ParallelConfig(), ENGINE)
    yield world
    world.close()


@pytest.fixture
def trainer(world: World, tmp_path: Path) -> Trainer:
    return small_trainer(world, tmp_path)


def groups() -> list[Group]:
    generator = torch.Generator().manual_seed(4)
    rewards: list[list[float | None]] = [[1.0, 0.0, 0.5], [0.0, 1.0, None]]
    tasks = [Task(Prompt(str(i), "d", (), {}), np.ones(1, np.int32), i) for i in range(2)]
    return [
        Group(
            task,
            tuple(rollout(generator, r, truncated=i == 0) for i, r in enumerate(row)),
        )
        for task, row in zip(tasks, rewards, strict=True)
    ]


def recipe(**grpo: object) -> GrpoRecipe:
    return GrpoRecipe(
        rollout=RolloutConfig(temperature=TEMPERATURE),
        grpo=GrpoConfig(capacity=CAPACITY, kl_coef=KL, **grpo),  # type: ignore[arg-type]
    )


def plain_loss(
    trainer: Trainer, swap: WeightSwap, found: list[Group], settings: GrpoConfig
) -> Tensor:
    """Eq. 1 with the KL's penalty: a loop over groups, rollouts and tokens."""
    terms: list[tuple[int, Tensor]] = []
    with torch.no_grad(), swap.using("start"):
        references = {
            id(r): plain_logprobs(trainer, sequence_of(r).tokens)
            for group in found
            for r in group.rollouts
        }
    for number, group in enumerate(found):
        valid = [r for r in group.rollouts if r.verdict.reward is not None]
        rewards = torch.tensor([r.verdict.reward for r in valid], dtype=torch.float64)
        advantage = (rewards - rewards.mean()) / (rewards.std() + settings.std_epsilon)
        for r, a in zip(valid, advantage.tolist(), strict=True):
            logprob = plain_logprobs(trainer, sequence_of(r).tokens)
            gap = references[id(r)] - logprob
            # The gradient of the weight makes that of the penalty -gap.
            weight = (logprob - logprob.detach()).exp()
            token = a * logprob - settings.kl_coef * weight * (gap.exp() - gap - 1)
            terms.append((number, token[sequence_of(r).written[1:]]))
    if settings.normalize == "batch":
        return -torch.cat([t for _, t in terms]).mean()
    if settings.normalize == "sequence":
        return -torch.stack([t.mean() for _, t in terms]).mean()
    by_group = [torch.cat([t for n, t in terms if n == number]) for number in range(len(found))]
    return -torch.stack([t.mean() for t in by_group]).mean()


@pytest.mark.parametrize("normalize", ["batch", "group", "sequence"])
def test_loss_and_gradients_are_those_of_the_paper(trainer: Trainer, normalize: str) -> None:
    settings = recipe(normalize=normalize)
    swap = WeightSwap(trainer.world, trainer.chunks)
    swap.keep("start")
    trainer.train_step([sft_batch()])
    found = groups()

    for chunk in trainer.chunks:
        chunk.zero_grad_buffer()
    expected = plain_loss(trainer, swap, found, settings.grpo)
    expected.backward()
    wanted = gradients(trainer)

    result = trainer.train_step(
        batches(trainer, swap, found, settings),
        grpo_objective(settings.grpo),
        temperature=TEMPERATURE,
        measure=policy_metrics,
    )
    # Terms of about 4 of both signs nearly cancel.
    assert result.loss == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    norm = torch.sqrt(sum(g.double().square().sum() for g in wanted)).item()  # type: ignore[arg-type]
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    for mine, plain in zip(gradients(trainer), wanted, strict=True):
        assert (mine - plain).norm() <= 1e-5 * norm
    assert result.metrics["kl"] > 0
    assert result.metrics["entropy"] > 0


def batches(
    trainer: Trainer, swap: WeightSwap, found: list[Group], settings: GrpoRecipe
) -> list[PackedBatch]:
    scored = advantages_of(found, settings.rollout, settings.grpo)
    sequences = filled(training_sequences(scored, settings))
    layout = lay_out([s.tokens.numel() for s in sequences], CAPACITY, ranks=1)[0]
    assert len(layout) > 1, "the case should need several micro-batches"
    packed = [pack_sequences([sequences[i] for i in chosen], CAPACITY, 0) for chosen in layout]
    with swap.using("start"):
        reference = token_logprobs(
            trainer.world, trainer.config, trainer.chunks, packed, temperature=TEMPERATURE
        )
    return [replace(b, ref_logprob=r) for b, r in zip(packed, reference, strict=True)]


def test_what_does_not_train_is_excluded() -> None:
    """Answers without a verdict; truncated ones under the filter, which still count in the mean."""
    settings = replace(recipe(), rollout=RolloutConfig(overlong_filter=True))
    kept = training_sequences(advantages_of(groups(), settings.rollout, settings.grpo), settings)
    assert len(kept) == 6 - 1 - 2
    rewards = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    expected = (rewards - rewards.mean()) / rewards.std()
    assert [s.advantage for s in kept[:2]] == pytest.approx(expected[1:].tolist(), rel=1e-4)


def test_training_has_the_truncated_distribution_of_the_rollouts(
    world: World, trainer: Trainer
) -> None:
    """Their log-probabilities agree, and no sampled token is outside of what training keeps."""
    settings = RolloutConfig(temperature=TEMPERATURE, top_p=0.7, top_k=30)
    size = VOCABULARY - 6
    engine = LiveEngine(world, trainer.modules, slots=4, vocabulary=size)
    sampling = Sampling(
        TEMPERATURE, settings.top_k, settings.top_p, truncated_logprobs=True, max_tokens=20
    )
    sequences = [
        TrainingSequence(c.tokens, c.written, c.logprob, weight=1.0, advantage=(-1.0) ** n)
        for n, c in enumerate(engine.run([Request(i, (1, 2, 3 + i)) for i in range(6)], sampling))
    ]
    packed = [pack_sequences(sequences[n : n + 3], CAPACITY, 0) for n in (0, 3)]

    def mismatch(truncation: Truncation | None) -> dict[str, float]:
        result = trainer.train_step(
            packed,
            grpo_objective(GrpoConfig()),
            temperature=TEMPERATURE,
            truncation=truncation,
            measure=policy_metrics,
        )
        return result.metrics

    found = mismatch(truncation_of(settings, size))
    assert found["mismatch_max"] < 1e-4
    assert found["outside"] == 0
    # The step has moved the policy, and whole distributions are others anyway.
    whole = mismatch(truncation_of(replace(settings, truncated_logprobs=False), size))
    assert whole["mismatch_mean"] > 0.1
    assert "outside" not in whole


def test_a_token_that_training_does_not_keep_is_counted(trainer: Trainer) -> None:
    """Random tokens are rarely the most probable: they do not train, and spoil no metric."""
    sequences = filled(
        training_sequences(advantages_of(groups(), recipe().rollout, recipe().grpo), recipe())
    )
    result = trainer.train_step(
        [pack_sequences([s], CAPACITY, 0) for s in sequences],
        grpo_objective(GrpoConfig()),
        truncation=Truncation(top_k=8),
        measure=policy_metrics,
    )
    assert 0.5 < result.metrics["outside"] < 1
    assert all(math.isfinite(value) for value in result.metrics.values())
    assert math.isfinite(result.loss)


def test_rows_carry_the_constants_of_the_token_they_predict() -> None:
    settings = recipe()
    (s, *_) = filled(
        training_sequences(advantages_of(groups(), settings.rollout, settings.grpo), settings)
    )
    s = replace(s, logprob=torch.arange(len(s.tokens)).float())
    batch = pack_sequences([s], CAPACITY, 0)
    check_batch(batch)
    rows = torch.nonzero(batch.token_weight)[:, 0]
    assert rows.tolist() == (torch.nonzero(s.written)[:, 0] - 1).tolist()
    assert batch.rollout_logprob is not None
    assert batch.rollout_logprob[rows].tolist() == (rows + 1).tolist()
    assert batch.advantage is not None
    assert batch.advantage[rows].tolist() == pytest.approx([s.advantage] * len(rows))
    assert batch.targets[rows].tolist() == s.tokens[rows + 1].tolist()


@pytest.mark.parametrize(("ranks", "multiple"), [(1, 1), (2, 1), (3, 2), (8, 1)])
def test_every_sequence_stands_in_one_micro_batch(ranks: int, multiple: int) -> None:
    settings = recipe()
    sequences = training_sequences(
        advantages_of(groups(), settings.rollout, settings.grpo), settings
    )
    lengths = [s.rollout.tokens for s in sequences]
    layout = lay_out(lengths, CAPACITY, ranks=ranks, multiple=multiple)
    assert len(layout) == ranks
    assert len({len(mine) for mine in layout}) == 1
    assert len(layout[0]) % multiple == 0
    placed = sorted(i for mine in layout for chosen in mine for i in chosen)
    assert placed == list(range(len(sequences)))
