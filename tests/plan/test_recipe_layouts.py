"""The 30B recipes have layouts near the planner's best for the number of GPUs that they name.

A script's docstring says `On N GPUs, tp A x cp B leaves dp C`. A reason to hold an axis is there
too, as in `pp 1, because ..`: the recipe is then compared with layouts of the same pp.
"""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest

from nemocascade.plan.gpus import find_gpu
from nemocascade.plan.job import Job, job_of_recipe
from nemocascade.plan.memory import available, worst_rank
from nemocascade.plan.search import AXES, legal_layouts, price
from nemocascade.plan.timing import StepModel
from nemocascade.recipe import CascadeRecipe, ParallelConfig, load_any_recipe

NANO = Path(__file__).resolve().parents[2] / "recipes" / "nemotron3_nano_30b"
SCRIPTS = sorted(path for path in NANO.glob("*.py") if path.stem != "cascade")
NEAR = 0.9
"""Least share of the best layout's speed."""


def docstring(script: Path) -> str:
    return " ".join((ast.get_docstring(ast.parse(script.read_text())) or "").split())


def job_of(script: Path) -> Job:
    """The script's job, on the GPUs that it names."""
    recipe = load_any_recipe(script)
    assert not isinstance(recipe, CascadeRecipe)
    found = re.search(r"On (\d+) GPUs", docstring(script))
    assert found, f"{script.name} names no number of GPUs"
    return job_of_recipe(recipe, find_gpu("h200"), int(found[1]), preset="nemotron3_nano_30b")


def held_axes(script: Path) -> set[str]:
    """Axes with a reason in the docstring."""
    return set(re.findall(rf"\b({'|'.join(AXES)}) \d+, because \w", docstring(script)))


def faster_layouts(job: Job, held: set[str]) -> list[str]:
    """Layouts that fit and are faster than the job's own by more than a tenth."""
    least = price(job).time.total * NEAR
    found = []
    for other in legal_layouts(job):
        if any(getattr(other.parallel, a) != getattr(job.parallel, a) for a in held):
            continue
        # The bound saves most of the work.
        model = StepModel(other)
        if model.bound() < least and worst_rank(other).total <= available(other):
            plan = price(other)
            if plan.time.total < least:
                found.append(f"{plan.describe()}: {plan.time.total:.1f} s")
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_a_recipe_is_near_the_planners_best(script: Path) -> None:
    job = job_of(script)
    plan = price(job)
    assert plan.fits
    faster = faster_layouts(job, held_axes(script))
    assert not faster, f"{plan.describe()}: {plan.time.total:.1f} s; better: {faster[:5]}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_a_docstring_says_its_layout(script: Path) -> None:
    job, p = job_of(script), job_of(script).parallel
    axes = (
        f"tp {p.tp}" + (f" x cp {p.cp}" if p.cp > 1 else "") + (f" x pp {p.pp}" if p.pp > 1 else "")
    )
    wanted = f"{axes} leaves dp {p.data_parallel(job.world_size)}, and ep {p.ep} uses the same"
    assert wanted in docstring(script)


def test_a_slow_layout_is_found_and_a_reason_accepted() -> None:
    """The check itself: SFT with a pipeline, and with tp 8 that has a reason."""
    job = job_of(NANO / "sft.py")
    slow = replace(job, parallel=ParallelConfig(tp=8, pp=2, ep=8))
    slow = replace(slow, engine=replace(job.engine, recompute=True))
    assert any(
        f"tp {job.parallel.tp} cp {job.parallel.cp} " in f for f in faster_layouts(slow, set())
    )
    assert all(" pp 2 " in f for f in faster_layouts(slow, {"pp"}))
    assert held_axes(NANO / "if_rl.py") == {"pp"}
