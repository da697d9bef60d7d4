"""The planner's peak memory beside that of the dry run, for one layer of each kind."""

from __future__ import annotations

import pytest
from gpu_dry import run as dry
from gpu_dry import suite
from gpu_dry.cases import Case

from nemocascade.plan.gpus import GPUS
from nemocascade.plan.job import Job
from nemocascade.plan.memory import worst_rank
from nemocascade.recipe import MoeTrainingConfig

LAYERS = [
    f"nano-{kind}{end}"
    for kind in ("mamba", "mamba-fla", "attention", "moe")
    for end in ("", "-recompute")
]
LAYERS += ["nano-moe-fp8"]
CONTEXT = [f"nano-{what}-cp8" for what in ("mamba", "attention", "moe", "sft")]
WHOLE = ["nano-sft-cp2", "nano-sft-cp8", "nano-sft-tp8"]


def job_of(case: Case, document: int) -> Job:
    """The case in the planner's terms."""
    return Job(
        model=case.model,
        parallel=case.parallel,
        engine=case.engine,
        moe=MoeTrainingConfig(),
        optimizer=case.optimizer,
        capacity=case.tokens,
        sequences_per_step=case.parallel.data_parallel(case.world) * max(case.steps),
        gpu=GPUS["h100"],
        world_size=case.world,
        document=document,
        imbalance=1.0,
        mixer=case.accelerators.mamba2 or "triton",
        lora=case.lora,
    )


@pytest.mark.parametrize("name", dict.fromkeys(LAYERS + CONTEXT + WHOLE))
def test_peak_memory_is_within_five_percent(name: str) -> None:
    case, budget = suite.CASES[name], dry.read_budgets()["cases"][name]
    # Under context parallelism the case's rank holds parts of its longest document.
    parts = 4 if case.parallel.cp == 1 else 2
    planned = worst_rank(job_of(case, case.tokens // parts))
    # A context and libraries take memory that no tensor shows.
    predicted, measured = planned.total - planned.other, budget["peak_bytes"]
    assert predicted == pytest.approx(measured, rel=0.05), planned.table()
