"""The single pass, chunk by chunk, from hidden states of both models to the loss and gradients."""

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
from nemocascade_kernels.common.linear_head.statistics import Shards
from nemocascade_kernels.common.products import multiply
from nemocascade_kernels.linear_distill_loss.reference import Divergence
from nemocascade_kernels.linear_distill_loss.statistics import (
    PairResult,
    PairStatistics,
    finish,
    merged,
)


class TeacherHead(NamedTuple):
    """hidden: [T, G], or [R, G] of the rows that train; weight: [V, G]."""

    hidden: Tensor
    weight: Tensor


@dataclass(frozen=True, kw_only=True)
class OnePass(HeadPass):
    """Settings of a pass. The kernels are those of torch.py. token_weight, target: by slot."""

    divergence: Divergence
    token_weight: Tensor
    target: Tensor | None


class PassResult(NamedTuple):
    """Gradients include grad_scale; weight_grad is None if it was added to main_grad."""

    loss: Tensor
    divergence: Tensor
    logprob: Tensor | None
    hidden_grad: Tensor | None
    weight_grad: Tensor | None


class _Chunk(NamedTuple):
    slots: slice
    hidden: Tensor
    logits: Tensor
    teacher: Tensor
    shards: Shards | None  # None if the chunk's rows are complete


def one_pass(
    teacher: TeacherHead, settings: OnePass, hidden: Tensor, weight: Tensor, needed: Needed
) -> PassResult:
    """Compute loss, divergences, and the required gradients, scaled by grad_scale."""
    return _Walk(hidden, weight, teacher, settings, needed).run()


class _Walk(HeadWalk[OnePass, _Chunk]):
    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        teacher: TeacherHead,
        settings: OnePass,
        needed: Needed,
    ) -> None:
        super().__init__(hidden, weight, settings, needed, heads=2)
        self.teacher = teacher
        size, dtype = settings.rows.size, torch.promote_types(hidden.dtype, torch.float32)
        self.slope = settings.token_weight.to(dtype) * settings.grad_scale
        # All are indexed by slot; a slot's row is settings.rows.index[slot].
        self.divergence = torch.zeros(size, dtype=dtype, device=hidden.device)
        self.logprob = torch.zeros_like(self.divergence)

    def run(self) -> PassResult:
        self.walk()
        rows, tokens = self.settings.rows, self.hidden.shape[0]
        loss = self.settings.token_weight.to(self.divergence.dtype) * self.divergence
        return PassResult(
            checked_sum(loss, rows),
            by_row(self.divergence, rows, tokens),
            None if self.settings.target is None else by_row(self.logprob, rows, tokens),
            *self.gradients.result(),
        )

    def start(self, slots: slice) -> _Chunk:
        settings, count = self.settings, slots.stop - slots.start
        hidden = take_hidden(self.hidden, settings.rows, slots)
        logits, teacher = self.buffers.take()[:count], self.buffers.take()[:count]
        multiply(hidden, self.weight.t(), out=logits)
        multiply(self.take_teacher(slots), self.teacher.weight.t(), out=teacher)
        if self.fused:
            self.fused_rows(slots, logits, teacher)
            return _Chunk(slots, hidden, logits, teacher, None)
        found = settings.kernels.statistics(logits, teacher, settings.scale, settings.divergence)
        values = [*found]
        if settings.target is not None:
            values.append(self.target_logit(slots, logits, found.maximum.dtype))
        return _Chunk(slots, hidden, logits, teacher, Shards(values, settings.group))

    def take_teacher(self, slots: slice) -> Tensor:
        """The teacher's hidden states of a chunk's slots."""
        given = self.teacher.hidden
        compact = given.shape[0] != self.hidden.shape[0]
        return given[slots] if compact else self.settings.rows.take(given, slots)

    def fused_rows(self, slots: slice, logits: Tensor, teacher: Tensor) -> None:
        """Compute divergence and gradient of a chunk at once."""
        settings = self.settings
        if settings.target is not None:
            self.logprob[slots] = self.target_logit(slots, logits, self.logprob.dtype)
        self.divergence[slots], lse, _ = settings.kernels.fused_rows(
            logits,
            teacher,
            settings.scale,
            self.slope[slots],
            settings.divergence,
            self.needs_grad,
        ).unbind()
        if settings.target is not None:
            self.record_logprob(slots, self.logprob[slots], lse)

    def finish(self, chunk: _Chunk) -> None:
        if chunk.shards is not None:
            self.combine(chunk, chunk.shards.wait())
        if self.needs_grad:
            self.gradients.add(chunk.slots, chunk.logits, chunk.hidden)

    def combine(self, chunk: _Chunk, shards: Tensor) -> None:
        """Divergence and gradient of a chunk from the statistics of all shards."""
        settings, slots = self.settings, chunk.slots
        pair = len(PairStatistics._fields)
        result = finish(merged(shards[:, :pair], settings.divergence), settings.divergence)
        if settings.divergence == "jensen_shannon":
            result = self.mixed(chunk, result)
        active = settings.rows.active(slots)
        found = result.divergence
        self.divergence[slots] = found if active is None else torch.where(active, found, 0.0)
        if settings.target is not None:
            self.record_logprob(slots, shards[:, pair].amax(0), result.lse)
        if self.needs_grad:
            settings.kernels.gradient_(
                chunk.logits,
                chunk.teacher,
                settings.scale,
                result,
                self.slope[slots],
                settings.divergence,
            )

    def mixed(self, chunk: _Chunk, result: PairResult) -> PairResult:
        """The divergence from the mixture, whose sums need both distributions' normalisers."""
        settings = self.settings
        parts = settings.kernels.mixture_parts(
            chunk.logits, chunk.teacher, settings.scale, result.lse, result.teacher_lse
        )
        if self.depth:
            dist.all_reduce(parts, group=settings.group)
        return result._replace(divergence=0.5 * (parts[0] + parts[1]), inner=parts[0])

    def target_logit(self, slots: slice, logits: Tensor, dtype: torch.dtype) -> Tensor:
        """The target's scaled logit of each row, [R]; -inf if it is in another shard."""
        assert self.settings.target is not None
        local = self.settings.target[slots] - self.settings.first_id
        inside = (local >= 0) & (local < logits.shape[1])
        found = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        return torch.where(inside, found.to(dtype) * self.settings.scale, -torch.inf)

    def record_logprob(self, slots: slice, logit: Tensor, lse: Tensor) -> None:
        """Record the targets' log-probabilities: NaN outside of the vocabulary."""
        settings = self.settings
        assert settings.target is not None
        ids = settings.target[slots]
        valid = (ids >= 0) & (ids < settings.vocabulary)
        found = torch.where(valid, logit - lse, torch.nan)
        active = settings.rows.active(slots)
        self.logprob[slots] = found if active is None else torch.where(active, found, 0.0)
