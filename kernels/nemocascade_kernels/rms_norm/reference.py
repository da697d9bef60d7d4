"""The definition of `rms_norm` (arXiv 1910.07467), gated by groups as in Mamba-2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None, groups: int = 1
) -> Tensor:
    """See `op.rms_norm`. Arithmetic is float32, float64 for float64 inputs."""
    high = torch.promote_types(x.dtype, torch.float32)
    u = x.to(high)
    if gate is not None:
        u = u * F.silu(gate.to(high))
    u = u.unflatten(-1, (groups, -1))
    normed = u / torch.sqrt(u.square().mean(-1, keepdim=True) + eps)
    return (normed.flatten(-2) * weight.to(high)).to(x.dtype)
