"""Calls of the ops that `predict.py` plays, with inputs of the device that is played."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from nemocascade_kernels import (
    MambaWeights,
    Nll,
    PackedSeq,
    RouterSettings,
    SampleSettings,
    SharedExpert,
    decode_steps,
    linear_distill_loss,
    linear_logprob,
    linear_policy_loss,
    mamba2,
    moe_experts,
    moe_route,
    mopd_advantage_metrics,
)
from torch import Tensor

from benchmarks.kernels.bench_mopd_advantage import chain
from benchmarks.kernels.moe_rows import Problem, grouped_mm

BF16, FP32 = torch.bfloat16, torch.float32
Mark = Callable[[Literal["ready", "backward"]], None]
"""A call marks when its inputs exist, and where its backward starts."""
#: Nemotron-3-Nano.
HIDDEN, MIXER = 2688, (64, 64, 8, 128)
EXPERTS, TOP_K, WIDTH, SHARED_WIDTH = 128, 6, 1856, 3712
TOKENS, VOCABULARY = 262_144, 131_072
#: A decode step: its rows, and the cached tokens of each.
SLOTS, CACHED, BLOCK = 64, 32_768, 64


def empty(*shape: int, dtype: torch.dtype = BF16, grad: bool = False) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda", requires_grad=grad)


def with_main_grad(weight: Tensor) -> Tensor:
    weight.main_grad = torch.empty_like(weight, dtype=FP32)  # type: ignore[attr-defined]
    return weight


def head(tokens: int, hidden: int, vocabulary: int, trained: int | None, mark: Mark) -> None:
    """linear_policy_loss into main_grad. trained: rows that train; None: linear_logprob alone."""
    x, weight = empty(tokens, hidden, grad=True), empty(vocabulary, hidden, grad=True)
    target = empty(tokens, dtype=torch.int64)
    if trained is None:
        mark("ready")
        with torch.no_grad():
            linear_logprob(x, weight, target)
        return
    weights = empty(tokens, dtype=FP32)
    with_main_grad(weight)
    mark("ready")
    out = linear_policy_loss(
        x, weight, target, Nll(weights), active_rows=trained, accumulate_main_grad=True
    )
    out.loss.backward()


def distill(tokens: int, hidden: int, vocabulary: int, mark: Mark) -> None:
    """linear_distill_loss of two heads into main_grad."""
    x, weight = empty(tokens, hidden, grad=True), empty(vocabulary, hidden, grad=True)
    states, teacher = empty(tokens, hidden), empty(vocabulary, hidden)
    weights = empty(tokens, dtype=FP32)
    with_main_grad(weight)
    mark("ready")
    out = linear_distill_loss(
        x, weight, states, teacher, weights, divergence="reverse_kl", accumulate_main_grad=True
    )
    out.loss.backward()


def router(tokens: int, experts: int, top_k: int, mark: Mark) -> None:
    logits, bias = empty(tokens, experts, dtype=FP32), empty(experts, dtype=FP32)
    with torch.no_grad():
        # The first call of a stream makes the counters that all others share.
        moe_route(logits, top_k, expert_bias=bias)
        mark("ready")
        moe_route(logits, top_k, expert_bias=bias, scale=2.5)


def experts(
    tokens: int, count: int, top_k: int, hidden: int, width: int, activation: str, peer: bool,
    mark: Mark,
) -> None:  # fmt: skip
    """moe_experts into main_grad; peer: torch's grouped products with an activation between."""
    with torch.no_grad():
        routing = moe_route(empty(tokens, count, dtype=FP32), top_k)
    up = empty(count, width * (2 if activation == "swiglu" else 1), hidden, grad=True)
    down, x = empty(count, hidden, width, grad=True), empty(tokens, hidden, grad=True)
    for weight in () if peer else (up, down):
        with_main_grad(weight)
    upstream = empty(tokens, hidden)
    mark("ready")
    if peer:
        device = torch.device("cuda")
        sizes = tokens, hidden, count, top_k, width, activation, BF16, device
        y = grouped_mm(Problem("peer", *sizes))(x, routing, up, down)
    else:
        y = moe_experts(x, routing, up, down, activation=activation, accumulate_main_grad=True)
    mark("backward")
    y.backward(upstream)


def mopd(tokens: int, peer: bool, mark: Mark) -> None:
    if peer:
        call = chain(tokens, torch.device("cuda"))
        mark("ready")
        call()
    else:
        mopd_advantage_metrics(*(empty(tokens, dtype=FP32) for _ in range(4)))


def mixer(tokens: int, mark: Mark) -> None:
    """Mamba-2's mixer between its projections, of eight documents."""
    heads, dim, groups, state = MIXER
    inner, channels = heads * dim, heads * dim + 2 * groups * state
    ends = list(range(0, tokens + 1, tokens // 8))
    packed = PackedSeq.from_cu_seqlens(ends, "cuda")
    dt_bias, a, d = (empty(heads, dtype=FP32, grad=True) for _ in range(3))
    zxbcdt = empty(tokens, inner + channels + heads, grad=True)
    conv, bias = empty(channels, 4, grad=True), empty(channels, grad=True)
    norm, upstream = empty(inner, grad=True), empty(tokens, inner)
    mark("ready")
    out, _ = mamba2(
        zxbcdt, conv, bias, dt_bias, a, d, norm, packed,
        heads=heads, head_dim=dim, groups=groups, state=state,
    )  # fmt: skip
    mark("backward")
    out.backward(upstream)


def decode_attention(heads: int, kv_heads: int, dim: int, mark: Mark) -> None:
    blocks = CACHED // BLOCK
    keys, values = (empty(SLOTS * blocks, kv_heads, BLOCK, dim) for _ in range(2))
    slots, positions = (empty(SLOTS, dtype=torch.int64) for _ in range(2))
    qkv = empty(SLOTS, kv_heads, heads // kv_heads + 2, dim)
    q, k, v = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
    table, steps = empty(SLOTS, blocks, dtype=torch.int32), decode_steps(keys)
    mark("ready")
    steps.attention(q, k, v, keys, values, table, slots, positions, CACHED)


def decode_mixer(mark: Mark) -> None:
    heads, dim, groups, state = MIXER
    inner, channels = heads * dim, heads * dim + 2 * groups * state
    dt_bias, a, d = (empty(heads, dtype=FP32) for _ in range(3))
    weights = MambaWeights(
        empty(channels, 4), empty(channels), dt_bias, a, d, empty(inner), groups,
        (0.0, float("inf")), 1e-5,
    )  # fmt: skip
    zxbcdt, conv = empty(SLOTS, inner + channels + heads), empty(SLOTS, 3, channels)
    ssm, slots = empty(SLOTS, heads, dim, state, dtype=FP32), empty(SLOTS, dtype=torch.int64)
    steps = decode_steps(weights.conv_weight)
    mark("ready")
    steps.mamba(zxbcdt, conv, ssm, slots, weights)


def decode_mixture(mark: Mark) -> None:
    """The norm with the router is the forward; the experts with the shared one the backward."""
    x, scale, gate = empty(SLOTS, HIDDEN), empty(HIDDEN), empty(EXPERTS, HIDDEN)
    bias, slots, steps = empty(EXPERTS, dtype=FP32), empty(SLOTS, dtype=torch.int64), None
    up, down = empty(EXPERTS, WIDTH, HIDDEN), empty(EXPERTS, HIDDEN, WIDTH)
    first, last = empty(SHARED_WIDTH, HIDDEN), empty(HIDDEN, SHARED_WIDTH)
    settings, steps = RouterSettings(TOP_K, "sigmoid", 1, 1, True, 2.5), decode_steps(x)
    mark("ready")
    routed = steps.norm_route(x, scale, 1e-5, gate, bias, slots, SLOTS, settings)
    mark("backward")
    steps.mixture(routed, up, down, 0, SharedExpert(first, last, 0, SLOTS), x, False)


def decode_sample(mark: Mark) -> None:
    settings = SampleSettings(1.0, VOCABULARY, top_k=50, top_p=0.95, truncated_logprobs=True)
    logits = empty(SLOTS, VOCABULARY)
    keys, positions = (empty(SLOTS, dtype=torch.int64) for _ in range(2))
    steps: Any = decode_steps(logits)
    mark("ready")
    steps.sample(logits, keys, positions, settings)
