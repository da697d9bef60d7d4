# The arguments of a jit function have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The router's Triton kernels; `triton.py` launches them.

Letters: E experts, K choices a token. Ids are int32; the id E means no expert.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nemocascade_kernels.common.expert_choice import (
    LOWEST,
    first_largest,
    ordered,
    scores_of,
    without_other_groups,
)


@triton.jit
def _checked(ids, E: tl.constexpr):
    """Map given ids that are out of range to no expert, because a kernel cannot raise."""
    return tl.where((ids < 0) | (ids > E), E, ids)


@triton.jit
def _row_tile(
    pointer, rows, inside, other, E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Rows of a matrix [T, E] as [BLOCK_T, BLOCK_E] float32.

    Loaded by chunks of columns, whose dimension comes first: the lanes of a warp then share
    32 / (CHUNK / 16 bytes) rows, and a reduction over a row takes few exchanges between lanes.
    """
    columns = (
        tl.arange(0, BLOCK_E // CHUNK)[:, None, None] * CHUNK + tl.arange(0, CHUNK)[None, None, :]
    )
    values = tl.load(
        pointer + rows[None, :, None] * E + columns,
        mask=inside[None, :, None] & (columns < E),
        other=other,
    )
    return tl.reshape(tl.permute(values, [1, 0, 2]), [BLOCK_T, BLOCK_E]).to(tl.float32)


@triton.jit
def _chosen(
    logits, bias_ptr, E: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr, SOFTMAX: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Ids of the K best experts of each row, by decreasing key."""
    columns, choices = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    is_expert = columns < E
    biased = scores_of(logits, SOFTMAX)
    if HAS_BIAS:
        biased += tl.load(bias_ptr + columns, mask=is_expert, other=0.0)[None, :]
    keys = tl.where(is_expert[None, :], ordered(biased), LOWEST)
    if GROUPS > 1:
        keys = without_other_groups(
            keys, biased, columns, GROUPS, TOP_GROUPS, E // GROUPS, BLOCK_E, BLOCK_G
        )
    ids = tl.full([BLOCK_T, BLOCK_K], E, tl.int32)
    for k in range(K):
        best = first_largest(keys, columns, BLOCK_E)
        keys = tl.where(columns[None, :] == best[:, None], LOWEST, keys)
        ids = tl.where(choices[None, :] == k, best[:, None], ids)
    return ids


@triton.jit
def _weights_of(own, logits, SOFTMAX: tl.constexpr):
    """Scores of single logits `own` of the rows of logits."""
    if SOFTMAX:
        top = tl.max(logits, axis=1)[:, None]
        return tl.exp(own - top) / tl.sum(tl.exp(logits - top), axis=1)[:, None]
    return 1.0 / (1.0 + tl.exp(-own))


@triton.jit
def _choose(
    program, logits_ptr, bias_ptr, mask_ptr, given_ptr, weights_ptr, experts_ptr, ranks_ptr,
    loads_ptr, totals_ptr, tokens, scale, tiles,
    E: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr, GIVEN: tl.constexpr, WEIGH: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr,
    CHUNK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Choose for `tiles` tiles of tokens, and rank each slot among the earlier ones of its expert
    (E: none) in them; leave the number of slots of each."""
    choices, bins, members = tl.arange(0, BLOCK_K), tl.arange(0, BINS), tl.arange(0, BLOCK_T)
    seen = tl.zeros([BINS], tl.int32)
    for tile in range(tiles):
        first = (program * tiles + tile).to(tl.int64) * BLOCK_T
        rows = first + tl.arange(0, BLOCK_T)
        inside = rows < tokens
        own = rows[:, None] * K + choices[None, :]
        is_slot = inside[:, None] & (choices < K)[None, :]
        if WEIGH:
            logits = _row_tile(logits_ptr, rows, inside, -float("inf"), E, BLOCK_T, BLOCK_E, CHUNK)
        if GIVEN:
            ids = _checked(tl.load(given_ptr + own, mask=is_slot, other=E), E)
        else:
            ids = _chosen(
                logits, bias_ptr, E, K, GROUPS, TOP_GROUPS, SOFTMAX, HAS_BIAS,
                BLOCK_T, BLOCK_E, BLOCK_K, BLOCK_G,
            )  # fmt: skip
        if HAS_MASK:
            present = tl.load(mask_ptr + rows, mask=inside, other=0) != 0
            ids = tl.where(present[:, None], ids, E)
        if WEIGH:
            is_chosen = is_slot & (ids < E)
            chosen = tl.load(logits_ptr + rows[:, None] * E + ids, mask=is_chosen, other=0.0)
            weights = tl.where(is_chosen, _weights_of(chosen.to(tl.float32), logits, SOFTMAX), 0.0)
            if NORMALIZE:
                weights = weights / (tl.sum(weights, axis=1)[:, None] + 1e-20)
            tl.store(weights_ptr + own, weights * scale, mask=is_slot)
            tl.store(experts_ptr + own, ids, mask=is_slot)
        ids = tl.where(is_slot, ids, -1)
        ranks = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
        for k in range(K):
            other = tl.sum(tl.where(choices[None, :] == k, ids, 0), axis=1)
            # Given experts may contain one twice in a token.
            earlier = members[None, None, :] < members[:, None, None] + (k < choices)[None, :, None]
            same = ids[:, :, None] == other[None, None, :]
            ranks += tl.sum((same & earlier).to(tl.int32), axis=2)
        flat = tl.reshape(ids, [BLOCK_T * BLOCK_K])
        known = tl.maximum(flat, 0)
        ranks += tl.reshape(tl.gather(seen, known, 0), [BLOCK_T, BLOCK_K])
        tl.store(ranks_ptr + own, ranks, mask=is_slot)
        seen += tl.histogram(known, BINS, mask=flat >= 0)
    tl.store(loads_ptr + program * (E + 1) + bins, seen, mask=bins <= E)
    tl.atomic_add(totals_ptr + bins, seen, mask=(bins < E) & (seen > 0), sem="relaxed")


@triton.jit
def _scan(
    part, loads_ptr, totals_ptr, counts_ptr, offsets_ptr, rows,
    E: tl.constexpr, BINS: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Replace each row of loads by its slots' first positions, for EXPERTS experts (E: none)."""
    mine = part * EXPERTS + tl.arange(0, EXPERTS)
    bins = tl.arange(0, BINS)
    totals = tl.load(totals_ptr + bins, mask=bins < E, other=0, cache_modifier=".cg")
    bin_of_mine = tl.minimum(mine, BINS - 1)
    begin = tl.gather(tl.cumsum(totals, axis=0) - totals, bin_of_mine, 0)
    tl.store(offsets_ptr + mine, begin, mask=mine <= E)
    tl.store(counts_ptr + mine, tl.gather(totals, bin_of_mine, 0), mask=mine < E)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        pointers = loads_ptr + row[:, None] * (E + 1) + mine[None, :]
        inside = (row < rows)[:, None] & (mine <= E)[None, :]
        loads = tl.load(pointers, mask=inside, other=0, cache_modifier=".cg")
        tl.store(pointers, begin[None, :] + tl.cumsum(loads, axis=0) - loads, mask=inside)
        begin += tl.sum(loads, axis=0)


@triton.jit
def _place(
    part, experts_ptr, begins_ptr, positions_ptr, order_ptr, slots, slots_of_row,
    E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Convert ranks, in `positions`, to positions, and write their inverse to `order`."""
    slot = part * BLOCK + tl.arange(0, BLOCK)
    inside = slot < slots
    expert = _checked(tl.load(experts_ptr + slot, mask=inside, other=0, cache_modifier=".cg"), E)
    rank = tl.load(positions_ptr + slot, mask=inside, other=0, cache_modifier=".cg")
    begins = begins_ptr + slot // slots_of_row * (E + 1) + expert
    position = tl.load(begins, mask=inside, other=0, cache_modifier=".cg") + rank
    tl.store(positions_ptr + slot, position, mask=inside)
    tl.store(order_ptr + position, slot, mask=inside)


@triton.jit
def _finish(counter_ptr):
    """Count this program, after everything that it has written."""
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel")


@triton.jit
def _await(counter_ptr, programs):
    """Wait until so many programs have finished; see what they have written."""
    finished = tl.atomic_add(counter_ptr, 0, sem="acquire")
    while finished < programs:
        finished = tl.atomic_add(counter_ptr, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def route_kernel(
    logits_ptr, bias_ptr, mask_ptr, given_ptr,
    weights_ptr, experts_ptr, positions_ptr, loads_ptr, counts_ptr, offsets_ptr, order_ptr,
    state_ptr, tokens, slots, scale, tiles, choosers,
    E: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr, GIVEN: tl.constexpr, WEIGH: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr,
    CHUNK: tl.constexpr, BINS: tl.constexpr, SCAN_EXPERTS: tl.constexpr, SCAN_ROWS: tl.constexpr,
    PLACED: tl.constexpr,
):  # fmt: skip
    """Choose, scan and place, each by some programs, in the order in which they start.

    A program draws a number when it starts, and waits only for programs of lower numbers, which
    run already: there is no deadlock, whatever order the device starts them in. state: 0 at the
    beginning and at the end; drawn numbers, programs that have chosen, scanned, ended, then the
    slots of each expert.
    """
    number = tl.atomic_add(state_ptr, 1, sem="relaxed")
    totals_ptr = state_ptr + 4
    scanners: tl.constexpr = (E + SCAN_EXPERTS) // SCAN_EXPERTS
    if number < choosers:
        _choose(
            number, logits_ptr, bias_ptr, mask_ptr, given_ptr, weights_ptr, experts_ptr,
            positions_ptr, loads_ptr, totals_ptr, tokens, scale, tiles, E, K, GROUPS,
            TOP_GROUPS, SOFTMAX, NORMALIZE, HAS_BIAS, HAS_MASK, GIVEN, WEIGH, BLOCK_T, BLOCK_E,
            BLOCK_K, BLOCK_G, CHUNK, BINS,
        )  # fmt: skip
        _finish(state_ptr + 1)
    elif number < choosers + scanners:
        _await(state_ptr + 1, choosers)
        _scan(
            number - choosers, loads_ptr, totals_ptr, counts_ptr, offsets_ptr, choosers,
            E, BINS, SCAN_EXPERTS, SCAN_ROWS,
        )  # fmt: skip
        _finish(state_ptr + 2)
    else:
        _await(state_ptr + 2, scanners)
        _place(
            number - choosers - scanners, experts_ptr, loads_ptr, positions_ptr, order_ptr, slots,
            tiles * BLOCK_T * K, E, PLACED,
        )  # fmt: skip
    if _finish(state_ptr + 3) == tl.num_programs(0) - 1:
        bins = tl.arange(0, BINS)
        tl.store(totals_ptr + bins, tl.zeros([BINS], tl.int32), mask=bins < E)
        heads = tl.arange(0, 4)
        tl.store(state_ptr + heads, tl.zeros([4], tl.int32))


@triton.jit
def gradient_kernel(
    grad_weights_ptr, logits_ptr, experts_ptr, grad_logits_ptr, tokens, scale,
    E: tl.constexpr, K: tl.constexpr, SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    columns, choices = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    slots = rows[:, None] * K + choices[None, :]
    is_slot = (rows < tokens)[:, None] & (choices < K)[None, :]
    ids = tl.load(experts_ptr + slots, mask=is_slot, other=E)
    present = ids < E
    grad = tl.load(grad_weights_ptr + slots, mask=present, other=0.0).to(tl.float32) * scale
    is_element = (rows < tokens)[:, None] & (columns < E)[None, :]
    # The logits of a token without experts are not read: they may be NaN.
    any_present = tl.max(present.to(tl.int32), axis=1) > 0
    if SOFTMAX:
        logits = tl.load(
            logits_ptr + rows[:, None] * E + columns[None, :],
            mask=is_element & any_present[:, None],
            other=-float("inf"),
        ).to(tl.float32)
        # Use a finite row for the tokens that were not read.
        logits = tl.where(any_present[:, None], logits, 0.0)
        dense = scores_of(logits, True)
        chosen = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
        for k in range(K):
            here = choices[None, :] == k
            id_k = tl.sum(tl.where(here, ids, 0), axis=1)
            hit = (columns[None, :] == id_k[:, None]) & (columns < E)[None, :]
            own = tl.sum(tl.where(hit, dense, 0.0), axis=1)
            chosen = tl.where(here, own[:, None], chosen)
    else:
        logits = tl.load(logits_ptr + rows[:, None] * E + ids, mask=present, other=0.0)
        chosen = tl.where(present, scores_of(logits.to(tl.float32), False), 0.0)
    if NORMALIZE:
        total = tl.sum(chosen, axis=1)[:, None] + 1e-20
        grad = tl.where(
            present, (grad - tl.sum(grad * chosen, axis=1)[:, None] / total) / total, 0.0
        )
    if SOFTMAX:
        slope = grad * chosen
        out = tl.where(any_present[:, None], -dense * tl.sum(slope, axis=1)[:, None], 0.0)
    else:
        slope = grad * chosen * (1.0 - chosen)
        out = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for k in range(K):
        here = choices[None, :] == k
        id_k = tl.sum(tl.where(here, ids, 0), axis=1)
        own = tl.sum(tl.where(here & present, slope, 0.0), axis=1)
        out += tl.where(columns[None, :] == id_k[:, None], own[:, None], 0.0)
    tl.store(
        grad_logits_ptr + rows[:, None] * E + columns[None, :],
        out.to(grad_logits_ptr.dtype.element_ty),
        mask=is_element,
    )
