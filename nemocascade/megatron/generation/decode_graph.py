"""Decode steps as CUDA graphs, which launch all kernels of a step at once.

A graph contains the addresses of its inputs and of all caches, and its shapes are fixed. So rows
are padded to a power of two with the spare slot, and the length that attention may read is rounded
up. A graph is captured at the first step of each pair of these sizes. Code that moves a cache must
`clear` the graphs.

**Memory.** All graphs allocate from one pool. That is safe in any order of replays, because they
never run at the same time and none reads what another left in the pool: inputs and logits are in
buffers outside it, shared by all graphs. A smaller graph fits into what a larger one has freed, so
for each length the run's largest number of rows is captured first, and the pool is as large as the
largest step. If a larger one comes later, the pool grows.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

LEAST_LENGTH = 512
"""Attention may read this many tokens times a power of two."""

StepCall = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""A decode step without host synchronisation: tokens, slots, positions [n], longest -> [n, V]."""


class DecodeGraphs:
    """The captured steps of one model.

    call: a step. most_rows: maximum rows of a step. spare: the slot of padding rows.
    """

    def __init__(self, call: StepCall, *, most_rows: int, spare: int, device: torch.device) -> None:
        self._call, self._most_rows = call, most_rows
        self._fillers = (0, spare, 0)
        self._inputs = [
            torch.zeros(most_rows, dtype=torch.int64, device=device) for _ in self._fillers
        ]
        self._logits: Tensor | None = None
        self._pool: Any = None
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    def clear(self) -> None:
        """Drop all graphs, because a cache has moved to another address, and free their memory."""
        self._graphs.clear()
        # The allocator rejects the handle of a pool whose graphs are all gone.
        self._pool = None

    @staticmethod
    def rounded_length(longest: int) -> int:
        """The length that attention reads in the graph for `longest`; caches must be this long."""
        return LEAST_LENGTH * _power_of_two(-(-longest // LEAST_LENGTH))

    def step(
        self, tokens: Tensor, slots: Tensor, positions: Tensor, longest: int, largest: int = 0
    ) -> Tensor:
        """Logits [n, V], valid until the next step. Caches must hold `rounded_length`.

        largest: maximum rows of this run's steps; 0 is that of all runs.
        """
        rows, length = tokens.numel(), self.rounded_length(longest)
        key = self._rounded_rows(rows), length
        if key not in self._graphs:
            self._add(self._rounded_rows(largest or self._most_rows), length)
            self._add(*key)
        for static, value, filler in zip(
            self._inputs, (tokens, slots, positions), self._fillers, strict=True
        ):
            static[:rows] = value
            static[rows : key[0]] = filler
        self._graphs[key].replay()
        assert self._logits is not None
        return self._logits[:rows]

    def _rounded_rows(self, rows: int) -> int:
        return min(_power_of_two(rows), self._most_rows)

    def _add(self, rows: int, longest: int) -> None:
        """Capture a step if there is no graph of its size."""
        if (rows, longest) in self._graphs:
            return
        tokens, slots, positions = (static[:rows] for static in self._inputs)
        # Steps before and in the capture may change the states of the spare slot only.
        for static, filler in zip((tokens, slots, positions), self._fillers, strict=True):
            static.fill_(filler)
        if self._logits is None:
            example = self._call(tokens, slots, positions, longest)
            self._logits = example.new_empty(self._most_rows, example.shape[1])
        logits = self._logits[:rows]

        def step() -> None:
            logits.copy_(self._call(tokens, slots, positions, longest))

        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        self._graphs[rows, longest] = _capture(step, self._pool)


def _capture(call: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    """Capture `call` as a CUDA graph. It runs twice before, as a warm-up.

    pool: the handle of the memory pool that it allocates from.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # The capture stream is the same for all graphs: the allocator reuses memory within a stream.
    # Other threads may use the device during the capture.
    with _no_collection(), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        call()
    return graph


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from running finalizers, whose calls a capture may forbid."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << max(0, count - 1).bit_length()
