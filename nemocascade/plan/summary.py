"""Report of `nemocascade plan`: the recipe's layout, the fastest ones, the nearest that fits."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, replace
from typing import Annotated, Any

import tyro

from nemocascade.plan.gpus import find_gpu
from nemocascade.plan.job import Job, job_of_recipe
from nemocascade.plan.memory import GIB, available
from nemocascade.plan.search import (
    AXES,
    PricedLayout,
    best_plans,
    faults,
    least_memory,
    nearest_fitting,
    price,
)
from nemocascade.recipe import ModelConfig, StageRecipe
from nemocascade.recipe.rules import Count, Natural, Range


@dataclass(frozen=True)
class PlanSettings:
    """Predict the worst rank's memory and the step time of a recipe, over all legal layouts."""

    recipe: tyro.conf.Positional[str]
    """Recipe script."""

    gpus: Count = 8
    """Number of ranks."""

    gpu: str = "h200"
    """A known accelerator, or a JSON file with the fields of nemocascade.plan.gpus.Gpu."""

    model: str = ""
    """Model preset, for a recipe whose start artifact does not exist yet."""

    best: Count = 10
    """Number of layouts to print."""

    document: Natural = 0
    """Length of the documents that fill a pack; 0 = one document of the whole capacity."""

    longest: Natural = 0
    """Tokens of the longest document: packs may be halved down to it; 0 = fixed capacity."""

    imbalance: Annotated[float, Range(1)] = 1.5
    """Rows of the busiest rank's experts, relative to the mean."""

    teachers: Natural = 0
    """Number of teacher models kept on the device."""

    rollout_sequences: Natural = 0
    """Concurrent rollout sequences on the training ranks, over the world; 0 = the recipe's own."""

    rollout_length: Natural = 0
    """Length of the rollout sequences in tokens."""

    margin: Annotated[float, Range(0, 1, open_high=True)] = 0.08
    """Share of the device's memory to leave free."""

    fla: bool = True
    """Plan for fla-core's Mamba scan, which keeps less for backward than the one in torch."""

    json: bool = False
    """Print one JSON object."""


def plan_recipe(recipe: StageRecipe, settings: PlanSettings) -> str:
    """Plan report of a recipe. Raises PlanError for an unknown accelerator or model."""
    text, value = report_of(recipe, settings)
    return json.dumps(value, indent=1) if settings.json else text


def report_of(
    recipe: StageRecipe, settings: PlanSettings, model: ModelConfig | None = None
) -> tuple[str, dict[str, Any]]:
    """Plan report of a recipe, as text and as JSON values. model: the model, if already known.

    Raises PlanError for an unknown accelerator or model.
    """
    job = job_of_recipe(
        recipe,
        find_gpu(settings.gpu),
        settings.gpus,
        preset=settings.model,
        model=model,
        document=settings.document,
        imbalance=settings.imbalance,
        teachers=settings.teachers,
        margin=settings.margin,
        fla=settings.fla and recipe.engine.fla != "off",
    )
    if settings.rollout_sequences:
        load = replace(
            job.rollout, sequences=settings.rollout_sequences, length=settings.rollout_length
        )
        job = replace(job, rollout=load)
    problems = faults(job)
    best = best_plans(job, count=settings.best, longest=settings.longest)
    nearest = nearest_fitting(job) if problems else None
    text = "\n".join(_lines(job, problems, best, nearest, settings))
    return text, _as_json(job, problems, best, nearest)


def _lines(
    job: Job,
    problems: list[str],
    best: list[PricedLayout],
    nearest: PricedLayout | None,
    settings: PlanSettings,
) -> list[str]:
    lines = [
        f"{job.world_size} x {job.gpu.name}: {available(job) / GIB:.1f} GiB a rank to use; "
        f"{job.sequences_per_step} packs of {job.capacity:,} tokens a step, documents of "
        f"{job.document_length:,}; expert imbalance {job.imbalance:g}",
        "",
    ]
    if problems:
        lines += ["The recipe's layout cannot run:", *(f"  - {p}" for p in problems)]
        if nearest is not None:
            lines += ["The nearest one that fits:", *_details(nearest)]
    else:
        lines += ["The recipe's layout:", *_details(price(job))]
    lines.append("")
    if best:
        lines += [f"The fastest {len(best)} that fit:", HEADER, RULE, *map(row, best)]
    else:
        least = least_memory(job, longest=settings.longest)
        need = "no layout is legal"
        if least is not None:
            need = f"the least needs {least.memory.total / GIB:.1f} GiB: {least.describe()}"
        lines.append(f"No layout fits; {need}. Use more ranks, or a smaller data.capacity.")
    return lines


HEADER = f"| {' | '.join(AXES)} | dp | capacity | layers | GiB | s a step | tokens/s/GPU |"
RULE = "|" + "---|" * (HEADER.count("|") - 1)


def row(plan: PricedLayout) -> str:
    """Row of a layout in the table of layouts."""
    p = plan.job.parallel
    cells = (
        *(getattr(p, axis) for axis in AXES),
        p.data_parallel(plan.job.world_size),
        plan.job.capacity,
        "recomputed" if plan.job.engine.recompute else "kept",
        f"{plan.memory.total / GIB:.1f}",
        f"{plan.time.total:.2f}",
        f"{plan.tokens_per_s_per_gpu:,.0f}",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def _details(plan: PricedLayout) -> list[str]:
    layout = plan.job.parallel.pipeline_layout
    lines = [f"  {plan.describe()}"]
    if layout:
        lines.append(f"  --parallel.pipeline-layout '{layout}'")
    lines.append(
        f"  {plan.memory.total / GIB:.1f} GiB on the worst rank (stage {plan.memory.place.pp}): "
        + ", ".join(f"{name} {value:.2f}" for name, value in plan.memory.table())
    )
    parts = [(n, v) for n, v in plan.time.table() if v >= 0.0005]
    lines.append(
        f"  {plan.time.total:.2f} s a step, {plan.tokens_per_s_per_gpu:,.0f} tokens/s/GPU: "
        + ", ".join(f"{name} {value:.2f}" for name, value in parts)
    )
    return lines


def _as_json(
    job: Job, problems: list[str], best: list[PricedLayout], nearest: PricedLayout | None
) -> dict[str, Any]:
    own = None if problems else price(job)
    return {
        "gpus": job.world_size,
        "gpu": dataclasses.asdict(job.gpu),
        "available_gib": available(job) / GIB,
        "problems": problems,
        "own": own and _plan_json(own),
        "nearest": nearest and _plan_json(nearest),
        "best": [_plan_json(plan) for plan in best],
    }


def _plan_json(plan: PricedLayout) -> dict[str, Any]:
    return {
        "parallel": dataclasses.asdict(plan.job.parallel),
        "dp": plan.job.parallel.data_parallel(plan.job.world_size),
        "capacity": plan.job.capacity,
        "recompute": plan.job.engine.recompute,
        "fits": plan.fits,
        "memory_gib": {"total": plan.memory.total / GIB, **dict(plan.memory.table())},
        "time_s": {"total": plan.time.total, **dict(plan.time.table())},
        "tokens_per_s_per_gpu": plan.tokens_per_s_per_gpu,
    }
