# The arguments of a jit function have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Grouped products of e4m3 matrices in Triton, with quantisation in the epilogues.

Letters as in `triton_gemm`. Every operand is padded to whole blocks of 128 and holds its
contraction last; `blocks` counts the blocks of the contraction. Tiles have 128 rows of one expert,
which are also the blocks of the weights' gradients.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nemocascade_kernels.moe_experts.fp8_quantize import (
    as_stored,
    factor_and_scale,
    magnitudes,
    store_columns,
    to_e4m3,
)


@triton.jit
def _rows_of_tile(tile, offsets_ptr, tile_expert_ptr, tile_row_ptr):
    expert = tl.load(tile_expert_ptr + tile)
    rows = tl.load(tile_row_ptr + tile) + tl.arange(0, 128)
    return expert.to(tl.int64), rows, rows < tl.load(offsets_ptr + expert + 1)


@triton.jit
def _tokens(rows, is_row, order_ptr, TOP_K: tl.constexpr):
    return (tl.load(order_ptr + rows, mask=is_row, other=0) // TOP_K).to(tl.int64)


@triton.jit
def _product(
    left_ptr, left_scale_ptr, sources, is_row, right_ptr, right_scale_ptr, right_block, blocks
):  # fmt: skip
    """[128, 128] of left[sources] @ right[right_block * 128 : ...]^T.

    left: [*, blocks * 128] with scales by row and block. right: [*, blocks * 128] with scales by
    blocks of 128 x 128; `right_block` is 64-bit.
    """
    inner = tl.arange(0, 128)
    left = left_ptr + sources[:, None] * (blocks * 128) + inner[None, :]
    right = right_ptr + (right_block * 128 + inner)[None, :] * (blocks * 128) + inner[:, None]
    left_scale = left_scale_ptr + sources * blocks
    right_scale = right_scale_ptr + right_block * blocks
    acc = tl.zeros([128, 128], tl.float32)
    for _ in range(blocks):
        a = tl.load(left, mask=is_row[:, None], other=0.0)
        b = tl.load(right)
        scale = tl.load(left_scale, mask=is_row, other=0.0) * tl.load(right_scale)
        acc += tl.dot(a, b, out_dtype=tl.float32) * scale[:, None]
        left += 128
        right += 128
        left_scale += 1
        right_scale += 1
    return acc


@triton.jit
def _store(pointer, rows, columns, width, values, mask, INTERPRETED: tl.constexpr):
    at = pointer + rows[:, None].to(tl.int64) * width + columns[None, :]
    tl.store(at, as_stored(values, pointer.dtype.element_ty, INTERPRETED), mask=mask)


@triton.jit
def _halves(tile):
    """Left and right columns of a tile, to be processed one after the other."""
    half: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, [tile.shape[0], 2, half]), [0, 2, 1]))


@triton.jit
def fp8_up_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, h_ptr, active_ptr, active_scale_ptr, order_ptr,
    offsets_ptr, tile_expert_ptr, tile_row_ptr, tile_count_ptr, N, blocks,
    TOP_K: tl.constexpr, GATED: tl.constexpr, KEEP_H: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Compute h = x[token] w_up[e]^T, and act(h) in blocks of 1 x 128.

    N is the expert's width I. x: [T, blocks * 128]. h: [R, gates * N]. active: [R, across * 128]
    with scales [R, across], across = ceil(N / 128).
    """
    across = tl.cdiv(N, 128)
    gates: tl.constexpr = 2 if GATED else 1
    for index in range(tl.program_id(0), tl.load(tile_count_ptr) * across, tl.num_programs(0)):
        expert, rows, is_row = _rows_of_tile(
            index // across, offsets_ptr, tile_expert_ptr, tile_row_ptr
        )
        tokens = _tokens(rows, is_row, order_ptr, TOP_K)
        block = index % across
        columns = block * 128 + tl.arange(0, 128)
        mask = is_row[:, None] & (columns < N)[None, :]
        h = _product(
            x_ptr, x_scale_ptr, tokens, is_row, w_ptr, w_scale_ptr,
            expert * gates * across + block, blocks,
        )  # fmt: skip
        if KEEP_H:
            _store(h_ptr, rows, columns, gates * N, h, mask, INTERPRETED)
        # Use the rounded h, so that the backward recomputes the same activation.
        h = as_stored(h, h_ptr.dtype.element_ty, INTERPRETED).to(tl.float32)
        if GATED:
            up = _product(
                x_ptr, x_scale_ptr, tokens, is_row, w_ptr, w_scale_ptr,
                (expert * 2 + 1) * across + block, blocks,
            )  # fmt: skip
            if KEEP_H:
                _store(h_ptr + N, rows, columns, 2 * N, up, mask, INTERPRETED)
            up = as_stored(up, h_ptr.dtype.element_ty, INTERPRETED).to(tl.float32)
            active = h * tl.sigmoid(h) * up
        else:
            h = tl.maximum(h, 0.0)
            active = h * h
        factor, scale = factor_and_scale(tl.max(magnitudes(active), axis=1))
        wide = rows.to(tl.int64)
        at = active_ptr + wide[:, None] * (across * 128) + columns[None, :]
        tl.store(at, to_e4m3(active * factor[:, None], INTERPRETED), mask=is_row[:, None])
        tl.store(active_scale_ptr + wide * across + block, scale, mask=is_row)


@triton.jit
def fp8_rows_kernel(
    left_ptr, left_scale_ptr, right_ptr, right_scale_ptr, out_ptr, order_ptr, weights_ptr,
    offsets_ptr, tile_expert_ptr, tile_row_ptr, tile_count_ptr, N, blocks,
    WEIGH: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Compute out[r] = left[r] @ right[e]^T, [R, N], times the slot's combine weight if WEIGH."""
    across = tl.cdiv(N, 128)
    for index in range(tl.program_id(0), tl.load(tile_count_ptr) * across, tl.num_programs(0)):
        expert, rows, is_row = _rows_of_tile(
            index // across, offsets_ptr, tile_expert_ptr, tile_row_ptr
        )
        block = index % across
        acc = _product(
            left_ptr, left_scale_ptr, rows.to(tl.int64), is_row, right_ptr, right_scale_ptr,
            expert * across + block, blocks,
        )  # fmt: skip
        if WEIGH:
            slots = tl.load(order_ptr + rows, mask=is_row, other=0)
            acc *= tl.load(weights_ptr + slots, mask=is_row, other=0.0)[:, None]
        columns = block * 128 + tl.arange(0, 128)
        mask = is_row[:, None] & (columns < N)[None, :]
        _store(out_ptr, rows, columns, N, acc, mask, INTERPRETED)


@triton.jit
def _activation_gradient(grad, h_ptr, rows, columns, is_row, N, GATED: tl.constexpr):
    """act(h) of some columns, and the gradients of h: of the gate and the up projection if GATED,
    else twice the only one. grad: that of act(h) times the combine weight."""
    mask = is_row[:, None] & (columns < N)[None, :]
    gates: tl.constexpr = 2 if GATED else 1
    pointers = h_ptr + rows[:, None].to(tl.int64) * (gates * N) + columns[None, :]
    h = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(pointers + N, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(h)
        silu = h * sigmoid
        slope = sigmoid + silu * (1.0 - sigmoid)
        return silu * up, grad * up * slope, grad * silu
    h = tl.maximum(h, 0.0)
    first = grad * (2.0 * h)
    return h * h, first, first


@triton.jit
def _store_rows(values, factor, out_ptr, rows, first, width, is_row, INTERPRETED: tl.constexpr):
    columns = first + tl.arange(0, values.shape[1])
    at = out_ptr + rows[:, None].to(tl.int64) * width + columns[None, :]
    tl.store(at, to_e4m3(values * factor[:, None], INTERPRETED), mask=is_row[:, None])


@triton.jit
def fp8_down_gradient_kernel(
    grad_ptr, grad_scale_ptr, w_ptr, w_scale_ptr, h_ptr, weights_ptr,
    grad_h_ptr, grad_h_scale_ptr, grad_h_t_ptr, grad_h_t_scale_ptr, active_t_ptr,
    active_t_scale_ptr, dots_ptr, order_ptr,
    offsets_ptr, tile_expert_ptr, tile_row_ptr, tile_count_ptr, N, blocks, slots,
    TOP_K: tl.constexpr, GATED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Compute g = grad[token] @ w_down[e] and quantise the gradients that follow from it.

    N is the expert's width I. With a = act(h) recomputed and w the slot's combine weight:
    grad_h = w act'(h) g in blocks of 1 x 128 [R, gates * across * 128] and of 128 rows x 1
    [tiles, gates * across * 128, 128]; w a in blocks of 128 rows x 1; dots[n] = a . g over
    this tile's columns.
    """
    across = tl.cdiv(N, 128)
    gates: tl.constexpr = 2 if GATED else 1
    width = gates * across * 128
    for index in range(tl.program_id(0), tl.load(tile_count_ptr) * across, tl.num_programs(0)):
        tile, block = index // across, index % across
        expert, rows, is_row = _rows_of_tile(tile, offsets_ptr, tile_expert_ptr, tile_row_ptr)
        grad = _product(
            grad_ptr, grad_scale_ptr, _tokens(rows, is_row, order_ptr, TOP_K), is_row,
            w_ptr, w_scale_ptr, expert * across + block, blocks,
        )  # fmt: skip
        slot = tl.load(order_ptr + rows, mask=is_row, other=0)
        weight = tl.load(weights_ptr + slot, mask=is_row, other=0.0)[:, None]
        halves = _halves(grad)
        dots = tl.zeros([128], tl.float32)
        largest_gate = tl.zeros([128], tl.int32)
        largest_up = tl.zeros([128], tl.int32)
        for half in tl.static_range(2):
            columns = block * 128 + half * 64 + tl.arange(0, 64)
            active, of_gate, of_up = _activation_gradient(
                halves[half] * weight, h_ptr, rows, columns, is_row, N, GATED
            )
            dots += tl.sum(active * halves[half], axis=1)
            largest_gate = tl.maximum(largest_gate, tl.max(magnitudes(of_gate), axis=1))
            largest_up = tl.maximum(largest_up, tl.max(magnitudes(of_up), axis=1))
        gate_factor, gate_scale = factor_and_scale(largest_gate)
        up_factor, up_scale = factor_and_scale(largest_up)
        scales = grad_h_scale_ptr + rows.to(tl.int64) * (gates * across) + block
        tl.store(scales, gate_scale, mask=is_row)
        if GATED:
            tl.store(scales + across, up_scale, mask=is_row)
        # The gradients are computed anew: both halves would not fit in registers.
        for half in tl.static_range(2):
            first = block * 128 + half * 64
            columns = first + tl.arange(0, 64)
            active, of_gate, of_up = _activation_gradient(
                halves[half] * weight, h_ptr, rows, columns, is_row, N, GATED
            )
            store_columns(
                active * weight, active_t_ptr, active_t_scale_ptr, tile, first, across * 128,
                INTERPRETED,
            )  # fmt: skip
            store_columns(
                of_gate, grad_h_t_ptr, grad_h_t_scale_ptr, tile, first, width, INTERPRETED
            )
            _store_rows(of_gate, gate_factor, grad_h_ptr, rows, first, width, is_row, INTERPRETED)
            if GATED:
                first += across * 128
                store_columns(
                    of_up, grad_h_t_ptr, grad_h_t_scale_ptr, tile, first, width, INTERPRETED
                )
                _store_rows(of_up, up_factor, grad_h_ptr, rows, first, width, is_row, INTERPRETED)
        tl.store(dots_ptr + block.to(tl.int64) * slots + rows, dots, mask=is_row)


@triton.jit
def fp8_weight_gradient_kernel(
    left_ptr, left_scale_ptr, right_ptr, right_scale_ptr, out_ptr, offsets_ptr, N, K,
    E: tl.constexpr, BLOCK_E: tl.constexpr, GATES: tl.constexpr, ACCUMULATE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Compute out[e] (+)= left^T right over the tiles of expert e: [GATES * N, K].

    left: [tiles, GATES * ceil(N / 128) * 128, 128], right: [tiles, ceil(K / 128) * 128, 128].
    """
    down, across = tl.cdiv(N, 128), tl.cdiv(K, 128)
    inner, experts = tl.arange(0, 128), tl.arange(0, BLOCK_E)
    begin = tl.load(offsets_ptr + experts, mask=experts < E, other=0)
    tiles = (tl.load(offsets_ptr + experts + 1, mask=experts < E, other=0) - begin + 127) // 128
    per_expert = GATES * down * across
    for index in range(tl.program_id(0), E * per_expert, tl.num_programs(0)):
        expert = index // per_expert
        left_block = index % per_expert // across
        right_block = index % across
        first = tl.sum(tl.where(experts < expert, tiles, 0), axis=0)
        count = tl.sum(tl.where(experts == expert, tiles, 0), axis=0)
        rows = (first.to(tl.int64) * (GATES * down) + left_block) * 128 + inner
        columns = (first.to(tl.int64) * across + right_block) * 128 + inner
        left = left_ptr + rows[:, None] * 128 + inner[None, :]
        right = right_ptr + columns[None, :] * 128 + inner[:, None]
        left_scale, right_scale = left_scale_ptr + rows, right_scale_ptr + columns
        acc = tl.zeros([128, 128], tl.float32)
        for _ in range(count):
            product = tl.dot(tl.load(left), tl.load(right), out_dtype=tl.float32)
            acc += product * tl.load(left_scale)[:, None] * tl.load(right_scale)[None, :]
            left += GATES * down * 16384
            right += across * 16384
            left_scale += GATES * down * 128
            right_scale += across * 128
        gate, n = left_block // down, left_block % down * 128 + inner
        is_row = n < N
        start = out_ptr + ((expert.to(tl.int64) * GATES + gate) * N + n[:, None]) * K
        halves = _halves(acc)
        # The old values of a whole tile would not fit in registers together with the new ones.
        for half in tl.static_range(2):
            k = right_block * 128 + half * 64 + tl.arange(0, 64)
            mask = is_row[:, None] & (k < K)[None, :]
            values = halves[half]
            if ACCUMULATE:
                mask &= count > 0
                values += tl.load(start + k[None, :], mask=mask, other=0.0).to(tl.float32)
            values = as_stored(values, out_ptr.dtype.element_ty, INTERPRETED)
            tl.store(start + k[None, :], values, mask=mask)
