"""The blocked KV cache: its sizes in a rank's memory, and the table of each slot's blocks.

A sequence needs its Mamba states, and a block for each `size` tokens that exist. So a pool that is
smaller than all sequences at their limits is used well, and preemption covers the rest.

An attention layer caches keys and values in a pool of blocks. The table names the blocks of each
slot's tokens, for all layers. Who owns a block is decided outside (`nemocascade.rollout.blocks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from nemocascade_kernels.common.transfer import to_device
from torch import Tensor

from nemocascade.recipe import ModelConfig

# Short texts on a CPU waste little of a small block; a GPU reads a tile of keys from one.
_BLOCK = {"cpu": 16, "cuda": 64}
MOST_SLOTS = 256
"""Limit of slots that follow from memory: a decode step of more rows takes longer for each."""


CPU_GIB = 4.0
"""GiB of caches on a CPU if the settings name none. Memory is taken as tokens are written."""
# Slots besides those of sequences: for a shared prompt, and for padding rows.
_SPARE_SLOTS = 2


def block_size(device_type: str) -> int:
    """Tokens of a block on a type of device, `cpu` or `cuda`."""
    return _BLOCK[device_type]


def blocks_of(tokens: int, size: int) -> int:
    """Number of blocks of `size` tokens that hold `tokens`."""
    return -(-tokens // size)


@dataclass(frozen=True)
class CacheBytes:
    """Bytes that generation keeps on a rank: token, of a cached token's keys and values; slot, of
    a sequence's Mamba states."""

    token: int
    slot: int


def state_bytes(model: ModelConfig, layers: str, tp: int, width: int) -> CacheBytes:
    """Sizes for a rank.

    layers: pattern of the rank's layers. tp: tensor-parallel ranks. width: bytes of a parameter.
    """
    heads = max(model.num_kv_heads // tp, 1)
    convolution = (model.mamba_conv - 1) * model.mamba_channels * width
    scan = model.mamba_inner * model.mamba_state * 4
    return CacheBytes(
        token=layers.count("*") * 2 * heads * model.head_dim * width,
        slot=layers.count("M") * (convolution + scan) // tp,
    )


@dataclass(frozen=True)
class Load:
    """A run's largest numbers: tokens of a sequence, tokens of a prompt, and requests."""

    longest: int
    prompt: int
    requests: int


@dataclass(frozen=True)
class CacheMemory:
    """Memory of caches on a rank. budget: bytes. each: what a token and a slot take. size: tokens
    of a block."""

    budget: int
    each: CacheBytes
    size: int

    @property
    def block(self) -> int:
        """Bytes of a block."""
        return self.size * self.each.token

    def slots(self, load: Load) -> int:
        """Slots for sequences at half of the largest length each, which is what sequences in all
        stages of their generation have on average; at least 1, at most `MOST_SLOTS`."""
        half = blocks_of(load.longest, 2 * self.size) * self.block + self.each.slot
        states = self.budget - self.needed(load) * self.block - self.states(0)
        fitting = min(self.budget // max(1, half), states // max(1, self.each.slot))
        return max(1, min(MOST_SLOTS, fitting))

    def blocks(self, load: Load, slots: int) -> int:
        """Blocks of the pool beside the states of `slots`: as many as fit, but no more than all
        sequences need at their largest length. Less than 1 if nothing fits."""
        most = max(1, min(slots, load.requests)) * blocks_of(load.longest, self.size)
        most += blocks_of(load.prompt, self.size)
        left = self.budget - self.states(slots)
        return min(most, left // self.block) if self.block else most

    def needed(self, load: Load) -> int:
        """Blocks of the longest sequence and a stored prompt."""
        return blocks_of(load.longest, self.size) + blocks_of(load.prompt, self.size)

    def states(self, slots: int) -> int:
        """Bytes of the states of `slots`."""
        return (slots + _SPARE_SLOTS) * self.each.slot

    def needed_bytes(self, load: Load, slots: int) -> int:
        """Bytes of the states of `slots`, the longest sequence and a stored prompt."""
        return self.needed(load) * self.block + self.states(slots)


class BlockTable:
    """The blocks of each slot's tokens.

    slots: of sequences; slot `slots` is for padding rows. size: tokens of a block. Entries that
    were not assigned name the spare block, the one after the last of the pool.
    on_device: [slots + 1, W] int32, at one address until `allocate`.
    """

    def __init__(self, slots: int, size: int, device: torch.device) -> None:
        self.slots, self.size, self.device = slots, size, device
        self.blocks = self.columns = 0
        self.allocate(0, 0)

    def allocate(self, blocks: int, columns: int) -> None:
        """Make an empty table of a pool of `blocks`, for sequences of `columns` blocks."""
        self.blocks, self.columns = blocks, columns
        self._on_host = torch.full((self.slots + 1, columns), blocks, dtype=torch.int32)
        self.on_device = self._on_host.to(self.device)
        # One value a place: a device writes duplicates in any order.
        self._changes: dict[tuple[int, int], int] = {}

    def assign(self, slot: int, first: int, blocks: Sequence[int]) -> None:
        """Let `blocks` be those of a slot from its block number `first` on."""
        self._on_host[slot, first : first + len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        if self.on_device is not self._on_host:
            self._changes |= {(slot, first + i): block for i, block in enumerate(blocks)}

    def send(self) -> None:
        """Write the changes to the device, in one transfer."""
        if not self._changes:
            return
        changes = [(*place, block) for place, block in self._changes.items()]
        columns = [torch.tensor(column, dtype=torch.int64) for column in zip(*changes, strict=True)]
        slot, column, block = to_device(columns, self.device)
        self.on_device[slot, column] = block.int()
        self._changes.clear()

    def named(self, slot: int, tokens: int) -> Tensor:
        """Blocks of a slot's first tokens, [m] int64 on the host."""
        return self._on_host[slot, : blocks_of(tokens, self.size)].long()

    def cache_indices(self, slot: int, first: int, end: int) -> Tensor:
        """The block of each token of [first, end) of a slot, and its row there, [2, end - first]
        int64 on the host."""
        at = torch.arange(first, end)
        return torch.stack([self._on_host[slot].long()[at // self.size], at % self.size])
