"""The router's product in float32, whose backward keeps its inputs in their own dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemocascade_kernels.common.main_grad import checked_main_grad, placeholder_gradient


def router_logits(x: Tensor, weight: Tensor, *, accumulate_main_grad: bool = False) -> Tensor:
    """Logits `x weight^T` in float32.

    On a GPU, products of bfloat16 run on tensor cores: they are exact in float32, and are summed
    and returned in it. In backward the float32 gradient is split into three bfloat16 matrices, so
    that its products run there too. None depends on torch's TF32 settings.

    Args:
        x: [T, H] float32, bfloat16 or float16. Backward keeps it in this dtype.
        weight: [E, H], x's dtype.
        accumulate_main_grad: the backward adds the weight's gradient to its `main_grad`, as in
            `moe_experts`.

    Returns:
        [T, E] float32. Gradients go to x and weight, in their dtype.

    Raises:
        ValueError: a shape, dtype or main_grad is wrong.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or x.dtype != weight.dtype:
        raise ValueError(
            f"router_logits: x {list(x.shape)} {x.dtype} and weight {list(weight.shape)} "
            f"{weight.dtype} must be [T, H] and [E, H] of one dtype"
        )
    accumulate = accumulate_main_grad and weight.requires_grad
    main_grad = checked_main_grad(weight) if accumulate else None
    logits: Tensor = _RouterLogits.apply(x, weight, main_grad)
    return logits


class _RouterLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, main_grad: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        # Under activation checkpointing the saved weight is another object in backward.
        ctx.weight, ctx.main_grad = weight, main_grad
        return _float_product(x, weight.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        gradients = split_gradients if _on_tensor_cores(x) else float_gradients
        grad_x, grad_weight = gradients(grads[0], x, weight, *ctx.needs_input_grad[:2])
        if grad_weight is not None and ctx.main_grad is not None:
            ctx.main_grad.add_(grad_weight)
            grad_weight = placeholder_gradient(ctx.weight)
        elif grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_x, grad_weight, None


def _on_tensor_cores(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16


def _float_product(left: Tensor, right: Tensor) -> Tensor:
    """Compute left @ right in float32, of matrices of one dtype."""
    if _on_tensor_cores(left):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def float_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x, in its dtype, and of the weight, in float32, by products of float32."""
    grad_x = (grad @ weight.float()).to(x.dtype) if needs_x else None
    grad_weight = grad.t() @ x.float() if needs_weight else None
    return grad_x, grad_weight


def split_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Implements `float_gradients` by products of bfloat16 that are summed in float32.

    A float32 is the sum of three bfloat16, so no product is rounded. Rounding grad to bfloat16
    instead would cost a relative error of 2^-9.
    """
    high = grad.to(torch.bfloat16)
    rest = grad - high
    middle = rest.to(torch.bfloat16)
    parts = torch.cat([high, middle, (rest - middle).to(torch.bfloat16)], dim=1)
    grad_x = parts @ weight.repeat(3, 1) if needs_x else None
    grad_weight = None
    if needs_weight:
        grad_weight = _float_product(parts.t(), x).unflatten(0, (3, -1)).sum(0)
    return grad_x, grad_weight
