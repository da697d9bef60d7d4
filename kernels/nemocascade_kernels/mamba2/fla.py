"""fla-core's Triton kernels for `mamba2` on a GPU.

Mamba-2's scan is gated linear attention with one decay per head: q = C, k = B, v = dt x,
g = dt A. fla-core takes documents by `cu_seqlens` and starts each from a zero state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemocascade_kernels.common.documents import PackedSeq
from nemocascade_kernels.common.gated_norm import gated_rms_norm
from nemocascade_kernels.mamba2.arguments import Inputs, Sizes, States
from nemocascade_kernels.mamba2.op import mamba2
from nemocascade_kernels.mamba2.states import forward_by_scan

# Elements that a kernel may address with 32-bit offsets. Calls are split by heads or channels,
# which are independent, so that no tensor of a call is larger.
_LIMIT = 2**31 - 1


def forward(i: Inputs, packed: PackedSeq, s: Sizes) -> Tensor:
    """Output [T, h p] in zxbcdt's dtype. fla-core's own autograd functions differentiate it."""
    z, xbc, dt = s.split(i.zxbcdt)
    mixed = convolution(xbc, i.conv_weight, i.conv_bias, packed)
    steps = F.softplus(dt.float() + i.dt_bias.float()).clamp(*s.dt_limit)
    y = scan(mixed, steps, i.A, i.D.float(), packed, s)
    return gated_rms_norm(y.flatten(1), z, i.norm_weight, s.groups, s.eps)


def forward_with_states(
    i: Inputs, packed: PackedSeq, s: Sizes, initial: States | None
) -> tuple[Tensor, Tensor]:
    """Output [T, h p] in zxbcdt's dtype, and the state after each document [D, h, p, n]."""
    return forward_by_scan(i, packed, s, initial, lambda: forward(i, packed, s), scan)


def parts(rows: int, count: int, width: int) -> list[slice]:
    """Split `count` heads of `width` so that `rows * heads * width` fits 32-bit offsets.

    Raises ValueError if a single head is too large.
    """
    most = _LIMIT // (rows * width)
    if most < 1:
        raise ValueError(
            f"{rows} rows of {width} elements exceed 2^31 - 1 for a single head: "
            "use fewer rows, or another backend than fla"
        )
    return [slice(lo, min(lo + most, count)) for lo in range(0, count, most)]


def scan(mixed: Tensor, dt: Tensor, A: Tensor, D: Tensor, packed: PackedSeq, s: Sizes) -> Tensor:
    """Run only the state-space scan, each document from a zero state; see `torch.scan`."""
    from fla.ops.simple_gla import chunk_simple_gla

    x, B, C = s.split_channels(mixed)
    rows, ratio = x.shape[0], s.heads // s.groups
    cu_seqlens = packed.cu_seqlens.long()
    v, g = (x * dt[..., None]).to(x.dtype), dt * A.to(dt.dtype)
    out = []
    for part in parts(rows, s.heads, max(s.head_dim, s.state)):
        group = torch.arange(part.start, part.stop, device=x.device) // ratio
        y, _ = chunk_simple_gla(
            C.index_select(1, group)[None],
            B.index_select(1, group)[None],
            v[None, :, part].contiguous(),
            g[None, :, part].contiguous(),
            scale=1.0,
            cu_seqlens=cu_seqlens,
        )
        out.append(y[0])
    return torch.cat(out, 1) + (D[:, None] * x).to(x.dtype)


def convolution(x: Tensor, weight: Tensor, bias: Tensor, packed: PackedSeq) -> Tensor:
    """`silu(conv(x))` within documents, [T, W]."""
    conv = _conv_function()
    out = [
        conv(
            x[None, :, part].contiguous(),
            weight[part].contiguous(),
            bias[part].contiguous(),
            activation="silu",
            cu_seqlens=packed.cu_seqlens.long(),
        )
        for part in parts(x.shape[0], x.shape[1], 1)
    ]
    return torch.cat([y[0] if isinstance(y, tuple) else y for y in out], -1)[0]


def _conv_function() -> Callable[..., Any]:
    try:
        from fla.modules.causal_conv1d import causal_conv1d
    except ImportError:  # fla-core before 0.6
        from fla.modules.convolution import causal_conv1d
    function: Callable[..., Any] = causal_conv1d
    return function


def self_check(device: torch.device) -> None:
    """Compare fla-core's scan and convolution with torch's on a small pack, forward and backward.

    Raises RuntimeError if they disagree, and whatever fla-core raises.
    """
    packed = PackedSeq.from_cu_seqlens([0, 1, 70, 200, 203], device)
    s = Sizes(heads=4, head_dim=32, groups=2, state=32, dt_limit=(0.0, float("inf")), eps=1e-5)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    inputs = Inputs(
        zxbcdt=draw(packed.total, s.inner + s.channels + s.heads),
        conv_weight=draw(s.channels, 4),
        conv_bias=draw(s.channels),
        dt_bias=draw(s.heads) - 1,
        A=-draw(s.heads).exp(),
        D=draw(s.heads),
        norm_weight=draw(s.inner),
    )
    upstream = draw(packed.total, s.inner)
    results = []
    for of_fla in (True, False):
        i = Inputs(*(t.clone().requires_grad_() for t in inputs))
        if of_fla:
            out = forward(i, packed, s)
        else:
            out, _ = mamba2(*i, packed, **vars(s), backend="torch")
        results.append([out.detach(), *torch.autograd.grad(out, i, upstream)])
    for name, a, b in zip(("output", *Inputs._fields), *results, strict=True):
        # The kernels multiply in TF32, whose relative error is about 1e-3.
        error = float((a - b).abs().max() / b.abs().max())
        if not error < 2e-2:
            what = name if name == "output" else f"gradient of {name}"
            raise RuntimeError(
                f"its {what} differs from torch's by {error:.1e} of the largest value"
            )
