"""Accumulation of a weight's gradient in `weight.main_grad`, Megatron-Core's convention."""

from __future__ import annotations

import torch
from torch import Tensor


def checked_main_grad(weight: Tensor) -> Tensor:
    """Return `weight.main_grad`; raises ValueError unless the gradient can be added to it."""
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    if main_grad is None:
        raise ValueError("accumulate_main_grad=True, but weight has no main_grad: set it first")
    if main_grad.shape != weight.shape or main_grad.dtype not in (torch.float32, weight.dtype):
        raise ValueError(
            f"weight.main_grad is {tuple(main_grad.shape)} {main_grad.dtype}: it must be "
            f"{tuple(weight.shape)}, in float32 or {weight.dtype}"
        )
    return main_grad


def placeholder_gradient(weight: Tensor) -> Tensor:
    """Mark the gradient as added, and make a placeholder for autograd.

    Megatron-Core's hook needs a gradient as a sign that the parameter is ready, and drops it.
    The gradient of a parameter flagged `zero_out_wgrad` is read, so it is zeros.
    """
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    if getattr(weight, "zero_out_wgrad", False):
        return torch.zeros_like(weight)
    return torch.empty_like(weight)
