"""The expert GEMMs in Triton: launchers and tile settings.

Forward: `up_kernel` (gathers x, applies the activation), `rows_kernel` (applies the combine
weights), `combine_kernel`. Backward: `down_gradient_kernel` (gathers the gradient, recomputes the
activation), `rows_kernel` and `combine_kernel` for x, `weight_gradient_kernel` twice. With one
choice a token, `rows_kernel` writes the output itself. No permuted copy is saved, and the host
never reads a group's size. Every sum has a fixed order, so results are deterministic.

Programs are persistent: as many as fit on the device by the compiled kernel's registers and shared
memory. On Hopper a tile of 128 x 128 leaves two to a multiprocessor, so that the epilogue of one
runs beside the products of the other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nemocascade_kernels.common.routing import Routing
from nemocascade_kernels.common.tile_product import arch_of, precision
from nemocascade_kernels.moe_experts.tiles import (
    ROWS_OF_TILE,
    Tile,
    gradient_tile,
    launch,
    multiprocessors,
    product_tile,
    weight_tile,
)
from nemocascade_kernels.moe_experts.triton_gemm import (
    down_gradient_kernel,
    plan_kernel,
    rows_kernel,
    up_kernel,
    weight_gradient_kernel,
)
from nemocascade_kernels.moe_experts.triton_permute import (
    combine_kernel,
    permute_kernel,
    unpermute_gradient_kernel,
    weights_gradient_kernel,
    zero_padding_kernel,
)

_PLAN_BLOCK = 128
_TAIL_BLOCK, _DOTS_BLOCK = 1024, 256


#: Address and strides of a tensor descriptor are multiples of this, in bytes.
_TMA_ALIGNMENT = 16


def _matrices(stack: Tensor, tile: Tile, by_column: bool, arch: int) -> tuple[Any, bool]:
    """Return a tensor descriptor of weights [E, N, K] and True, or the weights and False if the
    device has no TMA or cannot address them by it."""
    size = stack.element_size()
    aligned = stack.shape[2] * size % _TMA_ALIGNMENT == 0
    aligned = aligned and stack.storage_offset() * size % _TMA_ALIGNMENT == 0
    if arch < 90 or not aligned or not stack.numel():
        return stack, False
    block = (tile.BLOCK_N, tile.BLOCK_K) if by_column else (tile.BLOCK_K, tile.BLOCK_N)
    return TensorDescriptor.from_tensor(stack, [1, *block]), True


class TilePlan(NamedTuple):
    """The rows of each row tile; see `plan_kernel`."""

    offsets: Tensor
    expert: Tensor
    row: Tensor
    tiles: Tensor


def make_plan(offsets: Tensor, rows: int) -> TilePlan:
    """Plan for at most `rows` sorted rows."""
    num_experts = offsets.shape[0] - 1
    most = rows // ROWS_OF_TILE + min(num_experts, rows)
    expert, row = offsets.new_empty(max(most, 1)), offsets.new_empty(max(most, 1))
    tiles = offsets.new_empty(1)
    plan_kernel[(max(1, triton.cdiv(most, _PLAN_BLOCK)),)](
        offsets, expert, row, tiles, most,
        E=num_experts, BLOCK_E=triton.next_power_of_2(num_experts), ROWS=ROWS_OF_TILE,
        BLOCK=_PLAN_BLOCK,
    )  # fmt: skip
    return TilePlan(offsets, expert, row, tiles)


def _rows_product(
    left: Tensor,
    right: Tensor,
    plan: TilePlan,
    rows: int,
    *,
    by_column: bool,
    order: Tensor | None = None,
    weights: Tensor | None = None,
    by_slot: bool = False,
) -> Tensor:
    """Compute left[r] @ right[e], [rows, N]; right is [E, N, K] if `by_column`, else [E, K, N].

    With order [rows] and combine weights they are weighted; `by_slot` writes them in the order of
    the slots.
    """
    depth = left.shape[1]
    width = right.shape[1] if by_column else right.shape[2]
    out = left.new_empty(rows, width)
    arch = arch_of(left.device)
    tile = product_tile(width, left.dtype, arch)
    factor, tma = _matrices(right, tile, by_column, arch)
    launch(
        rows_kernel, left.device,
        left, factor, out, order, weights, *plan, rows,
        N=width, K=depth, E=right.shape[0], WEIGH=weights is not None, BY_SLOT=by_slot,
        B_BY_COLUMN=by_column,
        EVEN_K=depth % tile.BLOCK_K == 0, TMA=tma, PRECISION=precision(left.dtype),
        **tile._asdict(),
    )  # fmt: skip
    return out


def grouped_gemm(x: Tensor, w: Tensor, offsets: Tensor, *, by_column: bool = True) -> Tensor:
    """Multiply the rows of group e by w[e] transposed, [R, N]; 0 past the last group."""
    offsets, rows = offsets.int(), x.shape[0]
    plan = make_plan(offsets, rows)
    out = _rows_product(x.contiguous(), w.contiguous(), plan, rows, by_column=by_column)
    if out.numel():
        zero_padding_kernel[(multiprocessors(out.device),)](
            out, offsets[-1:], rows, out.shape[1], BLOCK=_TAIL_BLOCK
        )
    return out


def grouped_gemm_backward_x(grad: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """Multiply the rows of group e by w[e], [R, K]; 0 past the last group."""
    return grouped_gemm(grad, w, offsets, by_column=False)


def grouped_gemm_backward_w(
    grad: Tensor, x: Tensor, w: Tensor, offsets: Tensor, main_grad: Tensor | None
) -> Tensor | None:
    """Return grad^T x of each group, [E, N, K]; with `main_grad`, add to it and return None."""
    return _weight_gradient(grad, x.contiguous(), w, offsets.int(), main_grad)


def _weight_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    main_grad: Tensor | None,
    *,
    order: Tensor | None = None,
    top_k: int = 1,
    gather_grad: bool = False,
    gather_x: bool = False,
) -> Tensor | None:
    num_experts, rows, columns = weight.shape
    if main_grad is not None and not main_grad.is_contiguous():
        raise ValueError("main_grad must be contiguous")
    out = torch.empty(weight.shape, dtype=x.dtype, device=x.device) if main_grad is None else None
    tile = weight_tile(x.dtype, arch_of(x.device))
    launch(
        weight_gradient_kernel, x.device,
        grad, x, main_grad if out is None else out, order, offsets,
        N=rows, K=columns, E=num_experts, TOP_K=top_k, GATHER_GRAD=gather_grad, GATHER_X=gather_x,
        ACCUMULATE=out is None, PRECISION=precision(x.dtype), **tile._asdict(),
    )  # fmt: skip
    return out


def _row_tile(width: int) -> dict[str, int]:
    """Tile of the kernels that move rows: about 4096 elements."""
    columns = min(1024, triton.next_power_of_2(max(width, 1)))
    return {"ROWS": max(1, min(64, 4096 // columns)), "COLUMNS": columns}


def _row_grid(rows: int, width: int) -> tuple[int, int]:
    tile = _row_tile(width)
    return triton.cdiv(rows, tile["ROWS"]), triton.cdiv(width, tile["COLUMNS"])


def permute(x: Tensor, routing: Routing) -> Tensor:
    """Rows of x in the order of the slots, [T * K, H]; 0 for slots without an expert."""
    slots, width = routing.order.numel(), x.shape[1]
    out = x.new_empty(slots, width)
    if out.numel():
        permute_kernel[_row_grid(slots, width)](
            x.contiguous(), out, routing.order, routing.offsets[-1:], slots, width,
            TOP_K=routing.top_k, **_row_tile(width),
        )  # fmt: skip
    return out


def _combine(rows: Tensor, routing: Routing, weights: Tensor | None) -> Tensor:
    tokens, width = routing.tokens, rows.shape[1]
    out = rows.new_empty(tokens, width)
    if out.numel():
        combine_kernel[_row_grid(tokens, width)](
            rows, weights, routing.experts, routing.positions, out, tokens, width,
            E=routing.num_experts, TOP_K=routing.top_k, WEIGH=weights is not None,
            **_row_tile(width),
        )  # fmt: skip
    return out


def permute_backward(grad: Tensor, routing: Routing) -> Tensor:
    """Gradient of `permute`'s x, [T, H]."""
    return sum_choices(grad, routing)


def sum_choices(rows: Tensor, routing: Routing) -> Tensor:
    """Sum of each token's rows in the order of its choices, [T, H]."""
    return _combine(rows, routing, None)


def unpermute(y: Tensor, routing: Routing) -> Tensor:
    """Weighted sum of each token's rows in the order of its choices, [T, H]."""
    return _combine(y.contiguous(), routing, routing.weights.contiguous())


def unpermute_backward(
    grad: Tensor, y: Tensor, routing: Routing, needs_y: bool, needs_weights: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the rows y [T * K, H] and of the weights [T, K]."""
    slots, width = y.shape
    grad_y = y.new_empty(slots, width) if needs_y else None
    grad_weights = torch.empty_like(routing.weights) if needs_weights else None
    if slots:
        unpermute_gradient_kernel[(_row_grid(slots, width)[0],)](
            grad, y.contiguous(), routing.weights.contiguous(), routing.order,
            routing.offsets[-1:], grad_y, grad_weights, slots, width,
            TOP_K=routing.top_k, NEEDS_ROWS=needs_y, NEEDS_WEIGHTS=needs_weights,
            **_row_tile(width),
        )  # fmt: skip
    return grad_y, grad_weights


def experts_forward(
    x: Tensor, routing: Routing, w_up: Tensor, w_down: Tensor, activation: str, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Output [T, H], and the pre-activations [R, I or 2I] for the backward if `keep`."""
    slots, (width, gated) = routing.order.numel(), (w_down.shape[2], activation == "swiglu")
    x = x.contiguous()
    plan = make_plan(routing.offsets, slots)
    h = x.new_empty(slots if keep else 0, w_up.shape[1])
    active = x.new_empty(slots, width)
    hidden, arch = x.shape[1], arch_of(x.device)
    tile = product_tile(width, x.dtype, arch, gated=gated)
    stack = w_up.contiguous().view(-1, width, hidden)
    factor, tma = _matrices(stack, tile, True, arch)
    launch(
        up_kernel, x.device, x, factor, h, active, routing.order, *plan,
        N=width, K=hidden, TOP_K=routing.top_k, GATED=gated, KEEP_H=keep,
        EVEN_K=hidden % tile.BLOCK_K == 0, TMA=tma, PRECISION=precision(x.dtype), **tile._asdict(),
    )  # fmt: skip
    y = _token_sums(active, w_down, plan, routing, by_column=True, weights=routing.weights)
    return y, h if keep else None


def _token_sums(
    left: Tensor,
    right: Tensor,
    plan: TilePlan,
    routing: Routing,
    *,
    by_column: bool,
    weights: Tensor | None = None,
) -> Tensor:
    """`_rows_product` of sorted rows, summed over each token's choices in their order, [T, N]."""
    single = routing.top_k == 1
    rows = _rows_product(
        left, right.contiguous(), plan, routing.order.numel(), by_column=by_column,
        order=routing.order, weights=None if weights is None else weights.contiguous(),
        by_slot=single,
    )  # fmt: skip
    return rows if single else sum_choices(rows, routing)


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
    slots, (width, gated) = routing.order.numel(), (w_down.shape[2], activation == "swiglu")
    x, offsets = x.contiguous(), routing.offsets
    plan = make_plan(offsets, slots)
    hidden, arch = x.shape[1], arch_of(x.device)
    tile = gradient_tile(x.dtype, arch, gated=gated)
    grad_h, active = torch.empty_like(h), x.new_empty(slots, width)
    parts = triton.cdiv(width, tile.BLOCK_N)
    dots = x.new_empty(parts, slots, dtype=torch.float32)
    factor, tma = _matrices(w_down.contiguous(), tile, False, arch)
    launch(
        down_gradient_kernel, x.device,
        grad, factor, h, routing.weights.contiguous(), grad_h, active, dots, routing.order, *plan,
        slots, N=width, K=hidden, TOP_K=routing.top_k, GATED=gated,
        EVEN_K=hidden % tile.BLOCK_K == 0, TMA=tma, PRECISION=precision(x.dtype), **tile._asdict(),
    )  # fmt: skip
    grad_weights = _sum_dots(dots, routing) if needs_weights else None
    gathered: dict[str, Any] = {"order": routing.order, "top_k": routing.top_k}
    grad_down = grad_up = grad_x = None
    if needs_down:
        grad_down = _weight_gradient(
            grad, active, w_down, offsets, main_grads[1], gather_grad=True, **gathered
        )
    if needs_up:
        grad_up = _weight_gradient(
            grad_h, x, w_up, offsets, main_grads[0], gather_x=True, **gathered
        )
    if needs_x:
        grad_x = _token_sums(grad_h, w_up, plan, routing, by_column=False)
    return grad_x, grad_weights, grad_up, grad_down


def _sum_dots(dots: Tensor, routing: Routing) -> Tensor:
    grad_weights = torch.empty_like(routing.weights)
    parts, slots = dots.shape
    if slots:
        weights_gradient_kernel[(triton.cdiv(slots, _DOTS_BLOCK),)](
            dots, routing.order, routing.offsets[-1:], grad_weights, slots, parts,
            BLOCK=_DOTS_BLOCK,
        )  # fmt: skip
    return grad_weights
