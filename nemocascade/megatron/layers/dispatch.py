"""Expert parallelism: dispatch of rows to the ranks that hold their experts, and combine.

One all-to-all over the joint expert group (ep x etp) serves both axes: a row is sent to every rank
of its expert's tensor-parallel group, and its source rank sums the partial results. Slots are
already sorted by expert, so no dense [T, E] tensor is made. The host must know the message sizes,
which costs one synchronisation a layer.

Shape letters: T tokens, S routed slots of this rank, R rows that arrive, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import all_to_all
from nemocascade_kernels import Routing, make_routing, moe_unpermute
from torch import Tensor


def dispatched(
    x: Tensor,
    routing: Routing,
    experts: Callable[[Tensor, Routing], Tensor],
    groups: ProcessGroupCollection,
) -> Tensor:
    """`sum_k weights_k expert_k(x)` with experts on other ranks.

    x: [T, H]. routing: over all experts. experts: applies this rank's experts to rows [R, H] with a
    routing of one expert a row. Returns [T, H].
    """
    etp = groups.expt_tp.size()
    ep = groups.ep.size()
    local_experts = routing.num_experts // ep
    counts = routing.counts.view(ep, local_experts)
    plan = _exchange_counts(counts, groups, etp)
    slots = routing.order[: sum(plan.to_owner)]
    expert_of_slot = torch.repeat_interleave(
        torch.arange(ep * local_experts, device=x.device), routing.counts.long()
    ).remainder(local_experts)
    copies = _copy_index(plan.to_owner, etp, x.device)
    rows = x.index_select(0, (slots // routing.top_k).long()[copies])
    sent = all_to_all(groups.tp_ep, rows, plan.received, plan.sent)
    ids = _send_ids(expert_of_slot[copies], plan, groups)
    ones = torch.ones(ids.numel(), 1, dtype=torch.float32, device=x.device)
    y = experts(sent, make_routing(ids[:, None], ones, local_experts))
    back = all_to_all(groups.tp_ep, y, plan.sent, plan.received)
    # Slots of padding are not dispatched; they come last.
    masked = routing.order.numel() - slots.numel()
    y = F.pad(_sum_copies(back, plan.to_owner, etp), (0, 0, 0, masked))
    return moe_unpermute(y, routing)


class _Plan:
    """Message sizes. to_owner: slots for each ep rank; sent, received: rows for each rank."""

    def __init__(self, to_owner: list[int], sent: list[int], received: list[int]) -> None:
        self.to_owner, self.sent, self.received = to_owner, sent, received


def _exchange_counts(counts: Tensor, groups: ProcessGroupCollection, etp: int) -> _Plan:
    per_owner = counts.sum(1).to(torch.int64)
    outgoing = per_owner.repeat_interleave(etp)
    incoming = torch.empty_like(outgoing)
    dist.all_to_all_single(incoming, outgoing, group=groups.tp_ep)
    return _Plan(per_owner.tolist(), outgoing.tolist(), incoming.tolist())


def _send_ids(ids: Tensor, plan: _Plan, groups: ProcessGroupCollection) -> Tensor:
    arrived = ids.new_empty(sum(plan.received))
    dist.all_to_all_single(arrived, ids.contiguous(), plan.received, plan.sent, groups.tp_ep)
    return arrived


def _copy_index(to_owner: list[int], etp: int, device: torch.device) -> Tensor:
    """Send order of the slots: each owner's segment, once for each rank of its group."""
    ends = list(accumulate(to_owner))
    stretches = [
        torch.arange(end - n, end, device=device).repeat(etp)
        for n, end in zip(to_owner, ends, strict=True)
    ]
    return torch.cat(stretches)


def _sum_copies(back: Tensor, to_owner: list[int], etp: int) -> Tensor:
    """Sum the copies: [S * etp, H] in the order of `_copy_index` -> [S, H]."""
    if etp == 1:
        return back
    parts = back.split([n * etp for n in to_owner])
    return torch.cat([p.view(etp, -1, back.shape[-1]).sum(0) for p in parts])
