# The arguments of a jit function have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""RMSNorm of a step's rows in Triton, alone or with the router's product and choice.

Letters: n rows, H their width, E experts, K choices a row. Element offsets are 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nemocascade_kernels.common.expert_choice import (
    LOWEST,
    first_largest,
    ordered,
    scores_of,
    without_other_groups,
)
from nemocascade_kernels.common.tile_product import dot


@triton.jit
def norm_kernel(
    x_ptr, weight_ptr, out_ptr, row_stride, eps, H: tl.constexpr, BLOCK_H: tl.constexpr
):
    """`x / sqrt(mean(x^2) + eps) * weight` of one row."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    x = tl.load(x_ptr + row * row_stride + h, mask=h < H, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / H + eps)
    weight = tl.load(weight_ptr + h, mask=h < H, other=0.0).to(tl.float32)
    out = (x * scale * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * H + h, out, mask=h < H)


@triton.jit
def norm_route_kernel(
    hidden_ptr, norm_weight_ptr, router_ptr, bias_ptr, slots_ptr, x_ptr, chosen_ptr, weights_ptr,
    rows, spare, x_stride, choice_stride, eps, scale,
    H: tl.constexpr, E: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr, SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SLOTS: tl.constexpr, EVEN_H: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Norm of BLOCK_T rows, their logits, and the choice of experts, of weight 0 and id E in rows
    of the spare slot. The row's own stride separates results, which share one buffer."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_row = t < rows
    columns, choices = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    is_expert = columns < E
    squares = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        here = is_row[:, None] if EVEN_H else is_row[:, None] & (h < H)[None, :]
        part = tl.load(hidden_ptr + t[:, None] * H + h[None, :], mask=here, other=0.0)
        squares += part.to(tl.float32) * part.to(tl.float32)
    factor = tl.rsqrt(tl.sum(squares, 1) / H + eps)
    logits = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        is_h = h < H
        here = is_row[:, None] if EVEN_H else is_row[:, None] & is_h[None, :]
        part = tl.load(hidden_ptr + t[:, None] * H + h[None, :], mask=here, other=0.0)
        weight = tl.load(norm_weight_ptr + h, mask=is_h, other=0.0).to(tl.float32)
        x = (part.to(tl.float32) * factor[:, None] * weight[None, :]).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + t[:, None] * x_stride + h[None, :], x, mask=here)
        inside = is_expert[:, None] if EVEN_H else is_expert[:, None] & is_h[None, :]
        router = tl.load(router_ptr + columns[:, None] * H + h[None, :], mask=inside, other=0.0)
        logits = dot(x, tl.trans(router), logits, PRECISION)

    scores = scores_of(tl.where(is_expert[None, :], logits, float("-inf")), SOFTMAX)
    biased = scores
    if HAS_BIAS:
        biased += tl.load(bias_ptr + columns, mask=is_expert, other=0.0)[None, :]
    keys = tl.where(is_expert[None, :], ordered(biased), LOWEST)
    if GROUPS > 1:
        keys, _ = without_other_groups(
            keys, biased, columns, GROUPS, TOP_GROUPS, E // GROUPS, BLOCK_E, BLOCK_G
        )
    is_live = is_row
    if HAS_SLOTS:
        is_live = is_row & (tl.load(slots_ptr + t, mask=is_row, other=0) != spare)
    ids = tl.full([BLOCK_T, BLOCK_K], E, tl.int32)
    chosen = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for k in range(K):
        best = first_largest(keys, columns, BLOCK_E)
        hit = columns[None, :] == best[:, None]
        keys = tl.where(hit, LOWEST, keys)
        here = (choices[None, :] == k) & is_live[:, None]
        ids = tl.where(here, best[:, None], ids)
        chosen = tl.where(here, tl.sum(tl.where(hit, scores, 0.0), 1)[:, None], chosen)
    if NORMALIZE:
        chosen = chosen / (tl.sum(chosen, 1)[:, None] + 1e-20)
    place = t[:, None] * choice_stride + choices[None, :]
    is_choice = is_row[:, None] & (choices < K)[None, :]
    tl.store(chosen_ptr + place, ids, mask=is_choice)
    tl.store(weights_ptr + place, chosen * scale, mask=is_choice)
