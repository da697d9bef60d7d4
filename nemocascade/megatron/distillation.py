"""Objectives on a model's last hidden states: distillation from teachers' heads, and their states.

Shape letters: R rows of a packed batch, N of them that train, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nemocascade_kernels import (
    DistillLoss,
    Divergence,
    linear_distill_loss,
)
from torch import Tensor

from nemocascade.types import TeacherStates


@dataclass(frozen=True)
class Distillation:
    """Divergence of the student from its teachers over the whole vocabulary, summed with weights.

    token_weight: [R] float32. teachers: a row with a weight belongs to one of them. divergence: see
    `nemocascade_kernels.linear_distill_loss`.
    """

    token_weight: Tensor
    divergence: Divergence
    teachers: Sequence[TeacherStates]

    def loss(self, hidden: Tensor, head: Tensor, targets: Tensor, **settings: Any) -> DistillLoss:
        """The loss of hidden [R, H] and this rank's head [V/tp, H]. targets: [R] int64.

        settings: `temperature`, `tp_group`, `reduce_hidden_grad` and `accumulate_main_grad` of the
        op.
        """
        losses = []
        divergence, logprob = torch.zeros(2, hidden.shape[0], device=hidden.device)
        for teacher in self.teachers:
            rows = _on_device(teacher.rows, hidden.device)
            # The rows of one teacher: their gradients are as many rows, not those of the pack.
            out = linear_distill_loss(
                hidden.index_select(0, rows),
                head,
                _on_device(teacher.hidden, hidden.device),
                teacher.head,
                self.token_weight[rows],
                divergence=self.divergence,
                target=targets[rows],
                active_rows=rows.numel(),
                **settings,
            )
            assert out.logprob is not None
            losses.append(out.loss)
            divergence.index_copy_(0, rows, out.divergence)
            logprob.index_copy_(0, rows, out.logprob)
        count = sum(teacher.rows.numel() for teacher in self.teachers)
        means = {
            name: values.sum() / max(1, count)
            for name, values in (("divergence", divergence), ("logprob", logprob))
        }
        tokens = divergence.new_full((), float(count))
        if not losses:
            # Without a row both still get their gradient, which is 0.
            losses = [hidden[:0].float().sum(), head[:0].float().sum()]
        return DistillLoss(
            torch.stack(losses).sum(), divergence, logprob, {"tokens": tokens, **means}
        )


@dataclass(frozen=True)
class KeptStates:
    """The output of `StatesOf`. loss: 0. hidden: [N, H] on the host."""

    loss: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class StatesOf:
    """Keeps a pass's last hidden states of `rows`, [N] int64 on the host."""

    rows: Tensor

    def kept(self, hidden: Tensor) -> KeptStates:
        """Copy the rows of hidden [R, H] to the host, without waiting for a GPU's copy."""
        found = hidden.detach().index_select(0, _on_device(self.rows, hidden.device))
        host = torch.empty(found.shape, dtype=found.dtype, pin_memory=found.is_cuda)
        host.copy_(found, non_blocking=True)
        return KeptStates(hidden.new_zeros(()), host)


def _on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a host tensor on the device; the host does not wait for a GPU's."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
