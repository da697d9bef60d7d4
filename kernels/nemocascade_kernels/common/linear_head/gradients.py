"""Gradients of a linear head that are computed in the forward pass, chunk by chunk.

`HeadGradients` makes them from the gradients of chunks of logits; `HeadLoss` returns them in
backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemocascade_kernels.common.linear_head.chunks import Rows, WeightGradient, sum_over_shards
from nemocascade_kernels.common.main_grad import placeholder_gradient
from nemocascade_kernels.common.products import multiply


class GradientSettings(NamedTuple):
    """Which gradients of a head are needed, and where they go.

    hidden, weight: they are needed. group: the ranks that share the vocabulary. reduce_hidden:
    sum the gradient in hidden over them. main_grad: the gradient in weight is added to it.
    """

    hidden: bool
    weight: bool
    group: dist.ProcessGroup | None
    reduce_hidden: bool
    main_grad: Tensor | None


class _HiddenPart(NamedTuple):
    """Gradient in a chunk's hidden states, and its pending all-reduce over the ranks."""

    slots: slice
    product: Tensor
    work: dist.Work | None


class HeadGradients:
    """Gradients in hidden [T, H] and weight [V, H], from those in chunks of logits.

    rows: the slots whose chunks come.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        rows: Rows,
        settings: GradientSettings,
    ) -> None:
        self._head, self._rows, self._settings = weight, rows, settings
        self._hidden = torch.zeros_like(hidden) if settings.hidden else None
        self._weight = None
        if settings.weight:
            self._weight = WeightGradient(weight, into=settings.main_grad)
        self._unscattered: _HiddenPart | None = None

    def add(self, slots: slice, dlogits: Tensor, hidden: Tensor) -> None:
        """Add the two matrix products of a chunk's backward: dlogits [R, V], hidden [R, H]."""
        index = self._rows.index
        if self._hidden is not None:
            self._scatter()
            out = self._hidden[slots] if index is None else None
            product = multiply(dlogits, self._head, out=out)
            group = self._settings.group
            work = sum_over_shards(product, group) if self._settings.reduce_hidden else None
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
        index = self._rows.index
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


class PassSettings(NamedTuple):
    """How `HeadLoss` computes and returns its gradients.

    name: of the op, for messages. compute: maps (hidden, weight, hidden_needs_grad,
    weight_needs_grad) to (loss, outputs..., hidden_grad, weight_grad). grad_scale: factor in the
    gradients. main_grad: what the gradient in weight was added to, or None.
    """

    name: str
    compute: Callable[[Tensor, Tensor, bool, bool], tuple[Tensor | None, ...]]
    grad_scale: float
    main_grad: Tensor | None


class HeadLoss(torch.autograd.Function):
    """A loss on a linear head whose gradients are computed in its forward pass, and kept once."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, settings: PassSettings
    ) -> tuple[Tensor | None, ...]:
        # The caller chooses the dtypes; autocast would change only those of some products.
        with torch.autocast(hidden.device.type, enabled=False):
            loss, *outputs, hidden_grad, weight_grad = settings.compute(
                hidden, weight, ctx.needs_input_grad[0], ctx.needs_input_grad[1]
            )
        ctx.settings, ctx.weight = settings, weight
        ctx.gradients = (hidden_grad, weight_grad)
        ctx.mark_non_differentiable(*(out for out in outputs if out is not None))
        return loss, *outputs

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, loss_grad: Tensor, *_: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        settings: PassSettings = ctx.settings
        if ctx.gradients is None:
            raise RuntimeError(
                f"{settings.name} has returned its gradients already: they are made in the "
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
        return hidden_grad, weight_grad, None


def _factor(loss_grad: Tensor, settings: PassSettings) -> Tensor | None:
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
