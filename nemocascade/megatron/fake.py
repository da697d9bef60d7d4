"""One rank of a world of any size in a single process, with collectives that do nothing.

It builds a rank's part of a model on the meta device without the other ranks. Shapes and byte
counts are exact, and there are no values. torch's fake backend replaces NCCL.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.testing._internal.distributed.fake_pg import FakeStore

from nemocascade.megatron.config import Accelerators, make_config
from nemocascade.megatron.groups import own_groups
from nemocascade.megatron.model import CascadeModel, build_model
from nemocascade.recipe import EngineConfig, ModelConfig, MoeTrainingConfig, ParallelConfig
from nemocascade.runtime.world import World


@contextlib.contextmanager
def fake_world(rank: int, size: int, parallel: ParallelConfig) -> Iterator[World]:
    """Rank `rank` of `size`, with the groups that a model needs; nothing is ever sent.

    Raises RuntimeError if this process already has a process group.
    """
    with _fake_group(rank, size):
        groups = own_groups(rank, size, parallel, functools.partial(dist.new_group, backend="fake"))
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


def build_on_meta(
    world: World, shape: ModelConfig, engine: EngineConfig, moe: MoeTrainingConfig
) -> list[CascadeModel]:
    """This rank's chunks on the meta device. world: a fake one."""
    config = make_config(shape, world.parallel, engine, moe, seed=0)
    with torch.device("meta"):
        return build_model(world, config, Accelerators())
