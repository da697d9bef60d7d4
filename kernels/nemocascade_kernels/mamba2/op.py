"""`mamba2`: public function, checks and the autograd function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemocascade_kernels.backends import Op, takes
from nemocascade_kernels.common.documents import PackedSeq
from nemocascade_kernels.common.transfer import to_device
from nemocascade_kernels.mamba2.arguments import Inputs, Sizes, States

#: The convolution reads no further back than the previous chunk of 32 rows.
LARGEST_WINDOW = 33


OP = Op("mamba2")
OP.register(
    "native",
    refuse=takes(torch.float32, torch.bfloat16, operators=("mamba2", "mamba2_backward")),
)
OP.register("fla")
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
    return_final_state: bool = False,
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
        return_final_state: return the states after each document.
        backend: require an implementation; see `nemocascade_kernels.backends`.

    Returns:
        out [T, h p] in zxbcdt's dtype, and the final states (conv in zxbcdt's dtype, ssm float32)
        or None.

    Raises:
        ValueError: a shape is wrong; the message names all that are. Or a gradient is needed with
            states: only the reference has one.
        BackendRefusedError: the required implementation is unavailable for the call.
    """
    packed = cu_seqlens
    if not isinstance(packed, PackedSeq):
        packed = PackedSeq.from_cu_seqlens(packed, zxbcdt.device)
    sizes = Sizes(heads, head_dim, groups, state, dt_limit, eps)
    inputs = Inputs(zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight)
    initial = None if initial_state is None else States(*initial_state)
    _check(inputs, packed, sizes, initial)
    chosen = OP.chosen(zxbcdt, backend=backend)
    module: Any = OP.module(chosen)
    if initial is None and not return_final_state:
        if hasattr(module, "backward"):
            y: Tensor = Mixer.apply(module, packed, sizes, *inputs)
        else:
            y = module.forward(inputs, packed, sizes)
        return y, None
    tensors = (*inputs, *(initial or ()))
    if chosen != "reference" and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise ValueError(
            f"mamba2 with states has no gradient in backend {chosen!r}: call it under "
            "torch.no_grad(), or with backend='reference'"
        )
    y, ssm = module.forward_with_states(inputs, packed, sizes, initial)
    final = States(_last_inputs(inputs, packed, sizes, initial), ssm)
    return y, final if return_final_state else None


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


def _check(i: Inputs, packed: PackedSeq, s: Sizes, initial: States | None) -> None:
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
        count = packed.num_documents
        expected["initial_state[0]"] = (initial.conv, (count, i.window - 1, s.channels))
        expected["initial_state[1]"] = (initial.ssm, (count, s.heads, s.head_dim, s.state))
    wrong = [
        f"{name} is {list(tensor.shape)}, not {list(shape)}"
        for name, (tensor, shape) in expected.items()
        if tensor.shape != shape
    ]
    if i.window > LARGEST_WINDOW:
        wrong.append(
            f"a convolution over {i.window} rows reaches beyond a chunk of 32: use at most "
            f"{LARGEST_WINDOW}"
        )
    if wrong:
        raise ValueError("mamba2: " + "; ".join(wrong))
