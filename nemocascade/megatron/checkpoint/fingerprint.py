"""A fingerprint of a model's weights, the same on every layout."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from nemocascade.megatron.checkpoint.state import model_parts, model_shards
from nemocascade.runtime.world import World

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MODULUS = (1 << 40) - 87
"""Sums of a million ranks fit into 64 bits."""


class WeightFingerprint:
    """The fingerprint of the weights and persistent buffers of `chunks`, as they are at each call.

    It is the sum over all tensors of the bits of their elements, as integers, times a hash of the
    tensor's name. Every element counts on one rank only.
    """

    def __init__(self, chunks: Sequence[Any], world: World) -> None:
        self.world = world
        shards = model_shards(model_parts(chunks, world))
        self._shards = [shard for shard in shards if shard.is_main]
        digests = [hashlib.sha256(shard.key.encode()).digest() for shard in self._shards]
        self._hashes = [[int.from_bytes(d[start : start + 5]) for start in (0, 5)] for d in digests]

    def current(self) -> str:
        """20 hex digits; every rank calls it. It reads every weight once."""
        sums: list[int] = []
        if self._shards:
            parts = [
                p.tensor.view(_INTEGERS[p.tensor.element_size()]).sum(dtype=torch.int64)
                for p in self._shards
            ]
            sums = torch.stack(parts).tolist()
        words = [
            sum(value * hash_[k] for value, hash_ in zip(sums, self._hashes, strict=True))
            for k in (0, 1)
        ]
        total = torch.tensor([word % _MODULUS for word in words])
        found = self.world.sum_over_ranks(total).tolist()
        return "".join(f"{word % _MODULUS:010x}" for word in found)
