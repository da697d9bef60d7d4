"""Gradients of a linear head that are computed in the forward pass, chunk by chunk.

`HeadGradients` makes them from the gradients of chunks of logits; `HeadLoss` returns them in
backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemocascade_kernels.common.linear_head.chunks import Rows, WeightGradient, sum_over_shards
from nemocascade_kernels.common.main_grad import placeholder_gradient
from nemocascade_kernels.common.products import multiply


@dataclass(frozen=True, kw_only=True)
class HeadPass:
    """Settings of a single pass; see `linear_policy_loss` for those not described here.

    op: its name, for messages. kernels: the module of row kernels; its `fused_rows`, if any, makes
    the results and the gradient of rows at once, without a collective in between. rows: the slots
    to compute. scale: 1 / temperature. group: the ranks that share the vocabulary. first_id: first
    id of this rank's shard. vocabulary: size of the full vocabulary. main_grad: the gradient in
    weight is added to it.
    """

    op: str
    kernels: ModuleType
    rows: Rows
    scale: float
    group: dist.ProcessGroup | None
    first_id: int
    vocabulary: int
    reduce_hidden_grad: bool
    main_grad: Tensor | None
    grad_scale: float


class Needed(NamedTuple):
    """Which gradients of a head are needed."""

    hidden: bool
    weight: bool


class _HiddenPart(NamedTuple):
    """Gradient in a chunk's hidden states, and its pending all-reduce over the ranks."""

    slots: slice
    product: Tensor
    work: dist.Work | None


class HeadGradients:
    """Gradients in hidden [T, H] and weight [V, H], from those in chunks of logits."""

    def __init__(self, hidden: Tensor, weight: Tensor, settings: HeadPass, needed: Needed) -> None:
        self._head, self._settings = weight, settings
        self._hidden = torch.zeros_like(hidden) if needed.hidden else None
        self._weight = None
        if needed.weight:
            self._weight = WeightGradient(weight, into=settings.main_grad)
        self._unscattered: _HiddenPart | None = None

    def add(self, slots: slice, dlogits: Tensor, hidden: Tensor) -> None:
        """Add the two matrix products of a chunk's backward: dlogits [R, V], hidden [R, H]."""
        index = self._settings.rows.index
        if self._hidden is not None:
            self._scatter()
            out = self._hidden[slots] if index is None else None
            product = multiply(dlogits, self._head, out=out)
            group = self._settings.group
            work = sum_over_shards(product, group) if self._settings.reduce_hidden_grad else None
            self._unscattered = _HiddenPart(slots, product, work)
        if self._weight is not None:
            self._weight.add(dlogits, hidden)

    def result(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients in hidden and in weight; None if not needed, or added to main_grad."""
        self._scatter()
        if self._weight is None or self._settings.main_grad is not None:
            return self._hidden, None
        return self._hidden, self._weight.result()

    def _scatter(self) -> None:
        """Wait for the all-reduce of the last chunk's gradient, and scatter it to its rows."""
        last, self._unscattered = self._unscattered, None
        if last is None or self._hidden is None:
            return
        if last.work is not None:
            last.work.wait()
        index = self._settings.rows.index
        if index is not None:
            self._hidden.index_copy_(0, index[last.slots], last.product)


def take_hidden(hidden: Tensor, rows: Rows, slots: slice) -> Tensor:
    """Hidden states of a chunk's slots, 0 in excluded slots, which may hold NaN."""
    found = rows.take(hidden, slots)
    active = rows.active(slots)
    return found if active is None else torch.where(active[:, None], found, 0.0)


def by_row(values: Tensor, rows: Rows, tokens: int) -> Tensor:
    """Scatter values: [size] by slot -> [tokens] by row, 0 elsewhere."""
    if rows.index is None:
        return values
    return values.new_zeros(tokens).index_copy_(0, rows.index, values)


def checked_sum(loss: Tensor, rows: Rows) -> Tensor:
    """The sum of the slots' losses; NaN for more rows than slots, whose bound was too low."""
    total = loss.sum()
    if rows.filled is None:
        return total
    return torch.where(rows.filled > rows.size, torch.nan, total)


class HeadLoss(torch.autograd.Function):
    """A loss on a linear head whose gradients are computed in its forward pass, and kept once.

    compute: maps (hidden, weight, needed) to (loss, outputs..., hidden_grad, weight_grad).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        settings: HeadPass,
        compute: Callable[[Tensor, Tensor, Needed], tuple[Tensor | None, ...]],
    ) -> tuple[Tensor | None, ...]:
        # The caller chooses the dtypes; autocast would change only those of some products.
        with torch.autocast(hidden.device.type, enabled=False):
            loss, *outputs, hidden_grad, weight_grad = compute(
                hidden, weight, Needed(*ctx.needs_input_grad[:2])
            )
        ctx.settings, ctx.weight = settings, weight
        ctx.gradients = (hidden_grad, weight_grad)
        ctx.mark_non_differentiable(*(out for out in outputs if out is not None))
        return loss, *outputs

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, loss_grad: Tensor, *_: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        settings: HeadPass = ctx.settings
        if ctx.gradients is None:
            raise RuntimeError(
                f"{settings.op} has returned its gradients already: they are made in the "
                "forward pass and kept once. Call it again for another backward"
            )
        hidden_grad, weight_grad = ctx.gradients
        weight: Tensor = ctx.weight
        ctx.gradients = ctx.weight = None
        factor = _factor(loss_grad, settings)
        if hidden_grad is not None and factor is not None:
            hidden_grad.mul_(factor)
        if settings.main_grad is not None and ctx.needs_input_grad[1]:
            weight_grad = placeholder_gradient(weight)
        elif weight_grad is not None and factor is not None:
            scaled = torch.empty_like(weight)
            weight_grad = torch.mul(weight_grad, factor, out=scaled)
        elif weight_grad is not None:
            weight_grad = weight_grad.to(weight.dtype)
        return hidden_grad, weight_grad, None, None


def _factor(loss_grad: Tensor, settings: HeadPass) -> Tensor | None:
    """Correction factor of the gradients, which include grad_scale; None if it is 1."""
    factor = loss_grad / settings.grad_scale
    if loss_grad.is_cuda:
        if settings.main_grad is None:
            return factor
        return torch.where(factor == 1, factor, torch.nan)
    if factor.item() == 1:
        return None
    if settings.main_grad is not None:
        raise ValueError(
            f"loss received the gradient {loss_grad.item()}, and grad_scale={settings.grad_scale} "
            "was promised and is in main_grad already: pass the true one as grad_scale"
        )
    return factor
