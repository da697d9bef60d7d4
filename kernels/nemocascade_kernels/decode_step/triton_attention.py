# The arguments of a jit function have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Decode attention in Triton over a blocked KV cache, split over each row's tokens.

`split_kernel` attends to SPLIT tokens of one row and one key/value head, for all query heads that
use it; `merge_kernel` adds the parts of a row by their log-sum-exp. The grid has a program for each
part that `longest` allows, and those past a row's length end at once: the host reads no length, and
a cached token is read once. A part has the same tokens in every call, so a row's result does not
depend on the other rows.

Letters: n rows, h query heads, g key/value heads, R = h / g, D their dimension, B tokens of a
block. Element offsets are 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nemocascade_kernels.common.tile_product import dot


@triton.jit
def split_kernel(
    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, table_ptr, slots_ptr, positions_ptr,
    part_ptr, lse_ptr, q_row, q_head, k_row, k_head, v_row, v_head, columns, splits, scale,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, B: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Part [n, h, splits, D] and its log2-sum-exp [n, h, splits]; append k and v to the cache.

    q_row, q_head, k_row, ...: strides of a row and of a key/value head. columns: of the table.
    scale: of the scores, for exponentials of base 2.
    """
    row, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions_ptr + row)
    first = split.to(tl.int64) * SPLIT
    if first <= position:
        slot = tl.load(slots_ptr + row)
        table = table_ptr + slot * columns
        r, d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
        is_query = (r < R)[:, None] & (d < D)[None, :]
        heads = row * (G * R) + head * R + r
        queries = q_ptr + row * q_row + head * q_head + r[:, None] * D + d[None, :]
        q = tl.load(queries, mask=is_query, other=0.0)
        new_key = tl.load(k_ptr + row * k_row + head * k_head + d, mask=d < D, other=0.0)
        new_value = tl.load(v_ptr + row * v_row + head * v_head + d, mask=d < D, other=0.0)
        new_key = new_key.to(keys_ptr.dtype.element_ty)
        new_value = new_value.to(values_ptr.dtype.element_ty)
        top = tl.full([BLOCK_R], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_R], tl.float32)
        out = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        for start in range(first, tl.minimum(first + SPLIT, position + 1), TILE):
            at = start + tl.arange(0, TILE)
            is_cached, is_new = at < position, at == position
            block = tl.load(table + at // B, mask=is_cached, other=0).to(tl.int64)
            offset = ((block * G + head) * B + at % B) * D
            inside = is_cached[:, None] & (d < D)[None, :]
            key = tl.load(keys_ptr + offset[:, None] + d[None, :], mask=inside, other=0.0)
            key = tl.where(is_new[:, None], new_key[None, :], key)
            score = dot(q, tl.trans(key), tl.zeros([BLOCK_R, TILE], tl.float32), PRECISION) * scale
            score = tl.where((at <= position)[None, :], score, float("-inf"))
            higher = tl.maximum(top, tl.max(score, 1))
            weight = tl.exp2(score - higher[:, None])
            decay = tl.exp2(top - higher)
            value = tl.load(values_ptr + offset[:, None] + d[None, :], mask=inside, other=0.0)
            value = tl.where(is_new[:, None], new_value[None, :], value)
            out = dot(weight.to(value.dtype), value, out * decay[:, None], PRECISION)
            total = total * decay + tl.sum(weight, 1)
            top = higher
        place = heads * splits + split
        parts = part_ptr + place[:, None] * D + d[None, :]
        tl.store(parts, out / total[:, None], mask=is_query)
        tl.store(lse_ptr + place, top + tl.log2(total), mask=r < R)
        if position < first + SPLIT:
            block = tl.load(table + position // B).to(tl.int64)
            there = ((block * G + head) * B + position % B) * D + d
            tl.store(keys_ptr + there, new_key, mask=d < D)
            tl.store(values_ptr + there, new_value, mask=d < D)


@triton.jit
def merge_kernel(
    part_ptr, lse_ptr, positions_ptr, out_ptr, heads, splits,
    D: tl.constexpr, SPLIT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Output [n, h, D] of one row and head from its parts."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    count = tl.load(positions_ptr + row) // SPLIT + 1
    d, s = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    place = (row * heads + head) * splits
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    out = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, count, BLOCK_S):
        at = start + s
        lse = tl.load(lse_ptr + place + at, mask=at < count, other=float("-inf"))
        inside = (at < count)[:, None] & (d < D)[None, :]
        part = tl.load(part_ptr + (place + at)[:, None] * D + d[None, :], mask=inside, other=0.0)
        higher = tl.maximum(top, tl.max(lse, 0))
        weight = tl.exp2(lse - higher)
        decay = tl.exp2(top - higher)
        out = out * decay + tl.sum(part * weight[:, None], 0)
        total = total * decay + tl.sum(weight, 0)
        top = higher
    out_type = out_ptr.dtype.element_ty
    tl.store(out_ptr + (row * heads + head) * D + d, (out / total).to(out_type), mask=d < D)
