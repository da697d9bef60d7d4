"""Preflight of a cascade: its own rules, and the checks of every stage."""

from __future__ import annotations

from nemocascade.cascade.graph import StageGraph, cascade_problems
from nemocascade.plan.findings import Preflight
from nemocascade.plan.gpus import find_gpu
from nemocascade.plan.job import job_of_recipe
from nemocascade.plan.memory import with_slots
from nemocascade.plan.preflight import check_artifacts, check_files, check_servers, offline
from nemocascade.plan.settings import PreflightSettings
from nemocascade.recipe import CascadeRecipe


def check_cascade(cascade: CascadeRecipe, settings: PreflightSettings, into: Preflight) -> None:
    """Check the cascade's own rules, and every stage as if those before it had run."""
    graph, ranks = StageGraph(cascade), settings.world_size
    problems = cascade_problems(cascade, ranks)
    into.add("cascade", problems, f"{len(cascade.stages)} stages, {ranks} ranks")
    if problems:
        return
    parts = {"scores": cascade.scores, **{s.name: s.recipe for s in cascade.stages}}
    for name, settings_of in parts.items():
        # The script says so: teachers that the cascade chooses have no artifact yet.
        part = into.part(name)
        check_artifacts(settings_of, part)
        if name == "scores":
            check_files(settings_of, part)
            check_servers(settings_of, part)
    for name in graph.names:
        recipe, model = graph.resolved(name), graph.model_of(name)
        job, part = None, into.part(name)
        with part.guarded("model"):
            gpu = find_gpu(settings.gpu)
            job = with_slots(job_of_recipe(recipe, gpu, ranks, preset=settings.model, model=model))
        ahead = bool(graph.start_of(name) or settings.model)
        offline(recipe, job, ranks, part, dry_run=settings.dry_run, ahead=ahead)
        into.seconds += part.seconds
