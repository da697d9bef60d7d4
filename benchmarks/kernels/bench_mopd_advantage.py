"""Benchmark of mopd_advantage and its metrics against the small operators that it replaces."""

from __future__ import annotations

from collections.abc import Callable

import torch
from nemocascade_kernels import mopd_advantage_metrics
from torch import Tensor

from benchmarks.measure import Case, Goal, Row


def cases(suite: str, device: torch.device, tiny: bool) -> list[Case]:
    """262,144 tokens, a third of them not trained: one call, and its device time alone."""
    tokens = 1024 if tiny else 262_144
    settings = {"T": tokens, "dtype": "float32"}
    goal = Goal("beside the chain", "ours", 0.1, "chain of masked means with .item()")
    found = [
        Case(
            "one call",
            settings,
            [
                Row("ours", "ours", lambda: fused(tokens, device), bytes=24.0 * tokens),
                Row("torch, no .item()", "peer", lambda: fused(tokens, device, "reference")),
                Row(goal.baseline or "", "peer", lambda: chain(tokens, device)),
            ],
            [goal] if suite == "gpu" else [],
        )
    ]
    if suite == "gpu":
        found.append(
            Case(
                "device time",
                settings,
                [
                    Row("ours", "ours", lambda: fused(tokens, device), bytes=24.0 * tokens),
                    Row("copy of as many bytes", "floor", lambda: copy(tokens, device)),
                ],
                [Goal("microseconds at 262,144 tokens", "ours", 6e-6)],
                calls=20,
            )
        )
    return found


def inputs(tokens: int, device: torch.device) -> tuple[Tensor, ...]:
    """Teacher, training and rollout log-probabilities, and token weights."""
    generator = torch.Generator().manual_seed(1)
    teacher, train, noise = torch.randn(3, tokens, generator=generator) * 0.5
    weight = (torch.rand(tokens, generator=generator) > 1 / 3).float() / tokens
    return tuple(x.to(device) for x in (teacher - 3, train - 3, train - 3 + noise, weight))


def fused(tokens: int, device: torch.device, backend: str | None = None) -> Callable[[], Tensor]:
    tensors = inputs(tokens, device)
    return lambda: mopd_advantage_metrics(*tensors, backend=backend)[2]["loss"]


def copy(tokens: int, device: torch.device) -> Callable[[], None]:
    source = torch.randn(3 * tokens, device=device)
    target = torch.empty_like(source)
    return lambda: (target.copy_(source), None)[1]


def masked_mean(values: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    return (values * mask).sum() / (count + 1e-8)


def chain(tokens: int, device: torch.device) -> Callable[[], Tensor]:
    """The same loss written as in a training loop, with the metrics of NeMo-RL's loss: 21 masked
    means, 19 of them read back by the host.
    """
    teacher, train, rollout, weight = inputs(tokens, device)

    def call() -> Tensor:
        mask = (weight != 0).float()
        count = mask.sum()
        advantage = teacher - train
        ratio = (train - rollout).exp()
        importance = torch.where((ratio >= 0.5) & (ratio <= 2.0), ratio, 0.0)
        loss = (-weight * importance * advantage * train).sum()
        difference = train - rollout
        logged = (
            train, teacher, rollout, advantage, advantage.abs(), advantage.square(),
            ratio, ratio.square(), importance, importance.square(), difference, difference.abs(),
            difference.exp() - difference - 1, (ratio < 0.5).float(), (ratio > 2.0).float(),
            (importance > 0).float(), (advantage > 0).float(), importance * advantage, -train,
        )  # fmt: skip
        for values in logged:
            masked_mean(values, mask, count).item()
        masked_mean(train.square(), mask, count)
        masked_mean(teacher.square(), mask, count)
        return loss

    return call
