"""The gated RMSNorm of Mamba-2 in torch operators, for ops without a kernel of their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """Compute `u = x * silu(gate)`, RMS-normalise each of `groups` equal parts, times weight.

    x, gate: [..., C]; weight: [C]. Returns [..., C] in x's dtype; arithmetic is float32 at least.
    """
    high = torch.promote_types(torch.promote_types(x.dtype, gate.dtype), torch.float32)
    u = (x.to(high) * F.silu(gate.to(high))).unflatten(-1, (groups, -1))
    u = F.rms_norm(u, u.shape[-1:], None, eps).flatten(-2)
    return (u * weight.to(high)).to(x.dtype)
