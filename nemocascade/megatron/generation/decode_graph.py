"""Decode steps as CUDA graphs, which launch all kernels of a step at once.

A graph contains the addresses of its inputs and of all caches, and its shapes are fixed. So rows
are padded to a power of two with the spare slot, and the length that attention may read is rounded
up. A graph is captured at the first step of each pair of these sizes. Code that moves a cache must
`clear` the graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_LENGTH = 512
"""Attention may read this many tokens times a power of two."""

StepCall = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""A decode step without host synchronisation: tokens, slots, positions [n], longest -> [n, V]."""

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""A call -> the function that replays it, and its output tensor."""


@dataclass(frozen=True)
class _Graph:
    """Static inputs, the replay, and its static output."""

    inputs: tuple[Tensor, Tensor, Tensor]
    replay: Callable[[], None]
    logits: Tensor


class DecodeGraphs:
    """The captured steps of one model.

    call: a step. most_rows: maximum rows of a step. spare: the slot of padding rows. capture:
    captures a call; the default makes a CUDA graph.
    """

    def __init__(
        self,
        call: StepCall,
        *,
        most_rows: int,
        spare: int,
        device: torch.device,
        capture: Capture | None = None,
    ) -> None:
        self._call, self._most_rows, self._spare = call, most_rows, spare
        self._device = device
        self._capture = capture or capture_cuda
        self._graphs: dict[tuple[int, int], _Graph] = {}

    def clear(self) -> None:
        """Drop all graphs: a cache has moved to another address."""
        self._graphs.clear()

    @staticmethod
    def rounded_length(longest: int) -> int:
        """The length that attention reads in the graph for `longest`; caches must be this long."""
        return LEAST_LENGTH * _power_of_two(-(-longest // LEAST_LENGTH))

    def step(self, tokens: Tensor, slots: Tensor, positions: Tensor, longest: int) -> Tensor:
        """Logits [n, V], valid until the next step. Caches must hold `rounded_length`."""
        rows = tokens.numel()
        key = min(_power_of_two(rows), self._most_rows), self.rounded_length(longest)
        if key not in self._graphs:
            self._graphs[key] = self._make(*key)
        graph = self._graphs[key]
        for static, value, filler in zip(
            graph.inputs, (tokens, slots, positions), (0, self._spare, 0), strict=True
        ):
            static[:rows] = value
            static[rows:] = filler
        graph.replay()
        return graph.logits[:rows]

    def _make(self, rows: int, longest: int) -> _Graph:
        def integers(value: int) -> Tensor:
            return torch.full((rows,), value, dtype=torch.int64, device=self._device)

        inputs = integers(0), integers(self._spare), integers(0)
        replay, logits = self._capture(lambda: self._call(*inputs, longest))
        return _Graph(inputs, replay, logits)


def capture_cuda(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Capture `call` as a CUDA graph. It runs twice before, as a warm-up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result


def _power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << max(0, count - 1).bit_length()
