"""Mamba-2's state-space scan in chunks as matrix products.

Within a chunk of s rows the recurrence is a masked matrix product (state-space duality, arXiv
2405.21060, section 6). With `l_i` the sum of `dt A` over the chunk's rows up to i, and S the state
that enters,

    y_i = sum_{j<=i} exp(l_i - l_j) (C_i . B_j) dt_j x_j + exp(l_i) C_i^T S + D x_i
    S'  = exp(l_last) S + sum_j exp(l_last - l_j) dt_j B_j x_j^T

The usual form computes `exp(l_i - l_j)` for every pair and head, which takes more time on a CPU
than the matrix products. Here that factor is split, with `m = l_last / 2`:

    e_i = exp(l_i - m)    sum_j ... = e_i (tril(C B^T) u)_i,    u_j = dt_j x_j / e_j

so all heads of a group share one matrix product and no [s, s] matrix is made per head. The split
would overflow in single precision. In double precision it cannot, because the exponents stay within
+-600 if a step's `dt A` is at least -1200 / s. Steps with a stronger decay are clamped to that
bound: at s = 32 a decay below 5e-17, less than double precision's own rounding, becomes 5e-17. The
other two sums have factors of at most 1 and are computed in single precision.

Chunks never cross a document (`chunks.chunk_table`), so no operation combines values of two
documents: isolation is exact by construction, even for NaN and infinity.

Shape letters: T tokens, h heads, p head dimension, g groups, r heads of a group, n state, c chunks
of a block, s rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemocascade_kernels.common.documents import PackedSeq
from nemocascade_kernels.mamba2.arguments import Sizes
from nemocascade_kernels.mamba2.chunks import ChunkBlock, ChunkRun, ChunkTable, chunk_table
from nemocascade_kernels.mamba2.segments import carry_states, segment_decays

LARGEST_CHUNK = 32
# Bound of |l - m|: exp(600) = 1e260 leaves 1e48 for the inputs' magnitude.
_EXPONENT = 600.0
# Chunks of a segment: the recurrence within it is one matrix product a head. On a CPU a step for
# each chunk takes less time.
_SEGMENT = {"cpu": 1, "cuda": 128}
# Double-precision elements of one [c, s, h, p] intermediate. On a CPU a block's tensors should
# stay in the caches; on a GPU they only bound memory.
_BLOCK_ELEMENTS = {"cpu": 2**17, "cuda": 3 * 2**25}


def workspace_bytes(rows: int, inner: int) -> int:
    """Largest temporary memory of a block's backward on a GPU; inner: h p."""
    # Eleven double-precision intermediates.
    return 11 * 8 * min(_BLOCK_ELEMENTS["cuda"], rows * inner)


@dataclass(frozen=True)
class Decays:
    """The decays of chunks, [c, g, s, r, 1], or [c, g, 1, r, 1] for one value a chunk.

    dt: float64, zero in padding. bounded: bool, steps clamped to the bound.
    e and split = dt / e: float64.
    opened: exp(l_i). kept: exp(l_last - l_i). added: kept dt. passed: exp(l_last). In the states'
    dtype.
    reach: what is left of a state that enters the segment. mixing: what is left in chunk i of the
    sum of chunk j <= i, [segments, g r, w, w], or None for segments of one chunk.
    """

    dt: Tensor
    bounded: Tensor
    e: Tensor
    split: Tensor
    opened: Tensor
    kept: Tensor
    added: Tensor
    passed: Tensor
    reach: Tensor
    mixing: Tensor | None

    def of(self, block: ChunkBlock) -> Decays:
        """The decays of a block of the run."""
        if block.count == self.dt.shape[0]:
            return self
        found = {name: value[block.here] for name, value in vars(self).items() if name != "mixing"}
        mixing = None if self.mixing is None else self.mixing[block.segments]
        return Decays(**found, mixing=mixing)


@dataclass(frozen=True)
class Chunks:
    """A block's rows as matrices, [c, g, s, r, p] and [c g, s, n], in the states' dtype."""

    x: Tensor
    B: Tensor
    C: Tensor


@dataclass(frozen=True)
class BlockResult:
    """Results of a block: y without D x, [c, g, s, r, p], and the values that backward needs.

    scores: tril(C B^T) [c g, s, s]; u and within = scores u: [c g, s, r p]; all float64.
    read: the products of C with the entering states, [c g, s, r p], or None.
    """

    y: Tensor
    scores: Tensor
    u: Tensor
    within: Tensor
    read: Tensor | None


class Layout:
    """The sizes of a scan, and the conversions between its rows and matrices.

    Rows are laid out as [c, g, s, r, p], so that [c g, s, r p] is a batch of matrices.
    dtype: of states and of sums between chunks.
    """

    def __init__(self, s: Sizes, dtype: torch.dtype):
        self.heads, self.head_dim, self.groups, self.state = s.heads, s.head_dim, s.groups, s.state
        self.ratio = s.heads // s.groups
        self.width = self.ratio * s.head_dim
        self.dtype = torch.promote_types(dtype, torch.float32)

    def block_slots(self, device: torch.device) -> int:
        """Number of rows that are computed at once."""
        limit = _BLOCK_ELEMENTS.get(device.type, _BLOCK_ELEMENTS["cuda"])
        return max(1, limit // (self.heads * self.head_dim))

    def chunks(self, packed: PackedSeq) -> ChunkTable:
        """The pack's chunks."""
        device = packed.device
        widest = _SEGMENT.get(device.type, _SEGMENT["cuda"])
        return chunk_table(packed, LARGEST_CHUNK, self.block_slots(device), widest=widest)

    def state_shape(self, chunks: int) -> tuple[int, ...]:
        return chunks, self.groups, self.state, self.ratio, self.head_dim

    def by_head(self, rows: Tensor, block: ChunkBlock) -> Tensor:
        """Convert `rows` [c * s, h m] or [c * s, h, m] to [c, g, s, r, m] in the states' dtype."""
        rows = rows.view(block.count, block.size, self.groups, self.ratio, -1)
        return rows.transpose(1, 2).to(self.dtype).contiguous()

    def by_group(self, rows: Tensor, block: ChunkBlock) -> Tensor:
        """Convert `rows` [c * s, g, n] to [c g, s, n] in the states' dtype."""
        rows = rows.view(block.count, block.size, self.groups, self.state)
        return rows.transpose(1, 2).to(self.dtype).contiguous().view(-1, block.size, self.state)

    def to_rows(self, value: Tensor, block: ChunkBlock) -> Tensor:
        """Convert `value` [c, g, s, ...] or [c g, s, ...] to rows [c * s, g ...]."""
        value = value.view(block.count, self.groups, block.size, -1)
        return value.transpose(1, 2).reshape(block.count * block.size, -1)

    def matrices(self, value: Tensor) -> Tensor:
        """View `value` [c, g, s, r, p] as matrices [c g, s, r p]."""
        return value.view(-1, value.shape[2], self.width)

    def doubled(self, value: Tensor, factor: Tensor) -> Tensor:
        """Multiply `value` [c, g, s, r, p] by `factor` [c, g, s, r, 1]: float64 [c g, s, r p]."""
        # Converted first: an operation on two precisions is slower than two operations.
        return self.matrices(value.to(torch.float64, copy=True).mul_(factor))

    def head_sum(self, value: Tensor, block: ChunkBlock) -> Tensor:
        """Sum `value` [c g, s, r p] over p: [c, g, s, r, 1]."""
        shape = (block.count, self.groups, block.size, self.ratio, self.head_dim)
        return value.view(shape).sum(-1, keepdim=True)

    def per_head(self, value: Tensor) -> Tensor:
        """Reshape `value` [h] to [g, 1, r, 1], to broadcast; in the states' dtype at least."""
        dtype = torch.promote_types(value.dtype, self.dtype)
        return value.to(dtype).view(self.groups, 1, self.ratio, 1)

    def decays(self, dt: Tensor, A: Tensor, run: ChunkRun) -> Decays:
        """Decays of all chunks of `run`. dt: [T, h]; A: [h]."""
        flat = dt.index_select(0, run.rows).double()
        if run.pad_slots is not None:
            flat.index_fill_(0, run.pad_slots, 0)
        flat = flat.view(-1, run.size, self.groups, self.ratio, 1)
        d = flat.transpose(1, 2).contiguous()
        bound = 2 * _EXPONENT / run.size
        step = d * self.per_head(A.double())
        bounded = step.abs() > bound
        sums = step.clamp_(-bound, bound).cumsum_(2)
        last = sums[:, :, -1:]
        e, kept = (sums - 0.5 * last).exp_(), (last - sums).exp_()
        passed = last.exp().to(self.dtype)
        reach, mixing = passed, None
        if run.width > 1:
            since = last.reshape(-1, run.width, self.heads).cumsum(1)
            reach = since.exp().to(self.dtype).view(passed.shape)
            mixing = segment_decays(since).to(self.dtype)
        return Decays(
            dt=d,
            bounded=bounded,
            e=e,
            split=d / e,
            opened=sums.exp().to(self.dtype),
            kept=kept.to(self.dtype),
            added=(kept * d).to(self.dtype),
            passed=passed,
            reach=reach,
            mixing=mixing,
        )


def grow_states(lay: Layout, block: ChunkBlock, f: Decays, m: Chunks, states: Tensor) -> None:
    """Write the states after a block's body chunks to `states`."""
    if block.body is None:
        return
    added = lay.matrices(m.x * f.added)
    grown = states[block.body].view(-1, lay.state, lay.width)
    torch.bmm(m.B.transpose(1, 2), added, out=grown)
    carry_states(block, f.reach, f.mixing, states)


def mix(lay: Layout, block: ChunkBlock, f: Decays, m: Chunks, states: Tensor) -> BlockResult:
    """Compute y of a block without D x. states: after body chunks, [chunks, g, n, r, p]."""
    scores = torch.bmm(m.C, m.B.transpose(1, 2)).double().tril_()
    u = lay.doubled(m.x, f.split)
    within = torch.bmm(scores, u)
    y = (within.view(m.x.shape) * f.e).to(lay.dtype)
    if block.enter is None:
        return BlockResult(y, scores, u, within, None)
    read = torch.bmm(m.C, lay.matrices(states.index_select(0, block.enter)))
    y.addcmul_(read.view(m.x.shape), f.opened)
    return BlockResult(y, scores, u, within, read)


def scatter(target: Tensor, rows: Tensor, block: ChunkBlock) -> None:
    """Write `rows` [c * s, ...] to the block's rows of `target` [T, ...] without padding."""
    rows = rows.view(-1, *target.shape[1:])
    if block.used_slots is not None:
        rows = rows.index_select(0, block.used_slots)
    target.index_copy_(0, block.used_rows, rows.to(target.dtype))
