"""RMSNorm in C++ for the CPU (csrc/rms_norm/), in float32: only x is saved for backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemocascade_kernels import native


def rms_norm(x: Tensor, weight: Tensor, eps: float, gate: Tensor | None, groups: int) -> Tensor:
    """See `op.rms_norm`. x: float32 or bfloat16; there is no gate."""
    del gate, groups
    y: Tensor = _RMSNorm.apply(x, weight, eps)
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.contiguous().view(-1, x.shape[-1])
        y = torch.empty_like(rows)
        native.op("rms_norm")(rows, weight.float().contiguous(), eps, y)
        ctx.save_for_backward(rows, weight)
        ctx.eps = eps
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        dx, d_weight = torch.empty_like(rows), weight.new_empty(weight.shape, dtype=torch.float32)
        upstream = grad.contiguous().view(rows.shape)
        native.op("rms_norm_backward")(
            rows, weight.float().contiguous(), ctx.eps, upstream, dx, d_weight
        )
        return dx.view(grad.shape), d_weight.to(weight.dtype), None
