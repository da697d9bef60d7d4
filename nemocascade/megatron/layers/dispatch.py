"""Expert parallelism: dispatch of rows to the ranks that hold their experts, and combine.

One all-to-all over the joint expert group (ep x etp) serves both axes: a row is sent to every rank
of its expert's tensor-parallel group, and its source rank sums the partial results. Slots are
already sorted by expert, so no dense [T, E] tensor is made, and the counts of each expert tell the
receiver the experts of its rows. The host must know the message sizes, which costs one
synchronisation a layer, and none in its recomputation.

Shape letters: T tokens, R rows that arrive, K experts a token, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from nemocascade_kernels import Routing, make_routing, moe_permute, moe_unpermute
from torch import Tensor

from nemocascade.megatron.microbatch import DispatchPlan, FirstPass


def dispatched(
    x: Tensor,
    routing: Routing,
    experts: Callable[[Tensor, Routing], Tensor],
    groups: ProcessGroupCollection,
    first_pass: FirstPass | None = None,
) -> Tensor:
    """`sum_k weights_k expert_k(x)` with experts on other ranks.

    x: [T, H]. routing: over all experts. experts: applies this rank's experts to rows [R, H] with a
    routing of one expert a row. first_pass: keeps the plan for the recomputation in backward.
    Returns [T, H].
    """
    plan = None if first_pass is None else first_pass.dispatch
    if plan is None:
        plan = _exchange_counts(routing.counts, groups)
        if first_pass is not None:
            first_pass.dispatch = plan
    return through_ranks(x, routing, experts, plan, groups.tp_ep)


def through_ranks(
    x: Tensor,
    routing: Routing,
    experts: Callable[[Tensor, Routing], Tensor],
    plan: DispatchPlan,
    group: dist.ProcessGroup,
) -> Tensor:
    """`dispatched` with a plan. routing: over all experts of the ranks of `group`."""
    sent, received = plan.sent, plan.received
    # No name holds the rows that were sent: they are most of the layer's memory.
    rows = ExchangeRows.apply(_outgoing(x, routing, plan), sum(received), received, sent, group)
    rows = experts(rows, _arrived_routing(plan))
    rows = ExchangeRows.apply(rows, _returning(routing, plan), sent, received, group)
    return moe_unpermute(_sum_copies(rows, routing, plan), routing)


def _exchange_counts(counts: Tensor, groups: ProcessGroupCollection) -> DispatchPlan:
    ep, etp = groups.ep.size(), groups.expt_tp.size()
    counts = counts.view(ep, -1)
    outgoing = counts.repeat_interleave(etp, dim=0)
    arrived = torch.empty_like(outgoing)
    dist.all_to_all_single(arrived, outgoing, group=groups.tp_ep)
    sizes = torch.cat([counts.sum(1), arrived.sum(1)]).cpu().tolist()
    return DispatchPlan(to_owner=sizes[:ep], received=sizes[ep:], arrived=arrived[..., None])


def _arrived_routing(plan: DispatchPlan) -> Routing:
    """The local expert of each row that arrives.

    Each rank's rows are sorted by expert, then by source. The rows of an expert are put in the
    order of sources, then of ranks, which is the same for every way of exchange.
    """
    ranks, experts, sources = plan.arrived.shape
    keys = torch.arange(experts * sources, dtype=torch.int32, device=plan.arrived.device)
    if sources == 1:
        # Rows arrive in the order of ranks.
        ids, each = keys.repeat(ranks), 1
    else:
        rank = torch.arange(ranks, dtype=torch.int32, device=keys.device)
        ids, each = (keys * ranks + rank[:, None]).flatten(), sources * ranks
    ids = ids.repeat_interleave(plan.arrived.flatten(), output_size=sum(plan.received))[:, None]
    ones = torch.ones_like(ids, dtype=torch.float32)
    found = make_routing(ids, ones, experts * each)
    if each == 1:
        return found
    counts = found.counts.view(experts, each).sum(1, dtype=torch.int32)
    return replace(found, experts=ids // each, counts=counts, offsets=found.offsets[::each])


def _outgoing(x: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
    """Rows to send: each owner's segment, once for each rank of its tensor-parallel group.

    Rows past the last one sent may have any values.
    """
    # On a GPU the gradient of an index would be summed by atomics, in no fixed order.
    return _indexed(x, routing, plan) if x.is_cpu else _permuted(x, routing, plan)


def _indexed(x: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
    tokens = (routing.order[: sum(plan.to_owner)] // routing.top_k).long()
    ends = list(accumulate(plan.to_owner))
    copies = [
        torch.arange(end - n, end).repeat(plan.copies)
        for n, end in zip(plan.to_owner, ends, strict=True)
    ]
    return x.index_select(0, tokens[torch.cat(copies)])


def _permuted(x: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
    rows = moe_permute(x, routing)
    if plan.copies == 1:
        return rows
    segments = rows[: sum(plan.to_owner)].split(plan.to_owner)
    return torch.cat([segment for segment in segments for _ in range(plan.copies)])


def _returning(routing: Routing, plan: DispatchPlan) -> int:
    """Rows that `_sum_copies` takes."""
    return routing.order.numel() if plan.copies == 1 else sum(plan.sent)


def _sum_copies(back: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
    """Sum the copies of `_outgoing`: [T * K, H] in the order of the slots.

    Slots of padding are not dispatched; they come last, and may have any values.
    """
    if plan.copies == 1:
        return back
    parts = back.split([n * plan.copies for n in plan.to_owner])
    summed = torch.cat([p.view(plan.copies, -1, back.shape[-1]).sum(0) for p in parts])
    return F.pad(summed, (0, 0, 0, routing.order.numel() - summed.shape[0]))


class ExchangeRows(torch.autograd.Function):
    """All-to-all of the first rows: [>= sum(sent), H] -> [rows, H], rows at least sum(received).

    Further rows, also those of the gradient, are not written.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: int,
        received: list[int],
        sent: list[int],
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.rows, ctx.received, ctx.sent, ctx.group = x.shape[0], received, sent, group
        return _exchange(x, rows, received, sent, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = _exchange(grads[0], ctx.rows, ctx.sent, ctx.received, ctx.group)
        return grad, None, None, None, None


def _exchange(
    x: Tensor, rows: int, received: list[int], sent: list[int], group: dist.ProcessGroup
) -> Tensor:
    out = x.new_empty(rows, x.shape[1])
    dist.all_to_all_single(out[: sum(received)], x[: sum(sent)].contiguous(), received, sent, group)
    return out
