"""The gated norm of rows and the time steps, with their gradients, in torch operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def time_step_slope(raw: Tensor, limit: tuple[float, float]) -> Tensor:
    """Derivative of `softplus(raw)`, clamped to `limit`, by `raw`."""
    free = F.softplus(raw)
    return raw.sigmoid().masked_fill_((free < limit[0]) | (free > limit[1]), 0)


class Gate:
    """The gated norm of R rows, with the values for its backward.

    y, z: [R, h p]; weight: [h p]; all in float32 or float64.
    """

    def __init__(self, y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> None:
        self.y, self.z, self.weight = y, z, weight
        self.silu = F.silu(z)
        u = (y * self.silu).view(y.shape[0], groups, -1)
        square = torch.linalg.vector_norm(u, dim=-1, keepdim=True).square_()
        self.scale = square.div_(u.shape[-1]).add_(eps).rsqrt_()
        self.normed = u.mul_(self.scale)

    def out(self) -> Tensor:
        """Output [R, h p]."""
        return self.normed.view(self.y.shape) * self.weight

    def backward(self, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of y and z [R, h p], and of the weight [h p]."""
        d_weight = (d_out * self.normed.view(d_out.shape)).sum(0)
        d_normed = (d_out * self.weight).view(self.normed.shape)
        along = (d_normed * self.normed).mean(-1, keepdim=True)
        d_u = d_normed.addcmul_(self.normed, along, value=-1).mul_(self.scale).view(d_out.shape)
        d_z: Tensor = torch.ops.aten.silu_backward(d_u * self.y, self.z)
        return d_u.mul_(self.silu), d_z, d_weight
