"""Expert parallelism: dispatch of rows to the ranks that hold their experts, and combine.

One all-to-all over the joint expert group (ep x etp) serves both axes: a row is sent to every rank
of its expert's tensor-parallel group, and its source rank sums the partial results. Slots are
already sorted by expert, so no dense [T, E] tensor is made, and the counts of each expert tell the
receiver the experts of its rows. The host must know the message sizes, which costs one
synchronisation a layer, and none in its recomputation.

Independent work may run while rows travel: it is called between the start of an exchange and the
wait for it, in forward. Autograd runs backward in the reverse order, so that the same work's
backward runs between the start of the opposite exchange and the wait for that one. A communicator
has a stream of its own, so nothing else is moved to another stream.

Shape letters: T tokens, R rows that arrive, K experts a token, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from nemocascade_kernels import Routing, make_routing, moe_permute, moe_unpermute
from torch import Tensor

from nemocascade.megatron.microbatch import DispatchPlan, FirstPass


@dataclass(frozen=True)
class OverlappedWork:
    """Work that runs while rows travel: `dispatch` on their way to the experts, `combine` on their
    way back. Each is called once in a forward pass."""

    dispatch: Callable[[], None]
    combine: Callable[[], None]


def dispatched(
    x: Tensor,
    routing: Routing,
    experts: Callable[[Tensor, Routing], Tensor],
    groups: ProcessGroupCollection,
    first_pass: FirstPass | None = None,
    overlapped: OverlappedWork | None = None,
) -> Tensor:
    """`sum_k weights_k expert_k(x)` with experts on other ranks.

    x: [T, H]. routing: over all experts. experts: applies this rank's experts to rows [R, H] with a
    routing of one expert a row. first_pass: keeps the plan for the recomputation in backward.
    overlapped: runs during the exchanges of rows. Returns [T, H].
    """
    plan = None if first_pass is None else first_pass.dispatch
    if plan is None:
        plan = _exchange_counts(routing.counts, groups)
        if first_pass is not None:
            first_pass.dispatch = plan
    return through_ranks(x, routing, experts, plan, groups.tp_ep, overlapped)


def through_ranks(
    x: Tensor,
    routing: Routing,
    experts: Callable[[Tensor, Routing], Tensor],
    plan: DispatchPlan,
    group: dist.ProcessGroup,
    overlapped: OverlappedWork | None = None,
) -> Tensor:
    """`dispatched` with a plan. routing: over all experts of the ranks of `group`."""
    there = RowExchange(plan.sent, plan.received, group)
    away, back = (overlapped.dispatch, overlapped.combine) if overlapped else (None, None)
    # No name holds the rows that were sent: they are most of the layer's memory.
    rows = there.run(_outgoing(x, routing, plan), sum(plan.received), away)
    rows = experts(rows, _arrived_routing(plan))
    rows = there.reversed().run(rows, _returning(routing, plan), back)
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


class RowExchange:
    """All-to-all of rows among the ranks of `group`, and the opposite one in backward.

    sent, received: rows to and from each rank.
    """

    def __init__(self, sent: list[int], received: list[int], group: dist.ProcessGroup) -> None:
        self.sent, self.received, self.group = sent, received, group
        self._pending: tuple[dist.Work, Tensor] | None = None

    def reversed(self) -> RowExchange:
        """The exchange that returns the rows."""
        return RowExchange(self.received, self.sent, self.group)

    def run(self, x: Tensor, rows: int, overlapped: Callable[[], None] | None = None) -> Tensor:
        """Exchange the first rows: x [>= sum(sent), H] -> [rows, H], rows at least sum(received).

        Further rows, also those of the gradient, are not written. overlapped: is called while the
        rows travel, and its backward runs while their gradients do.
        """
        back = self.reversed()
        if overlapped is None:
            whole: Tensor = _Exchange.apply(x, rows, self, back)
            return whole
        started = _Start.apply(x, rows, self, back)
        overlapped()
        finished: Tensor = _Finish.apply(started, x.shape[0], self, back)
        return finished

    def whole(self, x: Tensor, rows: int) -> Tensor:
        """`start` and `finish`, on the current stream."""
        out, inputs = self._buffers(x, rows)
        dist.all_to_all_single(
            out[: sum(self.received)], inputs, self.received, self.sent, self.group
        )
        return out

    def start(self, x: Tensor, rows: int) -> Tensor:
        """Start an exchange of x; the rows that are returned have no values before `finish`."""
        out, inputs = self._buffers(x, rows)
        arriving = out[: sum(self.received)]
        work = dist.all_to_all_single(
            arriving, inputs, self.received, self.sent, self.group, async_op=True
        )
        self._pending = work, out
        return out

    def finish(self) -> Tensor:
        """Wait for the exchange that has started: on a GPU the stream waits, and not the host."""
        assert self._pending is not None
        (work, out), self._pending = self._pending, None
        work.wait()
        return out

    def _buffers(self, x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        return x.new_empty(rows, x.shape[1]), x[: sum(self.sent)].contiguous()


class _Exchange(torch.autograd.Function):
    """`RowExchange.run` without other work; `back` exchanges the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, exchange: RowExchange, back: RowExchange) -> Tensor:
        ctx.rows, ctx.back = x.shape[0], back
        return exchange.whole(x, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.back.whole(grads[0], ctx.rows), None, None, None


class _Start(torch.autograd.Function):
    """Starts the exchange of rows; backward waits for that of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, exchange: RowExchange, back: RowExchange) -> Tensor:
        ctx.back = back
        return exchange.start(x, rows)

    @staticmethod
    def backward(ctx: Any, *_grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.back.finish(), None, None, None


class _Finish(torch.autograd.Function):
    """Waits for the exchange of rows; backward starts that of their gradients."""

    @staticmethod
    def forward(
        ctx: Any, started: Tensor, rows: int, exchange: RowExchange, back: RowExchange
    ) -> Tensor:
        ctx.rows, ctx.back = rows, back
        exchange.finish()
        return started.view_as(started)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.back.start(grads[0], ctx.rows)
        # Nothing reads this gradient: `_Start` returns the exchanged one.
        return grads[0], None, None, None
