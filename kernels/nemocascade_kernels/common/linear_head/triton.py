# The arguments of a jit function have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Row kernels in Triton, between the matrix products: one program a row.

A program loops over its row in tiles of [lanes, VECTOR] elements. VECTOR neighbours are one load
of a thread, so a reduction over them stays in its registers. The lanes keep their own running
maximum and sums, which are reduced once, at the row's end. Exponentials are base 2, like the
hardware instruction. Row offsets are 64-bit.

If V is not a multiple of VECTOR, a mask by element would split every load into single elements.
So rows with padding (PADDED) are masked by whole vectors. Values read from the padding are
replaced, and values written to it are unused.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemocascade_kernels.common.linear_head.statistics import RowStatistics

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
#: Maximum of no elements. It must be finite: the difference of two infinities is NaN.
LOWEST = tl.constexpr(-3.0e38)


class RowConfig(NamedTuple):
    """Tile of a row kernel: BLOCK elements at a time, VECTOR of them in one load of a thread."""

    BLOCK: int
    VECTOR: int
    num_warps: int


def row_config(vocabulary: int, element_size: int) -> RowConfig:
    """Tile for rows of `vocabulary` elements: 16-byte loads, two in flight in each thread."""
    vector = 16 // element_size
    block = min(triton.next_power_of_2(vocabulary), 1024 * vector)
    block = max(block, 32 * vector)
    return RowConfig(block, vector, num_warps=max(1, min(16, block // (64 * vector))))


@triton.jit
def tile_columns(BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """Columns of a tile, [BLOCK // VECTOR, VECTOR]."""
    lane = tl.arange(0, BLOCK // VECTOR)[:, None]
    return lane * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def readable(vocabulary, PADDED: tl.constexpr, VECTOR: tl.constexpr):
    """End of the accessible elements of a row, in whole vectors if the row is padded."""
    return tl.cdiv(vocabulary, VECTOR) * VECTOR if PADDED else vocabulary


@triton.jit
def reduce_row(
    row_ptr,
    vocabulary,
    scale_log2,
    ENTROPY: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Reduce `x2 = logits * scale * log2(e)`: maximum m2, sum of 2^(x2 - m2), and the same sum
    weighted with x2 - m2.
    """
    columns = tile_columns(BLOCK, VECTOR)
    end = readable(vocabulary, PADDED, VECTOR)
    maximum = tl.full([BLOCK // VECTOR], LOWEST, tl.float32)
    total = tl.zeros([BLOCK // VECTOR], tl.float32)
    weighted = tl.zeros([BLOCK // VECTOR], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        at = start + columns
        inside = at < vocabulary
        logits = tl.load(row_ptr + at, mask=at < end, other=0.0).to(tl.float32)
        x = tl.where(inside, logits * scale_log2, -float("inf"))
        larger = tl.maximum(maximum, tl.max(x, axis=1))
        difference = x - larger[:, None]
        e = tl.exp2(difference)
        shift = maximum - larger
        decay = tl.exp2(shift)
        if ENTROPY:
            # Outside the row e is 0 and the difference -inf: their product must be 0, not NaN.
            weighted = (weighted + total * tl.maximum(shift, LOWEST)) * decay
            weighted += tl.sum(e * tl.where(inside, difference, 0.0), axis=1)
        total = total * decay + tl.sum(e, axis=1)
        maximum = larger
    top = tl.max(maximum, axis=0)
    shift = tl.maximum(maximum - top, LOWEST)
    decay = tl.exp2(shift)
    if ENTROPY:
        weighted = (weighted + total * shift) * decay
    return top, tl.sum(total * decay, axis=0), tl.sum(weighted, axis=0)


@triton.jit
def write_gradient(
    row_ptr,
    vocabulary,
    target,
    scale,
    lse,
    slope,
    entropy,
    entropy_slope,
    ENTROPY: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Overwrite a row of logits with its gradient, from end to start: the end is still in cache.

    target is -1 if it is not in this shard. See `gradient_` in torch.py.
    """
    columns = tile_columns(BLOCK, VECTOR)
    end = readable(vocabulary, PADDED, VECTOR)
    lse_log2 = lse * LOG2E
    tiles = tl.cdiv(vocabulary, BLOCK)
    for tile in range(tiles):
        at = (tiles - 1 - tile) * BLOCK + columns
        logits = tl.load(row_ptr + at, mask=at < end, other=0.0).to(tl.float32)
        log2_p = logits * (scale * LOG2E) - lse_log2
        p = tl.exp2(log2_p)
        if ENTROPY:
            factor = entropy_slope * (log2_p * LN2 + entropy) + slope
            gradient = -scale * p * factor
        else:
            gradient = (-scale * slope) * p
        gradient = tl.where(at == target, gradient + scale * slope, gradient)
        tl.store(row_ptr + at, gradient.to(row_ptr.dtype.element_ty), mask=at < end)


@triton.jit
def write_zeros(
    row_ptr, vocabulary, PADDED: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr
):
    """Overwrite a row with zeros without reading it."""
    end = readable(vocabulary, PADDED, VECTOR)
    columns = tile_columns(BLOCK, VECTOR)
    zeros = tl.zeros([BLOCK // VECTOR, VECTOR], row_ptr.dtype.element_ty)
    for start in range(0, vocabulary, BLOCK):
        tl.store(row_ptr + start + columns, zeros, mask=start + columns < end)


@triton.jit
def load_target(row_ptr, target_ptr, row, vocabulary, scale):
    """The target's column and its scaled logit; -1 and -inf if it is not in this shard."""
    target = tl.load(target_ptr + row)
    inside = (target >= 0) & (target < vocabulary)
    column = tl.where(inside, target, 0)
    logit = tl.load(row_ptr + column, mask=inside, other=-float("inf")).to(tl.float32) * scale
    return tl.where(inside, target, -1).to(tl.int32), logit


@triton.jit
def statistics_kernel(
    logits_ptr,
    target_ptr,
    out_ptr,
    stride,
    rows,
    vocabulary,
    scale,
    ENTROPY: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Write maximum, total, target_logit and weighted to out [4, rows]. One program a row."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    top, total, weighted = reduce_row(
        row_ptr, vocabulary, scale * LOG2E, ENTROPY, PADDED, BLOCK, VECTOR
    )
    _, target_logit = load_target(row_ptr, target_ptr, row, vocabulary, scale)
    tl.store(out_ptr + row, top * LN2)
    tl.store(out_ptr + rows + row, total)
    tl.store(out_ptr + 2 * rows + row, target_logit)
    tl.store(out_ptr + 3 * rows + row, weighted * LN2)


@triton.jit
def gradient_kernel(
    logits_ptr,
    target_ptr,
    lse_ptr,
    slope_ptr,
    entropy_ptr,
    entropy_slope_ptr,
    stride,
    vocabulary,
    scale,
    ENTROPY: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Overwrite each row of logits with its gradient. One program a row."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    slope = tl.load(slope_ptr + row)
    entropy, entropy_slope = 0.0, 0.0
    silent = slope == 0
    if ENTROPY:
        entropy = tl.load(entropy_ptr + row)
        entropy_slope = tl.load(entropy_slope_ptr + row)
        silent = silent & (entropy_slope == 0)
    if silent:
        write_zeros(row_ptr, vocabulary, PADDED, BLOCK, VECTOR)
    else:
        lse = tl.load(lse_ptr + row)
        column, _ = load_target(row_ptr, target_ptr, row, vocabulary, scale)
        write_gradient(
            row_ptr,
            vocabulary,
            column,
            scale,
            lse,
            slope,
            entropy,
            entropy_slope,
            ENTROPY,
            PADDED,
            BLOCK,
            VECTOR,
        )


def is_padded(logits: Tensor, config: RowConfig) -> bool:
    """True if every row starts on a whole vector and is padded to whole vectors."""
    stride = logits.stride(0)
    whole = -(-logits.shape[1] // config.VECTOR) * config.VECTOR
    return stride % config.VECTOR == 0 and stride >= whole


def statistics(logits: Tensor, target: Tensor, scale: float, entropy: bool) -> RowStatistics:
    """See `statistics` in torch.py."""
    rows, vocabulary = logits.shape
    out = torch.empty(4, rows, dtype=torch.float32, device=logits.device)
    if rows:
        config = row_config(vocabulary, logits.element_size())
        statistics_kernel[(rows,)](
            logits,
            target,
            out,
            logits.stride(0),
            rows,
            vocabulary,
            scale,
            entropy,
            is_padded(logits, config),
            **config._asdict(),
        )
    return RowStatistics(*out.unbind())


def gradient_(
    logits: Tensor,
    target: Tensor,
    scale: float,
    lse: Tensor,
    slope: Tensor,
    entropy: Tensor | None = None,
    entropy_slope: Tensor | None = None,
) -> None:
    """See `gradient_` in torch.py."""
    rows, vocabulary = logits.shape
    with_entropy = entropy is not None and entropy_slope is not None
    if rows:
        config = row_config(vocabulary, logits.element_size())
        gradient_kernel[(rows,)](
            logits,
            target,
            lse,
            slope,
            entropy if with_entropy else lse,
            entropy_slope if with_entropy else slope,
            logits.stride(0),
            vocabulary,
            scale,
            with_entropy,
            is_padded(logits, config),
            **config._asdict(),
        )
