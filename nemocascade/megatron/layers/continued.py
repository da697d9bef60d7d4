"""The Mamba-2 mixer on a piece of a text, from the states that the pieces before it left.

The convolution reads the K - 1 inputs that stand before the piece. The scan is linear in the state
that enters, so it runs from zero as ever, and what the entering state S gives is added:

    y_t += exp(sum_{s <= t} dt_s A) C_t^T S          S' += exp(sum_s dt_s A) S

On a CPU, where it is built, `mamba_native.native_mamba_onward` makes both in one pass instead.

Nothing here has a gradient. Shape letters: T tokens, D documents, W channels of the convolution, K
its width, h heads, p head dimension, g groups, N state. `entering` and `before` hold, by document,
the states of those documents that go on; the others begin.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from nemocascade_kernels import MambaWeights
from torch import Tensor

from nemocascade.megatron.layers.conv import packed_causal_conv1d
from nemocascade.megatron.layers.mamba import MambaMixer
from nemocascade.megatron.layers.packing import PackedSeq

States = Mapping[int, Tensor]


def convolution(xbc: Tensor, w: MambaWeights, packed: PackedSeq, before: States) -> Tensor:
    """`silu(conv(xbc))`, [T, W]. before: [K - 1, W] each, the inputs before the piece."""
    mixed = packed_causal_conv1d(xbc, w.conv_weight, w.conv_bias, packed)
    width = w.conv_weight.shape[1]
    if width == 1:
        return mixed
    rows = packed.documents()
    high = torch.promote_types(xbc.dtype, torch.float32)
    taps, bias = w.conv_weight.to(high), w.conv_bias.to(high)
    for document, inputs in before.items():
        start = rows[document].start
        first = slice(start, min(start + width - 1, rows[document].stop))
        windows = torch.cat([inputs.to(high), xbc[first].to(high)]).unfold(0, width, 1)
        mixed[first] = F.silu((windows * taps).sum(-1) + bias).to(mixed.dtype)
    return mixed


def convolution_tails(xbc: Tensor, packed: PackedSeq, width: int, before: States) -> Tensor:
    """[D, width, W]: the last `width` inputs up to each document's end, zeros before its text.

    xbc: [T, W], what the convolution reads.
    """

    def make() -> tuple[Tensor, Tensor]:
        ends = packed.starts + packed.lengths
        back = torch.arange(width, 0, -1)
        rows = torch.maximum(ends[:, None] - back, packed.starts[:, None])
        outside = back > packed.lengths[:, None]
        return rows.to(packed.device), outside.to(packed.device)

    rows, outside = packed.cached(("tails", width), make)
    tails = xbc[rows].masked_fill_(outside[:, :, None], 0)
    for document, inputs in before.items():
        length = int(packed.lengths[document])
        if length < width:
            tails[document, : width - length] = inputs[length:]
    return tails


def steps_of(dt: Tensor, w: MambaWeights) -> Tensor:
    """[T, h] float32: softplus(dt + dt_bias) within its bounds. dt: [T, h], of the projection."""
    return F.softplus(dt.float() + w.dt_bias).clamp_(*w.dt_limit)


def mix_onward(
    mixer: MambaMixer,
    zxbcdt: Tensor,
    mixed: Tensor,
    steps: Tensor,
    w: MambaWeights,
    packed: PackedSeq,
    entering: States,
) -> Tensor:
    """`mixer.mix` of zxbcdt where states [h, p, N] enter some documents: [T, h p].

    mixed: [T, W], of `convolution`. steps: [T, h], of `steps_of`. w: of the mixer.
    """
    y = mixer.scan(mixed, steps, packed)
    rows = packed.documents()
    for document, state in entering.items():
        here = rows[document]
        heads, head_dim, size = state.shape
        c = mixed[here, mixed.shape[1] - w.groups * size :].float().view(-1, w.groups, size)
        opened = (steps[here].double() * w.A.double()).cumsum_(0).exp_().float()
        by_group = state.view(w.groups, -1, size).transpose(1, 2)
        read = torch.bmm(c.transpose(0, 1), by_group).transpose(0, 1)
        y[here] += (read.reshape(-1, heads, head_dim) * opened[:, :, None]).to(y.dtype)
    return mixer.gated(y.flatten(1), zxbcdt[:, : y.shape[1] * y.shape[2]])


def final_states(
    mixed: Tensor,
    steps: Tensor,
    w: MambaWeights,
    packed: PackedSeq,
    shape: torch.Size,
    entering: States,
) -> Tensor:
    """[D, h, p, N] float32, the state after each document's last token.

    `S' = exp(sum_s dt_s A) S + sum_t exp(sum_{s > t} dt_s A) dt_t x_t B_t^T`, the recurrence of
    `ssm` unrolled: one product a document. Arguments as of `mix_onward`. shape: [h, p, N].
    """
    heads, head_dim, state = shape
    inner, ratio = heads * head_dim, heads // w.groups
    shared = w.groups * state
    x, b, _ = mixed.float().split([inner, shared, shared], dim=1)
    step = steps.double()
    states = x.new_empty(packed.num_documents, w.groups, ratio * head_dim, state)
    for document, rows in enumerate(packed.documents()):
        taken = step[rows]
        # What is left of each token at the end: sums from the back, without the token's own.
        after = (taken * w.A.double()).flip(0).cumsum(0).roll(1, 0)
        passed = after[0].exp()
        after[0] = 0
        kept = (after.flip(0).exp_() * taken).float()
        added = x[rows].view(-1, heads, head_dim) * kept[:, :, None]
        by_group = added.view(-1, w.groups, ratio * head_dim).permute(1, 2, 0)
        out = states[document]
        torch.bmm(by_group, b[rows].view(-1, w.groups, state).transpose(0, 1), out=out)
        if document in entering:
            out.view(shape).add_(entering[document] * passed.float()[:, None, None])
    return states.view(-1, heads, head_dim, state)
