"""Other weights in the training ranks' model for a while: references and teachers without a copy of
the model.

A set of weights is everything a forward pass reads, parameters and persistent buffers, as this rank
holds them. Sets wait in host memory. The optimizer's state is not touched, and the weights come
back bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nemocascade.megatron.artifact import load_artifact_weights
from nemocascade.megatron.checkpoint.state import unwrap
from nemocascade.megatron.world import World
from nemocascade.types import Artifact

WeightSet = list[Tensor]
"""This rank's part of a model on the host, in the order of `live_tensors`."""


class SwapError(RuntimeError):
    """Weights were asked for while others than the model's own are in place."""


class WeightSwap:
    """The model's chunks, and the sets of weights that can take the place of their own."""

    def __init__(self, world: World, chunks: Sequence[Any]) -> None:
        self.world, self.chunks = world, list(chunks)
        self.current: str | None = None
        """Name of the set in place; None for the model's own weights."""
        self._sets: dict[str, WeightSet] = {}
        self._own: WeightSet | None = None

    @property
    def names(self) -> list[str]:
        """Sets that are there."""
        return sorted(self._sets)

    @property
    def num_bytes(self) -> int:
        """Host memory that this rank's sets take, the model's own weights included."""
        sets = [*self._sets.values(), *([self._own] if self._own else [])]
        return sum(t.numel() * t.element_size() for kept in sets for t in kept)

    def keep(self, name: str) -> None:
        """Add a copy of the model's own weights as they are now."""
        self._refuse_while_swapped("keep")
        self._sets[name] = self._copy()

    def load(self, name: str, artifact: Artifact) -> None:
        """Add the weights of an artifact; every rank calls it.

        Raises CheckpointError on every rank if it is damaged or of another shape.
        """
        self._refuse_while_swapped("load")
        own = self._copy()
        try:
            load_artifact_weights(artifact, self.world, self.chunks)
            self._sets[name] = self._copy()
        finally:
            self._fill(own)

    def drop(self, name: str) -> None:
        """Forget a set."""
        del self._sets[name]

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """The model computes with the set `name` inside; its own weights are back afterwards.

        Raises KeyError for an unknown name and SwapError inside another swap.
        """
        self._refuse_while_swapped("use")
        chosen = self._sets[name]
        self._own = self._copy(into=self._own)
        self.current = name
        try:
            self._fill(chosen)
            yield
        finally:
            self._fill(self._own)
            self.current = None

    def _refuse_while_swapped(self, what: str) -> None:
        if self.current is not None:
            raise SwapError(
                f"cannot {what} weights while {self.current!r} is in place: leave its block first"
            )

    @torch.no_grad()
    def _copy(self, into: WeightSet | None = None) -> WeightSet:
        live = live_tensors(self.chunks)
        if into is None:
            into = [
                torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda, device="cpu")
                for t in live
            ]
        for kept, tensor in zip(into, live, strict=True):
            kept.copy_(tensor, non_blocking=True)
        self._wait()
        return into

    @torch.no_grad()
    def _fill(self, weights: WeightSet) -> None:
        for kept, tensor in zip(weights, live_tensors(self.chunks), strict=True):
            tensor.copy_(kept, non_blocking=True)
        self._wait()

    def _wait(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)


def live_tensors(chunks: Sequence[Any]) -> list[Tensor]:
    """Parameters and persistent buffers of this rank's chunks, each once, in a fixed order."""
    found: dict[int, Tensor] = {}
    for chunk in chunks:
        module = unwrap(chunk)
        names = set(module.state_dict(keep_vars=True))
        tensors = [*module.named_parameters(), *module.named_buffers()]
        for name, tensor in tensors:
            if name in names or isinstance(tensor, torch.nn.Parameter):
                found.setdefault(id(tensor), tensor)
    return list(found.values())
