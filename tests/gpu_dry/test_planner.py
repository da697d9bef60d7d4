"""The planner's peak memory beside that of the dry run, for one layer of each kind."""

from __future__ import annotations

import pytest
from gpu_dry import run as dry
from gpu_dry import suite

from nemocascade.plan.gpus import GPUS
from nemocascade.plan.job import Job
from nemocascade.plan.memory import worst_rank
from nemocascade.recipe import MoeTrainingConfig, OptimizerConfig

LAYERS = [
    f"nano-{kind}{end}" for kind in ("mamba", "attention", "moe") for end in ("", "-recompute")
]


@pytest.mark.parametrize("name", LAYERS)
def test_peak_memory_is_within_five_percent(name: str) -> None:
    case, budget = suite.CASES[name], dry.read_budgets()["cases"][name]
    planned = worst_rank(
        Job(
            model=case.model,
            parallel=case.parallel,
            engine=case.engine,
            moe=MoeTrainingConfig(),
            optimizer=OptimizerConfig(),
            capacity=case.tokens,
            sequences_per_step=2,
            gpu=GPUS["h100"],
            world_size=1,
            document=case.tokens // 4,
            imbalance=1.0,
            fla=True,
        )
    )
    # A context and libraries take memory that no tensor shows.
    predicted, measured = planned.total - planned.other, budget["peak_bytes"]
    assert predicted == pytest.approx(measured, rel=0.05), planned.table()
