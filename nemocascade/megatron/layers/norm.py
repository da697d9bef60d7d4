"""RMSNorm, plain and gated by groups. Arithmetic is float32 (float64 for float64 inputs)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemocascade.megatron import native
from nemocascade.megatron.config import CascadeConfig

OPERATORS = ("rms_norm", "rms_norm_backward")


class RMSNorm(torch.nn.Module):
    """`y = x / sqrt(mean(x^2) + eps) * weight` over the last dimension (arXiv 1910.07467).

    The weight carries `sequence_parallel`, so that Megatron sums its gradient over the
    tensor-parallel ranks, each of which sees only its part of the sequence.
    """

    def __init__(
        self, config: CascadeConfig, hidden_size: int, eps: float = 1e-5, **_unused: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden_size]. Returns the same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension; dtype and shape of x.

    torch's fused kernel on a GPU. On a CPU torch computes and differentiates it operator by
    operator, so there it is a function of its own that keeps only x and a scale for each row; in
    float32 and bfloat16 it is compiled (csrc/rms_norm/), where the library is built.
    """
    if x.is_cuda or x.is_meta:
        return F.rms_norm(x, weight.shape, weight, eps)
    if x.dtype in (torch.float32, torch.bfloat16) and native.lacks(*OPERATORS) is None:
        compiled: Tensor = _NativeRMSNorm.apply(x, weight, eps)
        return compiled
    y: Tensor = _RMSNorm.apply(x, weight, eps)
    return y


class _NativeRMSNorm(torch.autograd.Function):
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


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """`u = y * silu(z)`, then each of `groups` equal parts of u is RMS-normalised, times weight.

    The order of Mamba-2 as Nemotron uses it: the gate comes first (`norm_before_gate=False`).
    y, z: [T, C]; weight: [C]; C is a multiple of `groups`. Returns [T, C] in z's dtype.
    """
    high = torch.promote_types(torch.promote_types(y.dtype, z.dtype), torch.float32)
    u = y.to(high) * F.silu(z.to(high))
    u = F.rms_norm(u.unflatten(-1, (groups, -1)), (u.shape[-1] // groups,), None, eps).flatten(-2)
    return (u * weight.to(high)).to(z.dtype)
