"""The ranks of Megatron's process groups, for any layout, and the groups themselves.

The order of axes is tp, cp, dp, pp for dense groups and etp, ep, expert dp, pp for expert groups;
the first varies fastest, as in Megatron's `parallel_state`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
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


def all_groups(size: int, parallel: ParallelConfig) -> list[tuple[int, ...]]:
    """The ranks of every group that `own_groups` makes on any rank, each once, in a fixed order."""
    found: dict[tuple[int, ...], None] = {}
    for rank in range(size):
        of_rank = group_ranks(rank, size, parallel)
        found |= dict.fromkeys(tuple(ranks) for ranks in (*of_rank.values(), [rank]))
    return list(found)
