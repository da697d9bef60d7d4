"""A small trainer, random rollouts and plain log-probabilities, shared by policy-step tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from nemocascade.megatron.config import Accelerators
from nemocascade.megatron.microbatch import Microbatch
from nemocascade.recipe import EngineConfig, MoeTrainingConfig, OptimizerConfig, tiny
from nemocascade.rl.batches import PlannedSequence, TrainingSequence
from nemocascade.rl.rollouts import Rollout, TokenSequence, whole_rollout
from nemocascade.runtime.world import World
from nemocascade.train.trainer import Trainer
from nemocascade.types import Document, PackedBatch, Verdict, pack_documents

ENGINE = EngineConfig(precision="fp32")
VOCABULARY, CAPACITY, TEMPERATURE = 64, 96, 0.8


def small_trainer(world: World, run_dir: Path) -> Trainer:
    """A policy with one layer of each kind; its gradients are not clipped."""
    return Trainer(
        world,
        replace(tiny(), pattern="M*E", vocab_size=VOCABULARY, hidden_size=64),
        engine=ENGINE,
        moe=MoeTrainingConfig(load_balance="none"),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=0, schedule="constant", clip_grad=0.0),
        accelerators=Accelerators(),
        seed=1,
        run_dir=run_dir,
    )


def rollout(
    generator: torch.Generator, reward: float | None, *, truncated: bool = False
) -> Rollout:
    """A prompt of 5 tokens, an answer, a stretch of the environment's, and a second answer."""
    length = int(torch.randint(12, 40, (), generator=generator))
    written = torch.arange(length) >= 5
    written[8:10] = False
    tokens = torch.randint(VOCABULARY, (length,), generator=generator)
    return whole_rollout(
        TokenSequence(tokens, written, torch.zeros(length)),
        Verdict(reward) if reward is not None else Verdict(None, "killed"),
        domain="d",
        text="",
        turns=2,
        truncated=truncated,
    )


def sequence_of(rollout: Rollout) -> TokenSequence:
    """The tokens of a rollout of this process."""
    assert rollout.sequence is not None
    return rollout.sequence


def filled(planned: Sequence[PlannedSequence]) -> list[TrainingSequence]:
    """Training sequences of rollouts of this process."""
    return [p.filled(sequence_of(p.rollout)) for p in planned]


def gradients(trainer: Trainer) -> list[Tensor]:
    return [p.main_grad.clone() for m in trainer.modules for p in m.parameters()]


def plain_logprobs(trainer: Trainer, tokens: Tensor) -> Tensor:
    """log pi of each token after the first, [n - 1]; by way of full logits."""
    return plain_distributions(trainer, tokens).gather(1, tokens[1:, None])[:, 0]


def plain_distributions(trainer: Trainer, tokens: Tensor) -> Tensor:
    """log pi of every token of the vocabulary after each token but the last, [n - 1, V]."""
    model = trainer.modules[0]
    document = Document(tokens.int(), torch.ones(len(tokens), dtype=torch.bool), "x")
    packed = Microbatch.from_batch(pack_documents([document], len(tokens)), torch.device("cpu"))
    hidden = model(packed)[:, 0]
    logits = (hidden @ model.lm_head().t())[:-1] / TEMPERATURE
    return torch.log_softmax(logits, -1)


def sft_batch() -> PackedBatch:
    tokens = torch.randint(VOCABULARY, (60,), generator=torch.Generator().manual_seed(9))
    return pack_documents([Document(tokens.int(), torch.arange(60) > 3, "x")], CAPACITY)
