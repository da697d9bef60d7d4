"""The walk of a single pass over the chunks of a linear head's rows."""

from __future__ import annotations

from torch import Tensor

from nemocascade_kernels.common.linear_head.chunks import LogitsBuffers, in_flight, look_ahead
from nemocascade_kernels.common.linear_head.gradients import HeadGradients, HeadPass, Needed


class HeadWalk[Pass: HeadPass, Chunk]:
    """One walk over the chunks of the rows, each from hidden [T, H] to gradients in its logits.

    heads: number of heads whose logits a chunk has. depth: chunks in flight beyond the current one.
    fused: no collective splits a chunk, and its row kernels run at once.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, settings: Pass, needed: Needed, *, heads: int = 1
    ) -> None:
        self.hidden, self.weight, self.settings = hidden, weight, settings
        self.gradients = HeadGradients(hidden, weight, settings, needed)
        self.needs_grad = needed.hidden or needed.weight
        self.depth = look_ahead(settings.group)
        self.fused = not self.depth and hasattr(settings.kernels, "fused_rows")
        self.buffers = LogitsBuffers(settings.rows.size, weight, heads * (self.depth + 1))

    def walk(self) -> None:
        """Start and finish every chunk; the gather over the ranks overlaps with the next start."""
        in_flight(self.buffers.chunks, self.start, self.finish, self.depth)

    def start(self, slots: slice) -> Chunk:
        """Compute a chunk's logits, reduce its rows, and start the gather over the ranks."""
        raise NotImplementedError  # each op defines its own

    def finish(self, chunk: Chunk) -> None:
        """Combine a chunk's shards, and overwrite its logits with gradients."""
        raise NotImplementedError  # each op defines its own
