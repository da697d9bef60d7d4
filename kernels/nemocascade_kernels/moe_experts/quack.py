"""The expert GEMMs by quack-kernels (CuTe; Hopper and Blackwell), only where asked for by name.

quack multiplies with producer and consumer warpgroups that take turns (pingpong). It gathers the
rows of a left matrix by index, cuts groups by cumulative lengths on the device, and adds to a
weight's main gradient. Its relu^2 is fused into the first product; gates, and the activation's
gradient, are torch operators. The sums over a token's choices are those of `triton.py`.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from nemocascade_kernels.common.activations import activate
from nemocascade_kernels.common.routing import Routing
from nemocascade_kernels.moe_experts.triton import (
    grouped_gemm,
    grouped_gemm_backward_w,
    grouped_gemm_backward_x,
    permute,
    permute_backward,
    sum_choices,
    unpermute,
    unpermute_backward,
)

__all__ = [
    "experts_backward",
    "experts_forward",
    "grouped_gemm",
    "grouped_gemm_backward_w",
    "grouped_gemm_backward_x",
    "permute",
    "permute_backward",
    "unpermute",
    "unpermute_backward",
]

#: quack's autotuner would measure in the middle of a step; its own choice is used instead.
_OPTIONS = {"tuned": False}


def _products() -> Any:
    return importlib.import_module("quack.gemm_interface")


def _tokens(routing: Routing) -> Tensor:
    """The token of each sorted slot, [T * K] int32."""
    return routing.order // routing.top_k


def experts_forward(
    x: Tensor, routing: Routing, w_up: Tensor, w_down: Tensor, activation: str, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Output [T, H], and the pre-activations [R, I or 2I] for the backward if `keep`."""
    groups = {"cu_seqlens_m": routing.offsets, **_OPTIONS}
    gathered = {"A_idx": _tokens(routing), **groups}
    if activation == "relu2":
        h, active = _products().gemm_act(
            x.contiguous(), w_up.mT, activation="relu_sq", store_preact=keep, **gathered
        )
    else:
        h = _products().gemm(x.contiguous(), w_up.mT, **gathered)
        active = activate(h, activation)
    rows = _products().gemm(active, w_down.mT, **groups)
    return unpermute(rows, routing), h if keep else None


def experts_backward(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    routing: Routing,
    w_up: Tensor,
    w_down: Tensor,
    activation: str,
    needs: tuple[bool, bool, bool, bool],
    main_grads: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, the routing weights, w_up and w_down, where `needs` requests them."""
    needs_x, needs_weights, needs_up, needs_down = needs
    tokens, groups = _tokens(routing), {"cu_seqlens_m": routing.offsets, **_OPTIONS}
    grad_active = _products().gemm(grad, w_down, A_idx=tokens, **groups)
    filled = torch.arange(h.shape[0], device=h.device) < routing.offsets[-1]
    # Rows without an expert are not written, and may hold NaN.
    wide = grad_active.masked_fill(~filled[:, None], 0.0).float()
    active, grad_h = _activation_gradient(h.masked_fill(~filled[:, None], 0.0).float(), activation)
    grad_weights = None
    if needs_weights:
        grad_weights = torch.zeros_like(routing.weights)
        grad_weights.view(-1)[routing.order.long()] = (active * wide).sum(dim=1)
    weights = routing.weights.reshape(-1)[routing.order.long()].unsqueeze(1)
    grad_h = (grad_h * (wide * weights).repeat(1, h.shape[1] // wide.shape[1])).to(x.dtype)
    weighted = (active * weights).to(x.dtype)
    grad_down = grad_up = grad_x = None
    if needs_down:
        grad_down = _weight_gradient(grad, weighted, tokens, routing, w_down, main_grads[1])
    if needs_up:
        # Only a left matrix is gathered, so this is the transposed gradient.
        main = None if main_grads[0] is None else main_grads[0].mT
        grad_up = _weight_gradient(x.contiguous(), grad_h, tokens, routing, w_up.mT, main)
        grad_up = None if grad_up is None else grad_up.mT
    if needs_x:
        grad_x = sum_choices(_products().gemm(grad_h, w_up, **groups), routing)
    return grad_x, grad_weights, grad_up, grad_down


def _activation_gradient(h: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """act(h) [R, I], and its derivative [R, I or 2I] in h."""
    if activation == "relu2":
        positive = h.relu()
        return positive.square(), 2.0 * positive
    gate, up = h.chunk(2, dim=1)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    return silu * up, torch.cat([up * (sigmoid + silu * (1.0 - sigmoid)), silu], dim=1)


def _weight_gradient(
    left: Tensor,
    right: Tensor,
    tokens: Tensor,
    routing: Routing,
    weight: Tensor,
    main_grad: Tensor | None,
) -> Tensor | None:
    """left[tokens]^T right of each expert, like `weight` [E, N, M]; added to `main_grad` if given,
    and None returned."""
    options = {"cu_seqlens_k": routing.offsets, "A_idx": tokens, **_OPTIONS}
    if main_grad is not None:
        _products().gemm_add_inplace(left.mT, right, main_grad, **options)
        return None
    out: Tensor = _products().gemm(left.mT, right, out=torch.empty_like(weight), **options)
    return out
