"""The definition of `mamba2`: the recurrence of arXiv 2405.21060 in plain torch, token by token.

For each document, with a state S [h, p, n], and head i using group i // (h / g) of B and C:

    [x, B, C]_t = silu(bias + sum_k weight_k [x, B, C]_{t - K + 1 + k})
    dt_t        = softplus(dt_t + dt_bias), within dt_limit
    S_t         = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T
    y_t         = S_t C_t + D x_t
    out_t       = group RMSNorm(y_t * silu(z_t)) * weight

Arithmetic is float32, float64 for float64 inputs. Autograd differentiates it, including the states.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nemocascade_kernels.common.documents import PackedSeq
from nemocascade_kernels.mamba2.arguments import Inputs, Sizes, States


def convolution(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> Tensor:
    """Depthwise causal convolution and SiLU of one document.

    x: [T, W]; weight: [W, K]; bias: [W]; before: [K - 1, W], the rows before x. Returns [T, W].
    """
    padded = torch.cat([before, x])
    total = bias
    for k in range(weight.shape[1]):
        total = total + weight[:, k] * padded[k : k + x.shape[0]]
    return F.silu(total)


def scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The state-space recurrence over one document.

    x: [T, h, p]; dt: [T, h]; A, D: [h]; B, C: [T, g, n]; state: [h, p, n], the initial state.
    Returns y [T, h, p] and the final state.
    """
    ratio = x.shape[1] // B.shape[1]
    B, C = B.repeat_interleave(ratio, 1), C.repeat_interleave(ratio, 1)
    rows = []
    for t in range(x.shape[0]):
        added = (dt[t, :, None] * x[t])[:, :, None] * B[t, :, None, :]
        state = torch.exp(dt[t] * A)[:, None, None] * state + added
        rows.append((state * C[t, :, None, :]).sum(2) + D[:, None] * x[t])
    return torch.stack(rows), state


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """Gate, then normalise (`norm_before_gate=False`). y, z: [T, h p]. Returns the same."""
    u = (y * F.silu(z)).unflatten(1, (groups, -1))
    normed = u / torch.sqrt(u.square().mean(-1, keepdim=True) + eps)
    return normed.flatten(1) * weight


def forward(i: Inputs, packed: PackedSeq, s: Sizes) -> Tensor:
    """Output [T, h p] in zxbcdt's dtype."""
    return forward_with_states(i, packed, s, None)[0]


def forward_with_states(
    i: Inputs,
    packed: PackedSeq,
    s: Sizes,
    initial: States | None,
    documents: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [T, h p] in zxbcdt's dtype, and the state after each document [D, h, p, n]."""
    if initial is not None and documents is not None:
        initial = initial.spread(documents, packed.num_documents)
    dtype = i.zxbcdt.dtype
    high = torch.promote_types(dtype, torch.float32)
    i = Inputs(*(tensor.to(high) for tensor in i))
    z, xbc, dt = s.split(i.zxbcdt)
    dt = F.softplus(dt + i.dt_bias).clamp(*s.dt_limit)
    if initial is None:
        count = packed.num_documents
        initial = States(
            xbc.new_zeros(count, i.window - 1, s.channels),
            xbc.new_zeros(count, s.heads, s.head_dim, s.state),
        )
    out, states = [], []
    for document, rows in enumerate(packed.documents()):
        before = initial.conv[document].to(high)
        x, B, C = s.split_channels(convolution(xbc[rows], i.conv_weight, i.conv_bias, before))
        y, state = scan(x, dt[rows], i.A, B, C, i.D, initial.ssm[document].to(high))
        out.append(gated_norm(y.flatten(1), z[rows], i.norm_weight, s.groups, s.eps))
        states.append(state)
    return torch.cat(out).to(dtype), torch.stack(states)
