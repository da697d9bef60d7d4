"""`mamba_step`: checks and choice of the implementation. Nothing here has a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from nemocascade_kernels import backends, native
from nemocascade_kernels.mamba_step.sizes import MambaWeights

_MODULE = "nemocascade_kernels.mamba_step"


def native_refusal(*tensors: Tensor) -> str | None:
    """Why the compiled CPU step cannot take such a call."""
    if any(tensor.dtype not in (torch.float32, torch.int64) for tensor in tensors):
        return "it works in float32"
    return native.lacks("mamba_step")


OP = backends.Op("mamba_step")
OP.register("native", f"{_MODULE}.native", refuse=native_refusal)
OP.register("reference", f"{_MODULE}.reference")


def mamba_step(
    zxbcdt: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    slots: Tensor,
    weights: MambaWeights,
    *,
    backend: str | None = None,
) -> Tensor:
    """One token of Mamba-2's mixer (arXiv 2405.21060) between its projections, for n sequences::

        [x, B, C] = silu(conv([x, B, C]))      over the token and the K - 1 before it
        dt = softplus(dt + dt_bias)            S = exp(dt A) S + dt x B^T
        y = S C + D x                          out = group RMSNorm(y * silu(z)) * weight

    States are changed in place. Rows that name the same slot leave it with the state of any of
    them. A row's result and state do not depend, in the compiled implementation not in a single
    bit, on the other rows.

    Args:
        zxbcdt: [n, h p + W + h] floating point, the parts z, x, B, C and dt; W = h p + 2 g N.
        conv_state: [S, W, K - 1], the last inputs of the convolution, the oldest first.
        ssm_state: [S, h, p, N] float32.
        slots: [n] int64, the slot of each row.
        weights: of the mixer.
        backend: demand an implementation; see `nemocascade_kernels.backends`.

    Returns:
        [n, h p], zxbcdt's dtype.

    Raises:
        ValueError: a shape or dtype is wrong; the message names all that are.
        BackendRefusedError: the demanded implementation cannot take the call.
    """
    _check(zxbcdt, conv_state, ssm_state, slots, weights)
    module = OP.choose(zxbcdt, conv_state, weights.conv_weight, slots, backend=backend)
    out: Tensor = module.mamba_step(zxbcdt, conv_state, ssm_state, slots, weights)
    return out


def _check(
    zxbcdt: Tensor, conv_state: Tensor, ssm_state: Tensor, slots: Tensor, w: MambaWeights
) -> None:
    _, heads, head_dim, state = ssm_state.shape
    inner = heads * head_dim
    width = inner + 2 * w.groups * state
    rows, count = zxbcdt.shape[0], ssm_state.shape[0]
    k = w.conv_weight.shape[-1]
    # Shapes as tuples: this runs for every layer and token.
    if (
        zxbcdt.shape == (rows, inner + width + heads)
        and conv_state.shape == (count, width, k - 1)
        and slots.shape == (rows,)
        and w.conv_weight.shape == (width, k)
        and w.norm_weight.shape == (inner,)
        and ssm_state.dtype == torch.float32
        and slots.dtype == torch.int64
    ):
        return
    faults = [
        f"{name} is {list(t.shape)}, not {list(shape)}"
        for name, t, shape in (
            ("zxbcdt", zxbcdt, (rows, inner + width + heads)),
            ("conv_state", conv_state, (count, width, k - 1)),
            ("slots", slots, (rows,)),
            ("conv_weight", w.conv_weight, (width, k)),
            ("norm_weight", w.norm_weight, (inner,)),
        )
        if tuple(t.shape) != tuple(shape)
    ]
    if ssm_state.dtype != torch.float32:
        faults.append(f"ssm_state is {ssm_state.dtype}, not torch.float32")
    if slots.dtype != torch.int64:
        faults.append(f"slots are {slots.dtype}, not torch.int64")
    raise ValueError(f"mamba_step with states {list(ssm_state.shape)}: " + "; ".join(faults))
