"""`moe_route` and `make_routing`: public functions, checks and the autograd function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemocascade_kernels.backends import HALF_AND_SINGLE, Op, takes
from nemocascade_kernels.common.routing import RouterSettings, Routing
from nemocascade_kernels.moe_router import cuda


def cuda_limitation(*tensors: Tensor) -> str | None:
    """Reason why the CUDA router is unavailable for a call, or None."""
    for tensor in tensors[:1]:
        if tensor.is_floating_point() and tensor.shape[-1] > cuda.MOST_EXPERTS:
            return f"it takes at most {cuda.MOST_EXPERTS} experts, and got {tensor.shape[-1]}"
    return takes(*HALF_AND_SINGLE, operators=("moe_route", "moe_route_gradient"))(*tensors)


_OPERATORS = ("moe_choose", "moe_sort_slots", "moe_choose_gradient")
OP = Op("moe_router")
OP.register("cuda", limit=cuda_limitation)
OP.register("triton", limit=takes(*HALF_AND_SINGLE))
OP.register("native", limit=takes(*HALF_AND_SINGLE, operators=_OPERATORS))
OP.register("reference")

_SCORES = ("sigmoid", "softmax")
#: Slots are numbered in int32.
_MOST_SLOTS = 2**31


def moe_route(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "sigmoid",
    expert_bias: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    normalize: bool = True,
    scale: float = 1.0,
    token_mask: Tensor | None = None,
    experts: Tensor | None = None,
    backend: str | None = None,
) -> Routing:
    """Choose K experts for every token and sort the choices by expert.

    With s = sigmoid(logits) or softmax(logits), in float32::

        experts_t = top K of (s_t + expert_bias)     within the best `top_groups` of `num_groups`
        weights_tk = scale * s_tk / (sum_j s_tj + 1e-20)      or scale * s_tk without `normalize`

    The bias is used only for the choice; weights come from the unbiased scores (DeepSeek-V3,
    arXiv 2412.19437, section 2.1.2; Nemotron 3 Nano, arXiv 2512.20848). The score of a group is the
    sum of its two best biased scores. Among equal scores the lower expert id comes first, in every
    implementation. There is no host synchronisation.

    Args:
        logits: [T, E] float32, bfloat16 or float16 (float64 in the reference).
        top_k: K, at most E, and at most the number of experts in `top_groups` groups.
        score: "sigmoid" or "softmax".
        expert_bias: [E], added to the scores for the choice; it gets no gradient.
        num_groups, top_groups: number of equal groups of experts, and maximum number of groups for
            a token.
        normalize: divide the K chosen scores by their sum.
        scale: factor on the weights.
        token_mask: [T] bool, False for a token (padding) without experts.
        experts: [T, K] integers: use these instead of choosing (router replay). E means no
            expert.
        backend: require an implementation; see `nemocascade_kernels.backends`.

    Returns:
        `Routing`. `weights` is differentiable with respect to `logits`.

    Raises:
        ValueError: a shape, dtype or setting is wrong; the message names all that are.
        BackendUnavailableError: the required implementation is unavailable for the call.
    """
    settings = RouterSettings(top_k, score, num_groups, top_groups, normalize, float(scale))
    _check(logits, expert_bias, token_mask, experts, settings)
    implementation = OP.choose(logits, backend=backend)
    if hasattr(implementation, "route"):
        routing: Routing = implementation.route(logits, expert_bias, token_mask, experts, settings)
        return routing
    return Routing(
        *_Route.apply(logits, expert_bias, token_mask, experts, settings, implementation)
    )


def make_routing(
    experts: Tensor, weights: Tensor, num_experts: int, *, backend: str | None = None
) -> Routing:
    """Sort given choices by expert, for rows whose experts are already known.

    A rank uses it for the rows that other ranks send: with K = 1, `moe_experts` then runs on the
    rows in their order of arrival.

    Args:
        experts: [T, K] integers below `num_experts`; `num_experts` itself means no expert. An id
            out of range raises on a CPU; on a GPU, where the host does not read it, it means no
            expert.
        weights: [T, K] float32; it must be 0 where there is no expert.
        num_experts: E.
        backend: as for `moe_route`.

    Raises:
        ValueError: a shape or dtype is wrong.
    """
    if experts.ndim != 2 or experts.shape != weights.shape:
        raise ValueError(
            f"experts {list(experts.shape)} and weights {list(weights.shape)} must both be [T, K]"
        )
    if experts.is_floating_point():
        raise ValueError(f"experts must be integers, and are {experts.dtype}")
    if experts.numel() >= _MOST_SLOTS:
        raise ValueError(f"make_routing: {_too_many(experts.numel())}")
    implementation = OP.choose(experts, backend=backend)
    narrow = experts.to(torch.int32)
    return Routing(weights, narrow, *implementation.sort_slots(narrow, num_experts))


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        expert_bias: Tensor | None,
        token_mask: Tensor | None,
        experts: Tensor | None,
        settings: RouterSettings,
        implementation: Any,
    ) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = implementation.forward(
            logits, expert_bias, token_mask, experts, settings
        )
        ctx.save_for_backward(logits, outputs[1])
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.settings = settings
        ctx.implementation = implementation
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, experts = ctx.saved_tensors
        grad = ctx.implementation.backward(grads[0], logits, experts, ctx.settings)
        return grad, None, None, None, None, None


def _too_many(slots: int) -> str:
    return f"{slots} slots (tokens x top_k) must be below 2^31: route fewer tokens at once"


def _check(
    logits: Tensor,
    expert_bias: Tensor | None,
    token_mask: Tensor | None,
    experts: Tensor | None,
    settings: RouterSettings,
) -> None:
    if logits.ndim != 2:
        raise ValueError(f"logits must be [T, E], and have shape {list(logits.shape)}")
    tokens, count = logits.shape
    faults = []
    if not logits.is_floating_point():
        faults.append(f"logits must be floating point, and are {logits.dtype}")
    if settings.score not in _SCORES:
        faults.append(f"score={settings.score!r}: choose one of {_SCORES}")
    if settings.num_groups < 1 or count % settings.num_groups:
        faults.append(f"num_groups={settings.num_groups} must divide the {count} experts")
    elif not 1 <= settings.top_groups <= settings.num_groups:
        faults.append(
            f"top_groups={settings.top_groups} must be in 1..num_groups={settings.num_groups}"
        )
    else:
        reachable = count // settings.num_groups * settings.top_groups
        if not 1 <= settings.top_k <= reachable:
            faults.append(
                f"top_k={settings.top_k} must be in 1..{reachable}, the experts a token can reach"
            )
    if tokens * settings.top_k >= _MOST_SLOTS:
        faults.append(_too_many(tokens * settings.top_k))
    if expert_bias is not None and expert_bias.shape != (count,):
        faults.append(f"expert_bias must be [{count}], and has shape {list(expert_bias.shape)}")
    if token_mask is not None:
        if token_mask.shape != (tokens,):
            faults.append(f"token_mask must be [{tokens}], and has shape {list(token_mask.shape)}")
        if token_mask.dtype != torch.bool:
            faults.append(f"token_mask must be bool, and is {token_mask.dtype}")
    if experts is not None and experts.shape != (tokens, settings.top_k):
        faults.append(
            f"experts must be [{tokens}, {settings.top_k}], and have shape {list(experts.shape)}"
        )
    for name, tensor in (
        ("expert_bias", expert_bias),
        ("token_mask", token_mask),
        ("experts", experts),
    ):
        if tensor is not None and tensor.device != logits.device:
            faults.append(f"{name} is on {tensor.device}, and logits on {logits.device}")
    if faults:
        raise ValueError("moe_route: " + "; ".join(faults))
