"""The definition of the experts in FP8, in plain torch: blockwise scales, e4m3 in both passes.

A block of values shares one scale, a power of two: the largest factor that keeps the block within
e4m3's 448. So scaling is exact, and only the rounding to e4m3's 4 significant bits is lost.

=========================== ======================== ==========================================
product                     contraction over         blocks
=========================== ======================== ==========================================
h = x w_up^T                H                        x 1 x 128, w_up 128 x 128
y = act(h) w_down^T         I                        act(h) 1 x 128, w_down 128 x 128
gradients of x and act(h)   H and I                  gradient 1 x 128, the weights' own blocks
gradients of the weights    the rows of an expert    128 rows x 1 of both, counted from its first
=========================== ======================== ==========================================

Blocks of 1 x 128 and 128 x 128 are those of DeepSeek-V3 (arXiv 2412.19437, section 3.3.2). The
backward is straight-through: a quantiser's gradient is 1. Products accumulate in float32, and
nothing is quantised but the operands of the six products.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemocascade_kernels.common.activations import activate
from nemocascade_kernels.common.main_grad import placeholder_gradient
from nemocascade_kernels.common.products import accumulate_product
from nemocascade_kernels.common.routing import Routing
from nemocascade_kernels.moe_experts import reference

#: Values that share a scale, along each quantised dimension.
BLOCK = 128
E4M3 = torch.float8_e4m3fn

#: Bits of the significand of 448 = 1.75 * 2^8 as float32: larger ones need the next scale.
_LARGEST_SIGNIFICAND = 0x600000
#: Biased exponent of a factor: its largest value keeps the factor's inverse a normal number.
_EXPONENT_SUM, _LARGEST_EXPONENT = 127 + 127 + 8, 253


def scale_of(largest: Tensor) -> Tensor:
    """The scale of blocks with these largest magnitudes: `largest / scale` is in (224, 448].

    largest: float32 of any shape. A block of zeros has the scale 2^-126; infinity and NaN have the
    scale NaN, so that the results show them.
    """
    bits = largest.float().view(torch.int32)
    exponent = _EXPONENT_SUM - (bits >> 23) - ((bits & 0x7FFFFF) > _LARGEST_SIGNIFICAND).int()
    exponent = exponent.clamp_max(_LARGEST_EXPONENT)
    scale = ((254 - exponent) << 23).view(torch.float32)
    return scale.masked_fill(~largest.isfinite(), torch.nan)


def quantize(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Blocks of `rows` x 128 of the last two dimensions, the last ones padded with zeros.

    Returns e4m3 values [..., M', N'], padded to whole blocks, and scales [..., M' / rows, N' / 128]
    in float32; `values * scale` of its block is about x.
    """
    height, width = x.shape[-2:]
    padded = F.pad(x, (0, -width % BLOCK, 0, -height % rows))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, rows))
    scale = scale_of(blocks.abs().amax((-3, -1)))
    values = blocks / scale[..., None, :, None]
    return values.to(E4M3).flatten(-2).flatten(-3, -2), scale


def rounded(x: Tensor, rows: int) -> Tensor:
    """Quantise blocks of `rows` x 128 and dequantise: x's shape and dtype."""
    values, scale = quantize(x, rows)
    blocks = values.to(x.dtype).unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, rows))
    wide = (blocks * scale[..., None, :, None].to(x.dtype)).flatten(-2).flatten(-3, -2)
    return wide[..., : x.shape[-2], : x.shape[-1]]


def _by_rows(x: Tensor, gates: int = 1) -> Tensor:
    """Round blocks of 1 x 128; no block crosses from the gate to the up projection."""
    return rounded(x.unflatten(-1, (gates, -1)), 1).flatten(-2)


def _by_columns(x: Tensor) -> Tensor:
    """Round blocks of 128 rows x 1."""
    return rounded(x.t(), 1).t()


class _Product(torch.autograd.Function):
    """`factors[r] * (w[e] x[r])` of the rows r of each expert e, rounded to w's dtype.

    x: [R, K], float32 or wider, like the result [R, N] and the gradients of both. w: [E, N, K], of
    `gates` projections. factors: [R], or None for 1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        factors: Tensor | None,
        bounds: list[int],
        gates: int,
        main_grad: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, w, factors)
        ctx.bounds, ctx.gates, ctx.main_grad, ctx.weight = bounds, gates, main_grad, w
        out = x.new_zeros(x.shape[0], w.shape[1])
        for e, rows in _segments(bounds):
            out[rows] = _by_rows(x[rows]) @ _weight(w[e], gates, x.dtype).t()
        if factors is not None:
            out *= factors[:, None]
        return out.to(w.dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w, factors = ctx.saved_tensors
        grad, gates, main_grad = grads[0], ctx.gates, ctx.main_grad
        grad_x, weighted = torch.zeros_like(x), x if factors is None else x * factors[:, None]
        grad_w = torch.zeros_like(w) if ctx.needs_input_grad[1] and main_grad is None else None
        for e, rows in _segments(ctx.bounds):
            grad_x[rows] = _by_rows(grad[rows], gates) @ _weight(w[e], gates, x.dtype)
            left, right = _by_columns(grad[rows]), _by_columns(weighted[rows])
            if grad_w is not None:
                grad_w[e] = left.t() @ right
            elif main_grad is not None:
                accumulate_product(main_grad[e], left, right)
        grad_factors = None
        if factors is not None:
            grad_factors = (grad_x * x).sum(dim=1)
            grad_x *= factors[:, None]
        if main_grad is not None:
            grad_w = placeholder_gradient(ctx.weight)
        return grad_x, grad_w, grad_factors, None, None, None


def _segments(bounds: list[int]) -> list[tuple[int, slice]]:
    """The experts that have rows, and their rows."""
    pairs = enumerate(itertools.pairwise(bounds))
    return [(e, slice(begin, end)) for e, (begin, end) in pairs if end > begin]


def _weight(w: Tensor, gates: int, dtype: torch.dtype) -> Tensor:
    """Round the 128 x 128 blocks of each projection of one expert's weight [N, K]."""
    return rounded(w.to(dtype).unflatten(0, (gates, -1)), BLOCK).flatten(0, 1)


def experts(
    x: Tensor,
    routing: Routing,
    w_up: Tensor,
    w_down: Tensor,
    activation: str,
    main_grads: tuple[Tensor | None, ...],
) -> Tensor:
    """See `nemocascade_kernels.moe_experts`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    bounds, gates = routing.offsets.tolist(), w_up.shape[1] // w_down.shape[2]
    rows = reference.permute(x, routing).to(wide)
    h = _Product.apply(rows, w_up, None, bounds, gates, main_grads[0])
    factors = routing.weights.reshape(-1)[routing.order.long()].to(wide)
    y = _Product.apply(activate(h, activation), w_down, factors, bounds, 1, main_grads[1])
    output: Tensor = y[routing.positions.long()].sum(dim=1).to(x.dtype)
    return output
