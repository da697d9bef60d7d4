# The arguments of a jit function have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Jit functions of the divergences, between the matrix products: one program a row.

`fused_kernel` computes divergence and gradient in one program: both rows are read from memory once,
read again from L2 (twice for the Jensen-Shannon divergence), and the student's is written once.
Under vocabulary parallelism the same steps are three kernels, with a collective between them.
Tiles, masks and units are those of common/linear_head/triton.py: x2 = logits * scale * log2(e).
"""

from __future__ import annotations

import triton
import triton.language as tl

from nemocascade_kernels.common.linear_head.triton import (
    LN2,
    LOG2E,
    LOWEST,
    readable,
    tile_columns,
    write_zeros,
)

#: Kinds, in the order of DIVERGENCES; every other one is the mixture.
REVERSE = tl.constexpr(0)
FORWARD = tl.constexpr(1)


@triton.jit
def load_pair(x_ptr, z_ptr, at, vocabulary, end, scale_log2):
    """x2 of student and teacher at the columns `at`: -inf outside the row."""
    inside = at < vocabulary
    x = tl.load(x_ptr + at, mask=at < end, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + at, mask=at < end, other=0.0).to(tl.float32)
    x = tl.where(inside, x * scale_log2, -float("inf"))
    return x, tl.where(inside, z * scale_log2, -float("inf")), inside


@triton.jit
def merge(maximum, total, cross):
    """Combine the lanes' running maxima and sums."""
    top = tl.max(maximum, axis=0)
    decay = tl.exp2(tl.maximum(maximum - top, LOWEST))
    return top, tl.sum(total * decay, axis=0), tl.sum(cross * decay, axis=0)


@triton.jit
def reduce_pair(
    x_ptr,
    z_ptr,
    vocabulary,
    scale_log2,
    KIND: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Maximum and sum of 2^(x2 - maximum) of both rows, and the cross term of `PairStatistics`, in
    units of x2."""
    columns = tile_columns(BLOCK, VECTOR)
    end = readable(vocabulary, PADDED, VECTOR)
    top_x = tl.full([BLOCK // VECTOR], LOWEST, tl.float32)
    top_z = tl.full([BLOCK // VECTOR], LOWEST, tl.float32)
    total_x = tl.zeros([BLOCK // VECTOR], tl.float32)
    total_z = tl.zeros([BLOCK // VECTOR], tl.float32)
    cross = tl.zeros([BLOCK // VECTOR], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        x, z, inside = load_pair(x_ptr, z_ptr, start + columns, vocabulary, end, scale_log2)
        # The difference of two infinities would be NaN.
        difference = tl.where(inside, x, 0.0) - tl.where(inside, z, 0.0)
        larger_x = tl.maximum(top_x, tl.max(x, axis=1))
        larger_z = tl.maximum(top_z, tl.max(z, axis=1))
        p = tl.exp2(x - larger_x[:, None])
        q = tl.exp2(z - larger_z[:, None])
        decay_x, decay_z = tl.exp2(top_x - larger_x), tl.exp2(top_z - larger_z)
        if KIND == REVERSE:
            cross = cross * decay_x + tl.sum(p * difference, axis=1)
        elif KIND == FORWARD:
            cross = cross * decay_z - tl.sum(q * difference, axis=1)
        total_x = total_x * decay_x + tl.sum(p, axis=1)
        total_z = total_z * decay_z + tl.sum(q, axis=1)
        top_x, top_z = larger_x, larger_z
    if KIND == FORWARD:
        one_x, sum_x, _ = merge(top_x, total_x, total_x)
        one_z, sum_z, crossed = merge(top_z, total_z, cross)
    else:
        one_x, sum_x, crossed = merge(top_x, total_x, cross)
        one_z, sum_z, _ = merge(top_z, total_z, total_z)
    return one_x, sum_x, one_z, sum_z, crossed


@triton.jit
def log_mixture(log_p, log_q):
    """log2(p / m) with m = (p + q) / 2, from log2 p and log2 q: 1 - log2(1 + q / p)."""
    away = log_q - log_p
    return 1.0 - tl.maximum(away, 0.0) - tl.log2(1.0 + tl.exp2(-tl.abs(away)))


@triton.jit
def mixture_sums(
    x_ptr,
    z_ptr,
    vocabulary,
    scale_log2,
    lse_x,
    lse_z,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """KL(p || m) and KL(q || m) of a row; lse in units of x2."""
    columns = tile_columns(BLOCK, VECTOR)
    end = readable(vocabulary, PADDED, VECTOR)
    of_p = tl.zeros([BLOCK // VECTOR], tl.float32)
    of_q = tl.zeros([BLOCK // VECTOR], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        x, z, inside = load_pair(x_ptr, z_ptr, start + columns, vocabulary, end, scale_log2)
        log_p, log_q = tl.where(inside, x - lse_x, 0.0), tl.where(inside, z - lse_z, 0.0)
        ratio = log_mixture(log_p, log_q)
        of_p += tl.sum(tl.where(inside, tl.exp2(log_p) * ratio, 0.0), axis=1)
        of_q += tl.sum(tl.where(inside, tl.exp2(log_q) * (ratio + log_q - log_p), 0.0), axis=1)
    return tl.sum(of_p, axis=0) * LN2, tl.sum(of_q, axis=0) * LN2


@triton.jit
def write_pair_gradient(
    x_ptr,
    z_ptr,
    vocabulary,
    scale,
    lse_x,
    lse_z,
    inner,
    slope,
    KIND: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Overwrite the student's row with its gradient, from end to start: the end is still in cache.
    lse in units of x2. See `gradient_` in torch.py."""
    columns = tile_columns(BLOCK, VECTOR)
    end = readable(vocabulary, PADDED, VECTOR)
    tiles = tl.cdiv(vocabulary, BLOCK)
    for tile in range(tiles):
        at = (tiles - 1 - tile) * BLOCK + columns
        x = tl.load(x_ptr + at, mask=at < end, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + at, mask=at < end, other=0.0).to(tl.float32)
        log_p, log_q = x * (scale * LOG2E) - lse_x, z * (scale * LOG2E) - lse_z
        p = tl.exp2(log_p)
        if KIND == REVERSE:
            gradient = (scale * slope) * p * ((log_p - log_q) * LN2 - inner)
        elif KIND == FORWARD:
            gradient = (scale * slope) * (p - tl.exp2(log_q))
        else:
            gradient = (0.5 * scale * slope) * p * (log_mixture(log_p, log_q) * LN2 - inner)
        tl.store(x_ptr + at, gradient.to(x_ptr.dtype.element_ty), mask=at < end)


@triton.jit
def fused_kernel(
    x_ptr,
    z_ptr,
    slope_ptr,
    out_ptr,
    stride_x,
    stride_z,
    rows,
    vocabulary,
    scale,
    KIND: tl.constexpr,
    GRADIENT: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Write divergence and both lse to out [3, rows]; GRADIENT: x becomes slope times its gradient.

    A row whose slope is 0 is not read, and contributes 0.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_x
    z_ptr += row * stride_z
    divergence, lse_x, lse_z = 0.0, 0.0, 0.0
    slope = tl.load(slope_ptr + row)
    if slope == 0:
        if GRADIENT:
            write_zeros(x_ptr, vocabulary, PADDED, BLOCK, VECTOR)
    else:
        top_x, total_x, top_z, total_z, cross = reduce_pair(
            x_ptr, z_ptr, vocabulary, scale * LOG2E, KIND, PADDED, BLOCK, VECTOR
        )
        lse_x, lse_z = top_x + tl.log2(total_x), top_z + tl.log2(total_z)
        if KIND == REVERSE:
            divergence = (cross / total_x - lse_x + lse_z) * LN2
            inner = divergence
        elif KIND == FORWARD:
            divergence = (cross / total_z - lse_z + lse_x) * LN2
            inner = divergence
        else:
            inner, of_q = mixture_sums(
                x_ptr, z_ptr, vocabulary, scale * LOG2E, lse_x, lse_z, PADDED, BLOCK, VECTOR
            )
            divergence = 0.5 * (inner + of_q)
        if GRADIENT:
            write_pair_gradient(
                x_ptr, z_ptr, vocabulary, scale, lse_x, lse_z, inner, slope,
                KIND, PADDED, BLOCK, VECTOR,
            )  # fmt: skip
    tl.store(out_ptr + row, divergence)
    tl.store(out_ptr + rows + row, lse_x * LN2)
    tl.store(out_ptr + 2 * rows + row, lse_z * LN2)


@triton.jit
def statistics_kernel(
    x_ptr,
    z_ptr,
    out_ptr,
    stride_x,
    stride_z,
    rows,
    vocabulary,
    scale,
    KIND: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Write the fields of `PairStatistics` to out [5, rows]."""
    row = tl.program_id(0).to(tl.int64)
    top_x, total_x, top_z, total_z, cross = reduce_pair(
        x_ptr + row * stride_x, z_ptr + row * stride_z, vocabulary, scale * LOG2E,
        KIND, PADDED, BLOCK, VECTOR,
    )  # fmt: skip
    tl.store(out_ptr + row, top_x * LN2)
    tl.store(out_ptr + rows + row, total_x)
    tl.store(out_ptr + 2 * rows + row, top_z * LN2)
    tl.store(out_ptr + 3 * rows + row, total_z)
    tl.store(out_ptr + 4 * rows + row, cross * LN2)


@triton.jit
def mixture_kernel(
    x_ptr,
    z_ptr,
    lse_x_ptr,
    lse_z_ptr,
    out_ptr,
    stride_x,
    stride_z,
    rows,
    vocabulary,
    scale,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Write a shard's parts of KL(p || m) and KL(q || m) to out [2, rows]."""
    row = tl.program_id(0).to(tl.int64)
    of_p, of_q = mixture_sums(
        x_ptr + row * stride_x, z_ptr + row * stride_z, vocabulary, scale * LOG2E,
        tl.load(lse_x_ptr + row) * LOG2E, tl.load(lse_z_ptr + row) * LOG2E, PADDED, BLOCK, VECTOR,
    )  # fmt: skip
    tl.store(out_ptr + row, of_p)
    tl.store(out_ptr + rows + row, of_q)


@triton.jit
def gradient_kernel(
    x_ptr,
    z_ptr,
    lse_x_ptr,
    lse_z_ptr,
    inner_ptr,
    slope_ptr,
    stride_x,
    stride_z,
    vocabulary,
    scale,
    KIND: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Overwrite each row of x with slope times its gradient."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_x
    slope = tl.load(slope_ptr + row)
    if slope == 0:
        write_zeros(x_ptr, vocabulary, PADDED, BLOCK, VECTOR)
    else:
        write_pair_gradient(
            x_ptr, z_ptr + row * stride_z, vocabulary, scale, tl.load(lse_x_ptr + row) * LOG2E,
            tl.load(lse_z_ptr + row) * LOG2E, tl.load(inner_ptr + row), slope,
            KIND, PADDED, BLOCK, VECTOR,
        )  # fmt: skip
