"""The experts in FP8 in Triton: launchers.

Forward: x is quantised once a token, and the first product gathers its e4m3 rows; act(h) leaves
that product's epilogue quantised. Backward: the gradient of h leaves the epilogue quantised by rows
for the gradient of x, and it and act(h) by columns for the gradients of the weights; x and the
incoming gradient are quantised by columns in the pass that gathers them. Weights are quantised in
each call, and once more, transposed, in its backward: see `quantized_weight`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from nemocascade_kernels.backends import interpreting
from nemocascade_kernels.common.routing import Routing
from nemocascade_kernels.moe_experts.fp8 import BLOCK, E4M3
from nemocascade_kernels.moe_experts.fp8_products import (
    fp8_down_gradient_kernel,
    fp8_rows_kernel,
    fp8_up_kernel,
    fp8_weight_gradient_kernel,
)
from nemocascade_kernels.moe_experts.fp8_quantize import (
    quantize_columns_kernel,
    quantize_rows_kernel,
    quantize_weight_kernel,
)
from nemocascade_kernels.moe_experts.tiles import launch
from nemocascade_kernels.moe_experts.triton import (
    TilePlan,
    _combine,
    _sum_dots,
    make_plan,
)

#: Launch settings of the products: two warpgroups, whose tiles of 128 x 128 x 128 take 32 KiB.
_LAUNCH = {"num_warps": 8, "num_stages": 3}
#: Rows of a program of `quantize_rows_kernel`.
_ROWS = 32


class Quantized(NamedTuple):
    """A matrix in e4m3, padded to whole blocks, and the scales of its blocks in float32."""

    values: Tensor
    scale: Tensor


def _blocks(width: int) -> int:
    return triton.cdiv(width, BLOCK)


def _empty(like: Tensor, *shape: int, blocks: tuple[int, ...]) -> Quantized:
    """e4m3 values of a shape, and scales of another."""
    return Quantized(
        torch.empty(shape, dtype=E4M3, device=like.device),
        torch.empty(blocks, dtype=torch.float32, device=like.device),
    )


def quantized_rows(x: Tensor) -> Quantized:
    """x [T, H] in blocks of 1 x 128."""
    rows, width = x.shape
    blocks = _blocks(width)
    out = _empty(x, rows, blocks * BLOCK, blocks=(rows, blocks))
    if rows:
        quantize_rows_kernel[(triton.cdiv(rows, _ROWS), blocks)](
            x, *out, rows, width, blocks, ROWS=_ROWS, INTERPRETED=interpreting()
        )
    return out


def quantized_columns(x: Tensor, routing: Routing, plan: TilePlan) -> Quantized:
    """Rows of x [T, H] in the order of the slots, in blocks of 128 rows x 1, transposed."""
    tiles, width = plan.expert.shape[0], x.shape[1]
    blocks = _blocks(width)
    out = _empty(x, tiles, blocks * BLOCK, BLOCK, blocks=(tiles, blocks * BLOCK))
    quantize_columns_kernel[(tiles, blocks)](
        x, *out, routing.order, *plan, width, blocks,
        TOP_K=routing.top_k, INTERPRETED=interpreting(), num_warps=8,
    )  # fmt: skip
    return out


def quantized_weight(w: Tensor, *, gates: int = 1, transposed: bool = False) -> Quantized:
    """w [E, N, K] in blocks of 128 x 128 of each of its `gates` projections.

    The copy lives as long as one call. It costs 3 bytes of memory traffic a parameter, in forward
    and again in backward, whose products need the other dimension last: an estimated 2 % of the
    products' time at 12,000 rows an expert, and as much as the products at 250.
    """
    num_experts, rows, width = w.shape
    height = rows // gates
    down, across = _blocks(height), _blocks(width)
    blocks = (across, gates * down) if transposed else (gates * down, across)
    out = _empty(w, num_experts, *(n * BLOCK for n in blocks), blocks=(num_experts, *blocks))
    quantize_weight_kernel[(num_experts * gates, down, across)](
        w.contiguous(), *out, height, width, down, across,
        GATES=gates, TRANSPOSED=transposed, INTERPRETED=interpreting(), num_warps=8,
    )  # fmt: skip
    return out


def _rows_product(
    left: Quantized, right: Quantized, plan: TilePlan, out: Tensor, routing: Routing | None = None
) -> Tensor:
    """Compute `out[r] = left[r] @ right[e]^T`, times the combine weights of `routing`."""
    order = weights = None
    if routing is not None:
        order, weights = routing.order, routing.weights.contiguous()
    launch(
        fp8_rows_kernel, out.device,
        *left, *right, out, order, weights, *plan, out.shape[1], left.scale.shape[1],
        WEIGH=routing is not None, INTERPRETED=interpreting(), **_LAUNCH,
    )  # fmt: skip
    return out


def _weight_gradient(
    left: Quantized,
    right: Quantized,
    weight: Tensor,
    plan: TilePlan,
    gates: int,
    total: Tensor | None,
) -> Tensor | None:
    """left^T right of each expert, [E, N, K]; with `total`, add to it and return None."""
    if total is not None and not total.is_contiguous():
        raise ValueError("main_grad must be contiguous")
    num_experts, rows, width = weight.shape
    out = torch.empty_like(weight) if total is None else total
    launch(
        fp8_weight_gradient_kernel, weight.device,
        *left, *right, out, plan.offsets, rows // gates, width,
        E=num_experts, BLOCK_E=triton.next_power_of_2(num_experts), GATES=gates,
        ACCUMULATE=total is not None, INTERPRETED=interpreting(), **_LAUNCH,
    )  # fmt: skip
    return out if total is None else None


def experts_forward(
    x: Tensor, routing: Routing, w_up: Tensor, w_down: Tensor, activation: str, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Output [T, H], and the pre-activations [R, I or 2I] for the backward if `keep`."""
    slots, gated = routing.order.numel(), activation == "swiglu"
    width, blocks = w_down.shape[2], _blocks(w_down.shape[2])
    plan = make_plan(routing.offsets, slots)
    h = x.new_empty(slots if keep else 0, w_up.shape[1])
    rows = quantized_rows(x.contiguous())
    active = _empty(x, slots, blocks * BLOCK, blocks=(slots, blocks))
    launch(
        fp8_up_kernel, x.device,
        *rows, *quantized_weight(w_up, gates=1 + gated), h, *active, routing.order, *plan, width,
        rows.scale.shape[1],
        TOP_K=routing.top_k, GATED=gated, KEEP_H=keep, INTERPRETED=interpreting(), **_LAUNCH,
    )  # fmt: skip
    y = x.new_empty(slots, x.shape[1])
    _rows_product(active, quantized_weight(w_down), plan, y, routing)
    return _combine(y, routing, None), h if keep else None


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
    needs_x, needs_weights, needs_up, needs_down = needs
    slots, gates = routing.order.numel(), 2 if activation == "swiglu" else 1
    width, blocks = w_down.shape[2], _blocks(w_down.shape[2])
    plan = make_plan(routing.offsets, slots)
    tiles, columns = plan.expert.shape[0], gates * blocks
    rows = quantized_rows(grad)
    grad_h = _empty(x, slots, columns * BLOCK, blocks=(slots, columns))
    grad_h_t, active_t = (
        _empty(x, tiles, n * BLOCK, BLOCK, blocks=(tiles, n * BLOCK)) for n in (columns, blocks)
    )
    dots = x.new_empty(blocks, slots, dtype=torch.float32)
    launch(
        fp8_down_gradient_kernel, x.device,
        *rows, *quantized_weight(w_down, transposed=True), h, routing.weights.contiguous(),
        *grad_h, *grad_h_t, *active_t, dots, routing.order, *plan, width, rows.scale.shape[1],
        slots,
        TOP_K=routing.top_k, GATED=gates == 2, INTERPRETED=interpreting(),
        # Two gradients a column do not fit in the registers of eight warps.
        **{**_LAUNCH, "num_warps": 8 * gates},
    )  # fmt: skip
    grad_weights = _sum_dots(dots, routing) if needs_weights else None
    grad_down = grad_up = grad_x = None
    gathered = functools.partial(quantized_columns, routing=routing, plan=plan)
    if needs_down:
        grad_down = _weight_gradient(gathered(grad), active_t, w_down, plan, 1, main_grads[1])
    if needs_up:
        columns_of_x = gathered(x.contiguous())
        grad_up = _weight_gradient(grad_h_t, columns_of_x, w_up, plan, gates, main_grads[0])
        del columns_of_x
    del rows, active_t, grad_h_t
    if needs_x:
        right = quantized_weight(w_up, gates=gates, transposed=True)
        out = x.new_empty(slots, x.shape[1])
        grad_x = _combine(_rows_product(grad_h, right, plan, out), routing, None)
    return grad_x, grad_weights, grad_up, grad_down
