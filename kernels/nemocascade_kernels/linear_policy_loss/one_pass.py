"""The single pass, chunk by chunk, from hidden states to the loss and its gradients."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nemocascade_kernels.common.linear_head.chunks import (
    Rows,
    WeightGradient,
    chunks,
    in_flight,
    logits_buffer,
    look_ahead,
    sum_over_shards,
)
from nemocascade_kernels.common.linear_head.statistics import Gathering, RowResult, finish
from nemocascade_kernels.common.linear_head.truncation import Truncation, truncate_
from nemocascade_kernels.linear_policy_loss.objectives import Objective, fused_row


class OnePass(NamedTuple):
    """Settings of a pass; see `linear_policy_loss` for those not described here.

    kernels: the module of row kernels, with `statistics` and `gradient_`. Its `fused_rows`, if any,
        computes both at once for an objective of `fused_row` without a collective in between.
    rows: the slots to compute. scale: 1 / temperature.
    first_id: first id of this rank's shard. vocabulary: size of the full vocabulary.
    """

    kernels: ModuleType
    objective: Objective
    rows: Rows
    scale: float
    entropy: bool
    group: dist.ProcessGroup | None
    first_id: int
    vocabulary: int
    reduce_hidden_grad: bool
    main_grad: Tensor | None
    grad_scale: float
    truncation: Truncation | None


class PassResult(NamedTuple):
    """Gradients include grad_scale; weight_grad is None if it was added to main_grad."""

    loss: Tensor
    logprob: Tensor
    entropy: Tensor | None
    hidden_grad: Tensor | None
    weight_grad: Tensor | None


class _Chunk(NamedTuple):
    piece: slice
    hidden: Tensor
    logits: Tensor
    gathering: Gathering | None  # None if the chunk's rows are complete
    kept: Tensor | None  # [R] bool: targets of the truncated policy; None: it is not truncated


class _HiddenGradient(NamedTuple):
    """Gradient in a chunk's hidden states, and its pending all-reduce over the ranks."""

    piece: slice
    product: Tensor
    work: dist.Work | None


def one_pass(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    settings: OnePass,
    hidden_needs_grad: bool,
    weight_needs_grad: bool,
) -> PassResult:
    """Compute loss, log-probabilities, and the required gradients, scaled by grad_scale."""
    # The caller chooses the dtypes; autocast would change only those of some products.
    with torch.autocast(hidden.device.type, enabled=False):
        walk = _Walk(hidden, weight, target, settings, hidden_needs_grad, weight_needs_grad)
        return walk.run()


class _Walk:
    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        settings: OnePass,
        hidden_needs_grad: bool,
        weight_needs_grad: bool,
    ) -> None:
        self.hidden, self.weight, self.settings = hidden, weight, settings
        size, dtype = settings.rows.size, torch.promote_types(hidden.dtype, torch.float32)
        # All are indexed by slot; a slot's row is settings.rows.index[slot].
        everything = slice(0, size)
        self.target = settings.rows.take(target, everything) - settings.first_id
        index = settings.rows.index
        self.objective = settings.objective.at(everything if index is None else index)
        self.loss = torch.zeros(size, dtype=dtype, device=hidden.device)
        self.logprob, self.entropy = torch.zeros_like(self.loss), torch.zeros_like(self.loss)
        self.hidden_grad = torch.zeros_like(hidden) if hidden_needs_grad else None
        self.weight_grad = None
        if weight_needs_grad:
            self.weight_grad = WeightGradient(weight, settings.kernels, into=settings.main_grad)
        self.depth = look_ahead(settings.group)
        self.needs_grad = hidden_needs_grad or weight_needs_grad
        self.pieces = chunks(size, weight, buffers=self.depth + 1)
        longest = max((piece.stop - piece.start for piece in self.pieces), default=0)
        self.buffers = [logits_buffer(longest, weight) for _ in range(self.depth + 1)]
        self.turn = 0
        has_twin = hasattr(settings.kernels, "fused_rows") and fused_row(settings.objective)
        self.fused = not self.depth and bool(has_twin)
        self.unscattered: _HiddenGradient | None = None

    def run(self) -> PassResult:
        settings = self.settings
        in_flight(self.pieces, self.start, self.finish, self.depth)
        self.scatter()
        loss = self.loss.sum()
        if settings.rows.filled is not None:
            # More rows than slots: the bound was too low, so the loss is made NaN.
            loss = torch.where(settings.rows.filled > settings.rows.size, torch.nan, loss)
        weight_grad = None
        if self.weight_grad is not None and settings.main_grad is None:
            weight_grad = self.weight_grad.result()
        return PassResult(
            loss,
            self.by_row(self.logprob),
            self.by_row(self.entropy) if settings.entropy else None,
            self.hidden_grad,
            weight_grad,
        )

    def start(self, piece: slice) -> _Chunk:
        """Compute a chunk's logits, reduce its rows, and start the gather over the ranks."""
        settings = self.settings
        hidden = self.take_hidden(piece)
        logits = self.buffers[self.turn % len(self.buffers)][: piece.stop - piece.start]
        self.turn += 1
        torch.mm(hidden, self.weight.t(), out=logits)
        kept = self.truncate(piece, logits)
        if self.fused:
            self.fused_rows(piece, logits, kept)
            return _Chunk(piece, hidden, logits, None, kept)
        target = self.target[piece]
        found = settings.kernels.statistics(logits, target, settings.scale, settings.entropy)
        return _Chunk(piece, hidden, logits, Gathering(found, settings.group), kept)

    def truncate(self, piece: slice, logits: Tensor) -> Tensor | None:
        """Truncate the distributions of a chunk. Returns [R] bool: the target is kept, or it is
        outside of the vocabulary and makes NaN; None without truncation."""
        settings = self.settings
        if settings.truncation is None:
            return None
        target = self.target[piece]
        kept = truncate_(logits, target, settings.scale, settings.truncation, settings.group)
        if look_ahead(settings.group):
            held = kept.int()
            dist.all_reduce(held, op=dist.ReduceOp.MAX, group=settings.group)
            kept = held.bool()
        ids = target + settings.first_id
        return kept | (ids < 0) | (ids >= settings.vocabulary)

    def finish(self, chunk: _Chunk) -> None:
        """Apply the objective to a chunk, and overwrite its logits with gradients."""
        settings, piece = self.settings, chunk.piece
        target = self.target[piece]
        if chunk.gathering is not None:
            ids = target + settings.first_id
            valid = (ids >= 0) & (ids < settings.vocabulary)
            result = finish(chunk.gathering.wait(), valid, settings.entropy)
            slope = self.apply_objective(piece, result, chunk.kept)
            if self.needs_grad:
                settings.kernels.gradient_(chunk.logits, target, settings.scale, result.lse, slope)
        if self.needs_grad:
            self.add_gradients(piece, chunk.logits, chunk.hidden)

    def fused_rows(self, piece: slice, logits: Tensor, kept: Tensor | None) -> None:
        """Compute statistics, objective and gradient of a chunk at once."""
        settings = self.settings
        filled = settings.rows.filled
        if filled is None:
            filled = torch.full((), settings.rows.size, device=logits.device)
        objective = self.objective.at(piece)
        weight = objective.token_weight
        if kept is not None:
            weight = torch.where(kept, weight, 0.0)
        found = settings.kernels.fused_rows(
            logits,
            self.target[piece],
            settings.scale,
            weight,
            fused_row(objective),
            settings.grad_scale,
            filled,
            piece.start,
            settings.entropy,
            self.needs_grad,
        )
        self.loss[piece], self.logprob[piece], self.entropy[piece] = found.unbind()
        if kept is not None:
            self.mark_outside(piece, kept)

    def apply_objective(self, piece: slice, result: RowResult, kept: Tensor | None) -> Tensor:
        """Record loss and log-probability of a chunk; return `grad_scale * df / dlogprob`, [R]."""
        settings = self.settings
        objective = self.objective.at(piece)
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
        active = settings.rows.active(piece)
        if active is not None:
            recorded = [torch.where(active, values, 0.0) for values in recorded]
        self.loss[piece], self.logprob[piece] = recorded[0], recorded[1]
        if result.entropy is not None:
            self.entropy[piece] = recorded[3]
        if kept is not None:
            self.mark_outside(piece, kept)
        return recorded[2]

    def mark_outside(self, piece: slice, kept: Tensor) -> None:
        """Set the log-probability of targets that are not kept to -inf, in slots that count."""
        active = self.settings.rows.active(piece)
        outside = ~kept if active is None else active & ~kept
        self.logprob[piece].masked_fill_(outside, -torch.inf)

    def add_gradients(self, piece: slice, dlogits: Tensor, hidden: Tensor) -> None:
        """Add the two matrix products of a chunk's backward."""
        settings, index = self.settings, self.settings.rows.index
        if self.hidden_grad is not None:
            self.scatter()
            if index is None:
                product = self.hidden_grad[piece]
                torch.mm(dlogits, self.weight, out=product)
            else:
                product = torch.mm(dlogits, self.weight)
            work = sum_over_shards(product, settings.group) if settings.reduce_hidden_grad else None
            self.unscattered = _HiddenGradient(piece, product, work)
        if self.weight_grad is not None:
            self.weight_grad.add(dlogits, hidden)

    def scatter(self) -> None:
        """Wait for the all-reduce of the last chunk's gradient, and scatter it to its rows."""
        last, self.unscattered = self.unscattered, None
        if last is None or self.hidden_grad is None:
            return
        if last.work is not None:
            last.work.wait()
        index = self.settings.rows.index
        if index is not None:
            self.hidden_grad.index_copy_(0, index[last.piece], last.product)

    def take_hidden(self, piece: slice) -> Tensor:
        """Hidden states of a chunk's slots, 0 in excluded slots, which may hold NaN."""
        rows = self.settings.rows.take(self.hidden, piece)
        active = self.settings.rows.active(piece)
        return rows if active is None else torch.where(active[:, None], rows, 0.0)

    def by_row(self, values: Tensor) -> Tensor:
        """Scatter values: [size] by slot -> [T] by row, 0 elsewhere."""
        index = self.settings.rows.index
        if index is None:
            return values
        everywhere = values.new_zeros(self.hidden.shape[0])
        return everywhere.index_copy_(0, index, values)
