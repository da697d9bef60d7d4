# The arguments of a jit function have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Quantisation to e4m3 in Triton, by rows, by columns of sorted rows, and of weights.

Every quantised matrix is padded with zeros to whole blocks of 128 and has its contraction last, as
Hopper's FP8 products need both operands. See `fp8` for the scales.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def magnitudes(values):
    """The bits of |values|, which order as the values do, with infinity and NaN at the end."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def factor_and_scale(largest):
    """Power of two to multiply by, and its inverse, from a block's largest `magnitudes`.

    See `fp8.scale_of`; 262 is the sum of two biases and the exponent of 256.
    """
    is_above = ((largest & 0x7FFFFF) > 0x600000).to(tl.int32)
    exponent = tl.minimum(262 - (largest >> 23) - is_above, 253)
    scale = tl.where((largest >> 23) == 255, 0x7FC00000, (254 - exponent) << 23)
    factor = (exponent << 23).to(tl.float32, bitcast=True)
    return factor, scale.to(tl.float32, bitcast=True)


@triton.jit
def _nearest(values, BITS: tl.constexpr):
    """Round float32 values to a shorter significand, the even one of two as near."""
    bits = values.to(tl.int32, bitcast=True)
    rest: tl.constexpr = (1 << BITS) - 1
    bits = (bits + (rest >> 1) + ((bits >> BITS) & 1)) & ~rest
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def to_e4m3(values, INTERPRETED: tl.constexpr):
    """Convert float32 values of at most 448. Triton's interpreter truncates: round before."""
    if INTERPRETED:
        # Below 2^-6 e4m3 has multiples of 2^-9, the distance of float32 values above 2^14.
        low = (values + 24576.0) - 24576.0
        values = tl.where(tl.abs(values) < 0.015625, low, _nearest(values, 20))
    return values.to(tl.float8e4nv)


@triton.jit
def as_stored(values, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """The values as memory of a dtype holds them. Triton's interpreter truncates to bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        values = _nearest(values, 16)
    return values.to(dtype)


@triton.jit
def quantize_rows_kernel(
    x_ptr, out_ptr, scale_ptr, rows, width, blocks,
    ROWS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Blocks of 1 x 128: out [rows, blocks * 128], scale [rows, blocks]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    column = block * 128 + tl.arange(0, 128)
    is_row, wide = row < rows, row.to(tl.int64)
    values = tl.load(
        x_ptr + wide[:, None] * width + column[None, :],
        mask=is_row[:, None] & (column < width)[None, :],
        other=0.0,
    ).to(tl.float32)
    factor, scale = factor_and_scale(tl.max(magnitudes(values), axis=1))
    out = to_e4m3(values * factor[:, None], INTERPRETED)
    at = out_ptr + wide[:, None] * (blocks * 128) + column[None, :]
    tl.store(at, out, mask=is_row[:, None])
    tl.store(scale_ptr + wide * blocks + block, scale, mask=is_row)


@triton.jit
def store_columns(
    values, out_ptr, scale_ptr, tile, first, width, INTERPRETED: tl.constexpr
):  # fmt: skip
    """Blocks of 128 rows x 1, transposed: out [tiles, width, 128], scale [tiles, width].

    values: [128, N] float32, the rows of a tile and the columns from `first` on.
    """
    factor, scale = factor_and_scale(tl.max(magnitudes(values), axis=0))
    column = tile.to(tl.int64) * width + first + tl.arange(0, values.shape[1])
    quantized = tl.trans(to_e4m3(values * factor[None, :], INTERPRETED))
    tl.store(out_ptr + column[:, None] * 128 + tl.arange(0, 128)[None, :], quantized)
    tl.store(scale_ptr + column, scale)


@triton.jit
def quantize_columns_kernel(
    x_ptr, out_ptr, scale_ptr, order_ptr, offsets_ptr, tile_expert_ptr, tile_row_ptr,
    tile_count_ptr, width, blocks, TOP_K: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Gather the rows of x of each tile of 128 slots, and quantise with `store_columns`."""
    tile, first = tl.program_id(0), tl.program_id(1) * 128
    if tile < tl.load(tile_count_ptr):
        row = tl.load(tile_row_ptr + tile) + tl.arange(0, 128)
        is_row = row < tl.load(offsets_ptr + tl.load(tile_expert_ptr + tile) + 1)
        source = (tl.load(order_ptr + row, mask=is_row, other=0) // TOP_K).to(tl.int64)
        column = first + tl.arange(0, 128)
        values = tl.load(
            x_ptr + source[:, None] * width + column[None, :],
            mask=is_row[:, None] & (column < width)[None, :],
            other=0.0,
        ).to(tl.float32)
        store_columns(values, out_ptr, scale_ptr, tile, first, blocks * 128, INTERPRETED)


@triton.jit
def quantize_weight_kernel(
    w_ptr, out_ptr, scale_ptr, N, K, down, across,
    GATES: tl.constexpr, TRANSPOSED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Blocks of 128 x 128 of w [E * GATES, N, K]: out [E * GATES, down, 128, across, 128], or
    TRANSPOSED [E, across, 128, GATES, down, 128]; scale without the 128s."""
    group = tl.program_id(0).to(tl.int64)
    n_block, k_block = tl.program_id(1), tl.program_id(2)
    inner = tl.arange(0, 128)
    n, k = n_block * 128 + inner, k_block * 128 + inner
    values = tl.load(
        w_ptr + (group * N + n[:, None]) * K + k[None, :],
        mask=(n < N)[:, None] & (k < K)[None, :],
        other=0.0,
    ).to(tl.float32)
    factor, scale = factor_and_scale(tl.max(tl.max(magnitudes(values), axis=1), axis=0))
    quantized = to_e4m3(values * factor, INTERPRETED)
    if TRANSPOSED:
        row = group // GATES * across + k_block
        block, columns = group % GATES * down + n_block, GATES * down
        quantized = tl.trans(quantized)
    else:
        row, block, columns = group * down + n_block, k_block, across
    start = out_ptr + row * 128 * columns * 128 + block * 128
    tl.store(start + inner[:, None] * columns * 128 + inner[None, :], quantized)
    tl.store(scale_ptr + row * columns + block, scale)
