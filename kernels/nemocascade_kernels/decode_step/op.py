"""The decode operators: checks and choice of the implementation. Nothing here has a gradient.

On a CPU with the compiled library the operators are batch-invariant: a row's result is
bit-identical for any other rows of the call and any number of them. Elsewhere a matrix library may
round differently for another number of rows.

Shape letters: n rows, H and I widths, E experts, K choices a row, S slots; of a Mamba-2 mixer h
heads, p head dimension, g groups, N state, W = h p + 2 g N channels of the convolution; of a KV
cache P blocks of B tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemocascade_kernels import backends
from nemocascade_kernels.common.activations import ACTIVATIONS
from nemocascade_kernels.common.routing import RouterSettings
from nemocascade_kernels.decode_step.weights import MambaWeights

_STEPS = ("norm", "linear", "route", "experts", "mamba", "attention", "draw")
OP = backends.Op("decode_step")
OP.register("triton", limit=backends.takes(*backends.HALF_AND_SINGLE))
OP.register(
    "native",
    limit=backends.takes(torch.float32, operators=tuple(f"step_{name}" for name in _STEPS)),
)
OP.register("reference")


def step_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str | None = None) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` by row (arXiv 1910.07467).

    x: [n, H] floating point. weight: [H]. backend: require an implementation; see
    `nemocascade_kernels.backends`. Returns [n, H] in x's dtype.
    Raises ValueError for shapes that do not fit.
    """
    if x.dim() != 2 or weight.shape != x.shape[1:]:
        raise ValueError(f"step_norm: x {list(x.shape)} and weight {list(weight.shape)} must fit")
    out: Tensor = OP.choose(x, weight, backend=backend).norm(x, weight, eps)
    return out


def step_linear(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """`residual + x weight^T`, [n, I].

    x: [n, H]; weight: [I, H]; residual: [n, I] or None for zeros; one dtype. In Triton the result
    takes the residual's memory. backend: as above.
    Raises ValueError for shapes that do not fit.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"step_linear: x {list(x.shape)} and weight {list(weight.shape)} must fit")
    if residual is not None and residual.shape != (x.shape[0], weight.shape[0]):
        raise ValueError(
            f"step_linear: residual {list(residual.shape)} must be "
            f"[{x.shape[0]}, {weight.shape[0]}]"
        )
    out: Tensor = OP.choose(x, weight, backend=backend).linear(x, weight, residual)
    return out


def step_route(
    logits: Tensor,
    settings: RouterSettings,
    bias: Tensor | None = None,
    *,
    real: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The experts of each row and their weights, as `moe_route` chooses them.

    logits: [n, E] float32. bias: [E] float32, added to the scores for the choice, or None. real:
    rows from this one on have no expert; None: all have one. backend: as above.
    Returns [n, K] int32, with E for no expert, and [n, K] float32.
    Raises ValueError for shapes that do not fit.
    """
    rows, count = logits.shape
    if settings.top_k > count or (bias is not None and bias.shape != (count,)):
        raise ValueError(
            f"step_route: {count} experts, a bias {None if bias is None else list(bias.shape)} and "
            f"top_k({settings.top_k}) must fit"
        )
    module = OP.choose(logits, backend=backend)
    chosen, weights = module.route(logits, bias, rows if real is None else real, settings)
    return chosen, weights


def step_experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    activation: str = "relu2",
    backend: str | None = None,
) -> Tensor:
    """`y_t = sum_k weights[t, k] w_down[e] act(w_up[e] x_t)`, e = chosen[t, k], as `moe_experts`.

    x: [n, H]. chosen: [n, K] int32, E for no expert. weights: [n, K] float32. w_up: [E, I, H], or
    [E, 2 I, H] for "swiglu" (the gate's rows first). w_down: [E, H, I]. backend: as above.
    Returns [n, H] in x's dtype. Raises ValueError for shapes or an activation that do not fit.
    """
    swiglu = activation == "swiglu"
    count, hidden, width = w_down.shape
    if (
        x.shape[1:] != (hidden,)
        or w_up.shape != (count, width * (1 + swiglu), hidden)
        or chosen.shape != weights.shape
        or chosen.shape[:1] != x.shape[:1]
        or activation not in ACTIVATIONS
    ):
        raise ValueError(
            f"step_experts with {activation}: x {list(x.shape)}, chosen {list(chosen.shape)}, "
            f"weights {list(weights.shape)}, w_up {list(w_up.shape)} and w_down "
            f"{list(w_down.shape)} must fit; activations are relu2 and swiglu"
        )
    module = OP.choose(x, weights, w_up, w_down, backend=backend)
    out: Tensor = module.experts(x, chosen, weights, w_up, w_down, swiglu)
    return out


def step_mamba(
    zxbcdt: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    slots: Tensor,
    weights: MambaWeights,
    *,
    backend: str | None = None,
) -> Tensor:
    """One token of Mamba-2's mixer (arXiv 2405.21060) between its projections::

        [x, B, C] = silu(conv([x, B, C]))      over the token and the K - 1 before it
        dt = softplus(dt + dt_bias)            S = exp(dt A) S + dt x B^T
        y = S C + D x                          out = group RMSNorm(y * silu(z)) * weight

    States are changed in place. If rows share a slot, its state is undefined.

    Args:
        zxbcdt: [n, h p + W + h] floating point, the parts z, x, B, C and dt.
        conv_state: [S, K - 1, W], the last inputs of the convolution, the oldest first.
        ssm_state: [S, h, p, N] float32 (float64 in the reference).
        slots: [n] int64, the slot of each row.
        weights: of the mixer.
        backend: require an implementation; see `nemocascade_kernels.backends`.

    Returns:
        [n, h p], zxbcdt's dtype.

    Raises:
        ValueError: a shape or dtype is wrong; the message names all that are.
        BackendUnavailableError: the required implementation is unavailable for the call.
    """
    heads, head_dim, state = ssm_state.shape[1:]
    inner, (width, taps) = heads * head_dim, weights.conv_weight.shape
    rows, count = zxbcdt.shape[0], ssm_state.shape[0]
    _check(
        "step_mamba",
        {
            "zxbcdt": (zxbcdt, (rows, inner + width + heads)),
            "conv_state": (conv_state, (count, taps - 1, width)),
            "conv_weight": (weights.conv_weight, (inner + 2 * weights.groups * state, taps)),
            "norm_weight": (weights.norm_weight, (inner,)),
            "slots": (slots, (rows,)),
        },
    )
    module = OP.choose(zxbcdt, conv_state, weights.conv_weight, ssm_state, backend=backend)
    out: Tensor = module.mamba(zxbcdt, conv_state, ssm_state, slots, weights)
    return out


def step_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    slots: Tensor,
    positions: Tensor,
    longest: int,
    *,
    backend: str | None = None,
) -> Tensor:
    """One token of causal grouped-query attention over the blocked KV cache of each row::

        K = [keys[b] for b in table[s]], V = [values[b] for b in table[s]]    [g, W B, d] each
        K[:, t], V[:, t] = k, v
        out = softmax(q K[:, :t + 1]^T / sqrt(d)) V[:, :t + 1]

    The caches are changed in place. Sequences may share blocks that they do not write. Values past
    a row's position are ignored, even NaN, and so are the table's entries past its block.

    Args:
        q: [n, h, d] floating point; query head i uses key/value head i // (h / g).
        k, v: [n, g, d], of the same token.
        keys, values: [P, g, B, d], the caches; B is a multiple of 4.
        table: [S, W] int32, the blocks of each slot's tokens, in order.
        slots: [n] int64, the slot of each row.
        positions: [n] int64, t: the number of cached tokens in the slot, below `longest`.
        longest: at most W B; bounds the work if the host does not read `positions`.
        backend: require an implementation; see `nemocascade_kernels.backends`.

    Returns:
        [n, h, d], q's dtype.

    Raises:
        ValueError: a shape or dtype is wrong; the message names all that are.
        BackendUnavailableError: the required implementation is unavailable for the call.
    """
    rows, heads, dim = q.shape
    count, kv_heads, size = keys.shape[:3]
    capacity = table.shape[1] * size
    if heads % kv_heads or size % 4 or not 1 <= longest <= capacity:
        raise ValueError(
            f"step_attention: {heads} query heads must be a multiple of {kv_heads} key/value "
            f"heads, blocks of {size} tokens a multiple of 4, and longest({longest}) in "
            f"1..{capacity}, the capacity of the table"
        )
    _check(
        "step_attention",
        {
            "k": (k, (rows, kv_heads, dim)),
            "v": (v, (rows, kv_heads, dim)),
            "keys": (keys, (count, kv_heads, size, dim)),
            "values": (values, (count, kv_heads, size, dim)),
            "slots": (slots, (rows,)),
            "positions": (positions, (rows,)),
        },
    )
    if table.dtype != torch.int32:
        raise ValueError(f"step_attention: table is {table.dtype}, not torch.int32")
    module = OP.choose(q, keys, backend=backend)
    out: Tensor = module.attention(q, k, v, keys, values, table, slots, positions, longest)
    return out


def step_draw(
    logits: Tensor,
    u: Tensor | None,
    *,
    temperature: float = 1.0,
    limit: int = 0,
    allowed: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw a token a row and its log-probability, by inverting the cumulative distribution at u.

    logits: [n, V] floating point. u: [n] float64 in [0, 1), or None for the most probable token,
    the first of equals. temperature: divides the logits. limit: ids from this one on are excluded;
    0 excludes none. allowed: [n, V] bool, ids that may be drawn; None is all. backend: as above.
    Returns tokens [n] int64, and their log-probabilities [n] float32 under softmax(logits /
    temperature) over all of V, including excluded ids.
    Raises ValueError for shapes or settings that do not fit.
    """
    rows, vocabulary = logits.shape
    if (
        not temperature > 0
        or not 0 <= limit <= vocabulary
        or (u is not None and u.shape != (rows,))
        or (allowed is not None and allowed.shape != logits.shape)
    ):
        raise ValueError(
            f"step_draw: logits {list(logits.shape)}, u {None if u is None else list(u.shape)} and "
            f"allowed {None if allowed is None else list(allowed.shape)} must fit, temperature"
            f"({temperature}) must be above 0 and limit({limit}) in 0..{vocabulary}"
        )
    module = OP.choose(logits, backend=backend)
    tokens, logprobs = module.draw(logits, u, temperature, limit or vocabulary, allowed)
    return tokens, logprobs


def _check(what: str, tensors: dict[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    faults = [
        f"{name} is {list(tensor.shape)}, not {list(shape)}"
        for name, (tensor, shape) in tensors.items()
        if tensor.shape != shape
    ]
    faults += [
        f"{name} are {tensors[name][0].dtype}, not torch.int64"
        for name in ("slots", "positions")
        if name in tensors and tensors[name][0].dtype != torch.int64
    ]
    if faults:
        raise ValueError(f"{what}: " + "; ".join(faults))
