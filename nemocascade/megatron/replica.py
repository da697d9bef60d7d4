"""A copy of the training weights in a generation layout, and training's memory meanwhile.

The copy exists between `load` and `free`. Tensors stay the same objects: their storage is allocated
and freed. Weights with low-rank adapters are copied merged. In the layout of training only these
are copied, and all others are training's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemocascade.megatron.adapter import MergedPart, merged_parts
from nemocascade.megatron.checkpoint.resharding import BUCKET_BYTES, Resharding
from nemocascade.megatron.checkpoint.state import ModelPart, model_parts
from nemocascade.megatron.config import Accelerators, make_config
from nemocascade.megatron.model import CascadeModel, build_model
from nemocascade.megatron.optimizer import Optimizer
from nemocascade.megatron.world import shares_weights
from nemocascade.recipe import EngineConfig, ModelConfig, MoeTrainingConfig
from nemocascade.runtime.world import World


class Replica:
    """The model in the layout of `rollout_world`, without gradients; `chunks` are its chunks.

    world, source: the training layout and its chunks, bare or wrapped. bucket_bytes: of the tensors
    that the ranks exchange at a time. Every rank makes the object. The model is built without
    values, and its memory is not allocated before `load`.
    """

    def __init__(
        self,
        world: World,
        source: Sequence[Any],
        rollout_world: World,
        shape: ModelConfig,
        engine: EngineConfig,
        accelerators: Accelerators,
        *,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self.world = world
        config = make_config(shape, rollout_world.parallel, engine, MoeTrainingConfig(), seed=0)
        # Without it, Megatron synchronises tied weights of pipeline stages while it builds.
        config.init_model_with_meta_device = True
        with torch.device("meta"):
            self.chunks: list[CascadeModel] = build_model(rollout_world, config, accelerators)
        for chunk in self.chunks:
            # Host memory that is never written costs nothing; parts are found by their addresses.
            chunk.to_empty(device="cpu").requires_grad_(False)
        parts, held = model_parts(self.chunks, rollout_world), merged_parts(source, world)
        filled = {id(part.owner) for part in parts}
        if shares_weights(world, rollout_world):
            parts, held = _share(parts, held)
        for buffer in (b for chunk in self.chunks for b in chunk.buffers()):
            if id(buffer) not in filled:
                buffer.data = torch.zeros_like(buffer.data, device=world.device)
        self._storages = _on_device([part.owner for part in parts], world.device)
        self._resharding = Resharding(world, held, parts, bucket_bytes)
        self._connected = False

    def load(self) -> None:
        """Allocate the memory and copy the current training weights; every rank calls it."""
        for storage, size in self._storages:
            if storage.nbytes() != size:
                storage.resize_(size)
        if not self._connected:
            # All ranks must take part in a group's first exchange on a GPU.
            dist.all_reduce(torch.zeros(1, device=self.world.device))
            self._connected = True
        self._resharding.run()

    def free(self) -> None:
        """Free the memory; the chunks have no values until `load`."""
        for storage, _ in self._storages:
            storage.resize_(0)


def _share(
    parts: Sequence[ModelPart], held: Sequence[ModelPart]
) -> tuple[list[ModelPart], list[ModelPart]]:
    """Make the parts of an equal layout the held ones, where these are read as they are; returns
    the other parts of both."""
    merged = {part.key for part in held if isinstance(part, MergedPart)}
    sources = {part.key: part.owner for part in held}
    for part in parts:
        if part.key not in merged:
            part.owner.data = sources[part.key].data
    left, right = ([p for p in found if p.key in merged] for found in (parts, held))
    return left, right


class TrainingMemory:
    """The gradient buffers and the optimizer's state, which rollouts do not need.

    chunks: wrapped in DDP. Gradients are not kept: each step starts with zeros.
    """

    def __init__(self, chunks: Sequence[Any], optimizer: Optimizer, device: torch.device) -> None:
        self._chunks, self._optimizer, self._device = chunks, optimizer, device
        self._host: list[Tensor] = []
        self._offloaded: list[torch.UntypedStorage] = []
        self._gradients: list[tuple[torch.UntypedStorage, int]] = []

    @torch.no_grad()
    def offload(self) -> None:
        """Copy the state to host memory, free it and the gradients. Safe to call twice."""
        if self._offloaded or self._gradients:
            return
        self._offloaded = _storages(self._optimizer.state_tensors())
        sizes = [storage.nbytes() for storage in self._offloaded]
        if sizes != [kept.numel() for kept in self._host]:
            pinned = self._device.type == "cuda"
            self._host = [
                torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)
                for size in sizes
            ]
        for kept, storage in zip(self._host, self._offloaded, strict=True):
            kept.copy_(_bytes_of(storage), non_blocking=True)
        gradients = _storages(
            [b.grad_data for c in self._chunks for b in (*c.buffers, *c.expert_parallel_buffers)]
        )
        self._gradients = [(storage, storage.nbytes()) for storage in gradients]
        self._wait()
        for storage in (*self._offloaded, *gradients):
            storage.resize_(0)

    @torch.no_grad()
    def restore(self) -> None:
        """Allocate all memory again; the state is bit-identical, gradients are zero."""
        for storage, size in self._gradients:
            storage.resize_(size)
            _bytes_of(storage).zero_()
        for kept, storage in zip(self._host, self._offloaded, strict=bool(self._offloaded)):
            storage.resize_(kept.numel())
            _bytes_of(storage).copy_(kept, non_blocking=True)
        self._wait()
        self._offloaded, self._gradients = [], []

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _on_device(
    owners: Sequence[Tensor], device: torch.device
) -> list[tuple[torch.UntypedStorage, int]]:
    """Move `owners` to `device`, without memory; returns their storages with the bytes that they
    need."""
    freed: dict[int, tuple[torch.UntypedStorage, int]] = {}
    for owner in owners:
        if id(owner) not in freed:
            owner.data = torch.empty_like(owner.data, device=device)
            storage = owner.untyped_storage()
            freed[id(owner)] = storage, storage.nbytes()
            storage.resize_(0)
    return list(freed.values())


def _storages(tensors: Sequence[Tensor]) -> list[torch.UntypedStorage]:
    """The storages of some tensors, each once, without empty ones."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return [storage for storage in found.values() if storage.nbytes()]


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """The storage as a tensor [n] uint8."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
