"""The decode operators in C++ for the CPU (csrc/decode_step/), in float32, batch-invariant."""

from __future__ import annotations

import torch
from torch import Tensor

from nemocascade_kernels import native
from nemocascade_kernels.common.activations import activate
from nemocascade_kernels.common.routing import RouterSettings
from nemocascade_kernels.decode_step.reference import mixture, norm_route
from nemocascade_kernels.decode_step.sampling import SampleSettings, sampled
from nemocascade_kernels.decode_step.weights import MambaWeights

__all__ = [
    "attention",
    "draw",
    "experts",
    "linear",
    "mamba",
    "mixture",
    "norm",
    "norm_route",
    "route",
    "sample",
    "up",
]

FUSED = False


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `op.step_norm`."""
    out: Tensor = native.op("step_norm")(x.contiguous(), weight, eps)
    return out


def linear(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
    """See `op.step_linear`."""
    out: Tensor = native.op("step_linear")(x.contiguous(), weight, residual)
    return out


def up(x: Tensor, weight: Tensor, swiglu: bool) -> Tensor:
    """See `steps.Steps.up`."""
    return activate(linear(x, weight, None), "swiglu" if swiglu else "relu2")


def route(
    logits: Tensor, bias: Tensor | None, real: int, settings: RouterSettings
) -> tuple[Tensor, Tensor]:
    """See `op.step_route`."""
    chosen = torch.empty(logits.shape[0], settings.top_k, dtype=torch.int32)
    weights = torch.empty(chosen.shape)
    native.op("step_route")(
        logits,
        bias,
        real,
        settings.score == "softmax",
        settings.top_k,
        settings.num_groups,
        settings.top_groups,
        settings.normalize,
        settings.scale,
        chosen,
        weights,
    )
    return chosen, weights


def experts(
    x: Tensor, chosen: Tensor, weights: Tensor, w_up: Tensor, w_down: Tensor, swiglu: bool
) -> Tensor:
    """See `op.step_experts`."""
    out: Tensor = native.op("step_experts")(x.contiguous(), chosen, weights, w_up, w_down, swiglu)
    return out


def mamba(
    zxbcdt: Tensor, conv_state: Tensor, ssm_state: Tensor, slots: Tensor, w: MambaWeights
) -> Tensor:
    """See `op.step_mamba`."""
    out: Tensor = native.op("step_mamba")(
        zxbcdt.contiguous(),
        conv_state,
        ssm_state,
        slots,
        w.conv_weight,
        w.conv_bias,
        w.dt_bias,
        w.A,
        w.D,
        w.norm_weight,
        w.groups,
        *w.dt_limit,
        w.eps,
    )
    return out


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    slots: Tensor,
    positions: Tensor,
    longest: int,
) -> Tensor:
    """See `op.step_attention`."""
    del longest  # The host reads the positions.
    out: Tensor = native.op("step_attention")(
        q.contiguous(), k.contiguous(), v.contiguous(), keys, values, table, slots, positions
    )
    return out


def draw(
    logits: Tensor, u: Tensor | None, temperature: float, limit: int, allowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `op.step_draw`."""
    tokens = torch.empty(logits.shape[0], dtype=torch.int64)
    logprobs = torch.empty(logits.shape[0])
    native.op("step_draw")(
        logits.contiguous(), u, 1.0 / temperature, limit, allowed, tokens, logprobs
    )
    return tokens, logprobs


def sample(
    logits: Tensor, keys: Tensor, positions: Tensor, settings: SampleSettings
) -> tuple[Tensor, Tensor]:
    """See `steps.Steps.sample`."""
    return sampled(draw, logits, keys, positions, settings)
