"""The definition of `mamba_step`, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nemocascade_kernels.mamba_step.sizes import MambaWeights


def mamba_step(
    zxbcdt: Tensor, conv_state: Tensor, ssm_state: Tensor, slots: Tensor, w: MambaWeights
) -> Tensor:
    """See `op.mamba_step`."""
    heads, head_dim, state = ssm_state.shape[1:]
    inner, shared = heads * head_dim, w.groups * state
    z, xbc, dt = zxbcdt.split([inner, inner + 2 * shared, heads], dim=1)

    window = torch.cat([conv_state[slots], xbc.to(conv_state.dtype)[:, :, None]], dim=2)
    conv_state[slots] = window[:, :, 1:]
    mixed = F.silu((window.float() * w.conv_weight.float()).sum(2) + w.conv_bias.float())
    x, b, c = mixed.split([inner, shared, shared], dim=1)

    step = F.softplus(dt.float() + w.dt_bias).clamp(*w.dt_limit)
    ratio = heads // w.groups
    x = x.view(-1, heads, head_dim)
    b = b.view(-1, w.groups, 1, state).repeat_interleave(ratio, 1)
    c = c.view(-1, w.groups, state, 1).repeat_interleave(ratio, 1)
    decay = torch.exp(step * w.A)[:, :, None, None]
    now = ssm_state[slots] * decay + (step[:, :, None] * x)[..., None] * b
    ssm_state[slots] = now
    y = (now @ c).squeeze(3) + w.D[:, None] * x

    u = (y.flatten(1) * F.silu(z.float())).view(-1, w.groups, inner // w.groups)
    u = u * torch.rsqrt(u.square().mean(2, keepdim=True) + w.eps)
    return (u.flatten(1) * w.norm_weight.float()).to(zxbcdt.dtype)
