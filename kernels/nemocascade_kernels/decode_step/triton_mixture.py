"""Launches of the mixture of experts of a decode step in Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from nemocascade_kernels.common.routing import RouterSettings
from nemocascade_kernels.common.tile_product import arch_of, precision
from nemocascade_kernels.decode_step.routed_rows import RoutedRows, SharedExpert
from nemocascade_kernels.decode_step.triton_experts import (
    down_rows_kernel,
    sum_rows_kernel,
    up_rows_kernel,
)
from nemocascade_kernels.decode_step.triton_rows import norm_route_kernel

_ROUTED_ROWS = 16
"""Rows of a program of the router: those of the smallest product of tensor cores."""
_ROUTER_BYTES = 32_768
"""Bytes of the router's weights that a program multiplies at once; shared memory holds three."""
_MOST_ROWS = 64
"""Rows of an expert that one read of its weights serves."""
_CHUNK = 64
"""Rows in which a program looks for an expert's at once."""
_SUMMED = 1024


def norm_route(
    hidden: Tensor,
    norm_weight: Tensor,
    eps: float,
    router: Tensor,
    bias: Tensor | None,
    slots: Tensor | None,
    spare: int,
    settings: RouterSettings,
) -> RoutedRows:
    """See `steps.Steps.norm_route`."""
    (rows, width), count = hidden.shape, router.shape[0]
    out = RoutedRows.empty(rows, width, hidden.dtype, settings.top_k, hidden.device)
    if not rows:
        return out
    x, chosen, weights = out.x, out.chosen, out.weights
    block_e = max(16, triton.next_power_of_2(count))
    widest = 32 if hidden.dtype == torch.float32 else 128
    block_h = max(16, min(widest, _ROUTER_BYTES // (block_e * hidden.dtype.itemsize)))
    norm_route_kernel[(triton.cdiv(rows, _ROUTED_ROWS),)](
        hidden, norm_weight, router, bias, slots, x, chosen, weights,
        rows, spare, x.stride(0), chosen.stride(0), eps, settings.scale,
        H=width, E=count, K=settings.top_k, GROUPS=settings.num_groups,
        TOP_GROUPS=settings.top_groups, SOFTMAX=settings.score == "softmax",
        NORMALIZE=settings.normalize, HAS_BIAS=bias is not None, HAS_SLOTS=slots is not None,
        EVEN_H=width % block_h == 0, BLOCK_T=_ROUTED_ROWS, BLOCK_H=block_h, BLOCK_E=block_e,
        BLOCK_K=triton.next_power_of_2(settings.top_k),
        BLOCK_G=triton.next_power_of_2(settings.num_groups),
        PRECISION=_precision(hidden.dtype), num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


def up(x: Tensor, weight: Tensor, swiglu: bool) -> Tensor:
    """See `steps.Steps.up`."""
    h = x.new_empty(x.shape[0], weight.shape[0] // (1 + swiglu))
    if x.shape[0]:
        x = x if x.stride(1) == 1 else x.contiguous()
        shared = SharedExpert(weight, weight, 0, x.shape[0])
        nothing = RoutedRows.empty(0, x.shape[1], x.dtype, 1, x.device)
        _launch_up(x, nothing, 0, weight[None], shared, h, h, swiglu)
    return h


def mixture(
    routed: RoutedRows,
    w_up: Tensor,
    w_down: Tensor,
    first_expert: int,
    shared: SharedExpert | None,
    residual: Tensor | None,
    swiglu: bool,
) -> Tensor:
    """See `steps.Steps.mixture`."""
    x, chosen, weights = routed.x, routed.chosen, routed.weights
    (rows, top_k), (count, hidden, width) = chosen.shape, w_down.shape
    dtype = torch.float32 if residual is None else residual.dtype
    out = torch.empty(rows, hidden, dtype=dtype, device=x.device)
    if not rows:
        return out
    shared = shared or SharedExpert(w_up, w_down[0, :, :0], 0, 0)
    shared_width = shared.down.shape[1]
    h, shared_h = x.new_empty(rows, top_k, width), x.new_empty(shared.rows, shared_width)
    _launch_up(x, routed, first_expert, w_up, shared, h, shared_h, swiglu)
    y, shared_y = (
        torch.empty(n, hidden, dtype=torch.float32, device=x.device)
        for n in (rows * top_k, shared.rows)
    )
    groups, sizes = min(routed.count * top_k, count), _tile(rows, x)
    tiles = triton.cdiv(hidden, sizes["BLOCK_N"])
    down_rows_kernel[(groups * tiles + (tiles if shared.rows else 0),)](
        h, shared_h, chosen, weights, w_down, shared.down, y, shared_y,
        routed.first, routed.count, chosen.stride(0), first_expert, groups, width, shared_width,
        shared.first, shared.rows,
        E=count, K=top_k, H=hidden, BY_SLOT=groups < count,
        BLOCK_R=max(1, triton.next_power_of_2(routed.count)) if groups < count else 1,
        CHUNK=min(_CHUNK, triton.next_power_of_2(rows)), BLOCK_K=triton.next_power_of_2(top_k),
        EVEN=width % sizes["BLOCK_D"] == 0 and shared_width % sizes["BLOCK_D"] == 0, **sizes,
    )  # fmt: skip
    sum_rows_kernel[(rows, triton.cdiv(hidden, _SUMMED))](
        y, shared_y, chosen, residual, out, routed.first, routed.count, chosen.stride(0),
        first_expert, shared.first, shared.rows,
        E=count, K=top_k, H=hidden, HAS_RESIDUAL=residual is not None, BLOCK_H=_SUMMED,
    )  # fmt: skip
    return out


def _launch_up(
    x: Tensor,
    routed: RoutedRows,
    first_expert: int,
    w_up: Tensor,
    shared: SharedExpert,
    h: Tensor,
    shared_h: Tensor,
    swiglu: bool,
) -> None:
    """Write the activations of the chosen experts to h and those of the shared one to shared_h."""
    (rows, hidden), count = x.shape, w_up.shape[0]
    width, shared_width = w_up.shape[1] // (1 + swiglu), shared_h.shape[1]
    top_k, sizes = routed.top_k, _tile(rows, x)
    # Programs look for the rows of the experts, or of the slots where these are fewer.
    groups = min(routed.count * top_k, count)
    tiles = groups * triton.cdiv(width, sizes["BLOCK_N"])
    tiles += triton.cdiv(shared_width, sizes["BLOCK_N"]) if shared.rows else 0
    up_rows_kernel[(tiles,)](
        x, routed.chosen, w_up, shared.up, h, shared_h,
        routed.first, routed.count, x.stride(0), routed.chosen.stride(0),
        first_expert, groups, width, shared_width, shared.first, shared.rows,
        E=count, K=top_k, H=hidden, GATED=swiglu, BY_SLOT=groups < count,
        BLOCK_R=max(1, triton.next_power_of_2(routed.count)) if groups < count else 1,
        CHUNK=min(_CHUNK, triton.next_power_of_2(rows)), BLOCK_K=triton.next_power_of_2(top_k),
        EVEN=hidden % sizes["BLOCK_D"] == 0, **sizes,
    )  # fmt: skip


def _tile(rows: int, x: Tensor) -> dict[str, Any]:
    """Tile of the products of experts with x, and its launch settings."""
    dtype, block = x.dtype, max(16, min(_MOST_ROWS, triton.next_power_of_2(rows)))
    # Except on Hopper, four warps would spill registers.
    wide = block >= 64 and dtype != torch.float32 and arch_of(x.device) != 90
    return {
        "BLOCK_M": block,
        # Sums of three products of tf32 need more registers.
        "BLOCK_N": 32 if dtype == torch.float32 else 64,
        "BLOCK_D": 32 if dtype == torch.float32 else 64,
        "PRECISION": _precision(dtype),
        "num_warps": 8 if wide else 4,
        "num_stages": 4,
    }


def _precision(dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 else precision(dtype)
