"""Decode steps as CUDA graphs, which launch all kernels of a step at once.

A graph contains the addresses of its inputs and of all caches, and its shapes are fixed. So rows
are padded to a power of two with the spare slot, and the length that attention may read is rounded
up. A graph is captured at the first step of each pair of these sizes. Code that moves a cache must
`clear` the graphs.

**Ranks.** A graph contains the collectives of its step. Ranks that exchange rows must use graphs of
one size and capture them at the same time: they pass the same number of rows, the same length and
the same largest number, and clear their graphs together.

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
"""A decode step without host synchronisation: tokens, slots, positions [n], longest -> [n, V], or
another output with a number of rows in proportion to n."""


class DecodeGraphs:
    """The captured steps of one model.

    call: a step. most_rows: maximum rows of a step. spare: the slot of padding rows. multiple:
    the padded number of rows is one of this, such as the number of ranks that share them.
    """

    def __init__(
        self,
        call: StepCall,
        *,
        most_rows: int,
        spare: int,
        device: torch.device,
        multiple: int = 1,
    ) -> None:
        self._call, self._multiple = call, multiple
        self._most_rows = most_rows = -(-most_rows // multiple) * multiple
        self._fillers = (0, spare, 0)
        self._inputs = [
            torch.zeros(most_rows, dtype=torch.int64, device=device) for _ in self._fillers
        ]
        self._output: Tensor | None = None
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
        self,
        tokens: Tensor,
        slots: Tensor,
        positions: Tensor,
        longest: int,
        largest: int = 0,
        rows: int = 0,
    ) -> Tensor:
        """The output of the padded rows, [N, V] for n rows, valid until the next step. Caches must
        hold `rounded_length`.

        largest: maximum rows of this run's steps; 0 is that of all runs. rows: least number of
        rows, for ranks that agree on one.
        """
        real, length = tokens.numel(), self.rounded_length(longest)
        key = self.rounded_rows(max(real, rows)), length
        if key not in self._graphs:
            self._add(self.rounded_rows(largest or self._most_rows), length)
            self._add(*key)
        for static, value, filler in zip(
            self._inputs, (tokens, slots, positions), self._fillers, strict=True
        ):
            static[:real] = value
            static[real : key[0]] = filler
        self._graphs[key].replay()
        assert self._output is not None
        return self._output[: self._share(key[0])]

    def rounded_rows(self, rows: int) -> int:
        """The number of rows of the graph for `rows`."""
        rounded = -(-_power_of_two(rows) // self._multiple) * self._multiple
        return min(rounded, self._most_rows)

    def _share(self, rows: int) -> int:
        """Rows of the output of a step of `rows`."""
        assert self._output is not None
        return rows * self._output.shape[0] // self._most_rows

    def _add(self, rows: int, longest: int) -> None:
        """Capture a step if there is no graph of its size."""
        if (rows, longest) in self._graphs:
            return
        tokens, slots, positions = (static[:rows] for static in self._inputs)
        # Steps before and in the capture may change the states of the spare slot only.
        for static, filler in zip((tokens, slots, positions), self._fillers, strict=True):
            static.fill_(filler)
        if self._output is None:
            example = self._call(tokens, slots, positions, longest)
            most = self._most_rows * example.shape[0] // rows
            self._output = example.new_empty(most, example.shape[1])
        output = self._output[: self._share(rows)]

        def step() -> None:
            output.copy_(self._call(tokens, slots, positions, longest))

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
