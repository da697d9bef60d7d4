"""The expert GEMMs in Triton: launchers and tile settings.

Forward: `up_kernel` (gathers x, applies the activation), `rows_kernel` (applies the combine
weights), `combine_kernel`. Backward: `down_gradient_kernel` (gathers the gradient, recomputes the
activation), `rows_kernel` and `combine_kernel` for x, `weight_gradient_kernel` twice. No permuted
copy is saved, and the host never reads a group's size. Every sum has a fixed order, so results are
deterministic.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from nemocascade_kernels.backends import interpreting
from nemocascade_kernels.common.routing import Routing
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
    zero_tail_kernel,
)

_PLAN_BLOCK = 128
#: Rows of a tile in every kernel that loops over rows: they share one plan.
_BLOCK_M = 128
_TAIL_BLOCK, _DOTS_BLOCK = 1024, 256
#: Number of programs in the interpreter, instead of a device's multiprocessors.
_INTERPRETED_PROGRAMS = 3


class Tile(NamedTuple):
    """Tile of a product, and its launch settings."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


def product_tile(width: int, dtype: torch.dtype, arch: int, *, gated: bool = False) -> Tile:
    """Tile for `width` columns: 256 wide if little is wasted, because wide tiles read the least.

    Two products side by side (gated) have half the columns each. Hopper has asynchronous products
    with accumulators in registers, so it uses the widest tiles; on others they would spill.
    """
    if dtype == torch.float32:
        return Tile(_BLOCK_M, 64, 32, 8, 3)
    if gated:
        return Tile(_BLOCK_M, 128 if arch == 90 else 64, 64, 8, 3)
    if arch >= 90 and _waste(width, 256) <= 1.05 * _waste(width, 128):
        return Tile(_BLOCK_M, 256, 64, 8, 3)
    return Tile(_BLOCK_M, 128, 64, 8 if arch < 90 else 4, 4 if arch >= 90 else 3)


def _waste(width: int, block: int) -> float:
    return triton.cdiv(width, block) * block / max(width, 1)


def gradient_tile(dtype: torch.dtype) -> Tile:
    """Tile of `down_gradient_kernel`, whose epilogue needs the registers of a wider tile."""
    if dtype == torch.float32:
        return Tile(_BLOCK_M, 64, 32, 8, 3)
    return Tile(_BLOCK_M, 128, 64, 8, 4)


def weight_tile(width: int, dtype: torch.dtype) -> Tile:
    """Tile of a weight's gradient; BLOCK_K counts rows."""
    if dtype == torch.float32:
        return Tile(128, 64, 32, 8, 3)
    wide = _waste(width, 256) <= 1.05 * _waste(width, 128)
    return Tile(128, 256, 64, 8, 3) if wide else Tile(128, 128, 64, 8, 4)


def _precision(dtype: torch.dtype) -> str:
    if dtype == torch.bfloat16 and interpreting():
        return "widened"
    return "ieee" if dtype == torch.float32 else "tf32"


@functools.cache
def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _arch(device: torch.device) -> int:
    """Compute capability as in sm_90; that of Hopper in the interpreter."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


class Plan(NamedTuple):
    """The rows of each row tile; see `plan_kernel`."""

    offsets: Tensor
    expert: Tensor
    row: Tensor
    tiles: Tensor


def make_plan(offsets: Tensor, rows: int) -> Plan:
    """Plan for at most `rows` sorted rows."""
    num_experts = offsets.shape[0] - 1
    most = rows // _BLOCK_M + min(num_experts, rows)
    expert, row = offsets.new_empty(max(most, 1)), offsets.new_empty(max(most, 1))
    tiles = offsets.new_empty(1)
    plan_kernel[(max(1, triton.cdiv(most, _PLAN_BLOCK)),)](
        offsets, expert, row, tiles, most,
        E=num_experts, BLOCK_E=triton.next_power_of_2(num_experts), ROWS=_BLOCK_M,
        BLOCK=_PLAN_BLOCK,
    )  # fmt: skip
    return Plan(offsets, expert, row, tiles)


def _rows_product(
    left: Tensor,
    right: Tensor,
    plan: Plan,
    rows: int,
    *,
    by_column: bool,
    order: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Compute left[r] @ right[e], [rows, N]; right is [E, N, K] if `by_column`, else [E, K, N]."""
    depth = left.shape[1]
    width = right.shape[1] if by_column else right.shape[2]
    out = left.new_empty(rows, width)
    tile = product_tile(width, left.dtype, _arch(left.device))
    rows_kernel[(_programs(left.device),)](
        left, right, out, order, weights, *plan, width, depth,
        TOP_K=1, GATHER=False, WEIGH=weights is not None, B_BY_COLUMN=by_column,
        EVEN_K=depth % tile.BLOCK_K == 0, PRECISION=_precision(left.dtype), **tile._asdict(),
    )  # fmt: skip
    return out


def grouped_gemm(x: Tensor, w: Tensor, offsets: Tensor, *, by_column: bool = True) -> Tensor:
    """Multiply the rows of group e by w[e] transposed, [R, N]; 0 past the last group."""
    offsets, rows = offsets.int(), x.shape[0]
    plan = make_plan(offsets, rows)
    out = _rows_product(x.contiguous(), w.contiguous(), plan, rows, by_column=by_column)
    if out.numel():
        zero_tail_kernel[(_programs(out.device),)](
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
    tile = weight_tile(columns, x.dtype)
    weight_gradient_kernel[(_programs(x.device),)](
        grad, x, main_grad if out is None else out, order, offsets, rows, columns,
        E=num_experts, TOP_K=top_k, GATHER_GRAD=gather_grad, GATHER_X=gather_x,
        ACCUMULATE=out is None, PRECISION=_precision(x.dtype), **tile._asdict(),
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
    """Sum of each token's rows in the order of its choices, [T, H]."""
    return _combine(grad, routing, None)


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
    tile = product_tile(width, x.dtype, _arch(x.device), gated=gated)
    up_kernel[(_programs(x.device),)](
        x, w_up.contiguous(), h, active, routing.order, *plan, width, x.shape[1],
        TOP_K=routing.top_k, GATED=gated, KEEP_H=keep, EVEN_K=x.shape[1] % tile.BLOCK_K == 0,
        PRECISION=_precision(x.dtype), **tile._asdict(),
    )  # fmt: skip
    y = _rows_product(
        active, w_down.contiguous(), plan, slots, by_column=True, order=routing.order,
        weights=routing.weights.contiguous(),
    )  # fmt: skip
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
    slots, (width, gated) = routing.order.numel(), (w_down.shape[2], activation == "swiglu")
    x, offsets = x.contiguous(), routing.offsets
    plan = make_plan(offsets, slots)
    tile = gradient_tile(x.dtype)
    grad_h, active = torch.empty_like(h), x.new_empty(slots, width)
    parts = triton.cdiv(width, tile.BLOCK_N)
    dots = x.new_empty(parts, slots, dtype=torch.float32)
    down_gradient_kernel[(_programs(x.device),)](
        grad, w_down.contiguous(), h, routing.weights.contiguous(), grad_h, active, dots,
        routing.order, *plan, width, x.shape[1], slots,
        TOP_K=routing.top_k, GATED=gated, EVEN_K=x.shape[1] % tile.BLOCK_K == 0,
        PRECISION=_precision(x.dtype), **tile._asdict(),
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
        rows = _rows_product(grad_h, w_up.contiguous(), plan, slots, by_column=False)
        grad_x = _combine(rows, routing, None)
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
