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
    ordered,
    scores_of,
    scores_with,
    softmax_terms,
    without_other_groups,
)

#: Counters in the state of a launch, before the slots of each expert.
COUNTERS = tl.constexpr(5)


@triton.jit
def _checked(ids, E: tl.constexpr):
    """Map given ids that are out of range to no expert, because a kernel cannot raise."""
    return tl.where((ids < 0) | (ids > E), E, ids)


@triton.jit
def _row_tile(
    pointer, rows, E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Rows of a matrix [T, E] as [BLOCK_T, BLOCK_E] float32, with -inf past the last column.

    Loaded by chunks of columns, whose dimension comes first: the lanes of a warp then share
    32 / (CHUNK / 16 bytes) rows, and a reduction over a row takes few exchanges between lanes.
    """
    columns = (
        tl.arange(0, BLOCK_E // CHUNK)[:, None, None] * CHUNK + tl.arange(0, CHUNK)[None, None, :]
    )
    pointers = pointer + rows[None, :, None] * E + columns
    if E < BLOCK_E:
        values = tl.load(pointers, mask=columns < E, other=-float("inf"))
    else:
        values = tl.load(pointers)
    return tl.reshape(tl.permute(values, [1, 0, 2]), [BLOCK_T, BLOCK_E]).to(tl.float32)


@triton.jit
def _span_bests(
    biased, E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, SPAN: tl.constexpr
):
    """Best key of each span of SPAN columns, [BLOCK_T, BLOCK_E / SPAN].

    Four neighbours, which one thread holds, are compared as floats, so that a key is made of only
    one of them.
    """
    columns = tl.arange(0, BLOCK_E)
    if E < BLOCK_E:
        # No key is below that of -inf, and among equal ones those past the last come last.
        biased = tl.where((columns < E)[None, :], biased, -float("inf"))
    a, b = tl.split(tl.reshape(biased, [BLOCK_T, BLOCK_E // 4, 2, 2]))
    a, b = tl.split(tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL))
    keys = ordered(tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL))
    return tl.max(tl.reshape(keys, [BLOCK_T, BLOCK_E // SPAN, SPAN // 4]), axis=2)


@triton.jit
def _chosen(
    logits, logits_ptr, rows, bias_ptr, top, total,
    E: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr, SOFTMAX: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    """Ids of the K best experts of each row, by decreasing key.

    The best key of each span of SPAN columns is kept. A choice is the best of them, and only its
    span is read again, for its best key among those after the choice: so a choice costs
    E / SPAN + SPAN comparisons instead of E.
    """
    spans, members = tl.arange(0, BLOCK_E // SPAN), tl.arange(0, SPAN)
    columns, choices = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    biased = scores_with(logits, top, total, SOFTMAX)
    if HAS_BIAS:
        biased += tl.load(bias_ptr + columns, mask=columns < E, other=0.0)[None, :]
    if GROUPS > 1:
        keys = tl.where((columns < E)[None, :], ordered(biased), LOWEST)
        keys, best_groups = without_other_groups(
            keys, biased, columns, GROUPS, TOP_GROUPS, E // GROUPS, BLOCK_E, BLOCK_G
        )
        bests = tl.max(tl.reshape(keys, [BLOCK_T, BLOCK_E // SPAN, SPAN]), axis=2)
    else:
        bests = _span_bests(biased, E, BLOCK_T, BLOCK_E, SPAN)
    ids = tl.full([BLOCK_T, BLOCK_K], E, tl.int32)
    last_key, last = tl.full([BLOCK_T], LOWEST, tl.int32), tl.full([BLOCK_T], -1, tl.int32)
    for k in range(K):
        key = tl.max(bests, axis=1)
        is_best = bests == key[:, None]
        span = tl.min(tl.where(is_best, spans[None, :], BLOCK_E // SPAN), axis=1)
        near = span[:, None] * SPAN + members[None, :]
        again = tl.load(logits_ptr + rows[:, None] * E + near, mask=near < E, other=-float("inf"))
        again = scores_with(again.to(tl.float32), top, total, SOFTMAX)
        if HAS_BIAS:
            again += tl.load(bias_ptr + near, mask=near < E, other=0.0)
        own = ordered(again)
        if E < BLOCK_E:
            own = tl.where(near < E, own, LOWEST)
        if GROUPS > 1:
            group = tl.minimum(near // (E // GROUPS), BLOCK_G - 1)
            own = tl.where(tl.gather(best_groups, group, axis=1) != 0, own, LOWEST)
        # Among equal keys, columns up to the last choice have been chosen.
        chosen_before = tl.where(key == last_key, last, -1)
        is_key = own == key[:, None]
        is_next = is_key & (near > chosen_before[:, None])
        last = tl.min(tl.where(is_next, near, BLOCK_E), axis=1)
        is_left = (own < key[:, None]) | (is_key & (near > last[:, None]))
        best_left = tl.max(tl.where(is_left, own, LOWEST), axis=1)
        bests = tl.where(spans[None, :] == span[:, None], best_left[:, None], bests)
        ids = tl.where(choices[None, :] == k, last[:, None], ids)
        last_key = key
    return ids


@triton.jit
def _ones(bits):
    """Number of ones of int32: the compiler turns it into one instruction."""
    bits = bits.to(tl.uint32, bitcast=True)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return ((bits * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _ranked(
    marks_ptr, ids, is_slot, choices, seen, E: tl.constexpr, BINS: tl.constexpr,
    COPIES: tl.constexpr, MEMBERS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Ranks of the slots of 32 members among the earlier ones of their expert, and `seen`, the
    number of slots of each expert, with theirs.

    ids: [32, WIDTH], of which a member has each at most once, but E in all of COPIES `choices`.
    marks: [E + 1] words of this program: bit m of word e is set if member m has expert e.
    """
    bins, members = tl.arange(0, BINS), tl.arange(0, MEMBERS)[:, None]
    bit = 1 << members
    # The words have been read for the members before.
    tl.debug_barrier()
    tl.store(marks_ptr + bins, tl.zeros([BINS], tl.int32), mask=bins <= E)
    tl.debug_barrier()
    tl.atomic_or(marks_ptr + ids, bit, mask=is_slot, sem="relaxed")
    tl.debug_barrier()
    own = tl.load(marks_ptr + ids, mask=is_slot, other=0, cache_modifier=".cg")
    marks = tl.load(marks_ptr + bins, mask=bins <= E, other=0, cache_modifier=".cg")
    ranks, loads = _ones(own & (bit - 1)), _ones(marks)
    if COPIES > 1:
        ranks = tl.where(ids == E, ranks * COPIES + choices, ranks)
        loads = tl.where(bins == E, loads * COPIES, loads)
    flat = tl.reshape(ids, [MEMBERS * WIDTH])
    ranks += tl.reshape(tl.gather(seen, flat, 0), [MEMBERS, WIDTH])
    return ranks, seen + loads


@triton.jit
def _choose(
    program, logits_ptr, bias_ptr, mask_ptr, given_ptr, weights_ptr, experts_ptr, ranks_ptr,
    loads_ptr, totals_ptr, tokens, slots, scale, tiles,
    E: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr, GIVEN: tl.constexpr, WEIGH: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr,
    SPAN: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Choose for `tiles` tiles of tokens, and rank each slot among the earlier ones of its expert
    (E: none) in them; leave the number of slots of each."""
    choices, bins, members = tl.arange(0, BLOCK_K), tl.arange(0, BINS), tl.arange(0, BLOCK_T)
    own_loads_ptr = loads_ptr + program * (E + 1)
    seen = tl.zeros([BINS], tl.int32)
    for tile in range(tiles):
        first = (program * tiles + tile).to(tl.int64) * BLOCK_T
        rows = first + members
        inside = rows < tokens
        own = rows[:, None] * K + choices[None, :]
        is_slot = inside[:, None] & (choices < K)[None, :]
        if WEIGH:
            if SOFTMAX or not GIVEN:
                # Rows past the last read the last one: no read is masked.
                read = tl.minimum(rows, tokens - 1)
                logits = _row_tile(logits_ptr, read, E, BLOCK_T, BLOCK_E, CHUNK)
            if SOFTMAX:
                top, total = softmax_terms(logits)
            else:
                top, total = 0.0, 1.0
            if GIVEN:
                ids = _checked(tl.load(given_ptr + own, mask=is_slot, other=E), E)
            else:
                ids = _chosen(
                    logits, logits_ptr, read, bias_ptr, top, total, E, K, GROUPS, TOP_GROUPS,
                    SOFTMAX, HAS_BIAS, BLOCK_T, BLOCK_E, BLOCK_K, BLOCK_G, SPAN,
                )  # fmt: skip
            if HAS_MASK:
                present = tl.load(mask_ptr + rows, mask=inside, other=0) != 0
                ids = tl.where(present[:, None], ids, E)
            is_chosen = is_slot & (ids < E)
            chosen = tl.load(logits_ptr + rows[:, None] * E + ids, mask=is_chosen, other=0.0)
            scores = scores_with(chosen.to(tl.float32), top, total, SOFTMAX)
            weights = tl.where(is_chosen, scores, 0.0)
            if NORMALIZE:
                weights = weights / (tl.sum(weights, axis=1)[:, None] + 1e-20)
            tl.store(weights_ptr + own, weights * scale, mask=is_slot)
            tl.store(experts_ptr + own, ids, mask=is_slot)
        if GIVEN:
            # They may contain an expert twice in a token, so here a slot is a member.
            for part in range(K):
                slot = first * K + part * BLOCK_T + members[:, None]
                is_given = slot < slots
                given = _checked(tl.load(given_ptr + slot, mask=is_given, other=E), E)
                if HAS_MASK:
                    is_kept = tl.load(mask_ptr + slot // K, mask=is_given, other=0) != 0
                    given = tl.where(is_kept, given, E)
                ranks, seen = _ranked(
                    own_loads_ptr, given, is_given, choices[None, :], seen, E, BINS, 1,
                    BLOCK_T, 1,
                )  # fmt: skip
                tl.store(ranks_ptr + slot, ranks, mask=is_given)
        else:
            ranks, seen = _ranked(
                own_loads_ptr, ids, is_slot, choices[None, :], seen, E, BINS,
                K if HAS_MASK else 1, BLOCK_T, BLOCK_K,
            )  # fmt: skip
            tl.store(ranks_ptr + own, ranks, mask=is_slot)
    tl.debug_barrier()
    tl.store(own_loads_ptr + bins, seen, mask=bins <= E)
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
    part, parts, experts_ptr, begins_ptr, positions_ptr, order_ptr, slots, slots_of_row,
    E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Convert ranks, in `positions`, to positions, and write their inverse to `order`."""
    for block in range(part, tl.cdiv(slots, BLOCK), parts):
        slot = block * BLOCK + tl.arange(0, BLOCK)
        inside = slot < slots
        experts = tl.load(experts_ptr + slot, mask=inside, other=0, cache_modifier=".cg")
        rank = tl.load(positions_ptr + slot, mask=inside, other=0, cache_modifier=".cg")
        begins = begins_ptr + slot // slots_of_row * (E + 1) + _checked(experts, E)
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
    state_ptr, tokens, slots, scale, tiles, placers,
    E: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr, GIVEN: tl.constexpr, WEIGH: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr,
    SPAN: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr, SCAN_EXPERTS: tl.constexpr,
    SCAN_ROWS: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """Choose, once in each program; then scan and place: jobs that programs draw in this order.

    A program waits only for what has started: to choose, for nothing; and it draws a job only if
    all programs have started. There is no deadlock, however few run at once. state: 0 at the
    beginning and at the end; started, chosen, scanned, drawn jobs, ended, then the slots of each
    expert.
    """
    totals_ptr = state_ptr + COUNTERS
    scanners: tl.constexpr = (E + SCAN_EXPERTS) // SCAN_EXPERTS
    choosers = tl.num_programs(0)
    number = tl.atomic_add(state_ptr, 1, sem="relaxed")
    _choose(
        number, logits_ptr, bias_ptr, mask_ptr, given_ptr, weights_ptr, experts_ptr,
        positions_ptr, loads_ptr, totals_ptr, tokens, slots, scale, tiles, E, K, GROUPS,
        TOP_GROUPS, SOFTMAX, NORMALIZE, HAS_BIAS, HAS_MASK, GIVEN, WEIGH, BLOCK_T, BLOCK_E,
        BLOCK_K, BLOCK_G, SPAN, CHUNK, BINS,
    )  # fmt: skip
    _finish(state_ptr + 1)
    if tl.atomic_add(state_ptr, 0, sem="relaxed") == choosers:
        job = tl.atomic_add(state_ptr + 3, 1, sem="relaxed")
        while job < scanners + placers:
            if job < scanners:
                _await(state_ptr + 1, choosers)
                _scan(
                    job, loads_ptr, totals_ptr, counts_ptr, offsets_ptr, choosers,
                    E, BINS, SCAN_EXPERTS, SCAN_ROWS,
                )  # fmt: skip
                _finish(state_ptr + 2)
            else:
                _await(state_ptr + 2, scanners)
                _place(
                    job - scanners, placers, experts_ptr, loads_ptr, positions_ptr, order_ptr,
                    slots, tiles * BLOCK_T * K, E, PLACED,
                )  # fmt: skip
            job = tl.atomic_add(state_ptr + 3, 1, sem="relaxed")
    if _finish(state_ptr + 4) == choosers - 1:
        bins = tl.arange(0, BINS)
        tl.store(totals_ptr + bins, tl.zeros([BINS], tl.int32), mask=bins < E)
        heads = tl.arange(0, 8)
        tl.store(state_ptr + heads, tl.zeros([8], tl.int32), mask=heads < COUNTERS)


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
