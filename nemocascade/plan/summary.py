"""Report of `nemocascade plan`: the recipe's layout, the fastest ones, the nearest that fits."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from typing import Any

from nemocascade.plan.advice import (
    advice_lines,
    bf16_advice,
    bf16_lines,
    layout_advice,
    step_advice,
)
from nemocascade.plan.checkpoints import checkpoint_cost, checkpoint_line, start_cost, start_line
from nemocascade.plan.errors import PlanError
from nemocascade.plan.gpus import find_gpu
from nemocascade.plan.job import Job, RolloutLoad, job_of_recipe
from nemocascade.plan.memory import GIB, available, with_slots
from nemocascade.plan.rollout_report import rollout_lines, step_json
from nemocascade.plan.rollout_step import best_steps, expected_step
from nemocascade.plan.search import (
    AXES,
    PricedLayout,
    faults,
    least_memory,
    nearest_fitting,
    price,
    search,
)
from nemocascade.plan.settings import PlanSettings
from nemocascade.plan.timing import LayerCosts
from nemocascade.recipe import ModelConfig, StageRecipe

STEPS = 3
"""Training layouts for which a layout of generation is chosen."""


def plan_recipe(recipe: StageRecipe, settings: PlanSettings) -> str:
    """Plan report of a recipe. Raises PlanError for an unknown accelerator or model."""
    text, value = report_of(recipe, settings)
    return json.dumps(value, indent=1) if settings.json else text


def report_of(
    recipe: StageRecipe,
    settings: PlanSettings,
    model: ModelConfig | None = None,
    *,
    prefix: str = "",
) -> tuple[str, dict[str, Any]]:
    """Plan report of a recipe, as text and as JSON values. model: the model, if already known.
    prefix: of the names of its settings, `stages.sft.` in a cascade.

    Raises PlanError for an unknown accelerator or model.
    """
    job = planned_job(recipe, settings, model)
    problems = faults(job)
    own = None if problems else price(job)
    layers: LayerCosts = {}
    found = search(job, count=settings.best, longest=settings.longest, layers=layers)
    nearest = nearest_fitting(job) if problems else None
    lines = _lines(job, problems, own, found.best, nearest, settings)
    value = _as_json(job, problems, own, found.best, nearest)
    advice = layout_advice(job, own, found, prefix)
    if job.work is not None and job.rollout.slots:
        own_step = expected_step(job) if own is not None else None
        steps = best_steps(found.best[:STEPS])
        lines += ["", *rollout_lines(job, own_step, steps)]
        value["rollout_steps"] = {
            "own": own_step and step_json(own_step),
            "best": [step_json(step) for step in steps],
        }
        advice = step_advice(job, own_step, steps[0], prefix) if steps else advice
    lines += ["", *advice_lines(advice)] if advice else []
    value["advice"] = advice
    # Rollouts take most of a step where there are any.
    rounded: dict[str, Any] = {}
    if job.work is None:
        rounded = bf16_advice(job, found, prefix, longest=settings.longest, layers=layers)
    lines += bf16_lines(rounded)
    value["bf16_advice"] = rounded
    return "\n".join(lines), value


def planned_job(
    recipe: StageRecipe, settings: PlanSettings, model: ModelConfig | None = None
) -> Job:
    """The job of a recipe with the settings of `plan`; see `report_of`."""
    job = job_of_recipe(
        recipe,
        find_gpu(settings.gpu),
        settings.gpus,
        preset=settings.model,
        model=model,
        assumed=settings,
        document=settings.document,
        imbalance=settings.imbalance,
        teachers=settings.teachers,
        margin=settings.margin,
        **({} if settings.mamba2 == "auto" else {"mixer": settings.mamba2}),
    )
    if settings.rollout_sequences or settings.rollout_length:
        job = replace(job, rollout=_named_rollouts(job, settings))
    return with_slots(job)


def _named_rollouts(job: Job, settings: PlanSettings) -> RolloutLoad:
    """The rollouts that the settings name; the recipe's own where they name none."""
    own = job.rollout
    sequences = settings.rollout_sequences or own.sequences
    length = settings.rollout_length or own.length
    if not (sequences and length):
        raise PlanError(
            f"--rollout-sequences {sequences} and --rollout-length {length} must both be above 0 "
            "for a recipe without rollouts on its ranks: name the other one too"
        )
    slots = own.slots
    if settings.rollout_sequences:
        replicas = max(1, own.parallel.layout(job.parallel).data_parallel(job.world_size))
        slots = -(-sequences // replicas)
    live = 0.0 if settings.rollout_length else own.live
    prompt = min(own.prompt, length)
    return replace(own, sequences=sequences, slots=slots, length=length, live=live, prompt=prompt)


def _lines(
    job: Job,
    problems: list[str],
    own: PricedLayout | None,
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
    if own is None:
        lines += ["The recipe's layout cannot run:", *(f"  - {p}" for p in problems)]
        if nearest is not None:
            lines += ["The nearest one that fits:", *_details(nearest)]
    else:
        lines += ["The recipe's layout:", *_details(own)]
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
        plan.job.engine.recomputed_text,
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
    if len(phases := plan.memory.phases()) > 1:
        lines.append("  peak by phase: " + ", ".join(f"{n} {v:.1f} GiB" for n, v in phases))
    parts = [(n, v) for n, v in plan.time.table() if v >= 0.0005]
    lines.append(
        f"  {plan.time.total:.2f} s a step, {plan.tokens_per_s_per_gpu:,.0f} tokens/s/GPU: "
        + ", ".join(f"{name} {value:.2f}" for name, value in parts)
    )
    lines.append(f"  {checkpoint_line(plan.job, plan.time.total)}")
    lines.append(f"  {start_line(plan.job)}")
    return lines


def _as_json(
    job: Job,
    problems: list[str],
    own: PricedLayout | None,
    best: list[PricedLayout],
    nearest: PricedLayout | None,
) -> dict[str, Any]:
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
        "recompute_layers": plan.job.engine.recompute_layers,
        "fits": plan.fits,
        "memory_gib": {"total": plan.memory.total / GIB, **dict(plan.memory.table())},
        "phases_gib": dict(plan.memory.phases()),
        "time_s": {"total": plan.time.total, **dict(plan.time.table())},
        "checkpoint": dataclasses.asdict(checkpoint_cost(plan.job)),
        "start": dataclasses.asdict(start_cost(plan.job)),
        "tokens_per_s_per_gpu": plan.tokens_per_s_per_gpu,
    }
