# The arguments of a jit function have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton kernels of the Mamba-2 mixer: what forward and backward share, and the forward.

With a log decay `g_t = dt_t A` for each head and L_t its sum over a chunk up to t, a chunk computes
from the state S [p, n] that enters it

    y_t = sum_{j<=t} exp(L_t - L_j) (C_t . B_j) dt_j x_j + exp(L_t) S C_t + D x_t
    S'  = exp(L_last) S + sum_j exp(L_last - L_j) dt_j x_j B_j^T

A chunk consists of tiles of rows and is part of one document. A product is of two tiles, and all
heads of a group read its B and C.

Letters: T rows, H heads of P, G groups, N state, W channels of the convolution, K its width.
Element offsets are 64-bit. Tables of tiles and of chunks have records of eight int32: the first
row; the first row and the end of the chunk; its number; its document, with first row and end.
The state after chunk c has place c - document, because none is kept after a document's last chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nemocascade_kernels.common.tile_product import dot


@triton.jit
def read_record(table_ptr, index):
    """The record of a tile or a chunk: row, start, end, chunk, document, opens, closes."""
    at = table_ptr + index * 8
    return (
        tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4),
        tl.load(at + 5), tl.load(at + 6),
    )  # fmt: skip


@triton.jit
def load_rows(pointer, stride, rows, inside, columns):
    """Rows [R, C]; zeros where not inside."""
    at = pointer + rows[:, None].to(tl.int64) * stride + columns[None, :]
    return tl.load(at, mask=inside[:, None], other=0.0)


@triton.jit
def load_sums(sums_ptr, rows, inside):
    """Sums of log decays as two float32: their differences are as exact as float64's."""
    sums = tl.load(sums_ptr + rows, mask=inside, other=0.0)
    high = sums.to(tl.float32)
    return high, (sums - high.to(tl.float64)).to(tl.float32)


@triton.jit
def decays_between(later, later_high, later_low, earlier, high, low, end):
    """`exp(L_t - L_j)` for rows j <= t < end, else zero, [t, j]."""
    powers = tl.exp((later_high[:, None] - high[None, :]) + (later_low[:, None] - low[None, :]))
    ordered = (earlier[None, :] <= later[:, None]) & (later < end)[:, None]
    return tl.where(ordered, powers, 0.0)


@triton.jit
def decays_after(later, later_high, later_low, earlier, high, low, end):
    """`decays_between`, transposed: [j, t]."""
    powers = tl.exp((later_high[None, :] - high[:, None]) + (later_low[None, :] - low[:, None]))
    ordered = (earlier[:, None] <= later[None, :]) & (later < end)[None, :]
    return tl.where(ordered, powers, 0.0)


@triton.jit
def add_part(pointer, value, mask, is_first):
    """Store, or add to what this program stored for an earlier tile."""
    if is_first == 0:
        value += tl.load(pointer, mask=mask, other=0.0)
        # Threads that hold copies of a value must read it before one of them writes.
        tl.debug_barrier()
    tl.store(pointer, value, mask=mask)
    tl.debug_barrier()


@triton.jit
def entering_state(
    states_ptr, initial_ptr, documents_ptr, chunk, document, is_first, SIZE: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """Index of the state that enters a chunk, and a flag: there is one.

    documents: the place of each document among the initial states, or -1.
    """
    exists = is_first == 0
    pointer = states_ptr + (chunk - 1 - document).to(tl.int64) * SIZE
    if HAS_INITIAL:
        place = tl.load(documents_ptr + document).to(tl.int64)
        if is_first:
            pointer = initial_ptr + place * SIZE
            exists = place >= 0
    return pointer, exists


@triton.jit
def states_kernel(
    rows_ptr, rows_stride: tl.constexpr, shared_ptr, shared_stride: tl.constexpr, dt_ptr, sums_ptr,
    states_ptr, edges_ptr, documents_ptr, chunks_ptr, T,
    H: tl.constexpr, RATIO: tl.constexpr, P: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr,
    GRADIENT: tl.constexpr, HAS_EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute what a chunk's rows add to the state after it, from x and B; GRADIENT: to the
    gradient of the state before it, from the gradient of y and C.

    edges: final states by document; GRADIENT: gradients of initial states by place.
    """
    head = tl.program_id(1)
    _, start, end, chunk, document, opens, closes = read_record(chunks_ptr, tl.program_id(0))
    if GRADIENT:
        kept, place = start > opens, chunk - 1 - document
    else:
        kept, place = end < closes, chunk - document
    pointer, needed = states_ptr, kept
    if HAS_EDGE:  # noqa: SIM102
        if kept == 0:
            pointer, place = edges_ptr, document
            if GRADIENT:
                place = tl.load(documents_ptr + document)
            needed = place >= 0
    if needed:
        p, n = tl.arange(0, P), tl.arange(0, N)
        rows_ptr += head * P
        shared_ptr += head // RATIO * N
        head_rows = tl.cast(head, tl.int64) * T
        last = tl.load(sums_ptr + head_rows + end - 1).to(tl.float32)
        added = tl.zeros([P, N], tl.float32)
        for first in range(start, end, TILE):
            rows = first + tl.arange(0, TILE)
            inside = rows < end
            values = load_rows(rows_ptr, rows_stride, rows, inside, p)
            shared = load_rows(shared_ptr, shared_stride, rows, inside, n)
            sums, rest = load_sums(sums_ptr + head_rows, rows, inside)
            if GRADIENT:
                factor = tl.exp(sums)
            else:
                dt = tl.load(dt_ptr + head_rows + rows, mask=inside, other=0.0)
                factor = dt * tl.where(inside, tl.exp((last - sums) - rest), 0.0)
            left = (values.to(tl.float32) * factor[:, None]).to(shared.dtype)
            added = dot(tl.trans(left), shared, added, PRECISION)
        pointer += (place.to(tl.int64) * H + head) * (P * N)
        tl.store(pointer + p[:, None] * N + n[None, :], added)


@triton.jit
def carry_kernel(
    states_ptr, enter_ptr, leave_ptr, documents_ptr, sums_ptr, chunks_ptr, offsets_ptr,
    entering_ptr, initial_ptr, through_ptr, T,
    H: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    REVERSE: tl.constexpr, HAS_ENTER: tl.constexpr, HAS_LEAVE: tl.constexpr,
):  # fmt: skip
    """Turn what chunks add to a document's state into the states after them.

    REVERSE: what they add to its gradient, from the last to the first. enter, leave: initial and
    final states; REVERSE: their gradients, the other way round. through: [N, H, SIZE / BLOCK],
    written by REVERSE, sums of the state that enters a chunk (`entering`, `initial`) times the
    gradient of the one that leaves it.
    """
    document = tl.program_id(0)
    part = tl.program_id(1)
    head = part // (SIZE // BLOCK)
    at = part * BLOCK + tl.arange(0, BLOCK)
    first, stop = tl.load(offsets_ptr + document), tl.load(offsets_ptr + document + 1)
    sums_ptr += head.to(tl.int64) * T
    initial = document
    if HAS_ENTER or HAS_LEAVE:  # noqa: SIM102
        if documents_ptr is not None:
            initial = tl.load(documents_ptr + document)
    state = tl.zeros([BLOCK], tl.float32)
    if HAS_ENTER:
        place = document if REVERSE else initial
        mask = (at >= 0) & (place >= 0)
        state = tl.load(enter_ptr + place.to(tl.int64) * (H * SIZE) + at, mask=mask, other=0.0)
    for step in range(stop - first - 1):
        if REVERSE:
            chunk = stop - 1 - step
            place = chunk - 1 - document
        else:
            chunk = first + step
            place = chunk - document
        end = tl.load(chunks_ptr + chunk * 8 + 2)
        decay = tl.exp(tl.load(sums_ptr + end - 1).to(tl.float32))
        offsets = place.to(tl.int64) * (H * SIZE) + at
        if REVERSE:
            through = tl.sum(state * tl.load(entering_ptr + offsets), 0)
            tl.store(through_ptr + chunk.to(tl.int64) * tl.num_programs(1) + part, through)
        state = decay * state + tl.load(states_ptr + offsets)
        tl.store(states_ptr + offsets, state)
    if HAS_LEAVE:
        place, chunk = document, stop - 1
        if REVERSE:
            place, chunk = initial, first
        mask = (at >= 0) & (place >= 0)
        end = tl.load(chunks_ptr + chunk * 8 + 2)
        decay = tl.exp(tl.load(sums_ptr + end - 1).to(tl.float32))
        offsets = place.to(tl.int64) * (H * SIZE) + at
        if REVERSE:
            before = tl.load(initial_ptr + offsets, mask=mask, other=0.0)
            through = tl.sum(state * before, 0)
            tl.store(through_ptr + chunk.to(tl.int64) * tl.num_programs(1) + part, through)
        state = decay * state + tl.load(leave_ptr + offsets, mask=mask, other=0.0)
        tl.store(leave_ptr + offsets, state, mask=mask)
    elif REVERSE:
        tl.store(through_ptr + first.to(tl.int64) * tl.num_programs(1) + part, 0.0)


@triton.jit
def head_output(
    zxbcdt_ptr, stride, mixed_ptr, dt_ptr, sums_ptr, d_ptr, state_ptr, has_state, head, row, start,
    end, T,
    H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head in a tile of rows: y, and `y silu(z)`, the gate's output; [TILE, P] float32.

    state_ptr: of the states of all heads that enter the chunk.
    """
    p, n = tl.arange(0, P), tl.arange(0, N)
    rows = row + tl.arange(0, TILE)
    inside = rows < end
    x_ptr, b_ptr = mixed_ptr + head * P, mixed_ptr + H * P + head // (H // G) * N
    dt_ptr += tl.cast(head, tl.int64) * T
    sums_ptr += tl.cast(head, tl.int64) * T
    c = load_rows(b_ptr + G * N, W, rows, inside, n)
    high, low = load_sums(sums_ptr, rows, inside)
    y = tl.load(d_ptr + head).to(tl.float32) * load_rows(x_ptr, W, rows, inside, p)
    if has_state:
        state = tl.load(state_ptr + head * P * N + p[:, None] * N + n[None, :]).to(c.dtype)
        read = dot(c, tl.trans(state), tl.zeros([TILE, P], tl.float32), PRECISION)
        y += read * tl.exp(high)[:, None]
    for first in range(start, row + 1, TILE):
        others = first + tl.arange(0, TILE)
        is_other = others < end
        b = load_rows(b_ptr, W, others, is_other, n)
        x = load_rows(x_ptr, W, others, is_other, p)
        dt = tl.load(dt_ptr + others, mask=is_other, other=0.0)
        other_high, other_low = load_sums(sums_ptr, others, is_other)
        scores = dot(c, tl.trans(b), tl.zeros([TILE, TILE], tl.float32), PRECISION)
        scores *= decays_between(rows, high, low, others, other_high, other_low, end)
        y = dot((scores * dt[None, :]).to(x.dtype), x, y, PRECISION)
    z = load_rows(zxbcdt_ptr + head * P, stride, rows, inside, p).to(tl.float32)
    return y, y * z * tl.sigmoid(z)


@triton.jit
def scan_kernel(
    zxbcdt_ptr, stride: tl.constexpr, mixed_ptr, dt_ptr, sums_ptr, states_ptr, initial_ptr,
    documents_ptr, d_ptr, weight_ptr, out_ptr, tiles_ptr, T, eps,
    H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
    TILE: tl.constexpr, HAS_INITIAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The output of one group's heads in a tile of rows: scan, gate and norm."""
    group = tl.program_id(1)
    row, start, end, chunk, document, opens, _ = read_record(tiles_ptr, tl.program_id(0))
    rows = row + tl.arange(0, TILE)
    inside = rows < end
    p = tl.arange(0, P)
    state_ptr, has_state = entering_state(
        states_ptr, initial_ptr, documents_ptr, chunk, document, start == opens, H * P * N,
        HAS_INITIAL,
    )  # fmt: skip
    square = tl.zeros([TILE], tl.float32)
    for head in range(group * (H // G), (group + 1) * (H // G)):
        u = head_output(
            zxbcdt_ptr, stride, mixed_ptr, dt_ptr, sums_ptr, d_ptr, state_ptr, has_state, head,
            row, start, end, T, H, P, G, N, W, TILE, PRECISION,
        )[1]  # fmt: skip
        square += tl.sum(u * u, axis=1)
        at = out_ptr + rows[:, None].to(tl.int64) * (H * P) + (head * P + p)[None, :]
        tl.store(at, u.to(out_ptr.dtype.element_ty), mask=inside[:, None])
    # Below, threads read and overwrite what others wrote.
    tl.debug_barrier()
    scale = tl.rsqrt(square / (H // G * P) + eps)
    for head in range(group * (H // G), (group + 1) * (H // G)):
        at = out_ptr + rows[:, None].to(tl.int64) * (H * P) + (head * P + p)[None, :]
        u = tl.load(at, mask=inside[:, None], other=0.0).to(tl.float32)
        tl.debug_barrier()
        weight = tl.load(weight_ptr + head * P + p).to(tl.float32)
        values = (u * scale[:, None] * weight[None, :]).to(out_ptr.dtype.element_ty)
        tl.store(at, values, mask=inside[:, None])
        tl.debug_barrier()
