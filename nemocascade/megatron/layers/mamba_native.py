"""`mamba_core` in C++ for the CPU (csrc/mamba_core/).

A group of heads runs through a document chunk by chunk, so that everything between the two
projections stays in a core's caches. Groups and ranges of documents are shared out to the threads;
sums over rows are made for each range and added in order, so results do not depend on the number
of threads. Only the inputs are kept for backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from nemocascade_kernels import MambaWeights
from torch import Tensor

from nemocascade.megatron import native
from nemocascade.megatron.layers.packing import PackedSeq

if TYPE_CHECKING:
    from nemocascade.megatron.layers.mamba_core import CoreSizes

OPERATORS = ("mamba_core", "mamba_core_backward")
ONWARD = "mamba_core_onward"


def refusal(zxbcdt: Tensor, *operators: str) -> str | None:
    """Why the native core cannot take this projection, or None if it can.

    operators: those that are needed; training's where none is named.
    """
    if zxbcdt.device.type != "cpu":
        return f"it runs on the CPU, the tensors are on {zxbcdt.device.type}"
    if zxbcdt.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {zxbcdt.dtype}"
    return native.lacks(*(operators or OPERATORS))


def native_mamba_core(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    packed: PackedSeq,
    sizes: CoreSizes,
    level: str = "",
) -> Tensor:
    """See `mamba_core.packed_mamba_core`. zxbcdt: float32 or bfloat16; arithmetic is float32,
    decays float64.

    level: of the processor, `base`, `v3` (AVX2) or `v4` (AVX-512); empty is the best there is.
    """
    out: Tensor = _NativeCore.apply(
        zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, packed, sizes, level
    )
    return out


def native_mamba_onward(
    zxbcdt: Tensor,
    w: MambaWeights,
    packed: PackedSeq,
    sizes: CoreSizes,
    before: Mapping[int, Tensor],
    entering: Mapping[int, Tensor],
    level: str = "",
) -> tuple[Tensor, Tensor]:
    """`native_mamba_core` without a gradient, where some documents may go on from others.

    before: by document, the convolution's inputs before it, [K - 1, W]. entering: by document, the
    state [h, p, N] that enters. The same documents; the others begin.
    Returns the mixed rows [T, h p], and the state after each document [D, h, p, N] float32.
    """
    small = (w.conv_weight, w.conv_bias, w.dt_bias, w.A, w.D, w.norm_weight)
    joined = torch.cat([p.reshape(-1).float() for p in small])
    out = zxbcdt.new_empty(zxbcdt.shape[0], sizes.inner)
    shape = (sizes.heads, sizes.head_dim, sizes.state)
    left = joined.new_empty(packed.num_documents, *shape)
    window = joined.new_empty(len(before), w.conv_weight.shape[1] - 1, sizes.channels)
    states = joined.new_empty(len(before), *shape)
    for i, (document, inputs) in enumerate(before.items()):
        window[i], states[i] = inputs, entering[document]
    native.op(ONWARD)(
        _with_contiguous_rows(zxbcdt),
        joined,
        *_settings(packed, sizes, w.conv_weight.shape[1], level),
        torch.tensor(list(before), dtype=torch.int64),
        window,
        states,
        left,
        out,
    )
    return out, left


def _settings(packed: PackedSeq, sizes: CoreSizes, window: int, level: str) -> tuple[Any, ...]:
    """What the operators take after the parameters."""
    return (
        packed.cu_seqlens,
        sizes.heads,
        sizes.head_dim,
        sizes.groups,
        sizes.state,
        window,
        *sizes.dt_limit,
        sizes.eps,
        level,
    )


class _NativeCore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *inputs, packed, sizes, level = arguments
        zxbcdt, *parameters = inputs
        zxbcdt = _with_contiguous_rows(zxbcdt)
        joined = torch.cat([p.reshape(-1).float() for p in parameters])
        settings = _settings(packed, sizes, parameters[0].shape[1], level)
        out = zxbcdt.new_empty(zxbcdt.shape[0], sizes.inner)
        native.op("mamba_core")(zxbcdt, joined, *settings, out)
        ctx.save_for_backward(zxbcdt, joined)
        ctx.settings = settings
        ctx.parameters = [(p.shape, p.dtype) for p in parameters]
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        zxbcdt, joined = ctx.saved_tensors
        d_zxbcdt = torch.empty_like(zxbcdt, memory_format=torch.contiguous_format)
        sums = torch.empty_like(joined)
        native.op("mamba_core_backward")(
            zxbcdt, joined, *ctx.settings, _with_contiguous_rows(d_out), d_zxbcdt, sums
        )
        parts = sums.split([shape.numel() for shape, _ in ctx.parameters])
        small = [
            part.view(shape).to(dtype)
            for part, (shape, dtype) in zip(parts, ctx.parameters, strict=True)
        ]
        return d_zxbcdt, *small, None, None, None


def _with_contiguous_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
