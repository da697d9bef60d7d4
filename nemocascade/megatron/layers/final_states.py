"""What a Mamba-2 mixer remembers of a document at its end, for decoding to go on from.

Shape letters: T tokens, D documents, W channels of the convolution, K its width, h heads, p head
dimension, g groups, N state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from nemocascade_kernels import MambaWeights
from torch import Tensor

from nemocascade.megatron.layers.conv import packed_causal_conv1d
from nemocascade.megatron.layers.packing import PackedSeq


def convolution_tails(xbc: Tensor, packed: PackedSeq, width: int) -> Tensor:
    """[D, width, W]: the last `width` rows of each document, zeros where it is shorter.

    xbc: [T, W], what the convolution reads.
    """

    def make() -> tuple[Tensor, Tensor]:
        ends = packed.starts + packed.lengths
        back = torch.arange(width, 0, -1)
        rows = torch.maximum(ends[:, None] - back, packed.starts[:, None])
        outside = back > packed.lengths[:, None]
        return rows.to(packed.device), outside.to(packed.device)

    rows, outside = packed.cached(("tails", width), make)
    return xbc[rows].masked_fill_(outside[:, :, None], 0)


def scan_final_states(
    xbc: Tensor, dt: Tensor, w: MambaWeights, packed: PackedSeq, shape: torch.Size
) -> Tensor:
    """[D, h, p, N] float32, the state after each document's last token.

    `S = sum_t exp(sum_{s > t} dt_s A) dt_t x_t B_t^T`, the recurrence of `ssm` unrolled: one
    product a document. xbc: [T, W] and dt: [T, h], of the input projection. shape: [h, p, N].
    """
    heads, head_dim, state = shape
    inner, ratio = heads * head_dim, heads // w.groups
    shared = w.groups * state
    mixed = packed_causal_conv1d(xbc, w.conv_weight, w.conv_bias, packed)
    x, b, _ = mixed.float().split([inner, shared, shared], dim=1)
    step = F.softplus(dt.float() + w.dt_bias).clamp_(*w.dt_limit).double()
    states = x.new_empty(packed.num_documents, w.groups, ratio * head_dim, state)
    for document, rows in enumerate(packed.documents()):
        taken = step[rows]
        # What is left of each token at the end: sums from the back, without the token's own.
        after = (taken * w.A.double()).flip(0).cumsum(0).roll(1, 0)
        after[0] = 0
        kept = (after.flip(0).exp_() * taken).float()
        added = x[rows].view(-1, heads, head_dim) * kept[:, :, None]
        by_group = added.view(-1, w.groups, ratio * head_dim).permute(1, 2, 0)
        torch.bmm(by_group, b[rows].view(-1, w.groups, state).transpose(0, 1), out=states[document])
    return states.view(-1, heads, head_dim, state)
