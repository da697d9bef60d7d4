"""The definitions of the decode operators, in plain torch. See `op` for shapes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nemocascade_kernels.common.activations import activate
from nemocascade_kernels.common.routing import RouterSettings, choose_experts
from nemocascade_kernels.decode_step.routed_rows import RoutedRows, SharedExpert
from nemocascade_kernels.decode_step.sampling import SampleSettings, sampled
from nemocascade_kernels.decode_step.weights import MambaWeights

FUSED = False

# Probabilities are first summed in segments of this many.
_SEGMENT = 128
_MARGIN = 2.0**-40


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `op.step_norm`."""
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def linear(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
    """See `op.step_linear`."""
    y = F.linear(x, weight)
    return y if residual is None else residual + y


def route(
    logits: Tensor, bias: Tensor | None, real: int, settings: RouterSettings
) -> tuple[Tensor, Tensor]:
    """See `op.step_route`."""
    mask = torch.arange(logits.shape[0], device=logits.device) < real
    weights, chosen = choose_experts(logits, bias, mask, None, settings)
    return chosen.int(), weights


def experts(
    x: Tensor, chosen: Tensor, weights: Tensor, w_up: Tensor, w_down: Tensor, swiglu: bool
) -> Tensor:
    """See `op.step_experts`: all experts run on all tokens, and the chosen ones are summed."""
    h = torch.einsum("th,eih->tei", x, w_up)
    y = torch.einsum("tei,ehi->teh", activate(h, "swiglu" if swiglu else "relu2"), w_down)
    share = torch.zeros(x.shape[0], w_up.shape[0] + 1, dtype=weights.dtype, device=x.device)
    share.scatter_add_(1, chosen.long(), weights)
    return torch.einsum("te,teh->th", share[:, :-1].to(y.dtype), y)


def up(x: Tensor, weight: Tensor, swiglu: bool) -> Tensor:
    """See `steps.Steps.up`."""
    return activate(F.linear(x, weight), "swiglu" if swiglu else "relu2")


def norm_route(
    hidden: Tensor,
    norm_weight: Tensor,
    eps: float,
    router: Tensor,
    bias: Tensor | None,
    slots: Tensor | None,
    spare: int,
    settings: RouterSettings,
) -> RoutedRows:
    """See `steps.Steps.norm_route`."""
    x = norm(hidden, norm_weight, eps)
    high = torch.promote_types(x.dtype, torch.float32)
    logits = F.linear(x.to(high), router.to(high))
    mask = None if slots is None else slots != spare
    weights, chosen = choose_experts(logits, bias, mask, None, settings)
    out = RoutedRows.empty(x.shape[0], x.shape[1], x.dtype, settings.top_k, x.device)
    out.x.copy_(x)
    out.chosen.copy_(chosen)
    out.weights.copy_(weights)
    return out


def mixture(
    routed: RoutedRows,
    w_up: Tensor,
    w_down: Tensor,
    first_expert: int,
    shared: SharedExpert | None,
    residual: Tensor | None,
    swiglu: bool,
) -> Tensor:
    """See `steps.Steps.mixture`."""
    high = torch.promote_types(routed.dtype, torch.float32)
    x, count = routed.x.to(high), w_up.shape[0]
    local = routed.chosen - first_expert
    row = torch.arange(x.shape[0], device=x.device)[:, None] - routed.first
    is_mine = (local >= 0) & (local < count) & (row >= 0) & (row < routed.count)
    local, weights = local.where(is_mine, count), routed.weights.where(is_mine, 0).to(high)
    y = experts(x, local, weights, w_up.to(high), w_down.to(high), swiglu)
    if shared is not None:
        rows = slice(shared.first, shared.first + shared.rows)
        y[rows] += F.linear(up(x[rows], shared.up.to(high), swiglu), shared.down.to(high))
    return y if residual is None else (residual + y).to(residual.dtype)


def mamba(
    zxbcdt: Tensor, conv_state: Tensor, ssm_state: Tensor, slots: Tensor, w: MambaWeights
) -> Tensor:
    """See `op.step_mamba`."""
    high = torch.promote_types(zxbcdt.dtype, torch.float32)
    heads, head_dim, state = ssm_state.shape[1:]
    inner, shared = heads * head_dim, w.groups * state
    z, xbc, dt = zxbcdt.to(high).split([inner, inner + 2 * shared, heads], dim=1)

    window = torch.cat([conv_state[slots], xbc[:, None].to(conv_state.dtype)], dim=1)
    conv_state[slots] = window[:, 1:]
    mixed = F.silu((window.to(high) * w.conv_weight.t().to(high)).sum(1) + w.conv_bias.to(high))
    x, b, c = mixed.split([inner, shared, shared], dim=1)

    step = F.softplus(dt + w.dt_bias).clamp(*w.dt_limit)
    ratio = heads // w.groups
    x = x.reshape(-1, heads, head_dim)
    b = b.reshape(-1, w.groups, 1, state).repeat_interleave(ratio, 1)
    c = c.reshape(-1, w.groups, state, 1).repeat_interleave(ratio, 1)
    decay = torch.exp(step * w.A)[:, :, None, None]
    now = ssm_state[slots] * decay + (step[:, :, None] * x)[..., None] * b
    ssm_state[slots] = now.to(ssm_state.dtype)
    y = (now @ c).squeeze(3) + w.D[:, None] * x

    u = (y.flatten(1) * F.silu(z)).view(-1, w.groups, inner // w.groups)
    u = u * torch.rsqrt(u.square().mean(2, keepdim=True) + w.eps)
    return (u.flatten(1) * w.norm_weight.to(high)).to(zxbcdt.dtype)


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
    high = torch.promote_types(q.dtype, torch.float32)
    rows, heads, dim = q.shape
    kv_heads, size = keys.shape[1:3]
    blocks = table.index_select(0, slots).long()
    here = blocks.gather(1, (positions // size)[:, None]).squeeze(1)
    for cache, new in ((keys, k), (values, v)):
        cache[here, :, positions % size] = new.to(cache.dtype)
    used = blocks[:, : -(-longest // size)]
    past_k, past_v = (
        cache[used].transpose(1, 2).flatten(2, 3)[:, :, :longest].to(high)
        for cache in (keys, values)
    )
    grouped = q.to(high).view(rows, kv_heads, heads // kv_heads, dim)
    scores = torch.matmul(grouped, past_k.transpose(2, 3)) * dim**-0.5
    ahead = torch.arange(longest, device=q.device) > positions[:, None]
    weights = scores.masked_fill_(ahead[:, None, None], float("-inf")).softmax(3)
    # Unwritten cache memory may hold any value, and 0 * NaN is NaN.
    past_v = past_v.masked_fill(ahead[:, None, :, None], 0)
    return torch.matmul(weights, past_v).view(rows, heads, dim).to(q.dtype)


def draw(
    logits: Tensor, u: Tensor | None, temperature: float, limit: int, allowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `op.step_draw`."""
    high = torch.promote_types(logits.dtype, torch.float32)
    logprobs = torch.log_softmax(logits.to(high) / temperature, dim=1)
    drawn = logprobs[:, :limit]
    if allowed is not None:
        drawn = drawn.masked_fill(~allowed[:, :limit], float("-inf"))
    tokens = drawn.argmax(1) if u is None else _invert(drawn.exp(), u)
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)


def sample(
    logits: Tensor, keys: Tensor, positions: Tensor, settings: SampleSettings
) -> tuple[Tensor, Tensor]:
    """See `steps.Steps.sample`."""
    return sampled(draw, logits, keys, positions, settings)


def _invert(weights: Tensor, u: Tensor) -> Tensor:
    """The first id [n] at which the sum of weights [n, V] exceeds u times their total.

    It has two levels, because the sums of segments are cheaper than all partial sums.
    """
    rows, width = weights.shape
    segments = F.pad(weights, (0, -width % _SEGMENT)).view(rows, -1, _SEGMENT)
    sums = segments.sum(2, dtype=torch.float64).cumsum(1)
    # Below the total in spite of rounding, so that a weight above zero is found.
    target = u[:, None] * sums[:, -1:] * (1 - _MARGIN)
    at = _first_above(sums, target)
    before = torch.where(at > 0, sums.gather(1, (at - 1).clamp_(min=0)), 0.0)
    inside = segments.gather(1, at[:, :, None].expand(-1, -1, _SEGMENT)).squeeze(1)
    partial = inside.cumsum(1, dtype=torch.float64)
    target = torch.minimum(target - before, partial[:, -1:] * (1 - _MARGIN))
    # Weights that are not finite give any id; the caller sees it by the log-probability.
    return (at * _SEGMENT + _first_above(partial, target)).squeeze(1).clamp_(max=width - 1)


def _first_above(sums: Tensor, target: Tensor) -> Tensor:
    """The first index [n, 1] at which increasing sums [n, m] exceed target [n, 1]."""
    return torch.searchsorted(sums, target, right=True).clamp_(max=sums.shape[1] - 1)
