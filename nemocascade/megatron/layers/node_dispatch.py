"""Expert parallelism over several nodes: a token's row crosses the network once for each node.

A pair is a token and a node that holds some of its experts. The results of a token's experts are
summed for each pair, then over its pairs. With two hops, a pair's row and routing go to the rank of
the same index on that node (the rail), which dispatches the row to the node's experts and returns
the pair's sum. With one hop, the source rank exchanges a row for each expert with all ranks, and
computes both sums itself. Both ways give the same bits in fp32.

Shape letters: T tokens, K experts a token, E experts, N nodes, P pairs on this rank and a row of
padding, R pairs that arrive, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from nemocascade_kernels import Routing, make_routing, moe_permute, moe_unpermute
from torch import Tensor

from nemocascade.megatron.groups import ExpertNodes
from nemocascade.megatron.layers.dispatch import OverlappedWork, RowExchange, through_ranks
from nemocascade.megatron.microbatch import DispatchPlan, FirstPass, NodePlan


def dispatched_over_nodes(
    x: Tensor,
    routing: Routing,
    experts: Callable[[Tensor, Routing], Tensor],
    groups: ProcessGroupCollection,
    nodes: ExpertNodes,
    first_pass: FirstPass | None = None,
    overlapped: OverlappedWork | None = None,
) -> Tensor:
    """`sum_k weights_k expert_k(x)` with experts on the ranks of several nodes.

    The arguments are those of `dispatched`; with two hops, `overlapped` runs during those over the
    network. nodes: of the expert group. Returns [T, H].
    """
    plan = None if first_pass is None else first_pass.node_dispatch
    pairs = _pairs(routing, nodes.count)
    if plan is None:
        plan = (_plan_one_hop if nodes.rail is None else _plan_two_hops)(
            routing.counts, pairs.counts, groups, nodes
        )
        if first_pass is not None:
            first_pass.node_dispatch = plan
    pairs = pairs.truncated(sum(plan.sent))
    rows = moe_permute(x, pairs)
    ids, weights = _pair_experts(routing, pairs)
    if nodes.rail is None:
        own = make_routing(ids, weights, routing.num_experts)
        rows = _within(rows, own, experts, plan.ranks, groups.tp_ep, overlapped)
    else:
        rows = _over_rail(rows, ids, weights, routing.num_experts, experts, plan, nodes, overlapped)
    summed: Tensor = _SumPairs.apply(rows, pairs)
    return summed


def _pairs(routing: Routing, nodes: int) -> Routing:
    """The nodes of every token as its "experts": [T, min(N, K)], increasing, each once."""
    # A token without experts has the id E, and so the node N, which means none.
    of_slot = routing.experts // (routing.num_experts // nodes)
    of_slot = of_slot.sort(dim=1).values
    of_slot[:, 1:].masked_fill_(of_slot[:, 1:] == of_slot[:, :-1], nodes)
    found = of_slot.sort(dim=1).values[:, : min(nodes, routing.top_k)].contiguous()
    return make_routing(found, (found < nodes).float(), nodes)


def _pair_experts(routing: Routing, pairs: Routing) -> tuple[Tensor, Tensor]:
    """Experts [P, K] int32 of each pair's token on the pair's node, E elsewhere; their weights."""
    nodes, count = pairs.num_experts, routing.num_experts
    slot = pairs.order.long()
    node = pairs.experts.flatten()[slot][:, None]
    ids = routing.experts[slot // pairs.top_k]
    absent = (ids // (count // nodes) != node) | (node == nodes)
    weights = moe_permute(routing.weights, pairs).masked_fill(absent, 0.0)
    return ids.masked_fill(absent, count), weights


def _within(
    rows: Tensor,
    routing: Routing,
    experts: Callable[[Tensor, Routing], Tensor],
    plan: DispatchPlan,
    group: dist.ProcessGroup,
    overlapped: OverlappedWork | None = None,
) -> Tensor:
    """Each pair's sum over its experts on the ranks of `group`: rows [P, H] -> [P, H]."""
    own = routing.truncated(sum(plan.to_owner))
    return through_ranks(rows, own, experts, plan, group, overlapped)


def _over_rail(
    rows: Tensor,
    ids: Tensor,
    weights: Tensor,
    num_experts: int,
    experts: Callable[[Tensor, Routing], Tensor],
    plan: NodePlan,
    nodes: ExpertNodes,
    overlapped: OverlappedWork | None,
) -> Tensor:
    """Each pair's sum, computed on its node: rows [P, H], ids and weights [P, K] -> [P, H]."""
    assert nodes.rail is not None
    padded, arriving = rows.shape[0], sum(plan.received)
    away, back = (overlapped.dispatch, overlapped.combine) if overlapped else (None, None)
    there = RowExchange(plan.sent, plan.received, nodes.rail)
    of_node = num_experts // nodes.count
    local = (ids % of_node).masked_fill(ids == num_experts, of_node)
    # Ids are exact in float32, and travel with the weights.
    routed = there.run(torch.cat([weights, local.float()], 1), arriving)
    rows = RowExchange(plan.sent, plan.received, nodes.rail).run(rows, arriving, away)
    weights, local = routed.chunk(2, dim=1)
    own = make_routing(local.detach().int(), weights.contiguous(), of_node)
    rows = _within(rows, own, experts, plan.ranks, nodes.local)
    return there.reversed().run(rows, padded, back)


def _plan_one_hop(
    counts: Tensor, pairs: Tensor, groups: ProcessGroupCollection, nodes: ExpertNodes
) -> NodePlan:
    """Exchange the counts of all ranks' slots. counts: [E]. pairs: [N], pairs of this rank."""
    ep, etp = groups.ep.size(), groups.expt_tp.size()
    counts = counts.view(ep, -1)
    outgoing = counts.repeat_interleave(etp, dim=0)
    arrived = torch.empty_like(outgoing)
    dist.all_to_all_single(arrived, outgoing, group=groups.tp_ep)
    sizes = torch.cat([pairs, counts.sum(1), arrived.sum(1)]).cpu().tolist()
    sent, to_owner, received = _cut(sizes, nodes.count, ep, ep * etp)
    return NodePlan(sent, [], DispatchPlan(to_owner, received, arrived[..., None]))


def _plan_two_hops(
    counts: Tensor, pairs: Tensor, groups: ProcessGroupCollection, nodes: ExpertNodes
) -> NodePlan:
    """Exchange the counts of pairs and slots along the rail, then those of slots in the node.

    counts: [E]. pairs: [N], pairs of this rank. The host waits for the device once.
    """
    count, etp = nodes.count, groups.expt_tp.size()
    owners = groups.ep.size() // count
    outgoing = torch.cat([counts.view(count, -1), pairs[:, None]], 1)
    arrived = torch.empty_like(outgoing)
    dist.all_to_all_single(arrived, outgoing, group=nodes.rail)
    by_owner = arrived[:, :-1].reshape(count, owners, -1).permute(1, 2, 0)
    outgoing = by_owner.repeat_interleave(etp, dim=0)
    inside = torch.empty_like(outgoing, memory_format=torch.contiguous_format)
    dist.all_to_all_single(inside, outgoing.contiguous(), group=nodes.local)
    parts = [pairs, arrived[:, -1], by_owner.sum((1, 2)), inside.sum((1, 2))]
    sizes = torch.cat(parts).cpu().tolist()
    sent, received, to_owner, from_rank = _cut(sizes, count, count, owners, owners * etp)
    return NodePlan(sent, received, DispatchPlan(to_owner, from_rank, inside))


def _cut(values: list[int], *lengths: int) -> list[list[int]]:
    rest = iter(values)
    return [[next(rest) for _ in range(length)] for length in lengths]


class _SumPairs(torch.autograd.Function):
    """Sum of each token's pairs, [P, H] -> [T, H]. It keeps the routing only, and no rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, pairs: Routing) -> Tensor:
        ctx.pairs = pairs
        return moe_unpermute(rows, pairs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return moe_permute(grads[0].contiguous(), ctx.pairs), None
