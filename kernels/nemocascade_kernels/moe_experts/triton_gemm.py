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

from nemocascade_kernels.common.tile_product import dot


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
def _product(
    acc, left_ptr, sources, is_row, right, matrix, column, N, K,
    B_BY_COLUMN: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return `acc + left[sources, :K] @ right[matrix][:K, column : column + BLOCK_N]`.

    right holds matrices [N, K] if B_BY_COLUMN (a column's elements are neighbours), else [K, N].
    TMA: it is a tensor descriptor of them, else a pointer to the first.
    """
    depth = tl.arange(0, BLOCK_K)
    left = left_ptr + sources[:, None] * K + depth[None, :]
    for start in range(0, K, BLOCK_K):
        a = _left_tile(left, is_row, depth < K - start, EVEN_K)
        b = _right_tile(
            right, matrix, column, start, N, K, B_BY_COLUMN, EVEN_K, TMA, BLOCK_N, BLOCK_K
        )
        acc = dot(a, b, acc, PRECISION)
        left += BLOCK_K
    return acc


@triton.jit
def _left_tile(pointers, is_row, is_deep, EVEN_K: tl.constexpr):
    if EVEN_K:
        return tl.load(pointers, mask=is_row[:, None], other=0.0)
    return tl.load(pointers, mask=is_row[:, None] & is_deep[None, :], other=0.0)


@triton.jit
def _right_tile(
    right, matrix, column, start, N, K, B_BY_COLUMN: tl.constexpr, EVEN_K: tl.constexpr,
    TMA: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return [BLOCK_K, BLOCK_N] of right[matrix] from row `start` and `column` on; 0 outside."""
    if TMA:
        if B_BY_COLUMN:
            tile = right.load([matrix.to(tl.int32), column, start])
            return tl.reshape(tile, [BLOCK_N, BLOCK_K]).T
        tile = right.load([matrix.to(tl.int32), start, column])
        return tl.reshape(tile, [BLOCK_K, BLOCK_N])
    else:  # Without it, Triton would compile the rest for a descriptor too.  # noqa: RET505
        columns, depth = column + tl.arange(0, BLOCK_N), start + tl.arange(0, BLOCK_K)
        pointers = right + matrix * N * K
        if B_BY_COLUMN:
            pointers += columns.to(tl.int64)[None, :] * K + depth[:, None]
        else:
            pointers += depth[:, None].to(tl.int64) * N + columns[None, :]
        mask = (columns < N)[None, :]
        if not EVEN_K:
            mask = mask & (depth < K)[:, None]
        return tl.load(pointers, mask=mask, other=0.0)


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
    left_ptr, right, out_ptr, order_ptr, weights_ptr,
    offsets_ptr, tile_expert_ptr, tile_row_ptr, tile_count_ptr, slots,
    N: tl.constexpr, K: tl.constexpr, E: tl.constexpr, WEIGH: tl.constexpr, BY_SLOT: tl.constexpr,
    B_BY_COLUMN: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute out[r] = left[r] @ right[e], times the slot's combine weight if WEIGH.

    BY_SLOT: write out[order[r]], and 0 for slots without an expert. With one choice a token this
    is the combined output, because no two rows belong to one token.
    """
    across = tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tl.load(tile_count_ptr) * across, tl.num_programs(0)):
        expert, rows, is_row = _rows_of_tile(
            tile // across, offsets_ptr, tile_expert_ptr, tile_row_ptr, BLOCK_M
        )
        column = tile % across * BLOCK_N
        acc = _product(
            tl.zeros([BLOCK_M, BLOCK_N], tl.float32), left_ptr, rows.to(tl.int64), is_row,
            right, expert, column, N, K, B_BY_COLUMN, EVEN_K, TMA, PRECISION, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if WEIGH or BY_SLOT:
            slot = tl.load(order_ptr + rows, mask=is_row, other=0)
        if WEIGH:
            acc *= tl.load(weights_ptr + slot, mask=is_row, other=0.0)[:, None]
        columns = column + tl.arange(0, BLOCK_N)
        mask = is_row[:, None] & (columns < N)[None, :]
        _store(out_ptr, slot if BY_SLOT else rows, columns, N, acc, mask)
    if BY_SLOT:
        filled = tl.load(offsets_ptr + E)
        for row in range(filled + tl.program_id(0), slots, tl.num_programs(0)):
            out = out_ptr + tl.load(order_ptr + row).to(tl.int64) * N
            for column in range(0, N, BLOCK_N):
                columns = column + tl.arange(0, BLOCK_N)
                zeros = tl.zeros([BLOCK_N], out_ptr.dtype.element_ty)
                tl.store(out + columns, zeros, mask=columns < N)


@triton.jit
def up_kernel(
    x_ptr, w_up, h_ptr, active_ptr, order_ptr,
    offsets_ptr, tile_expert_ptr, tile_row_ptr, tile_count_ptr, N: tl.constexpr, K: tl.constexpr,
    TOP_K: tl.constexpr, GATED: tl.constexpr, KEEP_H: tl.constexpr,
    EVEN_K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute h = x[token] @ w_up[e]^T and act(h). N is the expert's width I.

    GATED: h has 2I columns, and w_up holds two matrices [I, K] an expert, the gate's first.
    """
    across = tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tl.load(tile_count_ptr) * across, tl.num_programs(0)):
        expert, rows, is_row = _rows_of_tile(
            tile // across, offsets_ptr, tile_expert_ptr, tile_row_ptr, BLOCK_M
        )
        sources = _sources(rows, is_row, order_ptr, TOP_K, True)
        column = tile % across * BLOCK_N
        zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if GATED:
            gate, up = _gated_product(
                zeros, zeros, x_ptr, sources, is_row, w_up, expert * 2, column, N, K,
                EVEN_K, TMA, PRECISION, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            gates, ups = _halves(gate), _halves(up)
            for half in tl.static_range(2):
                columns = column + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
                mask = is_row[:, None] & (columns < N)[None, :]
                if KEEP_H:
                    _store(h_ptr, rows, columns, 2 * N, gates[half], mask)
                    _store(h_ptr + N, rows, columns, 2 * N, ups[half], mask)
                active = gates[half] * tl.sigmoid(gates[half]) * ups[half]
                _store(active_ptr, rows, columns, N, active, mask)
        else:
            h = _product(
                zeros, x_ptr, sources, is_row, w_up, expert, column, N, K,
                True, EVEN_K, TMA, PRECISION, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            columns = column + tl.arange(0, BLOCK_N)
            mask = is_row[:, None] & (columns < N)[None, :]
            if KEEP_H:
                _store(h_ptr, rows, columns, N, h, mask)
            # Use the rounded h, so that the backward recomputes the same activation.
            h = tl.maximum(h.to(h_ptr.dtype.element_ty).to(tl.float32), 0.0)
            _store(active_ptr, rows, columns, N, h * h, mask)


@triton.jit
def _gated_product(
    gate, up, x_ptr, sources, is_row, w_up, matrix, column, N, K,
    EVEN_K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Both halves of a gated product at once, so that the rows of x are loaded only once."""
    depth = tl.arange(0, BLOCK_K)
    left = x_ptr + sources[:, None] * K + depth[None, :]
    for start in range(0, K, BLOCK_K):
        a = _left_tile(left, is_row, depth < K - start, EVEN_K)
        b = _right_tile(w_up, matrix, column, start, N, K, True, EVEN_K, TMA, BLOCK_N, BLOCK_K)
        gate = dot(a, b, gate, PRECISION)
        b = _right_tile(w_up, matrix + 1, column, start, N, K, True, EVEN_K, TMA, BLOCK_N, BLOCK_K)
        up = dot(a, b, up, PRECISION)
        left += BLOCK_K
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
    grad_ptr, w_down, h_ptr, weights_ptr, grad_h_ptr, active_ptr, dots_ptr, order_ptr,
    offsets_ptr, tile_expert_ptr, tile_row_ptr, tile_count_ptr, slots,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, GATED: tl.constexpr,
    EVEN_K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
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
            _sources(rows, is_row, order_ptr, TOP_K, True), is_row, w_down, expert,
            tile % across * BLOCK_N, N, K, False, EVEN_K, TMA, PRECISION, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        slot = tl.load(order_ptr + rows, mask=is_row, other=0)
        weight = tl.load(weights_ptr + slot, mask=is_row, other=0.0)[:, None]
        # A quarter at a time: the registers of a whole tile's epilogue would leave one block.
        left, right = _halves(grad)
        quarters = _halves(left) + _halves(right)
        dots = tl.zeros([BLOCK_M], tl.float32)
        for quarter in tl.static_range(4):
            dots += _activation_gradient(
                quarters[quarter], h_ptr, grad_h_ptr, active_ptr, rows,
                tile % across * BLOCK_N + quarter * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4),
                is_row, weight, N, GATED,
            )  # fmt: skip
        tl.store(dots_ptr + (tile % across).to(tl.int64) * slots + rows, dots, mask=is_row)


@triton.jit
def weight_gradient_kernel(
    grad_ptr, x_ptr, out_ptr, order_ptr, offsets_ptr, N: tl.constexpr, K: tl.constexpr,
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
            acc = dot(tl.trans(a), b, acc, PRECISION)
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
