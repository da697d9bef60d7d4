"""The recurrence between body chunks, `S' = passed S + grown`, by segments of chunks.

Within a segment of w chunks the states are one matrix product for each head,

    S_i = sum_{j<=i} exp(L_i - L_j) grown_j + exp(L_i) S

with the state S that enters the segment and the sums L of the chunks' log decays since then. All
factors are at most 1. Only the last states of segments are passed on one after the other. A
segment is part of one document, so no operation combines values of two documents.

Shape letters: those of `ssd`, and w chunks of a segment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemocascade_kernels.mamba2.chunks import ChunkBlock


def segment_decays(sums: Tensor) -> Tensor:
    """`exp(L_i - L_j)` for j <= i, else zero: [segments, h, w, w]. sums: L, [segments, w, h]."""
    sums = sums.transpose(1, 2)
    between = sums[..., :, None] - sums[..., None, :]
    later = torch.ones(between.shape[-2:], dtype=torch.bool, device=sums.device).triu_(1)
    return between.masked_fill_(later, float("-inf")).exp_()


def carry_states(block: ChunkBlock, reach: Tensor, mixing: Tensor | None, states: Tensor) -> None:
    """Turn what a block's chunks add to the states, in `states`, into the states after them.

    states: of all body chunks, [chunks, g, n, r, p]. reach: `exp(L_i)` of the block's chunks,
    [c, g, 1, r, 1]. mixing: from `segment_decays`; None if w = 1.
    """
    for carry in block.carries:
        now = states[carry.chunks]
        if mixing is not None:
            _mix(now, mixing[carry.segments(block)])
        by_segment = now.unflatten(0, (-1, carry.width))
        left = reach[carry.within(block)].unflatten(0, (-1, carry.width))
        by_segment.addcmul_(states[carry.before][:, None], left)


def carry_gradients(
    block: ChunkBlock, passed: Tensor, mixing: Tensor | None, d_states: Tensor
) -> None:
    """Turn gradients of the states after a block's chunks into those of what the chunks add, and
    add theirs to the states that enter the segments.

    d_states: of all body chunks, [chunks, g, n, r, p]. passed: the chunks' decays, [c, g, 1, r, 1].
    """
    for carry in reversed(block.carries):
        now = d_states[carry.chunks]
        if mixing is not None:
            _mix(now, mixing[carry.segments(block)].transpose(2, 3))
        first, left = now[:: carry.width], passed[carry.within(block)][:: carry.width]
        if isinstance(carry.before, slice):
            d_states[carry.before].addcmul_(first, left)
        else:
            d_states.index_add_(0, carry.before, first * left)


def _mix(states: Tensor, mixing: Tensor) -> None:
    """Replace `states` [segments w, g, n, r, p] by their sums over a segment, weighted by `mixing`
    [segments, h, w, w]."""
    count, heads, width, _ = mixing.shape
    by_segment = states.unflatten(0, (count, width))
    by_head = by_segment.permute(0, 2, 4, 1, 3, 5)
    sums = torch.bmm(mixing.flatten(0, 1), by_head.reshape(count * heads, width, -1))
    by_segment.copy_(sums.view(by_head.shape).permute(0, 3, 1, 4, 2, 5))
