"""Rows that expert parallelism moves: across nodes, and inside them."""

from __future__ import annotations

from math import comb
from typing import NamedTuple

from nemocascade.recipe import ModelConfig, ParallelConfig


class ExpertRows(NamedTuple):
    """Rows of a token in one exchange, with evenly loaded experts.

    network: to other nodes. link: to other ranks of a node. pairs: the token's nodes, its own among
    them, if rows are summed for each; otherwise 0. two_hops: they go through the network first.
    """

    network: float
    link: float
    pairs: float = 0.0
    two_hops: bool = False


def expert_rows(
    model: ModelConfig, parallel: ParallelConfig, per_node: int, exchange: str
) -> ExpertRows:
    """Rows of `EngineConfig.expert_exchange` on nodes of `per_node` GPUs.

    Of K experts among E, a node with E / N of them holds none with the probability
    `C(E - E / N, K) / C(E, K)`. DeepEP sends a row once to a rank, which saves little of the hop
    inside a node, and counts as hierarchical.
    """
    ranks, top_k = parallel.ep * parallel.etp, model.experts_per_token
    slots = float(top_k * parallel.etp)
    if ranks <= per_node:
        return ExpertRows(0.0, slots * (ranks - 1) / ranks)
    link = slots * (per_node - 1) / ranks
    nodes = parallel.expert_nodes(per_node)
    if nodes == 1:
        # The ranks do not fill their nodes.
        return ExpertRows(slots * (ranks - per_node) / ranks, link)
    experts = model.num_experts
    reached = 1.0 - comb(experts - experts // nodes, top_k) / comb(experts, top_k)
    if exchange == "direct":
        return ExpertRows(slots * (nodes - 1) / nodes, link, nodes * reached)
    inside = slots * (per_node - 1) / per_node
    return ExpertRows((nodes - 1) * reached, inside, nodes * reached, two_hops=True)
