# The arguments of a jit function have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The router's Triton kernels; `triton.py` launches them.

Letters: E experts, K choices a token. Ids are int32; the id E means no expert.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOWEST = tl.constexpr(-(2**31))
_HIGHEST = tl.constexpr(2**31 - 1)


@triton.jit
def _ordered(values):
    """Map floats to int32 of the same order; NaN is above all, -0 equals 0."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(values != values, _HIGHEST, keys)


@triton.jit
def _first_largest(keys, columns, SIZE: tl.constexpr):
    """Column of each row's largest key; among equals, the first."""
    largest = tl.max(keys, axis=1)
    return tl.min(tl.where(keys == largest[:, None], columns[None, :], SIZE), axis=1)


@triton.jit
def _checked(ids, E: tl.constexpr):
    """Map given ids that are out of range to no expert, because a kernel cannot raise."""
    return tl.where((ids < 0) | (ids > E), E, ids)


@triton.jit
def _scores(logits, SOFTMAX: tl.constexpr):
    if SOFTMAX:
        powers = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        return powers / tl.sum(powers, axis=1)[:, None]
    return 1.0 / (1.0 + tl.exp(-logits))


@triton.jit
def _without_other_groups(
    keys, biased, columns, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Set keys outside each row's best groups to the lowest key."""
    group_ids = tl.arange(0, BLOCK_G)
    group_keys = tl.full([keys.shape[0], BLOCK_G], _LOWEST, tl.int32)
    for g in tl.static_range(GROUPS):
        inside = (columns // GROUP_SIZE == g)[None, :]
        own = tl.where(inside, keys, _LOWEST)
        first = _first_largest(own, columns, BLOCK_E)
        is_first = columns[None, :] == first[:, None]
        total = tl.sum(tl.where(is_first, biased, 0.0), axis=1)
        if GROUP_SIZE > 1:
            second = _first_largest(tl.where(is_first, _LOWEST, own), columns, BLOCK_E)
            total += tl.sum(tl.where(columns[None, :] == second[:, None], biased, 0.0), axis=1)
        group_keys = tl.where(group_ids[None, :] == g, _ordered(total)[:, None], group_keys)
    kept = tl.zeros(keys.shape, tl.int1)
    for _ in tl.static_range(TOP_GROUPS):
        best = _first_largest(group_keys, group_ids, BLOCK_G)
        group_keys = tl.where(group_ids[None, :] == best[:, None], _LOWEST, group_keys)
        kept = kept | ((columns // GROUP_SIZE)[None, :] == best[:, None])
    return tl.where(kept, keys, _LOWEST)


@triton.jit
def choose_kernel(
    logits_ptr, bias_ptr, mask_ptr, given_ptr,
    weights_ptr, experts_ptr, ranks_ptr, loads_ptr, counts_ptr,
    tokens, scale, tiles,
    E: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr, GIVEN: tl.constexpr, WEIGH: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    columns, choices = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    is_expert, is_choice = columns < E, choices < K
    seen = tl.zeros([BLOCK_E], tl.int32)
    seen_absent = program * 0
    for tile in range(tiles):
        rows = (program * tiles + tile).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = rows < tokens
        slots = rows[:, None] * K + choices[None, :]
        is_slot = inside[:, None] & is_choice[None, :]
        if WEIGH:
            logits = tl.load(
                logits_ptr + rows[:, None] * E + columns[None, :],
                mask=inside[:, None] & is_expert[None, :],
                other=-float("inf"),
            ).to(tl.float32)
            scores = _scores(logits, SOFTMAX)
        if GIVEN:
            ids = _checked(tl.load(given_ptr + slots, mask=is_slot, other=E), E)
        else:
            biased = scores
            if HAS_BIAS:
                biased += tl.load(bias_ptr + columns, mask=is_expert, other=0.0)[None, :]
            keys = tl.where(is_expert[None, :], _ordered(biased), _LOWEST)
            if GROUPS > 1:
                keys = _without_other_groups(
                    keys, biased, columns, GROUPS, TOP_GROUPS, E // GROUPS, BLOCK_E, BLOCK_G
                )
            ids = tl.full([BLOCK_T, BLOCK_K], E, tl.int32)
            for k in range(K):
                best = _first_largest(keys, columns, BLOCK_E)
                keys = tl.where(columns[None, :] == best[:, None], _LOWEST, keys)
                ids = tl.where(choices[None, :] == k, best[:, None], ids)
        if HAS_MASK:
            present = tl.load(mask_ptr + rows, mask=inside, other=0) != 0
            ids = tl.where(present[:, None], ids, E)
        ids = tl.where(is_slot, ids, E)

        chosen = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
        weights = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
        for k in range(K):
            here = choices[None, :] == k
            hit = columns[None, :] == tl.sum(tl.where(here, ids, 0), axis=1)[:, None]
            chosen += (hit & is_expert[None, :]).to(tl.int32)
            if WEIGH:
                own = tl.sum(tl.where(hit & is_expert[None, :], scores, 0.0), axis=1)
                weights = tl.where(here, own[:, None], weights)
        if WEIGH:
            if NORMALIZE:
                weights = weights / (tl.sum(weights, axis=1)[:, None] + 1e-20)
            tl.store(weights_ptr + slots, weights * scale, mask=is_slot)
            tl.store(experts_ptr + slots, ids, mask=is_slot)

        before = tl.cumsum(chosen, axis=0) - chosen + seen[None, :]
        absent = (is_slot & (ids == E)).to(tl.int32)
        absent_of_token = tl.sum(absent, axis=1)
        absent_before = tl.cumsum(absent_of_token, axis=0) - absent_of_token + seen_absent
        ranks = absent_before[:, None] + tl.cumsum(absent, axis=1) - absent
        for k in range(K):
            here = choices[None, :] == k
            id_k = tl.sum(tl.where(here, ids, 0), axis=1)
            rank = tl.sum(tl.where(columns[None, :] == id_k[:, None], before, 0), axis=1)
            # Given experts may contain one twice in a token.
            rank += tl.sum(((choices < k)[None, :] & (ids == id_k[:, None])).to(tl.int32), axis=1)
            ranks = tl.where(here & (id_k < E)[:, None], rank[:, None], ranks)
        tl.store(ranks_ptr + slots, ranks, mask=is_slot)
        seen += tl.sum(chosen, axis=0)
        seen_absent += tl.sum(absent_of_token, axis=0)
    tl.store(loads_ptr + program * (E + 1) + columns, seen, mask=is_expert)
    tl.store(loads_ptr + program * (E + 1) + E, seen_absent)
    tl.atomic_add(counts_ptr + columns, seen, mask=is_expert)


@triton.jit
def scan_kernel(
    loads_ptr, counts_ptr, offsets_ptr, programs,
    E: tl.constexpr, BLOCK_E: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Replace each program's loads by its slots' first positions, for EXPERTS experts (E: none)."""
    mine = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    everyone = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + everyone, mask=everyone < E, other=0)
    begin = tl.sum(tl.where(everyone[None, :] < mine[:, None], counts[None, :], 0), axis=1)
    tl.store(offsets_ptr + mine, begin, mask=mine <= E)
    for first in range(0, programs, ROWS):
        rows = first + tl.arange(0, ROWS)
        pointers = loads_ptr + rows[:, None] * (E + 1) + mine[None, :]
        inside = (rows < programs)[:, None] & (mine <= E)[None, :]
        loads = tl.load(pointers, mask=inside, other=0)
        tl.store(pointers, begin[None, :] + tl.cumsum(loads, axis=0) - loads, mask=inside)
        begin += tl.sum(loads, axis=0)


@triton.jit
def place_kernel(
    experts_ptr, begins_ptr, positions_ptr, order_ptr, slots, slots_of_program,
    E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Convert ranks, in `positions`, to positions, and write their inverse to `order`."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < slots
    expert = _checked(tl.load(experts_ptr + slot, mask=inside, other=0), E)
    rank = tl.load(positions_ptr + slot, mask=inside, other=0)
    begin = tl.load(begins_ptr + slot // slots_of_program * (E + 1) + expert, mask=inside, other=0)
    tl.store(positions_ptr + slot, begin + rank, mask=inside)
    tl.store(order_ptr + begin + rank, slot, mask=inside)


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
        dense = _scores(logits, True)
        chosen = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
        for k in range(K):
            here = choices[None, :] == k
            id_k = tl.sum(tl.where(here, ids, 0), axis=1)
            hit = (columns[None, :] == id_k[:, None]) & (columns < E)[None, :]
            own = tl.sum(tl.where(hit, dense, 0.0), axis=1)
            chosen = tl.where(here, own[:, None], chosen)
    else:
        logits = tl.load(logits_ptr + rows[:, None] * E + ids, mask=present, other=0.0)
        chosen = tl.where(present, _scores(logits.to(tl.float32), False), 0.0)
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
