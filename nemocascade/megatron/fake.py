"""One rank of a world of any size in a single process, with collectives that do nothing.

It builds a rank's part of a model on the meta device without the other ranks. Shapes and byte
counts are exact, and there are no values. torch's fake backend replaces NCCL.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.testing._internal.distributed.fake_pg import FakeStore

from nemocascade.megatron.config import Accelerators, make_config
from nemocascade.megatron.model import CascadeModel, build_model
from nemocascade.recipe import EngineConfig, ModelConfig, MoeTrainingConfig, ParallelConfig
from nemocascade.runtime.world import World

# Axes that each of Megatron's groups spans. The order of axes is tp, cp, dp, pp for dense groups
# and etp, ep, expert dp, pp for expert groups; the first varies fastest, as in `parallel_state`.
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


@contextlib.contextmanager
def fake_world(rank: int, size: int, parallel: ParallelConfig) -> Iterator[World]:
    """Rank `rank` of `size`, with the groups that a model needs; nothing is ever sent.

    Raises RuntimeError if this process already has a process group.
    """
    with _fake_group(rank, size):
        groups = _own_groups(rank, size, parallel)
        yield _world(rank, size, parallel, groups)


@contextlib.contextmanager
def _fake_group(rank: int, size: int) -> Iterator[None]:
    if dist.is_initialized():
        raise RuntimeError("a fake world needs a process without a process group")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _world(rank: int, size: int, parallel: ParallelConfig, groups: ProcessGroupCollection) -> World:
    return World(
        rank=rank,
        size=size,
        device=torch.device("meta"),
        parallel=parallel,
        groups=groups,
    )


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


def _own_groups(rank: int, size: int, parallel: ParallelConfig) -> ProcessGroupCollection:
    made: dict[tuple[int, ...], Any] = {}

    def group(ranks: list[int]) -> Any:
        key = tuple(ranks)
        if key not in made:
            made[key] = dist.new_group(ranks, backend="fake")
        return made[key]

    named = {name: group(ranks) for name, ranks in group_ranks(rank, size, parallel).items()}
    alone = group([rank])
    return ProcessGroupCollection(
        **{f.name: named.get(f.name, alone) for f in fields(ProcessGroupCollection)}
    )


def build_on_meta(
    world: World, shape: ModelConfig, engine: EngineConfig, moe: MoeTrainingConfig
) -> list[CascadeModel]:
    """This rank's chunks on the meta device. world: a fake one."""
    config = make_config(shape, world.parallel, engine, moe, seed=0)
    with torch.device("meta"):
        return build_model(world, config, Accelerators())
