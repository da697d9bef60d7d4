"""`linear_logprob`: checks, choice of the implementation, autograd."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemocascade_kernels import backends
from nemocascade_kernels.common.linear_head.checks import check_head, check_reference, check_targets
from nemocascade_kernels.common.linear_head.chunks import (
    LogitsBuffers,
    WeightGradient,
    all_rows,
    in_flight,
    look_ahead,
    sum_over_shards,
)
from nemocascade_kernels.common.linear_head.statistics import Gathering, finish
from nemocascade_kernels.common.main_grad import checked_main_grad, placeholder_gradient
from nemocascade_kernels.common.products import multiply
from nemocascade_kernels.linear_logprob import reference

_ROWS = "nemocascade_kernels.common.linear_head"
_OPERATORS = ("logits_statistics", "logits_gradient_")
OP = backends.Op("linear_logprob")
OP.register("triton", f"{_ROWS}.triton", backends.takes(*backends.HALF_AND_SINGLE))
OP.register(
    "native",
    f"{_ROWS}.native",
    backends.takes(torch.float32, torch.bfloat16, operators=_OPERATORS),
)
OP.register("torch", f"{_ROWS}.torch")
OP.register("reference")


class LinearLogprob(NamedTuple):
    """Result: logprob [T] and entropy [T] (None if not requested), float32."""

    logprob: Tensor
    entropy: Tensor | None


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    tp_group: dist.ProcessGroup | None = None,
    reduce_hidden_grad: bool = True,
    accumulate_main_grad: bool = False,
    backend: str | None = None,
) -> LinearLogprob:
    """Log-probability of one token a row under a linear head, without holding all logits.

    `logprob_t = log softmax(hidden_t @ weight.T / temperature)[target_t]`, and
    `entropy_t = -sum_v p_tv log p_tv` of the same softmax. Both are differentiable in hidden and
    weight; backward recomputes the logits, a chunk of rows at a time.

    hidden: [T, H] float32, bfloat16 or float16; T may be 0.
    weight: [V, H] of the same dtype. Under `tp_group`, this rank's shard: rank r holds the ids
        `[r V, (r + 1) V)`, V is the same on every rank, and every rank passes the same hidden.
    target: [T] int64, ids of the full vocabulary.
    temperature: divides the logits; > 0.
    reduce_hidden_grad: sum the gradient in hidden over `tp_group` (the true derivative). False
        leaves this rank's part, for a caller whose own backward reduces it.
    accumulate_main_grad: backward adds the gradient in weight to `weight.main_grad` (float32 or
        weight's dtype), sets `weight.grad_added_to_main_grad` and gives autograd a placeholder:
        Megatron-Core's convention.
    backend: require an implementation; see `nemocascade_kernels.backends`.

    Raises ValueError for shapes, dtypes or settings that do not fit, and IndexError on a CPU for a
    target outside the vocabulary; on a GPU, where the host does not read the target, its row is
    NaN.
    """
    check_head(hidden, weight, target, temperature)
    main_grad = checked_main_grad(weight) if accumulate_main_grad else None
    chosen = OP.chosen(hidden, weight, target, backend=backend)
    first_id, vocabulary = check_targets(target, weight, tp_group)
    if chosen == "reference":
        check_reference(OP.name, tp_group, accumulate_main_grad)
        logprob, entropy = reference.linear_logprob(hidden, weight, target, temperature)
        return LinearLogprob(logprob, entropy if return_entropy else None)
    settings = _Settings(
        kernels=OP.module(chosen),
        scale=1.0 / temperature,
        entropy=return_entropy,
        group=tp_group,
        first_id=first_id,
        vocabulary=vocabulary,
        reduce_hidden_grad=reduce_hidden_grad,
        main_grad=main_grad,
    )
    logprob, entropy = _LinearLogprob.apply(hidden.contiguous(), weight, target, settings)
    return LinearLogprob(logprob, entropy)


class _Settings(NamedTuple):
    kernels: ModuleType
    scale: float
    entropy: bool
    group: dist.ProcessGroup | None
    first_id: int
    vocabulary: int
    reduce_hidden_grad: bool
    main_grad: Tensor | None


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, settings: _Settings
    ) -> tuple[Tensor, Tensor | None]:
        # The caller chooses the dtypes; autocast would change only those of some products.
        with torch.autocast(hidden.device.type, enabled=False):
            results = _forward(hidden, weight, target, settings)
        ctx.settings = settings
        # A saved tensor may be another object in backward; the main gradient needs the parameter.
        ctx.weight = weight
        ctx.save_for_backward(hidden, weight, target, results[1], results[2])
        return results[0], results[2]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, logprob_grad: Tensor, entropy_grad: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        settings: _Settings = ctx.settings
        needed = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        with torch.autocast(logprob_grad.device.type, enabled=False):
            hidden_grad, weight_grad = _backward(
                ctx.saved_tensors, logprob_grad, entropy_grad, settings, needed
            )
        return hidden_grad, _weight_gradient(ctx.weight, weight_grad, settings), None, None


def _weight_gradient(
    weight: Tensor, gradient: WeightGradient | None, settings: _Settings
) -> Tensor | None:
    if gradient is None:
        return None
    if settings.main_grad is not None:
        return placeholder_gradient(weight)
    return gradient.result().to(weight.dtype)


def _forward(
    hidden: Tensor, weight: Tensor, target: Tensor, settings: _Settings
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probability, log-sum-exp and entropy of every row."""
    rows = all_rows(hidden.shape[0])
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logprob, lse, entropy = torch.empty(3, rows.size, dtype=dtype, device=hidden.device)
    depth = look_ahead(settings.group)
    buffers = LogitsBuffers(rows.size, weight)

    def start(chunk: slice) -> tuple[slice, Gathering]:
        logits = buffers.take()[: chunk.stop - chunk.start]
        multiply(hidden[chunk], weight.t(), out=logits)
        local = target[chunk] - settings.first_id
        # The logits are not needed again: the next chunk may overwrite them.
        found = settings.kernels.statistics(logits, local, settings.scale, settings.entropy)
        return chunk, Gathering(found, settings.group)

    def end(started: tuple[slice, Gathering]) -> None:
        chunk, gathering = started
        ids = target[chunk]
        valid = (ids >= 0) & (ids < settings.vocabulary)
        result = finish(gathering.wait(), valid, settings.entropy)
        logprob[chunk], lse[chunk] = result.logprob, result.lse
        if result.entropy is not None:
            entropy[chunk] = result.entropy

    in_flight(buffers.chunks, start, end, depth)
    return logprob, lse, entropy if settings.entropy else None


def _backward(
    saved: tuple[Tensor, ...],
    logprob_grad: Tensor,
    entropy_grad: Tensor | None,
    settings: _Settings,
    needed: tuple[bool, bool],
) -> tuple[Tensor | None, WeightGradient | None]:
    """The required gradients, from recomputed logits."""
    hidden, weight, target, lse, entropy = saved
    slope = logprob_grad.contiguous()
    entropy_slope = None
    if entropy is not None and entropy_grad is not None:
        entropy_slope = entropy_grad.contiguous()
    hidden_grad = torch.empty_like(hidden) if needed[0] else None
    weight_grad = WeightGradient(weight, into=settings.main_grad) if needed[1] else None
    buffers = LogitsBuffers(hidden.shape[0], weight)
    sums = []
    for chunk in buffers.chunks:
        rows = hidden[chunk]
        logits = buffers.take()[: rows.shape[0]]
        multiply(rows, weight.t(), out=logits)
        settings.kernels.gradient_(
            logits,
            target[chunk] - settings.first_id,
            settings.scale,
            lse[chunk],
            slope[chunk],
            None if entropy_slope is None else entropy[chunk],
            None if entropy_slope is None else entropy_slope[chunk],
        )
        if hidden_grad is not None:
            multiply(logits, weight, out=hidden_grad[chunk])
            if settings.reduce_hidden_grad:
                sums.append(sum_over_shards(hidden_grad[chunk], settings.group))
        if weight_grad is not None:
            weight_grad.add(logits, rows)
    for work in filter(None, sums):
        work.wait()
    return hidden_grad, weight_grad
