"""The loop over chunks of rows: selection of rows, chunk sizes, and the matrix products.

Memory is bounded by one chunk's logits (two under vocabulary parallelism), for any T. On a GPU
nothing here synchronises with the host, so the loop can be captured in a CUDA graph.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nemocascade_kernels.common.products import accumulate_product, add_product

#: Peak bytes of logits. On a GPU a long chunk amortises the read and write of the weight gradient
#: in each chunk's product. On a CPU the chunk should be near the size of the cache.
LOGITS_BYTES = {"cuda": 1 << 30, "cpu": 128 << 20}
#: Rows of a chunk are a multiple of this, so that no product has a ragged last tile.
ROW_MULTIPLE = 128
#: On a GPU, rows of the logits buffer are aligned to lines of this size for any V: cuBLAS has no
#: fast kernel for rows that are not aligned to 16 bytes.
LINE_BYTES = 128


@dataclass(frozen=True)
class Rows:
    """Rows to compute, compacted.

    index: row of each slot, [size] int64; None if the slots are the rows themselves.
    filled: number of slots with a row to compute, scalar int64 on the device; None if all have one.
        The other slots hold excluded rows, although the products run over them.
    size: number of slots, known on the host.
    """

    index: Tensor | None
    filled: Tensor | None
    size: int

    def active(self, chunk: slice) -> Tensor | None:
        """Mask of the slots of a chunk that count, [R] bool; None if all do."""
        if self.filled is None:
            return None
        return torch.arange(chunk.start, chunk.stop, device=self.filled.device) < self.filled

    def take(self, values: Tensor, chunk: slice) -> Tensor:
        """`values` [T, ...] at the rows of a chunk's slots."""
        return values[chunk] if self.index is None else values[self.index[chunk]]


def all_rows(size: int) -> Rows:
    """Every row, in order."""
    return Rows(index=None, filled=None, size=size)


def trained_rows(token_weight: Tensor, active_rows: int | None) -> Rows:
    """The rows with non-zero weight, in order.

    On a CPU they are counted, and a count above `active_rows` raises ValueError. On a GPU the count
    stays on the device: see `static_slots`.
    """
    if token_weight.device.type != "cpu":
        return static_slots(token_weight, active_rows)
    index = token_weight.nonzero()[:, 0]
    count, total = index.shape[0], token_weight.shape[0]
    if active_rows is not None and count > active_rows:
        raise ValueError(
            f"{count} rows have a token_weight other than 0, and active_rows={active_rows} "
            "promises that no more than that have one: raise it, or leave it out"
        )
    return all_rows(total) if count == total else Rows(index, None, count)


def static_slots(token_weight: Tensor, active_rows: int | None) -> Rows:
    """Slots for the rows with non-zero weight, without reading their number back.

    There are `active_rows` slots, or T without that bound; the rows that count come first. If the
    bound was too low, `filled > size`, and the caller must report it.
    """
    index, filled = partition(token_weight != 0)
    size = index.shape[0] if active_rows is None else min(active_rows, index.shape[0])
    return Rows(index[:size], filled, size)


def partition(active: Tensor) -> tuple[Tensor, Tensor]:
    """A stable partition of active [T] bool: the true rows in order, then the others.

    Returns the rows [T] int64, and the number of true ones, a scalar int64 on the device.
    """
    rows = torch.arange(active.shape[0], device=active.device)
    true_before = torch.cumsum(active, 0) - active.long()
    filled = active.sum()
    slot = torch.where(active, true_before, filled + rows - true_before)
    return torch.empty_like(slot).scatter_(0, slot, rows), filled


def chunks(rows: int, weight: Tensor, buffers: int) -> list[slice]:
    """Split rows into equal chunks whose logits, in all buffers, take at most `LOGITS_BYTES`."""
    size, device = weight.element_size(), weight.device.type
    each = _chunk_rows(rows, _row_stride(weight.shape[0], size, device) * size, buffers, device)
    return [slice(start, min(start + each, rows)) for start in range(0, rows, max(each, 1))]


def _chunk_rows(rows: int, row_bytes: int, buffers: int, device: str) -> int:
    most = max(1, LOGITS_BYTES[device] // buffers // row_bytes)
    if most >= ROW_MULTIPLE:
        most -= most % ROW_MULTIPLE
    count = -(-rows // most)
    each = -(-rows // count) if count else 0
    if most >= ROW_MULTIPLE:
        each += -each % ROW_MULTIPLE
    return each


def logits_bytes(
    rows: int, vocabulary: int, element_size: int, *, device: str, ranks: int, heads: int = 1
) -> int:
    """Peak bytes of logits in `linear_policy_loss`, for a planner; in `linear_distill_loss` with
    2 heads.

    rows: number of computed rows. vocabulary: size of this rank's shard. element_size: that of the
    weight. device: "cuda" or "cpu". ranks: number of ranks that share the vocabulary.
    """
    buffers = heads * (1 + int(ranks > 1))
    row_bytes = _row_stride(vocabulary, element_size, device) * element_size
    each = _chunk_rows(rows, row_bytes, buffers, device)
    return buffers * min(each, rows) * row_bytes


class LogitsBuffers:
    """The chunks of `rows` rows, and `count` buffers for their logits, used in turn."""

    def __init__(self, rows: int, weight: Tensor, count: int = 1) -> None:
        self.chunks = chunks(rows, weight, buffers=count)
        longest = max((c.stop - c.start for c in self.chunks), default=0)
        self._buffers = itertools.cycle([_logits_buffer(longest, weight) for _ in range(count)])

    def take(self) -> Tensor:
        """The next buffer: [rows of the longest chunk, V] with aligned rows, uninitialised."""
        return next(self._buffers)


def _logits_buffer(rows: int, weight: Tensor) -> Tensor:
    stride = _row_stride(weight.shape[0], weight.element_size(), weight.device.type)
    buffer = torch.empty(rows, stride, dtype=weight.dtype, device=weight.device)
    return buffer[:, : weight.shape[0]]


def _row_stride(vocabulary: int, element_size: int, device: str) -> int:
    """Elements from one row of logits to the next."""
    if device != "cuda":
        return vocabulary
    line = LINE_BYTES // element_size
    return -(-vocabulary // line) * line


def in_flight[Item, Started](
    items: Iterable[Item],
    start: Callable[[Item], Started],
    finish: Callable[[Started], None],
    depth: int,
) -> None:
    """Start and finish every item in order, with up to `depth` more started than finished.

    Communication that `start` begins overlaps with the start of the next item.
    """
    started: deque[Started] = deque()
    for item in items:
        started.append(start(item))
        if len(started) > depth:
            finish(started.popleft())
    while started:
        finish(started.popleft())


def look_ahead(group: dist.ProcessGroup | None) -> int:
    """Chunks in flight beyond the current one: 1 if a collective must be hidden."""
    return int(group is not None and group.size() > 1)


class WeightGradient:
    """`dW += dlogits.T @ hidden` over chunks, accumulated in float32.

    into: the main gradient to add to, in the caller's dtype; None for an own buffer.
    """

    def __init__(self, weight: Tensor, into: Tensor | None = None) -> None:
        self._weight = weight
        self._total = into
        self._is_ours = into is None

    def add(self, dlogits: Tensor, hidden: Tensor) -> None:
        """Add the product of one chunk: dlogits [R, V], hidden [R, H]."""
        if self._total is None:
            self._total = self._first(dlogits, hidden)
            return
        if self._is_ours and self._total.dtype in (torch.bfloat16, torch.float16):
            self._total = self._total.float()
        accumulate_product(self._total, dlogits, hidden)

    def _first(self, dlogits: Tensor, hidden: Tensor) -> Tensor:
        if dlogits.is_cuda and dlogits.dtype in (torch.bfloat16, torch.float16):
            return torch.mm(dlogits.t(), hidden, out_dtype=torch.float32)
        if dlogits.device.type == "cpu" and dlogits.dtype == torch.bfloat16:
            total = torch.empty(self._weight.shape)
            add_product(total, dlogits, hidden, first=True)
            return total
        return torch.mm(dlogits.t(), hidden)

    def result(self) -> Tensor:
        """The sum [V, H], in float32 or, for a single chunk of float16 on a CPU, in float16."""
        if self._total is None:
            self._total = torch.zeros_like(self._weight)
        return self._total


def sum_over_shards(gradient: Tensor, group: dist.ProcessGroup | None) -> dist.Work | None:
    """Start an in-place all-reduce of the gradient in hidden states over the vocabulary's shards.

    Wait for the result before the gradient is read; None if there is nothing to wait for.
    """
    if group is None or group.size() == 1:
        return None
    return dist.all_reduce(gradient, group=group, async_op=True)
