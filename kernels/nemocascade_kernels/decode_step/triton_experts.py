# The arguments of a jit function have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Experts of few rows in Triton: each chosen expert's weights are read once, and nothing is sorted.

A program has one expert and a tile of its weights. It finds the expert's rows in the table of
choices, up to BLOCK_M of them at once; programs of experts that no row chose end at once. The
shared expert's tiles follow those of the routed ones in the same launch. Routed experts have the
rows [first, first + rows), the shared one has [shared_first, shared_first + shared_rows).

Letters: n rows, K choices a row, E experts of this rank, I their width, J that of the shared one,
H the model's. Element offsets are 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nemocascade_kernels.common.tile_product import dot

_NONE, _SHARED = tl.constexpr(-1), tl.constexpr(-2)


@triton.jit
def _expert_of(
    group, chosen_ptr, stride, first, rows, first_expert,
    E: tl.constexpr, K: tl.constexpr, BY_SLOT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The expert of a group of rows: its own number, or that which a slot has chosen; then _NONE if
    an earlier slot has the same or another rank has it."""
    expert = group
    if BY_SLOT:
        r, k = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
        is_slot = (r < rows)[:, None] & (k < K)[None, :]
        at = (first + r).to(tl.int64)[:, None] * stride + k[None, :]
        ids = tl.load(chosen_ptr + at, mask=is_slot, other=-1) - first_expert
        slot = r[:, None] * K + k[None, :]
        expert = tl.sum(tl.sum(tl.where(is_slot & (slot == group), ids, 0), 1), 0)
        earlier = is_slot & (slot < group) & (ids == expert)
        is_repeated = tl.max(tl.max(earlier.to(tl.int32), 1), 0) > 0
        expert = tl.where(is_repeated | (expert < 0) | (expert >= E), _NONE, expert)
    return expert


@triton.jit
def _choices(
    r, end, expert, chosen_ptr, stride, first_expert, K: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The choice of each row r < end that is the expert, or -1; 0 for the shared expert."""
    k = tl.arange(0, BLOCK_K)
    is_slot = (r < end)[:, None] & (k < K)[None, :] & (expert >= 0)
    at = r.to(tl.int64)[:, None] * stride + k[None, :]
    ids = tl.load(chosen_ptr + at, mask=is_slot, other=-1) - first_expert
    choice = tl.max(tl.where(is_slot & (ids == expert), k[None, :], -1), 1)
    return tl.where((r < end) & (expert == _SHARED), 0, choice)


@triton.jit
def _count(
    first, end, expert, chosen_ptr, stride, first_expert,
    K: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The number of the expert's rows in [first, end)."""
    count = tl.zeros([CHUNK], tl.int32)
    for start in range(first, end, CHUNK):
        r = start + tl.arange(0, CHUNK)
        choice = _choices(r, end, expert, chosen_ptr, stride, first_expert, K, BLOCK_K)
        count += (choice >= 0).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def _tile_rows(
    number, first, end, expert, chosen_ptr, stride, first_expert,
    K: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Rows and choices of the expert's rows number `number` to number + BLOCK_M."""
    m = number + tl.arange(0, BLOCK_M)
    row, k = tl.zeros([BLOCK_M], tl.int32), tl.zeros([BLOCK_M], tl.int32)
    seen = tl.zeros([], tl.int32)
    for start in range(first, end, CHUNK):
        r = start + tl.arange(0, CHUNK)
        choice = _choices(r, end, expert, chosen_ptr, stride, first_expert, K, BLOCK_K)
        is_hit = (choice >= 0).to(tl.int32)
        rank = seen + tl.cumsum(is_hit, 0) - 1
        found = (choice >= 0)[None, :] & (rank[None, :] == m[:, None])
        row += tl.sum(tl.where(found, r[None, :], 0), 1)
        k += tl.sum(tl.where(found, choice[None, :], 0), 1)
        seen += tl.sum(is_hit, 0)
    return row.to(tl.int64), k


@triton.jit
def _product(
    x_ptr, w_ptr, acc, is_row, is_column, depth,
    BLOCK_D: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + x w^T: pointers to the first elements of rows [M, 1] and [N, 1], `depth` long."""
    for start in range(0, depth, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        rows, columns = is_row[:, None], is_column[:, None]
        if not EVEN:
            rows, columns = rows & (d < depth)[None, :], columns & (d < depth)[None, :]
        x = tl.load(x_ptr + d[None, :], mask=rows, other=0.0)
        w = tl.load(w_ptr + d[None, :], mask=columns, other=0.0)
        acc = dot(x, tl.trans(w), acc, PRECISION)
    return acc


@triton.jit
def up_rows_kernel(
    x_ptr, chosen_ptr, up_ptr, shared_up_ptr, h_ptr, shared_h_ptr,
    first, rows, x_stride, choice_stride, first_expert, groups, width, shared_width, shared_first,
    shared_rows,
    E: tl.constexpr, K: tl.constexpr, H: tl.constexpr, GATED: tl.constexpr,
    BY_SLOT: tl.constexpr, BLOCK_R: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Activations [n, K, I] of the routed experts and [shared_rows, J] of the shared one."""
    program = tl.program_id(0)
    # Tiles of one group are consecutive: they share its rows of x.
    tiles = tl.cdiv(width, BLOCK_N)
    routed = groups * tiles
    is_routed = program < routed
    begin, end, expert = shared_first, shared_first + shared_rows, tl.full([], _SHARED, tl.int32)
    if is_routed:
        begin, end = first, first + rows
        expert = _expert_of(
            program // tiles, chosen_ptr, choice_stride, first, rows, first_expert,
            E, K, BY_SLOT, BLOCK_R, BLOCK_K,
        )  # fmt: skip
        tile, wide = program % tiles, width + 0
        weight = up_ptr + expert.to(tl.int64) * width * (2 if GATED else 1) * H
    else:
        tile, wide = program - routed, shared_width + 0
        weight = shared_up_ptr
    n = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = n < wide
    count = _count(begin, end, expert, chosen_ptr, choice_stride, first_expert, K, CHUNK, BLOCK_K)
    for start in range(0, count, BLOCK_M):
        row, k = _tile_rows(
            start, begin, end, expert, chosen_ptr, choice_stride, first_expert,
            K, CHUNK, BLOCK_K, BLOCK_M,
        )  # fmt: skip
        is_row = start + tl.arange(0, BLOCK_M) < count
        x = x_ptr + row[:, None] * x_stride
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        acc = _product(
            x, weight + n[:, None] * H, acc, is_row, is_column, H, BLOCK_D, EVEN, PRECISION
        )
        if GATED:
            up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            second = weight + (wide + n)[:, None] * H
            up = _product(x, second, up, is_row, is_column, H, BLOCK_D, EVEN, PRECISION)
            acc = acc / (1.0 + tl.exp(-acc)) * up
        else:
            positive = tl.maximum(acc, 0.0)
            acc = positive * positive
        here = is_row[:, None] & is_column[None, :]
        value = acc.to(h_ptr.dtype.element_ty)
        if is_routed:
            tl.store(h_ptr + (row * K + k)[:, None] * width + n[None, :], value, mask=here)
        else:
            at = (row - shared_first)[:, None] * shared_width + n[None, :]
            tl.store(shared_h_ptr + at, value, mask=here)


@triton.jit
def down_rows_kernel(
    h_ptr, shared_h_ptr, chosen_ptr, weights_ptr, down_ptr, shared_down_ptr, y_ptr, shared_y_ptr,
    first, rows, choice_stride, first_expert, groups, width, shared_width, shared_first,
    shared_rows,
    E: tl.constexpr, K: tl.constexpr, H: tl.constexpr, BY_SLOT: tl.constexpr,
    BLOCK_R: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weighted outputs [n, K, H] float32 of the routed experts, [shared_rows, H] of the shared."""
    program = tl.program_id(0)
    tiles: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    is_routed = program < groups * tiles
    n = (program % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin, end, expert = shared_first, shared_first + shared_rows, tl.full([], _SHARED, tl.int32)
    if is_routed:
        begin, end = first, first + rows
        expert = _expert_of(
            program // tiles, chosen_ptr, choice_stride, first, rows, first_expert,
            E, K, BY_SLOT, BLOCK_R, BLOCK_K,
        )  # fmt: skip
        depth = width + 0
        weight, inputs = down_ptr + expert.to(tl.int64) * H * width, h_ptr
    else:
        depth = shared_width + 0
        weight, inputs = shared_down_ptr, shared_h_ptr
    is_column = n < H
    count = _count(begin, end, expert, chosen_ptr, choice_stride, first_expert, K, CHUNK, BLOCK_K)
    for start in range(0, count, BLOCK_M):
        row, k = _tile_rows(
            start, begin, end, expert, chosen_ptr, choice_stride, first_expert,
            K, CHUNK, BLOCK_K, BLOCK_M,
        )  # fmt: skip
        is_row = start + tl.arange(0, BLOCK_M) < count
        place = tl.where(is_routed, row * K + k, row - shared_first)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        acc = _product(
            inputs + place[:, None] * depth, weight + n[:, None] * depth, acc, is_row, is_column,
            depth, BLOCK_D, EVEN, PRECISION,
        )  # fmt: skip
        here = is_row[:, None] & is_column[None, :]
        at = place[:, None] * H + n[None, :]
        if is_routed:
            share = tl.load(weights_ptr + row * choice_stride + k, mask=is_row, other=0.0)
            tl.store(y_ptr + at, acc * share[:, None], mask=here)
        else:
            tl.store(shared_y_ptr + at, acc, mask=here)


@triton.jit
def sum_rows_kernel(
    y_ptr, shared_y_ptr, chosen_ptr, residual_ptr, out_ptr, first, rows, choice_stride,
    first_expert, shared_first, shared_rows,
    E: tl.constexpr, K: tl.constexpr, H: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Sum of a row's outputs, by choice, with the shared expert's and the residual."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_H], tl.float32)
    is_served = (row >= first) & (row < first + rows)
    for k in tl.static_range(K):
        expert = tl.load(chosen_ptr + row * choice_stride + k) - first_expert
        is_mine = is_served & (expert >= 0) & (expert < E)
        y = y_ptr + (row * K + k) * H + h
        total += tl.load(y, mask=is_mine & (h < H), other=0.0)
    is_shared = (row >= shared_first) & (row < shared_first + shared_rows)
    shared = shared_y_ptr + (row - shared_first) * H + h
    total += tl.load(shared, mask=is_shared & (h < H), other=0.0)
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + row * H + h, mask=h < H, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * H + h, total.to(out_ptr.dtype.element_ty), mask=h < H)
