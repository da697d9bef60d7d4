"""The ranks of Megatron's process groups, for any layout, and the groups themselves.

The order of axes is tp, cp, dp, pp for dense groups and etp, ep, expert dp, pp for expert groups;
the first varies fastest, as in Megatron's `parallel_state`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection

from nemocascade.recipe import ParallelConfig

# Axes that each group spans.
_DENSE = {
    "tp": "tp",
    "pp": "pp",
    "mp": "tp-pp",
    "cp": "cp",
    "tp_cp": "tp-cp",
    "dp": "dp",
    "dp_cp": "dp-cp",
    "intra_dp_cp": "dp-cp",
    "tp_dp_cp": "tp-dp-cp",
    "embd": "pp",
    "pos_embd": "pp",
}
_EXPERT = {
    "ep": "ep",
    "expt_tp": "tp",
    "tp_ep": "tp-ep",
    "tp_ep_pp": "tp-ep-pp",
    "expt_dp": "dp",
    "intra_expt_dp": "dp",
}


HOST = ("dp", "dp_cp", "mp", "cp", "tp_ep")
"""Groups whose ranks exchange host tensors too. On GPUs, the others have no gloo group beside
NCCL's."""


def group_ranks(rank: int, size: int, parallel: ParallelConfig) -> dict[str, list[int]]:
    """The ranks of each of Megatron's groups that contains `rank`."""
    p = parallel
    stage = size // p.pp
    dense = {"tp": p.tp, "cp": p.cp, "dp": stage // p.tp // p.cp, "pp": p.pp}
    expert = {"tp": p.etp, "ep": p.ep, "dp": stage // p.etp // p.ep, "pp": p.pp}
    found = {name: _along(rank, dense, axes) for name, axes in _DENSE.items()}
    return found | {name: _along(rank, expert, axes) for name, axes in _EXPERT.items()}


def _along(rank: int, sizes: dict[str, int], axes: str) -> list[int]:
    """Ranks that differ from `rank` only on `axes`."""
    strides, stride = {}, 1
    for axis, size in sizes.items():
        strides[axis], stride = stride, stride * size
    chosen = [a for a in sizes if a in axes.split("-")]
    base = rank - sum(rank // strides[a] % sizes[a] * strides[a] for a in chosen)
    ranks = [base]
    for axis in chosen:
        ranks = [r + i * strides[axis] for i in range(sizes[axis]) for r in ranks]
    return sorted(ranks)


def own_groups(
    rank: int, size: int, parallel: ParallelConfig, new_group: Callable[[Sequence[int]], Any]
) -> ProcessGroupCollection:
    """The groups of `rank`; groups of the same ranks are one.

    new_group: makes the group of some ranks, once for each.
    """
    made: dict[tuple[int, ...], Any] = {}

    def group(ranks: Sequence[int]) -> Any:
        key = tuple(ranks)
        if key not in made:
            made[key] = new_group(ranks)
        return made[key]

    named = {name: group(ranks) for name, ranks in group_ranks(rank, size, parallel).items()}
    alone = group([rank])
    return ProcessGroupCollection(
        **{f.name: named.get(f.name, alone) for f in fields(ProcessGroupCollection)}
    )


def host_groups(size: int, parallel: ParallelConfig) -> set[tuple[int, ...]]:
    """The ranks of every group of `HOST`."""
    every = [group_ranks(rank, size, parallel) for rank in range(size)]
    return {tuple(ranks[name]) for ranks in every for name in HOST}


@dataclass(frozen=True)
class ExpertNodes:
    """The nodes that an expert group (ep x etp) spans.

    count: number of nodes. rail: group of the ranks with this rank's index on each of them; None
    if rows take one hop. local: group of the ranks on this rank's node.
    """

    count: int
    rail: Any = None
    local: Any = None


def hop_groups(
    size: int, parallel: ParallelConfig, ranks_per_node: int
) -> list[tuple[tuple[int, ...], ...]]:
    """The ranks of every rail and of every node, for each expert group, in a fixed order."""
    ranks, found = parallel.ep * parallel.etp, []
    for first in range(0, size, ranks):
        group = range(first, first + ranks)
        rails = [tuple(group[i::ranks_per_node]) for i in range(ranks_per_node)]
        local = [tuple(group[i : i + ranks_per_node]) for i in range(0, ranks, ranks_per_node)]
        found.append((*rails, *local))
    return found


def named_groups(size: int, parallel: ParallelConfig) -> list[tuple[int, ...]]:
    """The ranks of every group of Megatron's, each once, in a fixed order."""
    found: dict[tuple[int, ...], None] = {}
    for rank in range(size):
        found |= dict.fromkeys(map(tuple, group_ranks(rank, size, parallel).values()))
    return list(found)


def all_groups(size: int, parallel: ParallelConfig) -> list[tuple[int, ...]]:
    """The ranks of every group that `own_groups` makes on any rank, each once, in a fixed order."""
    return list(dict.fromkeys([*named_groups(size, parallel), *((r,) for r in range(size))]))
