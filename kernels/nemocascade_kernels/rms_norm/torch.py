"""RMSNorm in torch operators.

On a GPU torch has a fused kernel. On a CPU torch runs and differentiates several operators, so the
plain norm is an autograd function there, which saves only x and a scale for each row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemocascade_kernels.common.gated_norm import gated_rms_norm


def rms_norm(x: Tensor, weight: Tensor, eps: float, gate: Tensor | None, groups: int) -> Tensor:
    """See `op.rms_norm`."""
    if gate is not None:
        return gated_rms_norm(x, gate, weight, groups, eps)
    if x.device.type != "cpu":
        return F.rms_norm(x, weight.shape, weight, eps)
    y: Tensor = _RMSNorm.apply(x, weight, eps)
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        high = torch.promote_types(x.dtype, torch.float32)
        xh = x.to(high)
        square = torch.linalg.vector_norm(xh, dim=-1, keepdim=True).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (xh * scale).mul_(weight.to(high)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        high = scale.dtype
        normed, g = x.to(high) * scale, grad.to(high)
        d_weight = (g * normed).view(-1, weight.numel()).sum(0)
        d_normed = g * weight.to(high)
        along = (d_normed * normed).mean(-1, keepdim=True)
        dx = d_normed.addcmul_(normed, along, value=-1).mul_(scale)
        return dx.to(x.dtype), d_weight.to(weight.dtype), None
