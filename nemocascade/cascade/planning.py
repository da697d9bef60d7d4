"""Plan, preflight and Slurm jobs of a whole cascade, stage by stage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nemocascade.cascade.graph import StageGraph, cascade_problems
from nemocascade.plan.errors import PlanError
from nemocascade.plan.findings import Preflight
from nemocascade.plan.gpus import find_gpu
from nemocascade.plan.job import job_of_recipe
from nemocascade.plan.preflight import (
    PreflightSettings,
    check_artifacts,
    check_files,
    check_servers,
    offline,
)
from nemocascade.plan.slurm import SlurmJob, job_of_script
from nemocascade.plan.summary import PlanSettings, report_of
from nemocascade.recipe import CascadeRecipe, PolicyRecipe


def plan_cascade(cascade: CascadeRecipe, settings: PlanSettings) -> str:
    """Plan report of each stage. Raises PlanError for an unknown accelerator or model."""
    graph = StageGraph(cascade)
    found = {
        name: report_of(graph.resolved(name), settings, graph.model_of(name))
        for name in graph.names
    }
    if settings.json:
        return json.dumps({"stages": {name: value for name, (_, value) in found.items()}}, indent=1)
    return "\n\n".join(f"== {name} ==\n{text}" for name, (text, _) in found.items())


def check_cascade(cascade: CascadeRecipe, settings: PreflightSettings, into: Preflight) -> None:
    """Check the cascade's own rules, and every stage as if those before it had run."""
    graph, ranks = StageGraph(cascade), settings.world_size
    problems = cascade_problems(cascade, ranks)
    into.add("cascade", problems, f"{len(cascade.stages)} stages, {ranks} ranks")
    if problems:
        return
    parts = {"scores": cascade.scores, **{s.name: s.recipe for s in cascade.stages}}
    for name, settings_of in parts.items():
        # As the script says: teachers that the cascade chooses have no artifact yet.
        checked = Preflight()
        check_artifacts(settings_of, checked)
        if name == "scores":
            check_files(settings_of, checked)
            check_servers(settings_of, checked)
        into.findings += [replace(f, check=f"{name}: {f.check}") for f in checked.findings]
    for name in graph.names:
        recipe, model = graph.resolved(name), graph.model_of(name)
        job = None
        with into.guarded(f"{name}: model"):
            gpu = find_gpu(settings.gpu)
            job = job_of_recipe(recipe, gpu, ranks, preset=settings.model, model=model)
        ahead = bool(graph.start_of(name) or settings.model)
        checked = offline(recipe, job, ranks, dry_run=settings.dry_run, ahead=ahead)
        into.findings += [replace(f, check=f"{name}: {f.check}") for f in checked.findings]
        into.seconds += checked.seconds


def jobs_of_cascade(
    script: Path, cascade: CascadeRecipe, arguments: Sequence[str]
) -> list[SlurmJob]:
    """Slurm job of each stage of a cascade. Raises PlanError if the arguments select a stage."""
    chosen = [a for a in ("--only", "--from") if a in arguments]
    if chosen:
        raise PlanError(
            f"{script}: {', '.join(chosen)} among the recipe's arguments: each job of a cascade "
            "runs one stage, and one whose result is there already ends at once"
        )
    whole = job_of_script(script, cascade.run_dir, arguments)
    # A stage polls its own folder for the stop file.
    return [
        SlurmJob(
            script,
            whole.run_dir / "stages" / stage.name,
            ("--only", stage.name, *whole.arguments),
            f"stages.{stage.name}." if isinstance(stage.recipe, PolicyRecipe) else None,
        )
        for stage in cascade.stages
    ]
