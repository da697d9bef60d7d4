# The arguments of a jit function have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Grouped GEMMs in Triton: persistent programs loop over tiles of the rows of all experts.

Letters: R rows (slots sorted by expert), E experts, and a product [R, K] x [K, N]. Rows of expert e
are offsets[e]..offsets[e + 1]. A row tile belongs to one expert, given by `tile_expert`,
`tile_row` and `tile_count` (from `plan_kernel`), so the host never reads a group's size.
Consecutive tiles share their rows and loop over the columns of one expert's weight, which keeps
both in L2. Element offsets are 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def plan_kernel(
    offsets_ptr, tile_expert_ptr, tile_row_ptr, tile_count_ptr, most_tiles,
    E: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Expert and first row of each tile of ROWS rows; no tile crosses from expert to expert."""
    experts = tl.arange(0, BLOCK_E)
    begin = tl.load(offsets_ptr + experts, mask=experts < E, other=0)
    end = tl.load(offsets_ptr + experts + 1, mask=experts < E, other=0)
    tiles = (end - begin + ROWS - 1) // ROWS
    last = tl.cumsum(tiles, axis=0)
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.sum((last[None, :] <= mine[:, None]).to(tl.int32), axis=1)
    is_own = experts[None, :] == expert[:, None]
    first = tl.sum(tl.where(is_own, (last - tiles)[None, :], 0), axis=1)
    row = tl.sum(tl.where(is_own, begin[None, :], 0), axis=1) + (mine - first) * ROWS
    tl.store(tile_expert_ptr + mine, expert, mask=mine < most_tiles)
    tl.store(tile_row_ptr + mine, row, mask=mine < most_tiles)
    if tl.program_id(0) == 0:
        tl.store(tile_count_ptr, tl.sum(tiles, axis=0))


@triton.jit
def _rows_of_tile(
    tile, offsets_ptr, tile_expert_ptr, tile_row_ptr, ROWS: tl.constexpr
):  # fmt: skip
    expert = tl.load(tile_expert_ptr + tile)
    rows = tl.load(tile_row_ptr + tile) + tl.arange(0, ROWS)
    return expert.to(tl.int64), rows, rows < tl.load(offsets_ptr + expert + 1)


@triton.jit
def _sources(rows, is_row, order_ptr, TOP_K: tl.constexpr, GATHER: tl.constexpr):
    """Row indices of the left matrix: into x, by token, or into a matrix of sorted rows."""
    if GATHER:
        return (tl.load(order_ptr + rows, mask=is_row, other=0) // TOP_K).to(tl.int64)
    return rows.to(tl.int64)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """Matrix product with tl.dot's PRECISION, or of inputs "widened" to float32.

    Without widening, Triton's interpreter multiplies the bits of bfloat16.
    """
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _product(
    acc, left_ptr, sources, is_row, right_ptr, columns, N, K,
    B_BY_COLUMN: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return `acc + left[sources, :K] @ right[:K, columns]`.

    right is a contiguous [N, K] if B_BY_COLUMN (a column's elements are neighbours), else
    a contiguous [K, N].
    """
    depth = tl.arange(0, BLOCK_K)
    left = left_ptr + sources[:, None] * K + depth[None, :]
    is_column = columns < N
    wide = columns.to(tl.int64)
    if B_BY_COLUMN:
        right = right_ptr + wide[None, :] * K + depth[:, None]
    else:
        right = right_ptr + depth[:, None].to(tl.int64) * N + wide[None, :]
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(left, mask=is_row[:, None], other=0.0)
            b = tl.load(right, mask=is_column[None, :], other=0.0)
        else:
            inside = depth < K - start
            a = tl.load(left, mask=is_row[:, None] & inside[None, :], other=0.0)
            b = tl.load(right, mask=inside[:, None] & is_column[None, :], other=0.0)
        acc = _dot(a, b, acc, PRECISION)
        left += BLOCK_K
        right += BLOCK_K if B_BY_COLUMN else BLOCK_K * N
    return acc


@triton.jit
def _halves(tile):
    """Left and right columns of a tile, to be processed one after the other."""
    half: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, [tile.shape[0], 2, half]), [0, 2, 1]))


@triton.jit
def _store(pointer, rows, columns, width, values, mask):
    tl.store(
        pointer + rows[:, None].to(tl.int64) * width + columns[None, :],
        values.to(pointer.dtype.element_ty),
        mask=mask,
    )


@triton.jit
def rows_kernel(
    left_ptr, right_ptr, out_ptr, order_ptr, weights_ptr,
    offsets_ptr, tile_expert_ptr, tile_row_ptr, tile_count_ptr, N, K,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, WEIGH: tl.constexpr, B_BY_COLUMN: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute out[r] = left[r] @ right[e], times the slot's combine weight if WEIGH."""
    across = tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tl.load(tile_count_ptr) * across, tl.num_programs(0)):
        expert, rows, is_row = _rows_of_tile(
            tile // across, offsets_ptr, tile_expert_ptr, tile_row_ptr, BLOCK_M
        )
        columns = tile % across * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = _product(
            tl.zeros([BLOCK_M, BLOCK_N], tl.float32), left_ptr,
            _sources(rows, is_row, order_ptr, TOP_K, GATHER), is_row,
            right_ptr + expert * N * K, columns, N, K, B_BY_COLUMN, EVEN_K, PRECISION, BLOCK_K,
        )  # fmt: skip
        if WEIGH:
            slots = tl.load(order_ptr + rows, mask=is_row, other=0)
            acc *= tl.load(weights_ptr + slots, mask=is_row, other=0.0)[:, None]
        _store(out_ptr, rows, columns, N, acc, is_row[:, None] & (columns < N)[None, :])


@triton.jit
def up_kernel(
    x_ptr, w_up_ptr, h_ptr, active_ptr, order_ptr,
    offsets_ptr, tile_expert_ptr, tile_row_ptr, tile_count_ptr, N, K,
    TOP_K: tl.constexpr, GATED: tl.constexpr, KEEP_H: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute h = x[token] @ w_up[e]^T and act(h). N is the expert's width I; GATED: h has 2I."""
    across = tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tl.load(tile_count_ptr) * across, tl.num_programs(0)):
        expert, rows, is_row = _rows_of_tile(
            tile // across, offsets_ptr, tile_expert_ptr, tile_row_ptr, BLOCK_M
        )
        sources = _sources(rows, is_row, order_ptr, TOP_K, True)
        columns = tile % across * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = is_row[:, None] & (columns < N)[None, :]
        zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if GATED:
            gate, up = _gated_product(
                zeros, zeros, x_ptr, sources, is_row,
                w_up_ptr + expert * 2 * N * K, w_up_ptr + (expert * 2 + 1) * N * K,
                columns, N, K, EVEN_K, PRECISION, BLOCK_K,
            )  # fmt: skip
            if KEEP_H:
                _store(h_ptr, rows, columns, 2 * N, gate, mask)
                _store(h_ptr + N, rows, columns, 2 * N, up, mask)
            active = gate * tl.sigmoid(gate) * up
        else:
            h = _product(
                zeros, x_ptr, sources, is_row, w_up_ptr + expert * N * K, columns, N, K,
                True, EVEN_K, PRECISION, BLOCK_K,
            )  # fmt: skip
            if KEEP_H:
                _store(h_ptr, rows, columns, N, h, mask)
            # Use the rounded h, so that the backward recomputes the same activation.
            h = tl.maximum(h.to(h_ptr.dtype.element_ty).to(tl.float32), 0.0)
            active = h * h
        _store(active_ptr, rows, columns, N, active, mask)


@triton.jit
def _gated_product(
    gate, up, x_ptr, sources, is_row, gate_ptr, up_ptr, columns, N, K,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Both halves of a gated product at once, so that the rows of x are loaded only once."""
    depth = tl.arange(0, BLOCK_K)
    left = x_ptr + sources[:, None] * K + depth[None, :]
    offset = columns.to(tl.int64)[None, :] * K + depth[:, None]
    is_column = columns < N
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(left, mask=is_row[:, None], other=0.0)
            inside = is_column[None, :]
        else:
            within = depth < K - start
            a = tl.load(left, mask=is_row[:, None] & within[None, :], other=0.0)
            inside = is_column[None, :] & within[:, None]
        gate = _dot(a, tl.load(gate_ptr + offset, mask=inside, other=0.0), gate, PRECISION)
        up = _dot(a, tl.load(up_ptr + offset, mask=inside, other=0.0), up, PRECISION)
        left += BLOCK_K
        offset += BLOCK_K
    return gate, up


@triton.jit
def _activation_gradient(
    grad, h_ptr, grad_h_ptr, active_ptr, rows, columns, is_row, weight, N, GATED: tl.constexpr
):
    """Epilogue of `down_gradient_kernel` for some columns; returns their part of the dots."""
    mask = is_row[:, None] & (columns < N)[None, :]
    width = 2 * N if GATED else N
    h_pointers = h_ptr + rows[:, None].to(tl.int64) * width + columns[None, :]
    h = tl.load(h_pointers, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(h_pointers + N, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(h)
        silu = h * sigmoid
        active = silu * up
        weighted = grad * weight
        slope = sigmoid + silu * (1.0 - sigmoid)
        _store(grad_h_ptr, rows, columns, width, weighted * up * slope, mask)
        _store(grad_h_ptr + N, rows, columns, width, weighted * silu, mask)
    else:
        h = tl.maximum(h, 0.0)
        active = h * h
        _store(grad_h_ptr, rows, columns, width, grad * weight * (2.0 * h), mask)
    _store(active_ptr, rows, columns, N, active * weight, mask)
    return tl.sum(active * grad, axis=1)


@triton.jit
def down_gradient_kernel(
    grad_ptr, w_down_ptr, h_ptr, weights_ptr, grad_h_ptr, active_ptr, dots_ptr, order_ptr,
    offsets_ptr, tile_expert_ptr, tile_row_ptr, tile_count_ptr, N, K, slots,
    TOP_K: tl.constexpr, GATED: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute g = grad[token] @ w_down[e] (K is H, N is I) and the gradients that follow from it.

    With a = act(h) recomputed and w the slot's combine weight: active = w a, grad_h = w act'(h) g,
    and dots[n] = a . g over this tile's columns (their sum over n is the gradient of w).
    """
    across = tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tl.load(tile_count_ptr) * across, tl.num_programs(0)):
        expert, rows, is_row = _rows_of_tile(
            tile // across, offsets_ptr, tile_expert_ptr, tile_row_ptr, BLOCK_M
        )
        grad = _product(
            tl.zeros([BLOCK_M, BLOCK_N], tl.float32), grad_ptr,
            _sources(rows, is_row, order_ptr, TOP_K, True), is_row, w_down_ptr + expert * N * K,
            tile % across * BLOCK_N + tl.arange(0, BLOCK_N), N, K, False, EVEN_K, PRECISION,
            BLOCK_K,
        )  # fmt: skip
        slot = tl.load(order_ptr + rows, mask=is_row, other=0)
        weight = tl.load(weights_ptr + slot, mask=is_row, other=0.0)[:, None]
        first_half, second_half = _halves(grad)
        columns = tile % across * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        dots = _activation_gradient(
            first_half, h_ptr, grad_h_ptr, active_ptr, rows, columns, is_row, weight, N, GATED
        )
        dots += _activation_gradient(
            second_half, h_ptr, grad_h_ptr, active_ptr, rows, columns + BLOCK_N // 2, is_row,
            weight, N, GATED,
        )  # fmt: skip
        tl.store(dots_ptr + (tile % across).to(tl.int64) * slots + rows, dots, mask=is_row)


@triton.jit
def weight_gradient_kernel(
    grad_ptr, x_ptr, out_ptr, order_ptr, offsets_ptr, N, K,
    E: tl.constexpr, TOP_K: tl.constexpr, GATHER_GRAD: tl.constexpr, GATHER_X: tl.constexpr,
    ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute out[e] (+)= grad^T x over the rows of expert e: [N, K], in [BLOCK_M, BLOCK_N]."""
    down, across = tl.cdiv(N, BLOCK_M), tl.cdiv(K, BLOCK_N)
    for tile in range(tl.program_id(0), E * down * across, tl.num_programs(0)):
        expert = tile // (down * across)
        left = tile // across % down * BLOCK_M + tl.arange(0, BLOCK_M)
        right = tile % across * BLOCK_N + tl.arange(0, BLOCK_N)
        is_left, is_right = left < N, right < K
        begin, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in range(begin, end, BLOCK_K):
            rows = first + tl.arange(0, BLOCK_K)
            is_row = rows < end
            a = tl.load(
                grad_ptr
                + _sources(rows, is_row, order_ptr, TOP_K, GATHER_GRAD)[:, None] * N
                + left[None, :],
                mask=is_row[:, None] & is_left[None, :],
                other=0.0,
            )
            b = tl.load(
                x_ptr
                + _sources(rows, is_row, order_ptr, TOP_K, GATHER_X)[:, None] * K
                + right[None, :],
                mask=is_row[:, None] & is_right[None, :],
                other=0.0,
            )
            acc = _dot(tl.trans(a), b, acc, PRECISION)
        start = out_ptr + (expert.to(tl.int64) * N + left[:, None]) * K
        if not ACCUMULATE:
            tl.store(
                start + right[None, :],
                acc.to(out_ptr.dtype.element_ty),
                mask=is_left[:, None] & is_right[None, :],
            )
        elif end > begin:
            # The old values of a whole tile would not fit in registers together with the new ones.
            first_half, second_half = _halves(acc)
            part = tile % across * BLOCK_N + tl.arange(0, BLOCK_N // 2)
            _add(start + part[None, :], first_half, is_left[:, None] & (part < K)[None, :])
            part += BLOCK_N // 2
            _add(start + part[None, :], second_half, is_left[:, None] & (part < K)[None, :])


@triton.jit
def _add(pointers, values, mask):
    values += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)
