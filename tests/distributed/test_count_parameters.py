"""Parameter counting by a single rank inside a run of several ranks."""

from __future__ import annotations

from typing import Any

import torch
from helpers.ranks import run_ranks

from nemocascade.megatron.parameters import count_parameters
from nemocascade.megatron.world import start_world
from nemocascade.recipe import EngineConfig, ParallelConfig, tiny


def count_on_rank_1() -> dict[str, Any]:
    world = start_world(ParallelConfig(tp=2), EngineConfig(precision="fp32"))
    total = count_parameters(tiny()).total if world.rank == 1 else 0
    ones = torch.ones(1, device=world.device)
    torch.distributed.all_reduce(ones, group=world.groups.tp)
    world.close()
    return {"total": total, "sum": ones.item()}


def test_one_rank_of_two_counts_the_whole_model() -> None:
    here = count_parameters(tiny()).total
    assert run_ranks(count_on_rank_1, 2) == [{"total": 0, "sum": 2.0}, {"total": here, "sum": 2.0}]
