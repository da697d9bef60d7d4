"""The public kernels at the shapes of the models they are for, strictly: no call may wait.

The launches that these calls make are the list of `nemocascade_kernels.compile`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from nemocascade_kernels import (
    DIVERGENCES,
    Divergence,
    Grpo,
    MambaWeights,
    Mopd,
    Nll,
    PackedSeq,
    RouterSettings,
    Routing,
    SampleSettings,
    SharedExpert,
    decode_steps,
    grouped_gemm,
    linear_distill_loss,
    linear_logprob,
    linear_policy_loss,
    mamba2,
    moe_experts,
    moe_permute,
    moe_route,
    moe_unpermute,
    mopd_advantage,
    mopd_advantage_metrics,
)
from torch import Tensor

Call = tuple[str, str, Callable[[], object]]
"""Name of the op, a label, and what to call."""

TOKENS, HIDDEN, VOCABULARY = 8192, 4096, 131_072
BF16, FP32 = torch.bfloat16, torch.float32
MODELS = {
    "nemotron": (128, 6, 2688, 1856, "relu2"),
    "qwen3": (128, 8, 2048, 768, "swiglu"),
    "mixtral": (8, 2, 4096, 14_336, "swiglu"),
    "arrivals": (16, 1, 2688, 1856, "relu2"),
}
"""Experts, experts a token, hidden size, expert width, activation. arrivals: rows that a rank of
nemotron's expert parallelism receives."""
ROUTERS: dict[str, dict[str, Any]] = {
    "nemotron": {"experts": 128, "top_k": 6},
    "qwen3": {"experts": 128, "top_k": 8, "score": "softmax"},
    "groups": {"experts": 256, "top_k": 8, "num_groups": 8, "top_groups": 4},
    "512": {"experts": 512, "top_k": 10},
}
ATTENTION = {"nemotron": (32, 2, 128), "nemotron,tp2": (16, 1, 128), "qwen3": (32, 4, 128)}
"""Query heads, key/value heads, their dimension."""
MIXER_SHARDS = ((2, False), (4, False), (8, False), (8, True))
"""Tensor-parallel sizes of nemotron's mixer, and whether documents have initial states. At 8, rows
of zxbcdt have 1288 elements, which 16 does not divide."""
DECODED_MIXERS = {"nemotron": (64, 64, 8, 128), "nemotron,tp2": (32, 64, 4, 128)}
"""Heads, their dimension, groups, state."""
SAMPLES = {
    "greedy": SampleSettings(0.0, VOCABULARY),
    "all": SampleSettings(1.0, VOCABULARY),
    "top_k": SampleSettings(1.0, VOCABULARY, top_k=50, top_p=0.95, truncated_logprobs=True),
    "top_p": SampleSettings(1.0, VOCABULARY, top_p=0.95),
}
SHARED_WIDTHS = {"nemotron": 3712}
SLOTS, CACHED, BLOCK = 64, 32_768, 64
"""Rows of a decode step, cached tokens of each, tokens of a block."""


def calls() -> Iterator[Call]:
    """Every call, on the current device "cuda"."""
    for dtype in (BF16, torch.float16, FP32):
        name = str(dtype).removeprefix("torch.")
        for entropy in (False, True):
            label = name + (",entropy" if entropy else "")
            yield (
                "linear_logprob",
                label,
                partial(_logprob, dtype, entropy),
            )
            yield (
                "linear_policy_loss",
                label,
                partial(_policy_loss, dtype, entropy),
            )
        for kind in DIVERGENCES:
            yield "linear_distill_loss", f"{name},{kind}", partial(_distill_loss, dtype, kind)
    yield "mopd_advantage", "", lambda: mopd_advantage(_row(), _row(), _row())
    yield (
        "mopd_advantage",
        "metrics",
        lambda: mopd_advantage_metrics(_row(), _row(), _row(), _row()),
    )
    for dtype in (BF16, torch.float16, FP32):
        for states in (False, True):
            label = str(dtype).removeprefix("torch.") + (",states" if states else "")
            yield "mamba2", label, partial(_mixer, dtype, states, 1)
    for tp, states in MIXER_SHARDS:
        label = f"bfloat16,tp{tp}" + (",states" if states else "")
        yield "mamba2", label, partial(_mixer, BF16, states, tp)
    for label, router in ROUTERS.items():
        yield "moe_router", label, partial(_route, **router)
    for label, model in MODELS.items():
        yield "moe_experts", label, partial(_experts, *model)
        if torch.cuda.get_device_capability()[0] == 9:
            yield "moe_experts_fp8", label, partial(_fp8_experts, *model)
    for label, heads in ATTENTION.items():
        for dtype in (BF16, FP32):
            name = f"{label},{str(dtype).removeprefix('torch.')}"
            yield "decode_step", name, partial(_decode_attention, *heads, dtype)
    for dtype in (BF16, FP32):
        name = str(dtype).removeprefix("torch.")
        for label, settings in SAMPLES.items():
            yield "decode_step", f"sample {label},{name}", partial(_sample, settings, dtype)
        for label, mixer in DECODED_MIXERS.items():
            yield "decode_step", f"{label},{name}", partial(_decode_mixer, *mixer, dtype)
        for label, model in MODELS.items():
            for rows in (1, SLOTS):
                call = partial(_decode_mixture, *model, label, rows, dtype)
                yield "decode_step", f"{label},{rows} rows,{name}", call


def _row() -> Tensor:
    return torch.empty(TOKENS, device="cuda")


def _normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda", requires_grad=True)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def _with_main_grad(weight: Tensor) -> Any:
    weight.main_grad = torch.empty(weight.shape, device="cuda")  # type: ignore[attr-defined]
    return weight


def _targets() -> Tensor:
    return torch.empty(TOKENS, dtype=torch.int64, device="cuda")


def _logprob(dtype: torch.dtype, entropy: bool) -> None:
    hidden, weight = _normal(TOKENS, HIDDEN, dtype=dtype), _normal(VOCABULARY, HIDDEN, dtype=dtype)
    out = linear_logprob(hidden, weight, _targets(), return_entropy=entropy)
    total = out.logprob.sum()
    if out.entropy is not None:
        total = total + out.entropy.sum()
    total.backward()


def _policy_loss(dtype: torch.dtype, entropy: bool) -> None:
    for objective in (
        Nll(_row()),
        Grpo(_row(), _row()),
        Grpo(_row(), _row(), _row(), 0.1),
        Mopd(_row(), _row(), _row()),
    ):
        hidden = _normal(TOKENS, HIDDEN, dtype=dtype)
        weight = _with_main_grad(_normal(VOCABULARY, HIDDEN, dtype=dtype))
        out = linear_policy_loss(
            hidden,
            weight,
            _targets(),
            objective,
            return_entropy=entropy,
            active_rows=TOKENS // 4,
            accumulate_main_grad=True,
        )
        out.loss.backward()
        with torch.no_grad():
            linear_policy_loss(hidden, weight, _targets(), objective, return_entropy=entropy)


def _distill_loss(dtype: torch.dtype, kind: Divergence) -> None:
    from nemocascade_kernels.linear_distill_loss import triton as rows
    from nemocascade_kernels.linear_distill_loss.statistics import finish

    hidden = _normal(TOKENS, HIDDEN, dtype=dtype)
    weight = _with_main_grad(_normal(VOCABULARY, HIDDEN, dtype=dtype))
    states = _normal(TOKENS // 4, HIDDEN, dtype=dtype)
    for trains in (True, False):
        with torch.set_grad_enabled(trains):
            out = linear_distill_loss(
                hidden,
                weight,
                states,
                weight.detach(),
                _row(),
                divergence=kind,
                target=_targets(),
                active_rows=TOKENS // 4,
                accumulate_main_grad=trains,
            )
        if trains:
            out.loss.backward()
    # The kernels of a vocabulary's shard.
    logits, teacher = (_normal(1024, VOCABULARY // 8, dtype=dtype).detach() for _ in range(2))
    result = finish(rows.statistics(logits, teacher, 1.0, kind), kind)
    if kind == "jensen_shannon":
        rows.mixture_parts(logits, teacher, 1.0, result.lse, result.teacher_lse)
    rows.gradient_(logits, teacher, 1.0, result, _row()[:1024], kind)


def _mixer(dtype: torch.dtype, states: bool, tp: int) -> None:
    heads, dim, groups, state, window = 64 // tp, 64, 8 // tp, 128, 4
    inner, channels = heads * dim, heads * dim + 2 * groups * state
    packed = PackedSeq.from_cu_seqlens([0, TOKENS // 2, TOKENS], "cuda")
    initial = None
    if states:
        conv = _normal(1, window - 1, channels, dtype=dtype)
        initial = conv, _normal(1, heads, dim, state, dtype=FP32)
    dt_bias, a, d = (_normal(heads, dtype=FP32) for _ in range(3))
    out, final = mamba2(
        _normal(TOKENS, inner + channels + heads, dtype=dtype),
        _normal(channels, window, dtype=dtype),
        _normal(channels, dtype=dtype),
        dt_bias,
        a,
        d,
        _normal(inner, dtype=dtype),
        packed,
        heads=heads,
        head_dim=dim,
        groups=groups,
        state=state,
        initial_state=initial,
        state_documents=[1] if states else None,
        return_final_state=states,
    )
    total = out.sum()
    if final is not None:
        total = total + final[1].sum()
    total.backward()


def _route(experts: int, top_k: int, **settings: Any) -> None:
    logits = _normal(TOKENS, experts, dtype=FP32)
    mask = torch.empty(TOKENS, dtype=torch.bool, device="cuda")
    bias = torch.empty(experts, device="cuda")
    for given in (None, torch.empty(TOKENS, top_k, dtype=torch.int32, device="cuda")):
        routing = moe_route(
            logits, top_k, expert_bias=bias, token_mask=mask, experts=given, scale=2.5, **settings
        )
        routing.weights.sum().backward()


def _experts(experts: int, top_k: int, hidden: int, width: int, activation: str) -> None:
    def route() -> Routing:
        return moe_route(_normal(TOKENS, experts, dtype=FP32), top_k)

    routing = route()
    x = _normal(TOKENS, hidden)
    up = _with_main_grad(_normal(experts, width * (2 if activation == "swiglu" else 1), hidden))
    down = _with_main_grad(_normal(experts, hidden, width))
    y = moe_experts(x, routing, up, down, activation=activation, accumulate_main_grad=True)
    y.backward(torch.empty_like(y))
    with torch.no_grad():
        moe_experts(x, routing, up, down, activation=activation)
    routing = route()
    rows = moe_permute(x, routing)
    grouped = grouped_gemm(rows, up, routing.offsets, accumulate_main_grad=True)
    grouped.backward(torch.empty_like(grouped))
    y = moe_unpermute(moe_permute(x, routing), routing)
    y.backward(torch.empty_like(y))


def _fp8_experts(experts: int, top_k: int, hidden: int, width: int, activation: str) -> None:
    x = _normal(TOKENS, hidden)
    shapes = (
        (experts, width * (2 if activation == "swiglu" else 1), hidden),
        (experts, hidden, width),
    )
    for with_main_grad in (True, False):
        routing = moe_route(_normal(TOKENS, experts, dtype=FP32), top_k)
        weights = [_normal(*shape) for shape in shapes]
        if with_main_grad:
            weights = [_with_main_grad(weight) for weight in weights]
        settings: Any = {"activation": activation, "fp8": True}
        y = moe_experts(x, routing, *weights, accumulate_main_grad=with_main_grad, **settings)
        y.backward(torch.empty_like(y))
    with torch.no_grad():
        moe_experts(x, routing, *weights, **settings)


def _decode_attention(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    empty = partial(_empty, dtype=dtype)
    blocks = CACHED // BLOCK
    keys, values = (empty(SLOTS * blocks + 1, kv_heads, BLOCK, dim) for _ in range(2))
    slots, positions = (empty(SLOTS, dtype=torch.int64) for _ in range(2))
    # Parts of one product.
    qkv = empty(SLOTS, kv_heads, heads // kv_heads + 2, dim)
    decode_steps(keys).attention(
        qkv[:, :, :-2],
        qkv[:, :, -2],
        qkv[:, :, -1],
        keys,
        values,
        empty(SLOTS + 2, blocks, dtype=torch.int32),
        slots,
        positions,
        CACHED,
    )


def _decode_mixer(heads: int, dim: int, groups: int, state: int, dtype: torch.dtype) -> None:
    inner, channels = heads * dim, heads * dim + 2 * groups * state
    dt_bias, a, d = (torch.empty(heads, device="cuda") for _ in range(3))
    weights = MambaWeights(
        _empty(channels, 4, dtype=dtype), _empty(channels, dtype=dtype), dt_bias, a, d,
        _empty(inner, dtype=dtype), groups, (0.0, float("inf")), 1e-5,
    )  # fmt: skip
    steps = decode_steps(weights.conv_weight)
    steps.mamba(
        _empty(SLOTS, inner + channels + heads, dtype=dtype),
        _empty(SLOTS + 1, 3, channels, dtype=dtype),
        _empty(SLOTS + 1, heads, dim, state, dtype=FP32),
        _empty(SLOTS, dtype=torch.int64),
        weights,
    )
    steps.norm(_empty(SLOTS, 2688, dtype=dtype), _empty(2688, dtype=dtype), 1e-5)


def _decode_mixture(
    experts: int,
    top_k: int,
    hidden: int,
    width: int,
    activation: str,
    model: str,
    rows: int,
    dtype: torch.dtype,
) -> None:
    x, scale, router = (
        _empty(*s, dtype=dtype) for s in ((rows, hidden), (hidden,), (experts, hidden))
    )
    gates, steps = 2 if activation == "swiglu" else 1, decode_steps(x)
    settings = RouterSettings(top_k, "sigmoid", 1, 1, True, 2.5)
    bias, slots = _empty(experts, dtype=FP32), _empty(rows, dtype=torch.int64)
    routed = steps.norm_route(x, scale, 1e-5, router, bias, slots, SLOTS, settings)
    up, down = (
        _empty(experts, gates * width, hidden, dtype=dtype),
        _empty(experts, hidden, width, dtype=dtype),
    )
    shared = None
    if inner := SHARED_WIDTHS.get(model):
        first, last = _empty(inner, hidden, dtype=dtype), _empty(hidden, inner, dtype=dtype)
        shared = SharedExpert(first, last, 0, rows)
        steps.up(x, first, False)
    # One rank, and one of several.
    for residual, part in ((x, experts), (None, experts // 8)):
        steps.mixture(routed, up[:part], down[:part], 0, shared, residual, gates == 2)


def _sample(settings: SampleSettings, dtype: torch.dtype) -> None:
    logits = _empty(SLOTS, VOCABULARY, dtype=dtype)
    keys, positions = (_empty(SLOTS, dtype=torch.int64) for _ in range(2))
    decode_steps(logits).sample(logits, keys, positions, settings)
