"""`mamba2`: public function, checks and the autograd function."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemocascade_kernels.backends import Op, takes
from nemocascade_kernels.common.documents import PackedSeq
from nemocascade_kernels.common.transfer import to_device
from nemocascade_kernels.mamba2.arguments import Inputs, Sizes, States
from nemocascade_kernels.mamba2.limits import triton_limitation
from nemocascade_kernels.mamba2.states import ScanFunction, continued, decays, final_states

#: The convolution reads no further back than the previous chunk of 32 rows.
LARGEST_WINDOW = 33

OP = Op("mamba2")
OP.register("triton", limit=triton_limitation)
OP.register(
    "native",
    limit=takes(torch.float32, torch.bfloat16, operators=("mamba2", "mamba2_backward")),
)
OP.register("fla", by_name=True)
OP.register("torch")
OP.register("reference")


def mamba2(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    cu_seqlens: Tensor | PackedSeq,
    *,
    heads: int,
    head_dim: int,
    groups: int,
    state: int,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    eps: float = 1e-5,
    initial_state: tuple[Tensor, Tensor] | None = None,
    state_documents: Sequence[int] | None = None,
    return_final_state: bool = False,
    recompute: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, States | None]:
    """Mamba-2's mixer (arXiv 2405.21060) between its two projections, over packed documents::

        [x, B, C] = silu(conv1d([x, B, C]))             depthwise, causal, K rows
        dt = softplus(dt + dt_bias), within dt_limit
        S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T      y_t = S_t C_t + D x_t
        out = group RMSNorm(y * silu(z)) * norm_weight

    Documents are independent. With h heads of p = `head_dim`, g groups (head i uses B and C of
    group i // (h / g)), n = `state` and W = h p + 2 g n channels of the convolution:

    Args:
        zxbcdt: [T, h p + W + h] floating point, the input projection's z, x, B, C and dt.
        conv_weight: [W, K], K at most 33. conv_bias: [W].
        dt_bias, A, D: [h]; A is negative.
        norm_weight: [h p].
        cu_seqlens: [D + 1] int32, boundaries of the documents; on a GPU it costs a copy to the
            host. A `PackedSeq`, made once for all layers of a microbatch, costs none.
        heads, head_dim, groups, state: h, p, g, n.
        dt_limit: bounds of softplus(dt + dt_bias).
        eps: of the norm.
        initial_state: initial states of the documents: the convolution's last inputs
            [D, K - 1, W], and S [D, h, p, n]. Zeros, or None, for new documents.
        state_documents: the documents of `initial_state`, ascending; D is their number there, and
            the others are new. None: all.
        return_final_state: return the states after each document.
        recompute: with states, keep only the inputs for backward, which computes the rest again.
            False is faster for a caller that recomputes the mixer itself.
        backend: require an implementation; see `nemocascade_kernels.backends`.

    Returns:
        out [T, h p] in zxbcdt's dtype, and the final states (conv in zxbcdt's dtype, ssm float32)
        or None.

    Raises:
        ValueError: a shape is wrong; the message names all that are. Or `backend` requires the
            native one, and a gradient is needed with states: without it, torch's then runs.
        BackendUnavailableError: the required implementation is unavailable for the call.
    """
    packed = cu_seqlens
    if not isinstance(packed, PackedSeq):
        packed = PackedSeq.from_cu_seqlens(packed, zxbcdt.device)
    sizes = Sizes(heads, head_dim, groups, state, dt_limit, eps)
    inputs = Inputs(zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight)
    initial = None if initial_state is None else States(*initial_state)
    documents = None if state_documents is None else tuple(state_documents)
    _check(inputs, packed, sizes, initial, documents)
    tensors = (*inputs, *(initial or ()))
    chosen = OP.chosen(zxbcdt, zxbcdt.new_empty(0, heads, head_dim, state), backend=backend)
    module: Any = OP.module(chosen)
    if chosen == "triton":
        y, ssm = module.mix(inputs, packed, sizes, initial, documents, final=return_final_state)
    elif initial is None and not return_final_state:
        return _without_states(module, inputs, packed, sizes), None
    elif chosen in ("torch", "fla") and not _needs_gradient(tensors) and not return_final_state:
        assert initial is not None
        return continued(inputs, packed, sizes, initial, module.scan, documents), None
    elif chosen == "reference" or not _needs_gradient(tensors):
        y, ssm = module.forward_with_states(inputs, packed, sizes, initial, documents)
    elif backend == "native":
        raise ValueError(
            "mamba2 with states has no gradient in backend 'native': call it under "
            "torch.no_grad(), or without a backend"
        )
    else:
        module = OP.module("torch") if chosen == "native" else module
        y, ssm = with_gradient(
            module,
            inputs,
            packed,
            sizes,
            initial,
            documents,
            final=return_final_state,
            recompute=recompute,
        )
    if not return_final_state:
        return y, None
    if initial is not None and documents is not None:
        initial = initial.spread(documents, packed.num_documents)
    return y, States(_last_inputs(inputs, packed, sizes, initial), ssm)


def mamba2_final_state(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    cu_seqlens: Tensor | PackedSeq,
    *,
    heads: int,
    head_dim: int,
    groups: int,
    state: int,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_conv: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The state S that `mamba2` has after each document, from a zero state, and its decay.

    It takes one product a document, much less than `mamba2`. With an initial state S0, the state is
    `decay S0 + S`. Arguments are those of `mamba2`. Triton's kernels run where they run there, and
    torch's operators elsewhere.

    Args:
        initial_conv: [D, K - 1, W], the convolution's inputs before each document; None: zeros.

    Returns:
        S [D, h, p, n] and decay [D, h], float32 (float64 for float64 inputs), with gradients.
    """
    packed = cu_seqlens
    if not isinstance(packed, PackedSeq):
        packed = PackedSeq.from_cu_seqlens(packed, zxbcdt.device)
    sizes = Sizes(heads, head_dim, groups, state, dt_limit, 0.0)
    high = torch.promote_types(zxbcdt.dtype, torch.float32)
    chosen = OP.chosen(zxbcdt, zxbcdt.new_empty(0, heads, head_dim, state), backend=backend)

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        zxbcdt, weight, bias, dt_bias, A, *before = tensors
        initial = None
        if before:
            shape = packed.num_documents, heads, head_dim, state
            initial = States(before[0], zxbcdt.new_zeros(shape, dtype=high))
        # D and the norm's weight belong to the output.
        norm = bias.detach()[: sizes.inner]
        inputs = Inputs(zxbcdt, weight, bias, dt_bias, A, D=A.detach(), norm_weight=norm)
        if chosen == "triton":
            module: Any = OP.module(chosen)
            own = module.final_states(inputs, packed, sizes, initial)
            return own, decays(inputs, packed, sizes)
        return final_states(inputs, packed, sizes, initial)

    tensors = [zxbcdt, conv_weight, conv_bias, dt_bias, A]
    if initial_conv is not None:
        tensors.append(initial_conv)
    # Triton's kernels keep only their inputs, and the decays are small.
    states, factors = run(*tensors) if chosen == "triton" else _recomputed(run, *tensors)
    return states, factors


def _needs_gradient(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _recomputed(function: Callable[..., tuple[Tensor, Tensor]], *tensors: Tensor) -> Any:
    """Call `function`; backward computes it again, and keeps only its inputs until then."""
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)


def _without_states(module: Any, inputs: Inputs, packed: PackedSeq, sizes: Sizes) -> Tensor:
    if hasattr(module, "backward"):
        out: Tensor = Mixer.apply(module, packed, sizes, *inputs)
    else:
        out = module.forward(inputs, packed, sizes)
    return out


def with_gradient(
    module: Any,
    inputs: Inputs,
    packed: PackedSeq,
    sizes: Sizes,
    initial: States | None,
    documents: tuple[int, ...] | None,
    *,
    final: bool,
    recompute: bool,
) -> tuple[Tensor, Tensor]:
    """The output and, if `final`, the states after the documents, with gradients of all tensors."""
    count, has_states = len(inputs), initial is not None

    def scan(
        mixed: Tensor, dt: Tensor, A: Tensor, D: Tensor, packed: PackedSeq, s: Sizes
    ) -> Tensor:
        y: Tensor = ScanFunction.apply(module, packed, s, mixed, dt, A, D)
        return y

    # It refers to no tensor: under another recomputation, autograd alone decides what stays.
    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        own = Inputs(*tensors[:count])
        states = States(*tensors[count:]) if has_states else None
        if states is None:
            y = _without_states(module, own, packed, sizes)
        else:
            y = continued(own, packed, sizes, states, scan, documents)
        if not final:
            return y, y.new_empty(0)
        if states is not None and documents is not None:
            states = states.spread(documents, packed.num_documents)
        return y, final_states(own, packed, sizes, states)[0]

    tensors = (*inputs, *(initial or ()))
    y, ssm = _recomputed(run, *tensors) if recompute else run(*tensors)
    return y, ssm


class Mixer(torch.autograd.Function):
    """Autograd for implementations with their own gradients; they may save more than the inputs."""

    @staticmethod
    def forward(ctx: Any, module: Any, packed: PackedSeq, sizes: Sizes, *tensors: Tensor) -> Tensor:
        out: Tensor
        out, kept = module.forward(Inputs(*tensors), packed, sizes)
        ctx.save_for_backward(*tensors, *kept)
        ctx.module, ctx.packed, ctx.sizes = module, packed, sizes
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        # Read once: recomputation returns them only once.
        saved, count = ctx.saved_tensors, len(Inputs._fields)
        gradients = ctx.module.backward(
            d_out, Inputs(*saved[:count]), saved[count:], ctx.packed, ctx.sizes
        )
        return None, None, None, *gradients


def _last_inputs(i: Inputs, packed: PackedSeq, s: Sizes, initial: States | None) -> Tensor:
    """The last inputs of the convolution up to each document's end, [D, K - 1, W]."""
    width = i.window - 1

    def make() -> tuple[Tensor, Tensor]:
        lengths = packed.lengths[:, None]
        back = torch.arange(width, 0, -1)
        rows = (packed.starts[:, None] + lengths - back).maximum(packed.starts[:, None])
        # If a document is shorter, the inputs before it move up by its length.
        before = torch.arange(width) + lengths
        before = torch.where(back > lengths, before, -1)
        rows, before = to_device([rows, before], packed.device)
        return rows, before

    rows, before = packed.cached(("last inputs", width), make)
    last = s.split(i.zxbcdt)[1][rows]
    outside = (before >= 0)[:, :, None]
    if initial is None:
        return last.masked_fill_(outside, 0)
    index = before.clamp(min=0)[:, :, None].expand_as(last)
    return torch.where(outside, initial.conv.to(last.dtype).gather(1, index), last)


def _check(
    i: Inputs,
    packed: PackedSeq,
    s: Sizes,
    initial: States | None,
    documents: tuple[int, ...] | None,
) -> None:
    if i.zxbcdt.dim() != 2 or i.conv_weight.dim() != 2:
        raise ValueError("mamba2: zxbcdt and conv_weight must be matrices")
    if s.groups < 1 or s.heads % s.groups:
        raise ValueError(f"mamba2: {s.heads} heads cannot share {s.groups} groups equally")
    packed.check_rows(i.zxbcdt.shape[0], "mamba2's zxbcdt")
    if packed.device.type != i.zxbcdt.device.type:
        raise ValueError(
            f"mamba2: the pack is on {packed.device} and zxbcdt on {i.zxbcdt.device}: "
            "describe the documents on the rows' device"
        )
    per_head, channels = (s.heads,), (s.channels,)
    expected = {
        "zxbcdt": (i.zxbcdt, (packed.total, s.inner + s.channels + s.heads)),
        "conv_weight": (i.conv_weight, (*channels, i.window)),
        "conv_bias": (i.conv_bias, channels),
        "dt_bias": (i.dt_bias, per_head),
        "A": (i.A, per_head),
        "D": (i.D, per_head),
        "norm_weight": (i.norm_weight, (s.inner,)),
    }
    if initial is not None:
        count = packed.num_documents if documents is None else len(documents)
        expected["initial_state[0]"] = (initial.conv, (count, i.window - 1, s.channels))
        expected["initial_state[1]"] = (initial.ssm, (count, s.heads, s.head_dim, s.state))
    wrong = [
        f"{name} is {list(tensor.shape)}, not {list(shape)}"
        for name, (tensor, shape) in expected.items()
        if tensor.shape != shape
    ]
    if documents is not None and any(
        not a < b for a, b in itertools.pairwise((-1, *documents, packed.num_documents))
    ):
        wrong.append(
            f"state_documents is {list(documents)[:4]}, not ascending indices of "
            f"{packed.num_documents} documents"
        )
    if i.window > LARGEST_WINDOW:
        wrong.append(
            f"a convolution over {i.window} rows reaches beyond a chunk of 32: use at most "
            f"{LARGEST_WINDOW}"
        )
    if wrong:
        raise ValueError("mamba2: " + "; ".join(wrong))
