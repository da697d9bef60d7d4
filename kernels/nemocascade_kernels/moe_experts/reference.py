"""The definition of the expert GEMMs in plain torch, differentiable by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nemocascade_kernels.common.activations import activate
from nemocascade_kernels.common.routing import Routing


def grouped_gemm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """Multiply the rows of group e by w[e] transposed; rows past the last group give 0."""
    bounds = offsets.tolist()
    parts = [F.linear(x[bounds[e] : bounds[e + 1]], w[e]) for e in range(w.shape[0])]
    parts.append(x.new_zeros(x.shape[0] - bounds[-1], w.shape[1]))
    return torch.cat(parts)


def permute(x: Tensor, routing: Routing) -> Tensor:
    """Rows of x in the order of the slots; slots without an expert give 0."""
    rows = x[routing.order.long() // routing.top_k]
    absent = torch.arange(rows.shape[0], device=x.device) >= routing.offsets[-1]
    return rows.masked_fill(absent.unsqueeze(1), 0.0)


def unpermute(y: Tensor, routing: Routing) -> Tensor:
    """Weighted sum of each token's rows, in the order of its choices."""
    absent = torch.arange(y.shape[0], device=y.device) >= routing.offsets[-1]
    rows = y.masked_fill(absent.unsqueeze(1), 0.0)[routing.positions.long()]
    wide = routing.weights.to(torch.promote_types(y.dtype, routing.weights.dtype))
    return (rows * wide.unsqueeze(-1)).sum(dim=1).to(y.dtype)


def experts(x: Tensor, routing: Routing, w_up: Tensor, w_down: Tensor, activation: str) -> Tensor:
    """See `nemocascade_kernels.moe_experts`."""
    h = grouped_gemm(permute(x, routing), w_up, routing.offsets)
    y = grouped_gemm(activate(h, activation), w_down, routing.offsets)
    return unpermute(y, routing)
