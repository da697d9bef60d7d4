"""Mamba-2's mixer in C++ for the CPU (csrc/mamba2/); float32 arithmetic, decays in float64.

A group of heads is computed chunk by chunk through a document, so that everything between the two
projections stays in a core's caches. Groups and ranges of documents are distributed over the
threads. Sums over rows are computed for each range and added in order, so results do not depend on
the number of threads. Only the inputs are saved for backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemocascade_kernels import native
from nemocascade_kernels.common.documents import PackedSeq
from nemocascade_kernels.mamba2.arguments import Inputs, Sizes, States


def forward(i: Inputs, packed: PackedSeq, s: Sizes) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output [T, h p] in zxbcdt's dtype, float32 or bfloat16; nothing is saved for backward."""
    return _run(i, packed, s, (None, None, None)), ()


def forward_with_states(
    i: Inputs,
    packed: PackedSeq,
    s: Sizes,
    initial: States | None,
    documents: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [T, h p] in zxbcdt's dtype, and states after each document [D, h, p, n] float32."""
    if initial is not None and documents is not None:
        initial = initial.spread(documents, packed.num_documents)
    conv, ssm = (None, None) if initial is None else (t.float().contiguous() for t in initial)
    final = torch.empty(packed.num_documents, s.heads, s.head_dim, s.state)
    return _run(i, packed, s, (conv, ssm, final)), final


def backward(
    d_out: Tensor, i: Inputs, kept: tuple[Tensor, ...], packed: PackedSeq, s: Sizes
) -> tuple[Tensor, ...]:
    """Gradients of the inputs, in their dtypes."""
    del kept
    d_zxbcdt = torch.empty_like(i.zxbcdt, memory_format=torch.contiguous_format)
    arguments = _arguments(i, packed, s)
    sums = torch.empty_like(arguments[1])
    native.op("mamba2_backward")(*arguments, _with_contiguous_rows(d_out), d_zxbcdt, sums)
    parts = sums.split([t.numel() for t in i[1:]])
    return d_zxbcdt, *(part.view(t.shape).to(t.dtype) for part, t in zip(parts, i[1:], strict=True))


def _run(i: Inputs, packed: PackedSeq, s: Sizes, states: tuple[Tensor | None, ...]) -> Tensor:
    """Run the forward. states: initial ones of convolution and scan; output of the final ones."""
    out = i.zxbcdt.new_empty(i.zxbcdt.shape[0], s.inner)
    native.op("mamba2")(*_arguments(i, packed, s), *states, out)
    return out


def _arguments(i: Inputs, packed: PackedSeq, s: Sizes) -> tuple[Any, ...]:
    """Shared arguments of forward and backward; the second is all parameters in float32."""
    return (
        _with_contiguous_rows(i.zxbcdt),
        torch.cat([t.reshape(-1).float() for t in i[1:]]),
        packed.cu_seqlens,
        s.heads,
        s.head_dim,
        s.groups,
        s.state,
        i.window,
        *s.dt_limit,
        s.eps,
    )


def _with_contiguous_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
