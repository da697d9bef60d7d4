# The arguments of a jit function have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Row movements in Triton: gather by slot, and the sum over a token's choices in their order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def permute_kernel(
    x_ptr, out_ptr, order_ptr, filled_ptr, slots, width,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute out[r] = x[order[r] // TOP_K]; 0 from row `filled` on."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_filled = rows < tl.load(filled_ptr)
    source = (tl.load(order_ptr + rows, mask=is_filled, other=0) // TOP_K).to(tl.int64)
    inside = (columns < width)[None, :]
    values = tl.load(
        x_ptr + source[:, None] * width + columns[None, :],
        mask=inside & is_filled[:, None],
        other=0.0,
    )
    pointers = out_ptr + rows[:, None].to(tl.int64) * width + columns[None, :]
    tl.store(pointers, values, mask=inside & (rows < slots)[:, None])


@triton.jit
def zero_padding_kernel(out_ptr, filled_ptr, rows, width, BLOCK: tl.constexpr):
    """Write zeros from row `filled` on, with a fixed number of programs."""
    size = (rows - tl.load(filled_ptr)).to(tl.int64) * width
    begin = out_ptr + tl.load(filled_ptr).to(tl.int64) * width
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    first = tl.program_id(0).to(tl.int64) * BLOCK
    zeros = tl.zeros([BLOCK], out_ptr.dtype.element_ty)
    for start in range(first, size, step):
        at = start + tl.arange(0, BLOCK)
        tl.store(begin + at, zeros, mask=at < size)


@triton.jit
def combine_kernel(
    rows_ptr, weights_ptr, experts_ptr, positions_ptr, out_ptr, tokens, width,
    E: tl.constexpr, TOP_K: tl.constexpr, WEIGH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute out[t] = sum_k (weights[t, k] *) rows[positions[t, k]], in the order of k."""
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_token, inside = token < tokens, (columns < width)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in tl.static_range(TOP_K):
        slot = token * TOP_K + k
        # Rows without an expert are not read: they may hold any value, even NaN.
        present = tl.load(experts_ptr + slot, mask=is_token, other=E) < E
        row = tl.load(positions_ptr + slot, mask=present, other=0).to(tl.int64)
        values = tl.load(
            rows_ptr + row[:, None] * width + columns[None, :],
            mask=inside & present[:, None],
            other=0.0,
        ).to(tl.float32)
        if WEIGH:
            values *= tl.load(weights_ptr + slot, mask=present, other=0.0)[:, None]
        total += values
    tl.store(
        out_ptr + token[:, None] * width + columns[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=inside & is_token[:, None],
    )


@triton.jit
def unpermute_gradient_kernel(
    grad_ptr, rows_ptr, weights_ptr, order_ptr, filled_ptr, grad_rows_ptr, grad_weights_ptr,
    slots, width,
    TOP_K: tl.constexpr, NEEDS_ROWS: tl.constexpr, NEEDS_WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute grad_rows[r] = weight * grad[token], grad_weights[slot] = grad[token] . rows[r]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < slots
    is_filled = rows < tl.load(filled_ptr)
    slot = tl.load(order_ptr + rows, mask=is_row, other=0)
    weight = tl.load(weights_ptr + slot, mask=is_filled, other=0.0)[:, None]
    source = (slot // TOP_K).to(tl.int64)[:, None] * width
    own = rows[:, None].to(tl.int64) * width
    dots = tl.zeros([ROWS], tl.float32)
    for start in range(0, width, COLUMNS):
        columns = (start + tl.arange(0, COLUMNS))[None, :]
        inside = columns < width
        read = inside & is_filled[:, None]
        grad = tl.load(grad_ptr + source + columns, mask=read, other=0.0).to(tl.float32)
        if NEEDS_ROWS:
            product = (grad * weight).to(grad_rows_ptr.dtype.element_ty)
            tl.store(grad_rows_ptr + own + columns, product, mask=inside & is_row[:, None])
        if NEEDS_WEIGHTS:
            values = tl.load(rows_ptr + own + columns, mask=read, other=0.0).to(tl.float32)
            dots += tl.sum(grad * values, axis=1)
    if NEEDS_WEIGHTS:
        tl.store(grad_weights_ptr + slot, dots, mask=is_row)


@triton.jit
def weights_gradient_kernel(
    dots_ptr, order_ptr, filled_ptr, grad_weights_ptr, slots, parts, BLOCK: tl.constexpr
):  # fmt: skip
    """Compute grad_weights[order[r]] = sum over parts of dots[part, r]; 0 from `filled` on."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < slots
    is_filled = inside & (row < tl.load(filled_ptr))
    total = tl.zeros([BLOCK], tl.float32)
    pointers = dots_ptr + row
    for _ in range(parts):
        total += tl.load(pointers, mask=is_filled, other=0.0)
        pointers += slots
    slot = tl.load(order_ptr + row, mask=inside, other=0)
    tl.store(grad_weights_ptr + slot, total, mask=inside)
