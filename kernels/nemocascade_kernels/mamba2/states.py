"""Initial and final states for a scan without state support.

The convolution reads the K - 1 inputs before a document. The scan is linear in its initial state,
so it runs from zero, and the contribution of an initial state S is added:

    y_t += exp(sum_{s <= t} dt_s A) C_t^T S          S' += exp(sum_s dt_s A) S

Autograd differentiates these operators; `Scan` brings the scan's own gradient. Shape letters: T
tokens, D documents, m documents with an initial state, W convolution channels, K its width, h
heads, p head dimension, g groups, n state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemocascade_kernels.common.documents import PackedSeq
from nemocascade_kernels.common.gated_norm import gated_rms_norm
from nemocascade_kernels.common.transfer import to_device
from nemocascade_kernels.mamba2.arguments import Inputs, Sizes, States

# y [T, h, p] of mixed [T, W], dt [T, h], A and D [h]: each document from a zero state.
Scan = Callable[[Tensor, Tensor, Tensor, Tensor, PackedSeq, Sizes], Tensor]


class ScanFunction(torch.autograd.Function):
    """The scan of an implementation with its own gradient.

    module: has `scan_forward`, which returns y [T, h, p] and tensors for `scan_backward`.
    """

    @staticmethod
    def forward(ctx: Any, module: Any, packed: PackedSeq, sizes: Sizes, *tensors: Tensor) -> Tensor:
        out: Tensor
        out, kept = module.scan_forward(*tensors, packed, sizes)
        ctx.save_for_backward(*tensors, *kept)
        ctx.module, ctx.packed, ctx.sizes = module, packed, sizes
        return out

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        gradients = ctx.module.scan_backward(d_y, *saved[:4], saved[4:], ctx.packed, ctx.sizes)
        return None, None, None, *gradients


def forward_by_scan(
    i: Inputs,
    packed: PackedSeq,
    s: Sizes,
    initial: States | None,
    whole: Callable[[], Tensor],
    scan: Scan,
    documents: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """The mixer's output [T, h p], and the state after each document [D, h, p, n].

    whole: computes the output if there is no initial state. documents: those of `initial`, see
    `continued`.
    """
    out = whole() if initial is None else continued(i, packed, s, initial, scan, documents)
    if documents is not None and initial is not None:
        initial = initial.spread(documents, packed.num_documents)
    return out, final_states(i, packed, s, initial)[0]


def continued(
    i: Inputs,
    packed: PackedSeq,
    s: Sizes,
    initial: States,
    scan: Scan,
    documents: tuple[int, ...] | None,
) -> Tensor:
    """The mixer's output [T, h p].

    documents: the m documents of `initial`, ascending; the others begin from zeros. None: all.
    """
    z, xbc, dt = s.split(i.zxbcdt)
    mixed, dt = convolution(xbc, i, packed, initial, documents), time_steps(dt, i.dt_bias, s)
    y = scan(mixed, dt, i.A, i.D, packed, s)
    ssm = initial.ssm.to(dt.dtype)
    _add_initial(y, mixed, dt, i.A, packed, s, ssm, documents)
    return gated_rms_norm(y.flatten(1), z, i.norm_weight, s.groups, s.eps)


def final_states(
    i: Inputs, packed: PackedSeq, s: Sizes, initial: States | None
) -> tuple[Tensor, Tensor]:
    """The state after each document [D, h, p, n], and its factor on the initial state [D, h]."""
    _, xbc, dt = s.split(i.zxbcdt)
    mixed, dt = convolution(xbc, i, packed, initial), time_steps(dt, i.dt_bias, s)
    if initial is not None:
        initial = States(initial.conv, initial.ssm.to(dt.dtype))
    return _final_states(mixed, dt, i.A, packed, s, initial)


def decays(i: Inputs, packed: PackedSeq, s: Sizes) -> Tensor:
    """Factors of the initial states in the final ones, [D, h]."""
    high = torch.promote_types(i.zxbcdt.dtype, torch.float32)
    dt = time_steps(s.split(i.zxbcdt)[2], i.dt_bias, s).double()
    sums = torch.stack([dt[rows].sum(0) for rows in packed.documents()])
    return (sums * i.A.double()).exp().to(high)


def time_steps(raw: Tensor, bias: Tensor, s: Sizes) -> Tensor:
    """`softplus(raw + bias)`, within the limits, [T, h]; at least float32."""
    high = torch.promote_types(raw.dtype, torch.float32)
    return F.softplus(raw.to(high) + bias.to(high)).clamp(*s.dt_limit)


def convolution(
    xbc: Tensor,
    i: Inputs,
    packed: PackedSeq,
    initial: States | None,
    documents: tuple[int, ...] | None = None,
) -> Tensor:
    """`silu(conv(xbc))` [T, W], after the inputs of `initial` or zeros; sums at least float32.

    documents: those of `initial`, see `continued`.
    """
    high = torch.promote_types(xbc.dtype, torch.float32)
    x, taps = xbc.to(high), i.conv_weight.to(high).t().contiguous()
    width = i.window
    out = x * taps[width - 1]
    for k in range(width - 1):
        shift = width - 1 - k
        out[shift:].addcmul_(x[:-shift], taps[k])
    # The convolution above mixed documents at their first rows; these are recomputed here.
    rows, window, outside, before = _edge_rows(packed, width, documents)
    inputs = x[window]
    if initial is None:
        inputs.masked_fill_(outside[:, :, None], 0)
    else:
        conv = initial.conv.to(high)
        if documents is not None:
            conv = torch.cat([conv, conv.new_zeros(1, *conv.shape[1:])])
        conv = conv.flatten(0, 1)
        inputs = torch.where(outside[:, :, None], conv[before], inputs)
    out.index_copy_(0, rows, (inputs * taps).sum(1))
    return F.silu(out.add_(i.conv_bias.to(high))).to(xbc.dtype)


def _edge_rows(
    packed: PackedSeq, width: int, documents: tuple[int, ...] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows whose window of `width` rows backwards extends beyond their document.

    Returns, on the device: rows [e] int64; the window's rows [e, width] int64 (clamped into the
    document); `outside` [e, width] bool; and for those outside, their index among the rows before
    the documents [e, width] int64. These are D (width - 1) rows, or with `documents` (m + 1)
    (width - 1), the last of them for all other documents.
    """

    def make() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        positions = packed.positions_on_host()
        rows = torch.nonzero(positions < width - 1).reshape(-1)
        position, document = positions[rows][:, None], packed.document_of()[rows][:, None]
        if documents is not None:
            place = torch.full((packed.num_documents,), len(documents))
            place[list(documents)] = torch.arange(len(documents))
            document = place[document]
        source = position - torch.arange(width - 1, -1, -1)
        outside = source < 0
        window = rows[:, None] - position + source.clamp(min=0)
        before = torch.where(outside, (document + 1) * (width - 1) + source, 0)
        found = (rows, window, outside, before)
        rows, window, outside, before = to_device(found, packed.device)
        return rows, window, outside, before

    return packed.cached(("edge rows", width, documents), make)


def _add_initial(
    y: Tensor,
    mixed: Tensor,
    dt: Tensor,
    A: Tensor,
    packed: PackedSeq,
    s: Sizes,
    ssm: Tensor,
    documents: tuple[int, ...] | None,
) -> None:
    """Add to y [T, h, p] the contribution of the initial states [m, h, p, n] of `documents`."""
    c = s.split_channels(mixed)[2]
    for place, rows in enumerate(packed.documents(documents)):
        opened = (dt[rows].double() * A.double()).cumsum(0).exp().to(ssm.dtype)
        by_group = ssm[place].reshape(s.groups, -1, s.state).transpose(1, 2)
        read = torch.bmm(c[rows].to(ssm.dtype).transpose(0, 1), by_group).transpose(0, 1)
        y[rows] += (read.reshape(-1, s.heads, s.head_dim) * opened[:, :, None]).to(y.dtype)


def _final_states(
    mixed: Tensor, dt: Tensor, A: Tensor, packed: PackedSeq, s: Sizes, initial: States | None
) -> tuple[Tensor, Tensor]:
    """The state after each document's last token, [D, h, p, n], and what is left in it of the
    initial state, [D, h].

    `S' = exp(sum_s dt_s A) S + sum_t exp(sum_{s > t} dt_s A) dt_t x_t B_t^T`: the recurrence
    unrolled, one product a document.
    """
    high = torch.promote_types(mixed.dtype, torch.float32)
    x, b, _ = s.split_channels(mixed)
    width = s.inner // s.groups
    states, factors = [], []
    for document, rows in enumerate(packed.documents()):
        taken = dt[rows].double()
        # Remaining decay of each token: sums from the end, without the token's own.
        sums = (taken * A.double()).flip(0).cumsum(0)
        passed = sums[-1].exp().to(high)
        after = torch.cat([torch.zeros_like(sums[:1]), sums[:-1]])
        kept = (after.flip(0).exp() * taken).to(high)
        by_group = (x[rows].to(high) * kept[:, :, None]).view(-1, s.groups, width)
        state = torch.bmm(by_group.permute(1, 2, 0), b[rows].to(high).transpose(0, 1))
        state = state.view(s.heads, s.head_dim, s.state)
        if initial is not None:
            state = state + initial.ssm[document] * passed[:, None, None]
        states.append(state)
        factors.append(passed)
    return torch.stack(states), torch.stack(factors)
