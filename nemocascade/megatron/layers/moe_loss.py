"""Auxiliary losses of the router over the documents of a micro-batch.

Shape letters: T rows on this rank, E experts, K experts a token.
"""

from __future__ import annotations

from typing import Any

import nemocascade_kernels as kernels
import torch
import torch.distributed as dist
from nemocascade_kernels import Routing
from torch import Tensor

from nemocascade.megatron.microbatch import Microbatch


class _AttachLoss(torch.autograd.Function):
    """Identity on y; its backward also sends `scale` into the loss."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.full((), ctx.scale, dtype=torch.float32, device=grad.device), None


def attach_loss(y: Tensor, loss: Tensor, scale: float) -> Tensor:
    """Return y unchanged; backward also adds the gradient of `scale * loss`.

    loss: scalar float32.
    """
    out: Tensor = _AttachLoss.apply(y, loss, scale)
    return out


def load_balance_loss(
    logits: Tensor,
    routing: Routing,
    packed: Microbatch,
    rows: slice,
    *,
    score: str,
    over: str,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Sum over documents of `sum_e f_e P_e` (DeepSeek-V3, arXiv 2412.19437, Eq. 17-20).

    f_e = E / (K n) * (slots of the document on expert e), P_e = mean over its n tokens of the
    score, normalised over the experts. Equal load gives 1. `over="global"` takes all tokens of the
    micro-batch as one document, times the number of documents. Padding is excluded.

    logits: [T, E] float32. routing: of these rows, which are `rows` of this rank's batch. group:
    ranks that hold the other rows; loads are summed over them, and each rank's result covers its
    own rows, so that the sum over the ranks is the loss.
    """
    batch = packed.batch
    assert batch is not None
    documents = batch.num_documents
    mine = (packed.document_bounds()[: documents + 1] - rows.start).clamp(0, rows.stop - rows.start)

    def reduce(counts: Tensor) -> Tensor:
        dist.all_reduce(counts, group=group)
        return counts

    return kernels.load_balance_loss(
        logits,
        routing,
        mine,
        float(documents),
        kind=over,
        score=score,
        reduce=None if group is None else reduce,
    )


def z_loss(logits: Tensor, packed: Microbatch, rows: slice) -> Tensor:
    """Documents times the mean over tokens of `logsumexp(logits)^2` (ST-MoE, arXiv 2202.08906).

    logits: [T, E] float32. Padding is excluded.
    """
    batch = packed.batch
    assert batch is not None
    return kernels.z_loss(
        logits,
        float(batch.num_documents),
        token_mask=packed.token_mask(rows),
        num_tokens=batch.num_tokens,
    )
