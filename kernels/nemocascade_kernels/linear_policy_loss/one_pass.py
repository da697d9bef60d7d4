"""The single pass, chunk by chunk, from hidden states to the loss and its gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nemocascade_kernels.common.linear_head.gradients import (
    HeadPass,
    Needed,
    by_row,
    checked_sum,
    take_hidden,
)
from nemocascade_kernels.common.linear_head.one_pass import HeadWalk
from nemocascade_kernels.common.linear_head.statistics import Gathering, RowResult, finish
from nemocascade_kernels.common.linear_head.truncation import Truncation, truncate_
from nemocascade_kernels.common.products import multiply
from nemocascade_kernels.linear_policy_loss.objectives import Objective, fused_row


@dataclass(frozen=True, kw_only=True)
class OnePass(HeadPass):
    """Settings of a pass. The kernels have `statistics` and `gradient_`; their `fused_rows` is for
    an objective of `fused_row`."""

    objective: Objective
    entropy: bool
    truncation: Truncation | None


class PassResult(NamedTuple):
    """Gradients include grad_scale; weight_grad is None if it was added to main_grad."""

    loss: Tensor
    logprob: Tensor
    entropy: Tensor | None
    hidden_grad: Tensor | None
    weight_grad: Tensor | None


class _Chunk(NamedTuple):
    slots: slice
    hidden: Tensor
    logits: Tensor
    gathering: Gathering | None  # None if the chunk's rows are complete
    kept: Tensor | None  # [R] bool: targets of the truncated policy; None: it is not truncated


def one_pass(
    target: Tensor, settings: OnePass, hidden: Tensor, weight: Tensor, needed: Needed
) -> PassResult:
    """Compute loss, log-probabilities, and the required gradients, scaled by grad_scale."""
    return _Walk(hidden, weight, target, settings, needed).run()


class _Walk(HeadWalk[OnePass, _Chunk]):
    def __init__(
        self, hidden: Tensor, weight: Tensor, target: Tensor, settings: OnePass, needed: Needed
    ) -> None:
        super().__init__(hidden, weight, settings, needed)
        size, dtype = settings.rows.size, torch.promote_types(hidden.dtype, torch.float32)
        # All are indexed by slot; a slot's row is settings.rows.index[slot].
        everything = slice(0, size)
        self.target = settings.rows.take(target, everything) - settings.first_id
        index = settings.rows.index
        self.objective = settings.objective.at(everything if index is None else index)
        self.loss = torch.zeros(size, dtype=dtype, device=hidden.device)
        self.logprob, self.entropy = torch.zeros_like(self.loss), torch.zeros_like(self.loss)
        self.fused = self.fused and fused_row(settings.objective) is not None

    def run(self) -> PassResult:
        settings = self.settings
        self.walk()
        rows, tokens = settings.rows, self.hidden.shape[0]
        return PassResult(
            checked_sum(self.loss, rows),
            by_row(self.logprob, rows, tokens),
            by_row(self.entropy, rows, tokens) if settings.entropy else None,
            *self.gradients.result(),
        )

    def start(self, slots: slice) -> _Chunk:
        settings = self.settings
        hidden = take_hidden(self.hidden, settings.rows, slots)
        logits = self.buffers.take()[: slots.stop - slots.start]
        multiply(hidden, self.weight.t(), out=logits)
        kept = self.truncate(slots, logits)
        if self.fused:
            self.fused_rows(slots, logits, kept)
            return _Chunk(slots, hidden, logits, None, kept)
        target = self.target[slots]
        found = settings.kernels.statistics(logits, target, settings.scale, settings.entropy)
        return _Chunk(slots, hidden, logits, Gathering(found, settings.group), kept)

    def truncate(self, slots: slice, logits: Tensor) -> Tensor | None:
        """Truncate the distributions of a chunk. Returns [R] bool: the target is kept, or it is
        outside of the vocabulary and makes NaN; None without truncation."""
        settings = self.settings
        if settings.truncation is None:
            return None
        target = self.target[slots]
        kept = truncate_(logits, target, settings.scale, settings.truncation, settings.group)
        if self.depth:
            is_kept = kept.int()
            dist.all_reduce(is_kept, op=dist.ReduceOp.MAX, group=settings.group)
            kept = is_kept.bool()
        ids = target + settings.first_id
        return kept | (ids < 0) | (ids >= settings.vocabulary)

    def finish(self, chunk: _Chunk) -> None:
        settings, slots = self.settings, chunk.slots
        target = self.target[slots]
        if chunk.gathering is not None:
            ids = target + settings.first_id
            valid = (ids >= 0) & (ids < settings.vocabulary)
            result = finish(chunk.gathering.wait(), valid, settings.entropy)
            slope = self.apply_objective(slots, result, chunk.kept)
            if self.needs_grad:
                settings.kernels.gradient_(chunk.logits, target, settings.scale, result.lse, slope)
        if self.needs_grad:
            self.gradients.add(slots, chunk.logits, chunk.hidden)

    def fused_rows(self, slots: slice, logits: Tensor, kept: Tensor | None) -> None:
        """Compute statistics, objective and gradient of a chunk at once."""
        settings = self.settings
        filled = settings.rows.filled
        if filled is None:
            filled = torch.full((), settings.rows.size, device=logits.device)
        objective = self.objective.at(slots)
        weight = objective.token_weight
        if kept is not None:
            weight = torch.where(kept, weight, 0.0)
        found = settings.kernels.fused_rows(
            logits,
            self.target[slots],
            settings.scale,
            weight,
            fused_row(objective),
            settings.grad_scale,
            filled,
            slots.start,
            settings.entropy,
            self.needs_grad,
        )
        self.loss[slots], self.logprob[slots], self.entropy[slots] = found.unbind()
        if kept is not None:
            self.mark_outside(slots, kept)

    def apply_objective(self, slots: slice, result: RowResult, kept: Tensor | None) -> Tensor:
        """Record loss and log-probability of a chunk; return `grad_scale * df / dlogprob`, [R]."""
        settings = self.settings
        objective = self.objective.at(slots)
        given = result.logprob
        if kept is not None:
            given = torch.where(kept, given, 0.0)
        with torch.enable_grad():
            logprob = given.detach().requires_grad_()
            loss = objective.token_loss(logprob)
            (slope,) = torch.autograd.grad(loss.sum(), logprob)
        recorded = [loss.detach(), given, slope * settings.grad_scale]
        if kept is not None:
            recorded = [torch.where(kept, values, 0.0) for values in recorded]
        if result.entropy is not None:
            recorded.append(result.entropy)
        active = settings.rows.active(slots)
        if active is not None:
            recorded = [torch.where(active, values, 0.0) for values in recorded]
        self.loss[slots], self.logprob[slots] = recorded[0], recorded[1]
        if result.entropy is not None:
            self.entropy[slots] = recorded[3]
        if kept is not None:
            self.mark_outside(slots, kept)
        return recorded[2]

    def mark_outside(self, slots: slice, kept: Tensor) -> None:
        """Set the log-probability of targets that are not kept to -inf, in slots that count."""
        active = self.settings.rows.active(slots)
        outside = ~kept if active is None else active & ~kept
        self.logprob[slots].masked_fill_(outside, -torch.inf)
