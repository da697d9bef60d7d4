"""Groups of the generation layout, in a fake world of more ranks than a test can start."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch.distributed as dist
from helpers.fake_megatron import fake_megatron_world
from megatron.core.process_groups_config import ProcessGroupCollection

from nemocascade.megatron.groups import group_ranks
from nemocascade.megatron.world import generation_world
from nemocascade.recipe import EngineConfig, ParallelConfig

LAYOUTS = {
    "no axis of size 1": ParallelConfig(tp=2, cp=2, pp=2, ep=2, etp=2),
    "cp of size 1": ParallelConfig(tp=2, pp=2, ep=2, etp=2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_may_be_a_replica_of_its_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training has no group of a single rank where all of its axes are larger."""
    made = dist.new_group
    monkeypatch.setattr(dist, "new_group", lambda ranks, **_kwargs: made(ranks, backend="fake"))
    for rank in (0, 11):
        with fake_megatron_world(rank, 16, LAYOUTS[name]) as world:
            named = group_ranks(rank, 16, world.parallel)
            # Megatron's further groups of one rank come and go with its versions.
            for f in fields(ProcessGroupCollection):
                if f.name not in named:
                    setattr(world.groups, f.name, None)
            alone = ParallelConfig()
            found = generation_world(world, alone, EngineConfig())
            for group, ranks in group_ranks(rank, 16, alone).items():
                held = getattr(found.groups, group)
                assert dist.get_process_group_ranks(held) == ranks, group
