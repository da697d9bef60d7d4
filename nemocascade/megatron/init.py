"""Initial values that depend only on the seed and a parameter's global name.

Every parallel layout slices the same full tensor, so TP, PP, EP and DP start from the same model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Fill = Callable[[Tensor], Any]


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on `seed` and the parameter's global `name`."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


@dataclass(frozen=True)
class Shard:
    """Sharding of one dimension of a parameter over ranks.

    dim: the dimension. rank, size: this rank's index and the number of ranks on the axis.
    blocks: sizes of consecutive parts along `dim`, each sharded separately; None is one part.
        A rank holds its shard of every part, in the same order.
    """

    dim: int
    rank: int
    size: int
    blocks: tuple[int, ...] | None = None

    def local_size(self, full: int) -> int:
        """Rows on this rank. Raises ValueError if a part cannot be split equally."""
        return sum(self._block_sizes(full))

    def cut(self, full: Tensor) -> Tensor:
        """This rank's part of `full`."""
        if self.size == 1:
            return full
        sizes = self._block_sizes(full.shape[self.dim])
        parts = full.split(self.blocks or full.shape[self.dim], self.dim)
        return torch.cat(
            [part.narrow(self.dim, self.rank * n, n) for part, n in zip(parts, sizes, strict=True)],
            self.dim,
        )

    def _block_sizes(self, full: int) -> list[int]:
        blocks = self.blocks or (full,)
        if sum(blocks) != full:
            raise ValueError(f"blocks {list(blocks)} add up to {sum(blocks)}, not to {full}")
        for block in blocks:
            if block % self.size:
                raise ValueError(
                    f"a part of {block} rows cannot be cut into {self.size} equal shards: "
                    "choose a parallel size that divides it"
                )
        return [block // self.size for block in blocks]


def sharded_init(
    shape: Sequence[int],
    fill: Fill | None,
    shards: Sequence[Shard] = (),
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """This rank's shard of a parameter whose full tensor `fill` writes.

    shape: of the full tensor. fill: writes a full float32 CPU tensor in place, from a generator of
    its own (`generator_for`); None leaves the values undefined. shards: the sharded dimensions.
    device: default, torch's default device; on "meta" nothing is computed. Returns a contiguous
    tensor of `dtype`.
    Raises ValueError if a dimension cannot be split equally.
    """
    device = torch.device(device) if device is not None else torch.empty(0).device
    local = list(shape)
    for shard in shards:
        local[shard.dim] = shard.local_size(local[shard.dim])
    if fill is None or device.type == "meta":
        return torch.empty(local, dtype=dtype, device=device)
    value = torch.empty(tuple(shape), dtype=torch.float32, device="cpu")
    with torch.no_grad():
        fill(value)
        for shard in shards:
            value = shard.cut(value)
    return value.to(device=device, dtype=dtype).contiguous()
