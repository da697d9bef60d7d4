"""Weight swap: reference policies and teachers run in the training model, without a second model.

A weight set holds this rank's shard of all tensors that a forward pass reads: parameters and
persistent buffers. Sets are offloaded to host memory, or to files that are prefetched. The
optimizer's state is not touched, and the model's own weights are restored bit for bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemocascade.megatron.artifact import load_artifact_weights
from nemocascade.megatron.checkpoint.state import unwrap
from nemocascade.runtime.world import World
from nemocascade.types import Artifact

WeightSet = list[Tensor]
"""This rank's shard of a model on the host, in the order of `live_tensors`."""

ActivateSet = Callable[[str], None]
"""Copies a weight set, by its name, into the model."""


class SwapError(RuntimeError):
    """A weight set was requested during another swap."""


class WeightSwap:
    """The model's chunks, and the weight sets that can replace their own weights.

    folder: offload sets to files here, one for each rank's shard; None offloads to host memory. The
    folder must belong to this run alone: `close` removes it.
    """

    def __init__(self, world: World, chunks: Sequence[Any], folder: Path | None = None) -> None:
        self.world, self.chunks, self.folder = world, list(chunks), folder
        self.current: str | None = None
        """Name of the active set; None for the model's own weights."""
        self._sets: dict[str, WeightSet | Path] = {}
        self._own: WeightSet | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._prefetched: dict[str, Future[WeightSet]] = {}

    @property
    def names(self) -> list[str]:
        """Names of the stored sets."""
        return sorted(self._sets)

    @property
    def num_bytes(self) -> int:
        """Host memory of this rank's sets in bytes, including the model's own offloaded weights."""
        sets = [kept for kept in self._sets.values() if not isinstance(kept, Path)]
        sets += [self._own] if self._own else []
        sets += [read.result() for read in self._prefetched.values() if read.done()]
        return sum(t.numel() * t.element_size() for kept in sets for t in kept)

    def keep(self, name: str) -> None:
        """Add a copy of the model's own current weights."""
        self._require_own_weights("keep")
        self._store(name, self._copy())

    def load(self, name: str, artifact: Artifact) -> None:
        """Add the weights of an artifact; every rank calls it.

        Raises CheckpointError on every rank if it is damaged or of another shape.
        """
        self._require_own_weights("load")
        own = self._copy()
        try:
            load_artifact_weights(artifact, self.world, self.chunks)
            self._store(name, self._copy())
        finally:
            self._fill(own)

    def drop(self, name: str) -> None:
        """Delete a set."""
        self._prefetched.pop(name, None)
        kept = self._sets.pop(name)
        if isinstance(kept, Path):
            kept.unlink(missing_ok=True)

    def prefetch(self, name: str) -> None:
        """Read a set from its file in the background; it stays in host memory until used."""
        kept = self._sets[name]
        if isinstance(kept, Path) and name not in self._prefetched:
            self._prefetched[name] = self._reader.submit(_read, kept)

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Context manager: the model computes with the set `name`; its own weights return at exit.

        Raises KeyError for an unknown name and SwapError inside another swap.
        """
        with self.away() as place:
            place(name)
            yield

    @contextmanager
    def away(self) -> Iterator[ActivateSet]:
        """Context manager for several swaps: yields a function that activates a set by its name.

        The model's own weights are copied and restored only once. Raises SwapError inside another
        swap; activating an unknown name raises KeyError.
        """
        self._require_own_weights("use")
        self._own = self._copy(into=self._own)

        def place(name: str) -> None:
            chosen = self._take(name)
            self.current = name
            self._fill(chosen)

        try:
            yield place
        finally:
            self._fill(self._own)
            self.current = None

    def close(self) -> None:
        """Delete all sets and their files."""
        self._reader.shutdown()
        self._prefetched.clear()
        self._sets.clear()
        self._own = None
        self.world.barrier()
        if self.folder is not None and self.world.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _store(self, name: str, weights: WeightSet) -> None:
        self._prefetched.pop(name, None)
        if self.folder is None:
            self._sets[name] = weights
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}_rank_{self.world.rank:05d}.safetensors"
        save_file({f"{i:06d}": t for i, t in enumerate(weights)}, path)
        self._sets[name] = path

    def _take(self, name: str) -> WeightSet:
        kept = self._sets[name]
        if not isinstance(kept, Path):
            return kept
        ahead = self._prefetched.pop(name, None)
        return ahead.result() if ahead is not None else _read(kept)

    def _require_own_weights(self, what: str) -> None:
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


def _read(path: Path) -> WeightSet:
    found = load_file(path)
    return [found[name] for name in sorted(found)]


def live_tensors(chunks: Sequence[Any]) -> list[Tensor]:
    """Parameters and persistent buffers of this rank's chunks, deduplicated, in a fixed order."""
    found: dict[int, Tensor] = {}
    for chunk in chunks:
        module = unwrap(chunk)
        names = set(module.state_dict(keep_vars=True))
        tensors = [*module.named_parameters(), *module.named_buffers()]
        for name, tensor in tensors:
            if name in names or isinstance(tensor, torch.nn.Parameter):
                found.setdefault(id(tensor), tensor)
    return list(found.values())


def model_problems(named: str, other: Artifact, whose: str, policy: Artifact) -> list[str]:
    """Reasons why `other` cannot run in the model of `policy`: shape, tokenizer or template differ.

    named: start of each message, such as "judge.artifact is FOLDER". whose: "the student's", for
    example.
    """
    problems = []
    different = [
        f"{name} {other.model.get(name)} is not {policy.model.get(name)}"
        for name in sorted(other.model.keys() | policy.model.keys())
        if other.model.get(name) != policy.model.get(name)
    ]
    if different:
        problems.append(
            f"{named}, whose shape is not {whose}, {policy.folder} "
            f"({'; '.join(different)}): name an artifact of the same model"
        )
    if _tokenizer_bytes(other) != _tokenizer_bytes(policy):
        problems.append(
            f"{named}, whose tokenizer is not {whose}, {policy.folder}: ids would mean other "
            "texts; name an artifact with the same tokenizer"
        )
    if None not in (other.template, policy.template) and other.template != policy.template:
        problems.append(
            f"{named}, whose chat template is not {whose}, {policy.folder}: it was trained on "
            "other texts; name an artifact with the same tokenizer.template"
        )
    return problems


def _tokenizer_bytes(artifact: Artifact) -> bytes | None:
    path = artifact.tokenizer_path
    return None if path is None else path.read_bytes()
