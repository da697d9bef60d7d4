# The arguments of a jit function have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton kernels of the Mamba-2 mixer before its scan: convolution and time steps, forward and
backward; notation and letters of `triton_kernels`."""

from __future__ import annotations

import triton
import triton.language as tl

from nemocascade_kernels.mamba2.triton_kernels import add_part, read_record


@triton.jit
def window_rows(
    x_ptr, stride, before_ptr, place, rows, opens, closes, columns, is_column,
    W: tl.constexpr, K: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """Inputs of the convolution in `rows` of a document, or before it, in float32 [R, C]."""
    inside = (rows >= opens) & (rows < closes)
    at = x_ptr + rows[:, None].to(tl.int64) * stride + columns[None, :]
    values = tl.load(at, mask=inside[:, None] & is_column[None, :], other=0.0).to(tl.float32)
    if HAS_INITIAL:
        index = rows - opens + K - 1
        is_before = (index >= 0) & (rows < opens) & (place >= 0)
        at = before_ptr + (place * (K - 1) + index)[:, None].to(tl.int64) * W + columns[None, :]
        mask = is_before[:, None] & is_column[None, :]
        values += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def convolve(
    x_ptr, stride, before_ptr, place, weight_ptr, bias_ptr, rows, opens, closes, columns,
    is_column, W: tl.constexpr, K: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """The convolution before its SiLU, float32 [R, C]."""
    bias = tl.load(bias_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
    total = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32) + bias[None, :]
    for k in range(K):
        tap = tl.load(weight_ptr + columns * K + k, mask=is_column, other=0.0).to(tl.float32)
        total += tap[None, :] * window_rows(
            x_ptr, stride, before_ptr, place, rows - (K - 1) + k, opens, closes, columns,
            is_column, W, K, HAS_INITIAL,
        )  # fmt: skip
    return total


@triton.jit
def softplus(x):
    """float64: the logarithm of float32 loses the digits of small steps."""
    return tl.where(x > 0, x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def mix_kernel(
    zxbcdt_ptr, stride: tl.constexpr, weight_ptr, bias_ptr, dt_bias_ptr, a_ptr, before_ptr,
    documents_ptr, mixed_ptr, dt_ptr, sums_ptr, tiles_ptr, T, low, high,
    H: tl.constexpr, INNER: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
    HAS_INITIAL: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """The activated convolution [T, W]; dt [H, T] float32, and L [H, T] float64.

    The first programs of axis 1 are of COLUMNS channels, the others of HEADS heads: of these, the
    program of a chunk's first tile computes the chunk.
    """
    row, start, end, _, document, opens, closes = read_record(tiles_ptr, tl.program_id(0))
    rows = row + tl.arange(0, TILE)
    part = tl.program_id(1)
    if part < (W + COLUMNS - 1) // COLUMNS:
        columns = part * COLUMNS + tl.arange(0, COLUMNS)
        is_column = columns < W
        place = document * 0 - 1
        if HAS_INITIAL:
            place = tl.load(documents_ptr + document)
        total = convolve(
            zxbcdt_ptr + INNER, stride, before_ptr, place, weight_ptr, bias_ptr, rows, opens,
            closes, columns, is_column, W, K, HAS_INITIAL,
        )  # fmt: skip
        at = mixed_ptr + rows[:, None].to(tl.int64) * W + columns[None, :]
        values = (total * tl.sigmoid(total)).to(mixed_ptr.dtype.element_ty)
        tl.store(at, values, mask=(rows < end)[:, None] & is_column[None, :])
    elif row == start:
        heads = (part - (W + COLUMNS - 1) // COLUMNS) * HEADS + tl.arange(0, HEADS)
        is_head = heads < H
        bias = tl.load(dt_bias_ptr + heads, mask=is_head, other=0.0).to(tl.float32)
        rate = tl.load(a_ptr + heads, mask=is_head, other=0.0).to(tl.float64)
        carried = tl.zeros([HEADS], tl.float64)
        for first in range(start, end, TILE):
            rows = first + tl.arange(0, TILE)
            mask = (rows < end)[:, None] & is_head[None, :]
            at = zxbcdt_ptr + rows[:, None].to(tl.int64) * stride + INNER + W + heads[None, :]
            raw = tl.load(at, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
            dt = softplus(raw.to(tl.float64)).to(tl.float32)
            # Comparisons keep NaN, which minimum and maximum would drop.
            dt = tl.where(dt < low, low, tl.where(dt > high, high, dt))
            logs = tl.where(mask, dt.to(tl.float64) * rate[None, :], 0.0)
            sums = carried[None, :] + tl.cumsum(logs, axis=0)
            carried += tl.sum(logs, axis=0)
            at = heads[None, :].to(tl.int64) * T + rows[:, None]
            tl.store(dt_ptr + at, dt, mask=mask)
            tl.store(sums_ptr + at, sums, mask=mask)


@triton.jit
def input_gradient(
    d_mixed_ptr, d_b_ptr, d_c_ptr, x_ptr, stride, before_ptr, place, weight_ptr, bias_ptr, rows,
    opens, closes, columns, is_column,
    SHARED: tl.constexpr, W: tl.constexpr, K: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """Gradients of the convolution's inputs in `rows`, and of its sums before the SiLU in the same
    rows; float32 [R, C]. The last columns, SHARED of B and of C, have theirs in d_b and d_c.
    """
    d_x = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    d_own = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    is_c, is_shared = columns >= W - SHARED, columns >= W - 2 * SHARED
    shared = columns - tl.where(is_c, W - SHARED, W - 2 * SHARED)
    for k in range(K):
        later = rows + k
        inside = ((later >= opens) & (later < closes))[:, None]
        total = convolve(
            x_ptr, stride, before_ptr, place, weight_ptr, bias_ptr, later, opens, closes, columns,
            is_column, W, K, HAS_INITIAL,
        )  # fmt: skip
        wide = later[:, None].to(tl.int64)
        d = tl.load(
            d_mixed_ptr + wide * W + columns[None, :],
            mask=inside & (is_column & (is_shared == 0))[None, :],
            other=0.0,
        ).to(tl.float32)
        d += tl.load(
            tl.where(is_c, d_c_ptr, d_b_ptr)[None, :] + wide * SHARED + shared[None, :],
            mask=inside & (is_column & is_shared)[None, :],
            other=0.0,
        ).to(tl.float32)
        gate = tl.sigmoid(total)
        # Rows of other documents may hold NaN in their sums.
        d = tl.where(inside, d * (gate + total * gate * (1.0 - gate)), 0.0)
        tap = tl.load(weight_ptr + columns * K + (K - 1) - k, mask=is_column, other=0.0)
        d_x += tap.to(tl.float32)[None, :] * d
        if k == 0:
            d_own = d
    return d_x, d_own


@triton.jit
def step_gradients(
    zxbcdt_ptr, stride, d_zxbcdt_ptr, d_stride, dt_ptr, sums_ptr, pairs_ptr, read_ptr, kept_ptr,
    added_ptr, through_ptr, dt_bias_ptr, a_ptr, head, start, end, chunk, T, low, high,
    H: tl.constexpr, BLOCKS: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The gradient of one head's raw time steps in a chunk; returns its sums for dt_bias and A.

    read, kept: `along` of C's and of B's kernel. through: [N, H, BLOCKS], see `carry_kernel`.
    """
    at = tl.arange(0, CHUNK)
    rows = start + at
    inside = rows < end
    head_rows = tl.cast(head, tl.int64) * T
    plane = tl.cast(T, tl.int64) * H
    across = tl.load(read_ptr + head_rows + rows, mask=inside, other=0.0).to(tl.float64)
    across -= tl.load(added_ptr + head_rows + rows, mask=inside, other=0.0)
    for tile in range(CHUNK // TILE):
        written = inside & (at // TILE >= tile)
        pairs = tl.load(pairs_ptr + tile * plane + head_rows + rows, mask=written, other=0.0)
        across += pairs
    kept = tl.load(kept_ptr + head_rows + rows, mask=inside, other=0.0).to(tl.float64)
    along = tl.load(added_ptr + plane + head_rows + rows, mask=inside, other=0.0)
    blocks = (chunk.to(tl.int64) * H + head) * BLOCKS + tl.arange(0, BLOCKS)
    through = tl.sum(tl.load(through_ptr + blocks), 0)
    through *= tl.exp(tl.load(sums_ptr + head_rows + end - 1).to(tl.float32))
    d_log = tl.cumsum(across, axis=0, reverse=True) + tl.cumsum(kept, axis=0) - kept + through
    dt = tl.load(dt_ptr + head_rows + rows, mask=inside, other=0.0)
    rate = tl.load(a_ptr + head).to(tl.float64)
    column = rows.to(tl.int64) * stride + head
    raw = tl.load(zxbcdt_ptr + column, mask=inside, other=0.0).to(tl.float32)
    raw += tl.load(dt_bias_ptr + head).to(tl.float32)
    free = softplus(raw.to(tl.float64)).to(tl.float32)
    slope = tl.where((free < low) | (free > high), 0.0, tl.sigmoid(raw))
    d_raw = tl.where(inside, (d_log * rate + along) * slope, 0.0)
    value = d_raw.to(tl.float32).to(d_zxbcdt_ptr.dtype.element_ty)
    tl.store(d_zxbcdt_ptr + rows.to(tl.int64) * d_stride + head, value, mask=inside)
    d_rate = tl.sum(tl.where(inside, d_log * dt, 0.0), 0)
    return tl.sum(d_raw, 0).to(tl.float32), d_rate.to(tl.float32)


@triton.jit
def mix_gradient_kernel(
    zxbcdt_ptr, stride: tl.constexpr, d_zxbcdt_ptr, d_stride: tl.constexpr, d_mixed_ptr, d_b_ptr,
    d_c_ptr, weight_ptr, bias_ptr, before_ptr, documents_ptr, d_before_ptr, dt_ptr, sums_ptr,
    pairs_ptr, read_ptr, kept_ptr, added_ptr, through_ptr, dt_bias_ptr, a_ptr, parts_ptr,
    tiles_ptr, T, tiles, low, high,
    BLOCKS: tl.constexpr, H: tl.constexpr, INNER: tl.constexpr, SHARED: tl.constexpr,
    W: tl.constexpr, K: tl.constexpr, DT_BIAS_AT: tl.constexpr, A_AT: tl.constexpr,
    PARTS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    TILE: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """Gradients of xBC, of the convolution's weight and bias and of its initial inputs; then those
    of the time steps. Axis 1 as in `mix_kernel`, with one head a program."""
    span, part = tl.program_id(0), tl.program_id(1)
    each = tl.cdiv(tiles, tl.num_programs(0))
    parts_ptr += span.to(tl.int64) * PARTS
    for tile in range(span * each, min(tiles, (span + 1) * each)):
        row, start, end, chunk, document, opens, closes = read_record(tiles_ptr, tile)
        is_first = tile == span * each
        if part < (W + COLUMNS - 1) // COLUMNS:
            columns = part * COLUMNS + tl.arange(0, COLUMNS)
            is_column = columns < W
            rows = row + tl.arange(0, TILE)
            place = document * 0 - 1
            if HAS_INITIAL:
                place = tl.load(documents_ptr + document)
            d_x, d_own = input_gradient(
                d_mixed_ptr, d_b_ptr, d_c_ptr, zxbcdt_ptr + INNER, stride, before_ptr, place,
                weight_ptr, bias_ptr, rows, opens, closes, columns, is_column, SHARED, W, K,
                HAS_INITIAL,
            )  # fmt: skip
            at = d_zxbcdt_ptr + INNER + rows[:, None].to(tl.int64) * d_stride + columns[None, :]
            mask = (rows < end)[:, None] & is_column[None, :]
            tl.store(at, d_x.to(d_zxbcdt_ptr.dtype.element_ty), mask=mask)
            d_own = tl.where((rows < end)[:, None], d_own, 0.0)
            add_part(parts_ptr + W * K + columns, tl.sum(d_own, 0), is_column, is_first)
            for k in range(K):
                inputs = window_rows(
                    zxbcdt_ptr + INNER, stride, before_ptr, place, rows - (K - 1) + k, opens,
                    closes, columns, is_column, W, K, HAS_INITIAL,
                )  # fmt: skip
                # Beyond the tile there may be NaN of other rows.
                products = tl.where((rows < end)[:, None], d_own * inputs, 0.0)
                d_tap = tl.sum(products, 0)
                add_part(parts_ptr + columns * K + k, d_tap, is_column, is_first)
            if HAS_INITIAL:  # noqa: SIM102
                if (row == opens) & (place >= 0):
                    index = tl.arange(0, BEFORE)
                    d_before, _ = input_gradient(
                        d_mixed_ptr, d_b_ptr, d_c_ptr, zxbcdt_ptr + INNER, stride, before_ptr,
                        place, weight_ptr, bias_ptr, opens - (K - 1) + index, opens, closes,
                        columns, is_column, SHARED, W, K, HAS_INITIAL,
                    )  # fmt: skip
                    offsets = (place * (K - 1) + index)[:, None].to(tl.int64) * W + columns[None, :]
                    is_input = (index < K - 1)[:, None] & is_column[None, :]
                    tl.store(d_before_ptr + offsets, d_before, mask=is_input)
        else:
            head = part - (W + COLUMNS - 1) // COLUMNS
            d_bias, d_rate = tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32)
            if row == start:
                d_bias, d_rate = step_gradients(
                    zxbcdt_ptr + INNER + W, stride, d_zxbcdt_ptr + INNER + W, d_stride, dt_ptr,
                    sums_ptr, pairs_ptr, read_ptr, kept_ptr, added_ptr, through_ptr, dt_bias_ptr,
                    a_ptr, head, start, end, chunk, T, low, high, H, BLOCKS, CHUNK, TILE,
                )  # fmt: skip
            add_part(parts_ptr + DT_BIAS_AT + head, d_bias, part >= 0, is_first)
            add_part(parts_ptr + A_AT + head, d_rate, part >= 0, is_first)
