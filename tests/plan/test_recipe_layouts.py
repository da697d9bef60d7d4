"""The 30B recipes have layouts near the planner's best for the number of GPUs that they name.

A script's docstring says `On N GPUs, tp A x cp B leaves dp C`, and `rollouts on tp D, ep E`.
Training alone is compared for SFT, the whole expected step for RL and MOPD.
"""

from __future__ import annotations

import ast
import functools
import re
from dataclasses import replace
from pathlib import Path

import pytest

from nemocascade.plan.checkpoints import checkpoint_cost
from nemocascade.plan.gpus import find_gpu
from nemocascade.plan.job import Job, job_of_recipe
from nemocascade.plan.memory import available, worst_rank
from nemocascade.plan.rollout_step import best_generation, best_steps, expected_step
from nemocascade.plan.search import best_plans, legal_layouts, price
from nemocascade.plan.timing import StepModel
from nemocascade.recipe import (
    CascadeRecipe,
    ParallelConfig,
    RolloutParallelConfig,
    load_any_recipe,
)

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
NANO = RECIPES / "nemotron3_nano_30b"
SCRIPTS = sorted(p for p in RECIPES.glob("*_30b*/*.py") if p.stem != "cascade")
NEAR = 0.9
"""Least share of the best layout's speed."""


def docstring(script: Path) -> str:
    return " ".join((ast.get_docstring(ast.parse(script.read_text())) or "").split())


@functools.cache
def job_of(script: Path) -> Job:
    """The script's job, on the GPUs that it names."""
    recipe = load_any_recipe(script)
    assert not isinstance(recipe, CascadeRecipe)
    found = re.search(r"On (\d+) GPUs", docstring(script))
    assert found, f"{script.name} names no number of GPUs"
    return job_of_recipe(recipe, find_gpu("h200"), int(found[1]), preset=script.parent.name)


def faster_layouts(job: Job) -> list[str]:
    """Layouts that fit and train faster than the job's own by more than a tenth."""
    least = price(job).time.total * NEAR
    found = []
    for other in legal_layouts(job):
        # The bound saves most of the work.
        model = StepModel(other)
        if model.bound() < least and worst_rank(other).total <= available(other):
            plan = price(other)
            if plan.time.total < least:
                found.append(f"{plan.describe()}: {plan.time.total:.1f} s")
    return found


def faster_step(job: Job) -> str:
    """A step that is faster than the job's own by more than a tenth: with another layout of
    generation, or with others of both."""
    own = expected_step(job)
    generation = best_generation(job)
    assert generation is not None
    best = min([generation, *best_steps(best_plans(job, count=2))], key=lambda step: step.total)
    # Training alone hides in rollouts that take much longer, and the other way round.
    slow = best.total < own.total * NEAR or generation.total < own.total * NEAR
    rollouts = [step.total - step.training for step in (generation, own)]
    if slow or rollouts[0] < rollouts[1] * NEAR:
        return f"{own.phases()}; better: {best.job.parallel} {best.job.rollout} {best.phases()}"
    return ""


def name_of(script: Path) -> str:
    return f"{script.parent.name}/{script.stem}"


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_a_recipe_is_near_the_planners_best(script: Path) -> None:
    job = job_of(script)
    plan = price(job)
    assert plan.fits
    if job.work is not None:
        assert not faster_step(job)
        return
    faster = faster_layouts(job)
    assert not faster, f"{plan.describe()}: {plan.time.total:.1f} s; better: {faster[:5]}"


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_a_docstring_says_its_layout(script: Path) -> None:
    job, p = job_of(script), job_of(script).parallel
    axes = (
        f"tp {p.tp}" + (f" x cp {p.cp}" if p.cp > 1 else "") + (f" x pp {p.pp}" if p.pp > 1 else "")
    )
    wanted = f"{axes} leaves dp {p.data_parallel(job.world_size)}, and ep {p.ep} uses the same"
    assert wanted in docstring(script)
    if job.work is not None:
        own = job.rollout.parallel.layout(p)
        assert f"rollouts on tp {own.tp}, ep {own.ep}" in docstring(script)


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_saving_every_step_costs_less_than_a_fiftieth_of_a_long_step(script: Path) -> None:
    job, step_s = job_of(script), 300.0
    assert job.checkpoint.asynchronous
    cost = checkpoint_cost(job)
    assert 0 < cost.copy_s <= cost.blocked_s(step_s, asynchronous=True) < 0.02 * step_s
    # The check itself: a write that training waits for costs more.
    assert cost.blocked_s(step_s, asynchronous=False) > 0.02 * step_s


def test_a_slow_layout_is_found() -> None:
    """The check itself: SFT with a pipeline, and rollouts on a layout that is slow."""
    job = job_of(NANO / "sft.py")
    slow = job.with_layout(ParallelConfig(tp=8, pp=2, ep=8), recompute=True)
    assert any(f"tp {job.parallel.tp} cp {job.parallel.cp} " in f for f in faster_layouts(slow))
    rollouts = job_of(NANO / "if_rl.py")
    load = replace(rollouts.rollout, parallel=RolloutParallelConfig(tp=8, pp=1, ep=1))
    assert faster_step(replace(rollouts, rollout=load))
