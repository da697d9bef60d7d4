"""The public kernels at the shapes of the models they are for, strictly: no call may wait.

The launches that these calls make are the list of `nemocascade_kernels.compile`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from nemocascade_kernels import (
    Grpo,
    Mopd,
    Nll,
    Routing,
    grouped_gemm,
    linear_logprob,
    linear_policy_loss,
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
}
"""Experts, experts a token, hidden size, expert width, activation."""
ROUTERS: dict[str, dict[str, Any]] = {
    "nemotron": {"experts": 128, "top_k": 6},
    "qwen3": {"experts": 128, "top_k": 8, "score": "softmax"},
    "groups": {"experts": 256, "top_k": 8, "num_groups": 8, "top_groups": 4},
    "512": {"experts": 512, "top_k": 10},
}


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
    yield "mopd_advantage", "", lambda: mopd_advantage(_row(), _row(), _row())
    yield (
        "mopd_advantage",
        "metrics",
        lambda: mopd_advantage_metrics(_row(), _row(), _row(), _row()),
    )
    for label, router in ROUTERS.items():
        yield "moe_router", label, partial(_route, **router)
    for label, model in MODELS.items():
        yield "moe_experts", label, partial(_experts, *model)


def _row() -> Tensor:
    return torch.empty(TOKENS, device="cuda")


def _normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda", requires_grad=True)


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
