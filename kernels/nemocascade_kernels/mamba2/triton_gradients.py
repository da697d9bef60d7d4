# The arguments of a jit function have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton kernels of the Mamba-2 mixer's backward; notation and letters of `triton_kernels`.

With `M_tj = exp(L_t - L_j) (C_t . B_j) dt_j (x_j . dy_t)`, the gradient of a log decay g_s sums
what passes from rows before s to rows from s on: M_tj for j < s <= t; what rows read from the
entering state; what the leaving state keeps of rows; and what it keeps of the entering one. Only
the first of these is a difference of sums, and the diagonal is not part of it.

Sums over rows are added for each span of tiles in order, then for all spans: results do not depend
on the device.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nemocascade_kernels.common.tile_product import dot
from nemocascade_kernels.mamba2.triton_kernels import (
    add_part,
    decays_after,
    decays_between,
    entering_state,
    head_output,
    load_rows,
    load_sums,
    read_record,
)


@triton.jit
def leaving_gradient(
    d_states_ptr, d_final_ptr, chunk, document, is_last, SIZE: tl.constexpr,
    HAS_FINAL: tl.constexpr,
):  # fmt: skip
    """Index of the gradient of the state that leaves a chunk, and a flag: there is one."""
    exists = is_last == 0
    pointer = d_states_ptr + (chunk - document).to(tl.int64) * SIZE
    if HAS_FINAL:  # noqa: SIM102
        if is_last:
            pointer = d_final_ptr + document.to(tl.int64) * SIZE
            exists = document >= 0
    return pointer, exists


@triton.jit
def gate_gradient_kernel(
    d_out_ptr, zxbcdt_ptr, d_zxbcdt_ptr, stride: tl.constexpr, d_stride: tl.constexpr, mixed_ptr,
    dt_ptr, sums_ptr, states_ptr, initial_ptr, documents_ptr, d_ptr, weight_ptr, parts_ptr,
    tiles_ptr, T, tiles, eps,
    H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
    D_AT: tl.constexpr, WEIGHT_AT: tl.constexpr, PARTS: tl.constexpr,
    TILE: tl.constexpr, HAS_INITIAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The scan again, and the gradients of the gate: of z, of y (in the columns of x), and sums for
    D and the norm's weight."""
    span, group = tl.program_id(0), tl.program_id(1)
    each = tl.cdiv(tiles, tl.num_programs(0))
    p = tl.arange(0, P)
    parts_ptr += span.to(tl.int64) * PARTS
    for tile in range(span * each, min(tiles, (span + 1) * each)):
        row, start, end, chunk, document, opens, _ = read_record(tiles_ptr, tile)
        rows = row + tl.arange(0, TILE)
        inside = rows < end
        state_ptr, has_state = entering_state(
            states_ptr, initial_ptr, documents_ptr, chunk, document, start == opens, H * P * N,
            HAS_INITIAL,
        )  # fmt: skip
        square = tl.zeros([TILE], tl.float32)
        along = tl.zeros([TILE], tl.float32)
        for head in range(group * (H // G), (group + 1) * (H // G)):
            y, u = head_output(
                zxbcdt_ptr, stride, mixed_ptr, dt_ptr, sums_ptr, d_ptr, state_ptr, has_state, head,
                row, start, end, T, H, P, G, N, W, TILE, PRECISION,
            )  # fmt: skip
            weight = tl.load(weight_ptr + head * P + p).to(tl.float32)
            d_out = load_rows(d_out_ptr + head * P, H * P, rows, inside, p).to(tl.float32)
            square += tl.sum(u * u, axis=1)
            along += tl.sum(u * d_out * weight[None, :], axis=1)
            at = d_zxbcdt_ptr + rows[:, None].to(tl.int64) * d_stride + (head * P + p)[None, :]
            tl.store(at + H * P, y.to(d_zxbcdt_ptr.dtype.element_ty), mask=inside[:, None])
        # The loop below reads what other threads wrote.
        tl.debug_barrier()
        scale = tl.rsqrt(square / (H // G * P) + eps)
        along *= scale / (H // G * P)
        for head in range(group * (H // G), (group + 1) * (H // G)):
            at = d_zxbcdt_ptr + rows[:, None].to(tl.int64) * d_stride + (head * P + p)[None, :]
            y = tl.load(at + H * P, mask=inside[:, None], other=0.0).to(tl.float32)
            z = load_rows(zxbcdt_ptr + head * P, stride, rows, inside, p).to(tl.float32)
            weight = tl.load(weight_ptr + head * P + p).to(tl.float32)
            d_out = load_rows(d_out_ptr + head * P, H * P, rows, inside, p).to(tl.float32)
            gate = tl.sigmoid(z)
            silu = z * gate
            normed = y * silu * scale[:, None]
            d_u = (d_out * weight[None, :] - normed * along[:, None]) * scale[:, None]
            d_z = d_u * y * (gate + silu * (1.0 - gate))
            d_y = d_u * silu
            x = load_rows(mixed_ptr + head * P, W, rows, inside, p).to(tl.float32)
            is_first = tile == span * each
            d_weight, d_d = tl.sum(d_out * normed, 0), tl.sum(tl.sum(d_y * x, 0), 0)
            add_part(parts_ptr + WEIGHT_AT + head * P + p, d_weight, p < P, is_first)
            add_part(parts_ptr + D_AT + head, d_d, group >= 0, is_first)
            tl.store(at, d_z.to(d_zxbcdt_ptr.dtype.element_ty), mask=inside[:, None])
            tl.store(at + H * P, d_y.to(d_zxbcdt_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def shared_gradient_kernel(
    dy_ptr, dy_stride: tl.constexpr, mixed_ptr, dt_ptr, sums_ptr, states_ptr, edges_ptr,
    documents_ptr, d_shared_ptr, along_ptr, tiles_ptr, T,
    H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
    TILE: tl.constexpr, OF_B: tl.constexpr, HAS_EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of C [T, G N], with states and initial states; OF_B: that of B, with the
    gradients of states and final states.

    along: [H, T], the state's part of the gradient times C: `dy_t . y_t` of what row t reads from
    the entering state. OF_B: times B, what the leaving state keeps of row t.
    """
    group = tl.program_id(1)
    row, start, end, chunk, document, opens, closes = read_record(tiles_ptr, tl.program_id(0))
    rows = row + tl.arange(0, TILE)
    inside = rows < end
    p, n = tl.arange(0, P), tl.arange(0, N)
    b_ptr = mixed_ptr + H * P + group * N
    if OF_B:
        state_ptr, has_state = leaving_gradient(
            states_ptr, edges_ptr, chunk, document, end == closes, H * P * N, HAS_EDGE
        )
        own_ptr, other_ptr, lowest, stop = b_ptr, b_ptr + G * N, row, end
    else:
        state_ptr, has_state = entering_state(
            states_ptr, edges_ptr, documents_ptr, chunk, document, start == opens, H * P * N,
            HAS_EDGE,
        )  # fmt: skip
        own_ptr, other_ptr, lowest, stop = b_ptr + G * N, b_ptr, start, row + 1
    gradient = tl.zeros([TILE, N], tl.float32)
    for head in range(group * (H // G), (group + 1) * (H // G)):
        head_rows = tl.cast(head, tl.int64) * T
        x_ptr = mixed_ptr + head * P
        high, low = load_sums(sums_ptr + head_rows, rows, inside)
        dt = tl.load(dt_ptr + head_rows + rows, mask=inside, other=0.0)
        if OF_B:
            left = load_rows(x_ptr, W, rows, inside, p)
        else:
            left = load_rows(dy_ptr + head * P, dy_stride, rows, inside, p)
        along = tl.zeros([TILE], tl.float32)
        if has_state:
            state = tl.load(state_ptr + head * P * N + p[:, None] * N + n[None, :])
            part = dot(left, state.to(left.dtype), tl.zeros([TILE, N], tl.float32), PRECISION)
            if OF_B:
                last = tl.load(sums_ptr + head_rows + end - 1).to(tl.float32)
                part *= (dt * tl.where(inside, tl.exp((last - high) - low), 0.0))[:, None]
            else:
                part *= tl.exp(high)[:, None]
            own = load_rows(own_ptr, W, rows, inside, n).to(tl.float32)
            along = tl.sum(part * own, axis=1)
            gradient += part
        tl.store(along_ptr + head_rows + rows, along, mask=inside)
        for first in range(lowest, stop, TILE):
            others = first + tl.arange(0, TILE)
            is_other = others < end
            shared = load_rows(other_ptr, W, others, is_other, n)
            other_high, other_low = load_sums(sums_ptr + head_rows, others, is_other)
            if OF_B:
                right = load_rows(dy_ptr + head * P, dy_stride, others, is_other, p)
                factor = decays_after(others, other_high, other_low, rows, high, low, end)
                factor *= dt[:, None]
            else:
                right = load_rows(x_ptr, W, others, is_other, p)
                factor = decays_between(rows, high, low, others, other_high, other_low, end)
                factor *= tl.load(dt_ptr + head_rows + others, mask=is_other, other=0.0)[None, :]
            zeros = tl.zeros([TILE, TILE], tl.float32)
            scores = dot(left, tl.trans(right), zeros, PRECISION) * factor
            gradient = dot(scores.to(shared.dtype), shared, gradient, PRECISION)
    at = d_shared_ptr + rows[:, None].to(tl.int64) * (G * N) + (group * N + n)[None, :]
    tl.store(at, gradient.to(d_shared_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def x_gradient_kernel(
    dy_ptr, dy_stride: tl.constexpr, mixed_ptr, dt_ptr, sums_ptr, d_states_ptr, d_final_ptr, d_ptr,
    pairs_ptr, added_ptr, tiles_ptr, T,
    H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
    TILE: tl.constexpr, HAS_FINAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of x, in its place in `mixed`: no other program reads these columns and rows.

    pairs: [tiles of a chunk, H, T], sums of M_tj, j < t, over a tile's j. added: [2, H, T], by row
    j: that sum over t; and `x_j . dv_j` with v = dt x.
    """
    group = tl.program_id(1)
    row, start, end, chunk, document, _, closes = read_record(tiles_ptr, tl.program_id(0))
    rows = row + tl.arange(0, TILE)
    inside = rows < end
    p, n = tl.arange(0, P), tl.arange(0, N)
    b_ptr = mixed_ptr + H * P + group * N
    d_state_ptr, leaves = leaving_gradient(
        d_states_ptr, d_final_ptr, chunk, document, end == closes, H * P * N, HAS_FINAL
    )
    for head in range(group * (H // G), (group + 1) * (H // G)):
        head_rows = tl.cast(head, tl.int64) * T
        x_ptr = mixed_ptr + head * P
        x = load_rows(x_ptr, W, rows, inside, p)
        b = load_rows(b_ptr, W, rows, inside, n)
        dt = tl.load(dt_ptr + head_rows + rows, mask=inside, other=0.0)
        high, low = load_sums(sums_ptr + head_rows, rows, inside)
        d_v = tl.zeros([TILE, P], tl.float32)
        if leaves:
            d_state = tl.load(d_state_ptr + head * P * N + p[:, None] * N + n[None, :])
            last = tl.load(sums_ptr + head_rows + end - 1).to(tl.float32)
            factor = tl.where(inside, tl.exp((last - high) - low), 0.0)
            d_v = dot(b, tl.trans(d_state.to(b.dtype)), d_v, PRECISION) * factor[:, None]
        column = tl.zeros([TILE], tl.float32)
        for first in range(row, end, TILE):
            others = first + tl.arange(0, TILE)
            is_other = others < end
            c = load_rows(b_ptr + G * N, W, others, is_other, n)
            dy = load_rows(dy_ptr + head * P, dy_stride, others, is_other, p)
            other_high, other_low = load_sums(sums_ptr + head_rows, others, is_other)
            zeros = tl.zeros([TILE, TILE], tl.float32)
            scores = dot(b, tl.trans(c), zeros, PRECISION)
            scores *= decays_after(others, other_high, other_low, rows, high, low, end)
            d_v = dot(scores.to(dy.dtype), dy, d_v, PRECISION)
            products = scores * dot(x, tl.trans(dy), zeros, PRECISION) * dt[:, None]
            products = tl.where(rows[:, None] < others[None, :], products, 0.0)
            column += tl.sum(products, axis=1)
            at = pairs_ptr + (row - start) // TILE * tl.cast(T, tl.int64) * H + head_rows + others
            tl.store(at, tl.sum(products, axis=0), mask=is_other)
        dy = load_rows(dy_ptr + head * P, dy_stride, rows, inside, p).to(tl.float32)
        d_x = d_v * dt[:, None] + tl.load(d_ptr + head).to(tl.float32) * dy
        at = added_ptr + head_rows + rows
        tl.store(at, column, mask=inside)
        along = tl.sum(x.to(tl.float32) * d_v, axis=1)
        tl.store(at + tl.cast(T, tl.int64) * H, along, mask=inside)
        # All threads have read x.
        tl.debug_barrier()
        at = x_ptr + rows[:, None].to(tl.int64) * W + p[None, :]
        tl.store(at, d_x.to(mixed_ptr.dtype.element_ty), mask=inside[:, None])
        tl.debug_barrier()
