"""Gradients of the state-space scan in chunks; the forward, and the shape letters, are in `ssd`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nemocascade_kernels.mamba2.chunks import ChunkBlock
from nemocascade_kernels.mamba2.segments import carry_gradients
from nemocascade_kernels.mamba2.ssd import BlockResult, Chunks, Decays, Layout


class InnerGradients(NamedTuple):
    """Gradients by the products within chunks: of dt x [c, g, s, r, p], of B and C [c g, s, n], and
    of the log decays [c, g, s, r, 1] float64."""

    xd: Tensor
    B: Tensor
    C: Tensor
    log: Tensor


@dataclass(frozen=True)
class ChunkGradients:
    """Gradients of a block's rows, shaped like `Chunks`; dt [c, g, s, r, 1]; A and D [h]; float64
    for dt, A and D."""

    x: Tensor
    B: Tensor
    C: Tensor
    dt: Tensor
    A: Tensor
    D: Tensor


def inner_backward(
    lay: Layout, block: ChunkBlock, f: Decays, m: Chunks, mixed: BlockResult, dy: Tensor
) -> InnerGradients:
    """Gradients of a block by the products within chunks. dy: [c, g, s, r, p], zero in padding.

    Overwrites `mixed.within`.

    The gradient of an exponent is the inner product of a factor with its own gradient. y does not
    depend on m = l_last / 2, which is a constant here. So `d l_i` has one term for each factor:
    `e_i (scores u)_i . dy_i`, `- u_i . du_i`, and those of the states that enter and leave. Terms
    that cancel under strong decays are computed from the same double-precision numbers.
    """
    d_mixed = lay.doubled(dy, f.e)
    d_scores = torch.bmm(d_mixed, mixed.u.transpose(1, 2)).tril_().to(lay.dtype)
    d_c, d_b = torch.bmm(d_scores, m.B), torch.bmm(d_scores.transpose(1, 2), m.C)
    d_u = torch.bmm(mixed.scores.transpose(1, 2), d_mixed)
    d_log = lay.head_sum(mixed.within.mul_(d_mixed).addcmul_(d_u, mixed.u, value=-1), block)
    return InnerGradients(d_u.view(dy.shape).div_(f.e).to(lay.dtype), d_b, d_c, d_log)


def mix_backward(
    lay: Layout,
    block: ChunkBlock,
    f: Decays,
    m: Chunks,
    inner: InnerGradients,
    read: Tensor | None,
    A: Tensor,
    D: Tensor,
    dy: Tensor,
    states: Tensor,
    d_states: Tensor,
) -> ChunkGradients:
    """Gradients of a block. inner: from `inner_backward`; read: from `mix`, as are the states.

    Blocks are processed in reverse order. d_states: gradients of the states after body chunks; they
    are written for the chunks before the block and read for the block's own.
    """
    d_xd, d_b, d_c, d_log = inner
    if block.enter is not None and read is not None:
        entering = states.index_select(0, block.enter)
        opened = lay.matrices(dy * f.opened)
        d_c.baddbmm_(opened, lay.matrices(entering).transpose(1, 2))
        d_entering = torch.bmm(m.C.transpose(1, 2), opened)
        d_states.index_copy_(0, block.enter, d_entering.view(lay.state_shape(block.count)))
        del d_entering
        d_log += lay.head_sum(opened.mul_(read), block)
        del opened
    if block.body is not None:
        carry_gradients(block, f.passed, f.mixing, d_states)
        d_grown = lay.matrices(d_states[block.body])
        added = lay.matrices(m.x * f.added)
        d_b.baddbmm_(added, d_grown.transpose(1, 2))
        d_added = torch.bmm(m.B, d_grown)
        d_xd.addcmul_(d_added.view(dy.shape), f.kept)
        kept = lay.head_sum(added.mul_(d_added), block).double()
        del added, d_added
        d_log -= kept
        d_log[:, :, -1] += kept.sum(2)
        if block.enter is not None:
            passed = entering.mul_(d_states[block.body]).sum((2, 4)).unsqueeze(-1)
            d_log[:, :, -1] += passed * f.passed[:, :, 0]
    d_dt = (d_xd * m.x).sum(-1, keepdim=True).double()
    d_step = d_log.flip(2).cumsum(2).flip(2).masked_fill_(f.bounded, 0)
    return ChunkGradients(
        x=d_xd.mul_(f.dt.to(lay.dtype)).addcmul_(dy, lay.per_head(D)),
        B=d_b,
        C=d_c,
        dt=d_dt.addcmul_(d_step, lay.per_head(A.double())),
        A=(d_step * f.dt).sum((0, 2)).view(-1),
        D=(dy * m.x).sum((0, 2, 4)).view(-1).double(),
    )
