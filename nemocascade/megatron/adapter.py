"""The parts of a model with low-rank adapters: the base, the adapter, and both merged.

A stage trains the factors beside frozen weights. Whoever reads the model elsewhere, in a generation
layout, on a server or as an artifact, reads merged weights: `W + s B A`, computed in float32 and
rounded once to the weight's dtype. A rank has both factors of its own part of a weight, so merging
exchanges nothing. Without adapters, the merged parts are the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nemocascade.megatron.checkpoint.boxes import Box
from nemocascade.megatron.checkpoint.state import ModelPart, model_parts, model_shards, unwrap
from nemocascade.megatron.checkpoint.storage import TensorShard
from nemocascade.megatron.layers.lora import Adapted, Adapter
from nemocascade.runtime.world import World


@dataclass(frozen=True, eq=False)
class MergedPart(ModelPart):
    """A box of a weight that is read merged with its adapter."""

    adapter: Adapter

    @torch.no_grad()
    def view(self, box: Box) -> Tensor:
        """The merged elements of `box`, a copy."""
        lead = self.leading
        inner = box.relative_to(self.box.offset).offset[lead:]
        offset = tuple(a + b for a, b in zip(self.local.offset, inner, strict=True))
        delta = self.adapter.delta(Box(offset, box.size[lead:]).slices())
        weight = super().view(box)
        # The sum is a new tensor, float32 for bf16 weights too.
        return (weight + delta.view(box.size)).to(weight.dtype)


def _adapters(chunks: Sequence[Any]) -> Iterator[Adapter]:
    for chunk in map(unwrap, chunks):
        for module in chunk.modules():
            if isinstance(module, Adapted):
                yield from module.adapters()


def train_adapters_only(chunks: Sequence[Any]) -> str:
    """Freeze every parameter but the adapters' factors; returns a line for the log."""
    factors, trained, total = _factors(chunks), 0, 0
    for parameter in (p for chunk in map(unwrap, chunks) for p in chunk.parameters()):
        parameter.requires_grad_(id(parameter) in factors)
        total += parameter.numel()
        trained += parameter.numel() if parameter.requires_grad else 0
    return (
        f"adapters of {len(factors) // 2} weights: {trained:,} of {total:,} parameters of this "
        "rank are trained; routers and their selection biases are frozen"
    )


@torch.no_grad()
def reset_adapters(chunks: Sequence[Any]) -> None:
    """Set every B to zero: the model computes with its base weights."""
    for adapter in _adapters(chunks):
        adapter.b.zero_()


def base_parts(chunks: Sequence[Any], world: World) -> list[ModelPart]:
    """`model_parts` without the adapters' factors."""
    factors = _factors(chunks)
    return [part for part in model_parts(chunks, world) if id(part.owner) not in factors]


def adapter_parts(chunks: Sequence[Any], world: World) -> list[ModelPart]:
    """The factors among `model_parts`."""
    factors = _factors(chunks)
    return [part for part in model_parts(chunks, world) if id(part.owner) in factors]


def merged_parts(chunks: Sequence[Any], world: World) -> list[ModelPart]:
    """`base_parts` whose views of adapted weights are merged, at the time of each view."""
    adapters = {id(adapter.weight): adapter for adapter in _adapters(chunks)}
    return [
        MergedPart(**vars(part), adapter=adapters[id(part.owner)])
        if id(part.owner) in adapters
        else part
        for part in base_parts(chunks, world)
    ]


def merged_shards(chunks: Sequence[Any], world: World) -> list[TensorShard]:
    """The shards of `merged_parts`; merged weights are copied to host memory one by one."""
    found = []
    for part in merged_parts(chunks, world):
        [shard] = model_shards([part])
        if isinstance(part, MergedPart):
            shard = replace(shard, tensor=shard.tensor.cpu())
        found.append(shard)
    return found


def _factors(chunks: Sequence[Any]) -> set[int]:
    return {id(factor) for adapter in _adapters(chunks) for factor in (adapter.a, adapter.b)}
