"""The expert GEMMs in C++ for the CPU (csrc/moe_experts/), in float32.

`moe_experts` is one call forward and one backward: threads take blocks of an expert's rows, and all
steps between the products run while a block is in the cache. The separate operators are those of
`torch.py`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from nemocascade_kernels import native
from nemocascade_kernels.common.routing import Routing
from nemocascade_kernels.moe_experts.batch_invariant import best_sizes, cover, trial
from nemocascade_kernels.moe_experts.torch import (
    grouped_gemm,
    grouped_gemm_backward_w,
    grouped_gemm_backward_x,
    permute,
    permute_backward,
    unpermute,
    unpermute_backward,
)

__all__ = [
    "experts_backward",
    "experts_forward",
    "grouped_gemm",
    "grouped_gemm_backward_w",
    "grouped_gemm_backward_x",
    "permute",
    "permute_backward",
    "unpermute",
    "unpermute_backward",
]

#: Maximum rows of a block: its rows and intermediate results should stay in a core's cache.
_LARGEST_BLOCK = 256


def experts_forward(
    x: Tensor, routing: Routing, w_up: Tensor, w_down: Tensor, activation: str, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Output [T, H], and the pre-activations [R, I or 2I] for the backward if `keep`."""
    bounds = routing.offsets.tolist()
    h = x.new_empty(bounds[-1], w_up.shape[1]) if keep else None
    y = x.new_empty(x.shape)
    native.op("moe_experts_forward")(
        x.contiguous(),
        *_arguments(routing, w_up, w_down, activation, bounds),
        h,
        x.new_empty(routing.order.numel(), x.shape[1]),
        y,
    )
    return y, h


def experts_backward(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    routing: Routing,
    w_up: Tensor,
    w_down: Tensor,
    activation: str,
    needs: tuple[bool, bool, bool, bool],
    main_grads: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, the routing weights, w_up and w_down, where `needs` requests them."""
    needs_x, needs_weights, *needs_w = needs
    rows = x.new_empty(routing.order.numel(), x.shape[1]) if needs_x else None
    grad_x = x.new_empty(x.shape) if needs_x else None
    grad_weights = torch.zeros_like(routing.weights) if needs_weights else None
    sums = [
        (torch.zeros_like(weight) if main_grad is None else main_grad) if needed else None
        for weight, main_grad, needed in zip((w_up, w_down), main_grads, needs_w, strict=True)
    ]
    native.op("moe_experts_backward")(
        grad,
        x.contiguous(),
        h,
        *_arguments(routing, w_up, w_down, activation, routing.offsets.tolist()),
        rows,
        grad_x,
        grad_weights,
        *sums,
    )
    grads = (None if main is not None else own for own, main in zip(sums, main_grads, strict=True))
    grad_up, grad_down = grads
    return grad_x, grad_weights, grad_up, grad_down


def _arguments(
    routing: Routing, w_up: Tensor, w_down: Tensor, activation: str, bounds: list[int]
) -> tuple[Tensor | bool, ...]:
    """Arguments of both calls after their rows."""
    sizes = _block_sizes(w_down.shape[1], w_down.shape[2], w_up.shape[1])
    blocks = []
    for expert in range(routing.num_experts):
        first, end = bounds[expert], bounds[expert + 1]
        for size in cover(end - first, sizes):
            blocks.append((expert, first, min(size, end - first), size))
            first += size
    return (
        routing.order,
        routing.positions,
        routing.weights.contiguous(),
        w_up.contiguous(),
        w_down.contiguous(),
        torch.tensor(blocks, dtype=torch.int64).view(-1, 4),
        activation == "swiglu",
    )


@functools.cache
def _block_sizes(hidden: int, width: int, up: int) -> tuple[int, ...]:
    """Sizes of the blocks, for which all four products are batch-invariant."""
    trials = [
        trial(functools.partial(_product, transposed), torch.float32, depth, columns, transposed)
        for depth, columns, transposed in (
            (hidden, up, True),
            (width, hidden, True),
            (hidden, width, False),
            (up, hidden, False),
        )
    ]
    return best_sizes(
        [{n: rows for n, rows in found.items() if n <= _LARGEST_BLOCK} for found in trials]
    )


def _product(transposed: bool, x: Tensor, weight: Tensor) -> Tensor:
    """The product of the blocks; transposed: weight [K, N] is the transpose of a matrix."""
    out = x.new_empty(x.shape[0], weight.shape[1])
    factor = weight.t() if transposed else weight
    native.op("moe_experts_product")(x.contiguous(), factor.contiguous(), transposed, out)
    return out
