"""Rotary position embedding by position within the document (arXiv 2104.09864)."""

from __future__ import annotations

import math

import torch
from nemocascade_kernels import PackedSeq
from nemocascade_kernels.common.transfer import to_device
from torch import Tensor

from nemocascade.megatron.microbatch import Microbatch


def rotary_tables(packed: PackedSeq, dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of `position * base^(-2 i / dim)`, i < dim / 2: both [T, dim / 2] float32."""

    def make() -> tuple[Tensor, Tensor]:
        shard = packed.shard if isinstance(packed, Microbatch) else None
        positions = packed.positions_on_host() if shard is None else shard.positions
        tables = rotary_at(positions, dim, base)
        cos, sin = to_device(tables, packed.device)
        return cos, sin

    return packed.cached(("rotary", dim, base), make)


def rotary_at(positions: Tensor, dim: int, base: float) -> tuple[Tensor, Tensor]:
    """`rotary_tables` for given `positions` [T] int64, on their device."""
    index = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device)
    frequency = torch.exp(-math.log(base) * index / dim)
    # In float64 up to here: at position 2^17 float32 has lost the angle's third digit.
    angle = positions.double()[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 m of each head's dimensions, pairing i with i + m.

    x: [T, h, d]; cos, sin: [T, m]. Returns [T, h, d] in x's dtype; arithmetic is float32 (float64
    for float64 inputs).
    """
    m = cos.shape[1]
    a, b, rest = x.split([m, m, x.shape[-1] - 2 * m], dim=-1)
    high = torch.promote_types(x.dtype, torch.float32)
    a, b, cos, sin = a.to(high), b.to(high), cos[:, None].to(high), sin[:, None].to(high)
    turned = [(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype)]
    return torch.cat([*turned, rest], dim=-1)
