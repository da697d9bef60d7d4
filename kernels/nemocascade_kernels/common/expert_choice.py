# The arguments of a jit function have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Choice of a token's experts in Triton kernels, on tiles of scores [tokens, experts]."""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2**31))
_HIGHEST = tl.constexpr(2**31 - 1)
_INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def ordered(values):
    """Map floats to int32 of the same order; NaN is above all, -0 equals 0."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, bits ^ _HIGHEST, bits)
    # By its bits: compared as a float, a NaN costs two instructions more.
    return tl.where((bits & _HIGHEST) > _INFINITY, _HIGHEST, keys)


@triton.jit
def first_largest(keys, columns, SIZE: tl.constexpr):
    """Column of each row's largest key; among equals, the first."""
    largest = tl.max(keys, axis=1)
    return tl.min(tl.where(keys == largest[:, None], columns[None, :], SIZE), axis=1)


@triton.jit
def softmax_terms(logits):
    """Each row's largest logit m, and its sum of exp(logit - m)."""
    top = tl.max(logits, axis=1)
    return top, tl.sum(tl.exp(logits - top[:, None]), axis=1)


@triton.jit
def scores_with(logits, top, total, SOFTMAX: tl.constexpr):
    """Scores of some logits of rows whose `softmax_terms` are known; a sigmoid needs none."""
    if SOFTMAX:
        return tl.exp(logits - top[:, None]) / total[:, None]
    return 1.0 / (1.0 + tl.exp(-logits))


@triton.jit
def scores_of(logits, SOFTMAX: tl.constexpr):
    if SOFTMAX:
        top, total = softmax_terms(logits)
        return scores_with(logits, top, total, True)
    return scores_with(logits, 0.0, 1.0, False)


@triton.jit
def without_other_groups(
    keys, biased, columns, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Set keys outside each row's best groups to the lowest key.

    Returns the keys, and [rows, BLOCK_G] int32 with 1 for the best groups.
    """
    group_ids = tl.arange(0, BLOCK_G)
    group_keys = tl.full([keys.shape[0], BLOCK_G], LOWEST, tl.int32)
    for g in tl.static_range(GROUPS):
        inside = (columns // GROUP_SIZE == g)[None, :]
        own = tl.where(inside, keys, LOWEST)
        first = first_largest(own, columns, BLOCK_E)
        is_first = columns[None, :] == first[:, None]
        total = tl.sum(tl.where(is_first, biased, 0.0), axis=1)
        if GROUP_SIZE > 1:
            second = first_largest(tl.where(is_first, LOWEST, own), columns, BLOCK_E)
            total += tl.sum(tl.where(columns[None, :] == second[:, None], biased, 0.0), axis=1)
        group_keys = tl.where(group_ids[None, :] == g, ordered(total)[:, None], group_keys)
    kept = tl.zeros(keys.shape, tl.int1)
    best_groups = tl.zeros([keys.shape[0], BLOCK_G], tl.int32)
    for _ in tl.static_range(TOP_GROUPS):
        best = first_largest(group_keys, group_ids, BLOCK_G)
        is_best = group_ids[None, :] == best[:, None]
        group_keys = tl.where(is_best, LOWEST, group_keys)
        best_groups = tl.where(is_best, 1, best_groups)
        kept = kept | ((columns // GROUP_SIZE)[None, :] == best[:, None])
    return tl.where(kept, keys, LOWEST), best_groups
