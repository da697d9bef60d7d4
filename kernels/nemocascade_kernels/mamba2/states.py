"""Initial and final states for a scan without state support.

The convolution reads the K - 1 inputs before a document. The scan is linear in its initial state,
so it runs from zero, and the contribution of an initial state S is added:

    y_t += exp(sum_{s <= t} dt_s A) C_t^T S          S' += exp(sum_s dt_s A) S

Nothing here has a gradient. Shape letters: T tokens, D documents, W convolution channels, K its
width, h heads, p head dimension, g groups, n state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nemocascade_kernels.common.documents import PackedSeq
from nemocascade_kernels.common.gated_norm import gated_rms_norm
from nemocascade_kernels.common.transfer import to_device
from nemocascade_kernels.mamba2.arguments import Inputs, Sizes, States

# y [T, h, p] of mixed [T, W], dt [T, h], A and D [h]: each document from a zero state.
Scan = Callable[[Tensor, Tensor, Tensor, Tensor, PackedSeq, Sizes], Tensor]


def forward_by_scan(
    i: Inputs,
    packed: PackedSeq,
    s: Sizes,
    initial: States | None,
    whole: Callable[[], Tensor],
    scan: Scan,
) -> tuple[Tensor, Tensor]:
    """The mixer's output [T, h p], and the state after each document [D, h, p, n].

    whole: computes the output if there is no initial state.
    """
    z, xbc, dt = s.split(i.zxbcdt)
    high = torch.promote_types(xbc.dtype, torch.float32)
    if initial is not None:
        initial = States(initial.conv, initial.ssm.to(high))
    mixed = convolution(xbc, i, packed, initial)
    dt = F.softplus(dt.to(high) + i.dt_bias.to(high)).clamp_(*s.dt_limit)
    if initial is None:
        out = whole()
    else:
        y = scan(mixed, dt, i.A, i.D, packed, s)
        _add_initial(y, mixed, dt, i.A, packed, s, initial.ssm)
        out = gated_rms_norm(y.flatten(1), z, i.norm_weight, s.groups, s.eps)
    return out, _final_states(mixed, dt, i.A, packed, s, initial)


def convolution(xbc: Tensor, i: Inputs, packed: PackedSeq, initial: States | None) -> Tensor:
    """`silu(conv(xbc))` [T, W], after the inputs of `initial` or zeros; sums at least float32."""
    high = torch.promote_types(xbc.dtype, torch.float32)
    x, taps = xbc.to(high), i.conv_weight.to(high).t().contiguous()
    width = i.window
    out = x * taps[width - 1]
    for k in range(width - 1):
        shift = width - 1 - k
        out[shift:].addcmul_(x[:-shift], taps[k])
    # The convolution above mixed documents at their first rows; these are recomputed here.
    rows, window, outside, before = _edge_rows(packed, width)
    inputs = x[window]
    if initial is None:
        inputs.masked_fill_(outside[:, :, None], 0)
    else:
        conv = initial.conv.to(high).flatten(0, 1)
        inputs = torch.where(outside[:, :, None], conv[before], inputs)
    out.index_copy_(0, rows, (inputs * taps).sum(1))
    return F.silu(out.add_(i.conv_bias.to(high))).to(xbc.dtype)


def _edge_rows(packed: PackedSeq, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows whose window of `width` rows backwards extends beyond their document.

    Returns, on the device: rows [m] int64; the window's rows [m, width] int64 (clamped into the
    document); `outside` [m, width] bool; and for those outside, their index among the D (width - 1)
    rows before the documents [m, width] int64.
    """

    def make() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        positions = packed.positions_on_host()
        rows = torch.nonzero(positions < width - 1).reshape(-1)
        position, document = positions[rows][:, None], packed.document_of()[rows][:, None]
        source = position - torch.arange(width - 1, -1, -1)
        outside = source < 0
        window = rows[:, None] - position + source.clamp(min=0)
        before = torch.where(outside, (document + 1) * (width - 1) + source, 0)
        found = (rows, window, outside, before)
        rows, window, outside, before = to_device(found, packed.device)
        return rows, window, outside, before

    return packed.cached(("edge rows", width), make)


def _add_initial(
    y: Tensor, mixed: Tensor, dt: Tensor, A: Tensor, packed: PackedSeq, s: Sizes, ssm: Tensor
) -> None:
    """Add to y [T, h, p] the contribution of the documents' initial states [D, h, p, n]."""
    c = s.split_channels(mixed)[2].to(ssm.dtype)
    for document, rows in enumerate(packed.documents()):
        opened = (dt[rows].double() * A.double()).cumsum_(0).exp_().to(ssm.dtype)
        by_group = ssm[document].view(s.groups, -1, s.state).transpose(1, 2)
        read = torch.bmm(c[rows].transpose(0, 1), by_group).transpose(0, 1)
        y[rows] += (read.reshape(-1, s.heads, s.head_dim) * opened[:, :, None]).to(y.dtype)


def _final_states(
    mixed: Tensor, dt: Tensor, A: Tensor, packed: PackedSeq, s: Sizes, initial: States | None
) -> Tensor:
    """The state after each document's last token, [D, h, p, n].

    `S' = exp(sum_s dt_s A) S + sum_t exp(sum_{s > t} dt_s A) dt_t x_t B_t^T`: the recurrence
    unrolled, one product a document.
    """
    high = torch.promote_types(mixed.dtype, torch.float32)
    x, b, _ = (part.to(high) for part in s.split_channels(mixed))
    step = dt.double()
    width = s.inner // s.groups
    states = x.new_empty(packed.num_documents, s.groups, width, s.state)
    for document, rows in enumerate(packed.documents()):
        taken = step[rows]
        # Remaining decay of each token: sums from the end, without the token's own.
        after = (taken * A.double()).flip(0).cumsum(0).roll(1, 0)
        passed = after[0].exp()
        after[0] = 0
        kept = (after.flip(0).exp_() * taken).to(high)
        by_group = (x[rows] * kept[:, :, None]).view(-1, s.groups, width).permute(1, 2, 0)
        torch.bmm(by_group, b[rows].transpose(0, 1), out=states[document])
        if initial is not None:
            entering = initial.ssm[document] * passed.to(high)[:, None, None]
            states[document].add_(entering.view(states.shape[1:]))
    return states.view(-1, s.heads, s.head_dim, s.state)
