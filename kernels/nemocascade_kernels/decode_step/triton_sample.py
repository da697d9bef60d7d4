# The arguments of a jit function have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The draw of a token a row in one Triton kernel: random number, truncation, log-probability.

A program has one row. It reads the logits once for their maximum and sum, once for the sum of the
weights that may be drawn, and up to the drawn token a third time; after the first read they come
from the L2 cache. A truncation is a threshold of the logits, found by bisection of their bits, and
the number of tokens kept of those at the threshold, the lowest ids first.

Letters: n rows, V vocabulary. A weight is exp(logit / temperature - maximum).
"""

from __future__ import annotations

import triton
import triton.language as tl

from nemocascade_kernels.common import random_numbers
from nemocascade_kernels.common.expert_choice import ordered

_STEP = tl.constexpr(random_numbers.STEP)
_FIRST, _SECOND = tl.constexpr(random_numbers.FIRST), tl.constexpr(random_numbers.SECOND)
_UNIT = tl.constexpr(2.0**-53)
_ALL = tl.constexpr(2**31 - 1)


@triton.jit
def _shifted(z, BY: tl.constexpr):
    """Logical right shift, filling with zeros."""
    return (z >> BY) & ((1 << (64 - BY)) - 1)


@triton.jit
def _uniform(key, position):
    """`common.random_numbers.uniforms` of one row."""
    z = key + (position + 1) * _STEP
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    z = z ^ _shifted(z, 31)
    return _shifted(z, 11).to(tl.float64) * _UNIT


@triton.jit
def _scaled(logits_ptr, v, end, scale):
    """Logits over the temperature; minus infinity from `end` on."""
    logits = tl.load(logits_ptr + v, mask=v < end, other=float("-inf"))
    return logits.to(tl.float32) * scale


@triton.jit
def _above(logits_ptr, limit, scale, top, threshold, BLOCK: tl.constexpr):
    """Number and weight of the tokens whose keys are above a threshold."""
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float64)
    for start in range(0, limit, BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = _scaled(logits_ptr, v, limit, scale)
        is_above = (ordered(x) > threshold) & (v < limit)
        count += is_above.to(tl.int32)
        mass += tl.where(is_above, tl.exp(x - top), 0.0).to(tl.float64)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _threshold(logits_ptr, limit, scale, top, low, most, mass, BLOCK: tl.constexpr):
    """The smallest key from `low` on above which there are fewer than `most` tokens, and less than
    `mass`; with the number and the weight of the tokens above it."""
    at = low.to(tl.int64)
    high = ordered(top).to(tl.int64)
    while at < high:
        middle = (at + high) >> 1
        count, weight = _above(logits_ptr, limit, scale, top, middle.to(tl.int32), BLOCK)
        is_enough = (count < most) & (weight < mass)
        high = tl.where(is_enough, middle, high)
        at = tl.where(is_enough, at, middle + 1)
    key = at.to(tl.int32)
    count, weight = _above(logits_ptr, limit, scale, top, key, BLOCK)
    return key, count, weight


@triton.jit
def _weight(key, top):
    """The weight of the tokens of a key."""
    bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key)
    return tl.exp(bits.to(tl.float32, bitcast=True) - top).to(tl.float64)


@triton.jit
def _kept(
    logits_ptr, limit, scale, top, top_k, top_p, HAS_TOP_K: tl.constexpr, BLOCK: tl.constexpr
):
    """The key of the last kept token, and how many of this key are kept."""
    key, equals = tl.full([], -(2**31), tl.int32), tl.full([], _ALL, tl.int32)
    if HAS_TOP_K:
        infinite = tl.full([], float("inf"), tl.float64)
        key, above, mass = _threshold(logits_ptr, limit, scale, top, key, top_k, infinite, BLOCK)
        equals = (top_k - above).to(tl.int32)
        mass += equals * _weight(key, top)
    else:
        above, mass = _above(logits_ptr, limit, scale, top, key, BLOCK)
    last, kept = key, equals
    share = top_p.to(tl.float64) * _UNIT
    if share < 1:
        wanted = share * mass
        last, above, mass = _threshold(logits_ptr, limit, scale, top, key, _ALL, wanted, BLOCK)
        needed = tl.ceil((wanted - mass) / _weight(last, top))
        kept = tl.minimum(tl.maximum(needed, 1.0), 2.0**30).to(tl.int32)
        kept = tl.where(last == key, tl.minimum(equals, kept), kept)
    return last, kept


@triton.jit
def _weights(x, top, threshold, equals, seen, TRUNCATED: tl.constexpr):
    """Weights of a block's kept tokens, and the number of tokens at the threshold so far."""
    weights = tl.exp(x - top)
    if TRUNCATED:
        keys = ordered(x)
        at = (keys == threshold).to(tl.int32)
        is_early = (at > 0) & (seen + tl.cumsum(at, 0) <= equals)
        weights = tl.where((keys > threshold) | is_early, weights, 0.0)
        seen += tl.sum(at, 0)
    return weights, seen


@triton.jit
def sample_kernel(
    logits_ptr, keys_ptr, positions_ptr, tokens_ptr, logprobs_ptr,
    row_stride, width, limit, scale, top_k, top_p,
    GREEDY: tl.constexpr, TRUNCATED: tl.constexpr, HAS_TOP_K: tl.constexpr, OF_KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A token [n] int64 below `limit` and its log-probability [n] float32. top_p: over 2^53."""
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * row_stride
    lane = tl.arange(0, BLOCK)
    tops = tl.full([BLOCK], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    first = tl.zeros([BLOCK], tl.int32)
    for start in range(0, width, BLOCK):
        v = start + lane
        x = _scaled(logits, v, width, scale)
        higher = tl.maximum(tops, x)
        # Lanes without a finite logit so far have no sum.
        rest = tl.where(higher == float("-inf"), 0.0, higher)
        sums = sums * tl.exp(tops - rest) + tl.exp(x - rest)
        tops = higher
        is_better = (x > best) & (v < limit)
        best, first = tl.where(is_better, x, best), tl.where(is_better, v, first)
    top = tl.max(tops, 0)
    total = tl.sum(sums * tl.exp(tops - top), 0)
    log_kept = 0.0
    if GREEDY:
        token = tl.min(tl.where(best == tl.max(best, 0), first, _ALL), 0)
    else:
        threshold, equals = tl.full([], -(2**31), tl.int32), tl.full([], _ALL, tl.int32)
        if TRUNCATED:
            threshold, equals = _kept(logits, limit, scale, top, top_k, top_p, HAS_TOP_K, BLOCK)
        kept = tl.zeros([BLOCK], tl.float64)
        last, seen = tl.zeros([BLOCK], tl.int32), 0
        for start in range(0, limit, BLOCK):
            x = _scaled(logits, start + lane, limit, scale)
            weights, seen = _weights(x, top, threshold, equals, seen, TRUNCATED)
            kept += weights.to(tl.float64)
            last = tl.where(weights > 0, start + lane, last)
        mass = tl.sum(kept, 0)
        target = _uniform(tl.load(keys_ptr + row), tl.load(positions_ptr + row)) * mass
        token, before = tl.zeros([], tl.int32) + limit, tl.zeros([], tl.float64)
        seen, start = 0, 0
        while (token == limit) & (start < limit):
            x = _scaled(logits, start + lane, limit, scale)
            weights, seen = _weights(x, top, threshold, equals, seen, TRUNCATED)
            partial = before + tl.cumsum(weights.to(tl.float64), 0)
            token = tl.min(tl.where((partial > target) & (weights > 0), start + lane, limit), 0)
            before += tl.sum(weights.to(tl.float64), 0)
            start += BLOCK
        # If rounding leaves no sum above the target, the last id with a weight is drawn.
        token = tl.where(token == limit, tl.max(last, 0), token)
        if OF_KEPT:
            log_kept = tl.minimum(tl.log((mass / total).to(tl.float32)), 0.0)
    chosen = tl.load(logits + token).to(tl.float32) * scale
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(logprobs_ptr + row, chosen - top - tl.log(total) - log_kept)
