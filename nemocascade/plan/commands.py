"""`nemocascade preflight`: a job's problems before it starts, in one process and without a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from nemocascade.plan.gpus import find_gpu
from nemocascade.plan.job import job_of_recipe
from nemocascade.plan.preflight import Preflight, offline
from nemocascade.recipe import CascadeRecipe, Recipe, load_any_recipe


@dataclass(frozen=True)
class PreflightSettings:
    """Check a recipe: settings, files, disk, tokenizer, start, memory, and a dry run of every rank.

    Devices and collectives are checked by the job itself when it starts.
    """

    recipe: tyro.conf.Positional[str]
    """Recipe script."""

    ranks: int = 0
    """World size; 0 = that of the launcher, or 1."""

    gpu: str = "h200"
    """A known accelerator, or a JSON file with the fields of nemocascade.plan.gpus.Gpu."""

    model: str = ""
    """Preset of the model, to check ahead: the stages before have not run, so the artifact to start
    from is not looked for."""

    dry_run: bool = True
    """Build every rank's model on the meta device."""

    json: bool = False
    """Print one JSON object."""


def run_preflight(
    settings: PreflightSettings, override: Callable[[Recipe], Recipe] | None = None
) -> Preflight:
    """All findings; of a cascade, those of every stage. override: changes the recipe before it is
    checked."""
    found = Preflight()
    with found.guarded("recipe"):
        recipe = load_any_recipe(Path(settings.recipe))
        if override is not None:
            recipe = override(recipe)
        ranks = settings.ranks or int(os.environ.get("WORLD_SIZE", "1"))
        if isinstance(recipe, CascadeRecipe):
            _check_cascade(recipe, settings, ranks, found)
            return found
        job = None
        with found.guarded("model"):
            job = job_of_recipe(recipe, find_gpu(settings.gpu), ranks, preset=settings.model)
        checked = offline(recipe, job, ranks, dry_run=settings.dry_run, ahead=bool(settings.model))
        found.findings += checked.findings
        found.seconds = checked.seconds
    return found


def _check_cascade(
    cascade: CascadeRecipe, settings: PreflightSettings, ranks: int, into: Preflight
) -> None:
    """The cascade's own rules, and every stage as if those before it had run."""
    problems = cascade.problems(ranks)
    into.add("cascade", problems, f"{len(cascade.stages)} stages, {ranks} ranks")
    if problems:
        return
    for name in cascade.graph.names:
        recipe, model = cascade.graph.resolved(name), cascade.graph.model_of(name)
        job = None
        with into.guarded(f"{name}: model"):
            gpu = find_gpu(settings.gpu)
            job = job_of_recipe(recipe, gpu, ranks, preset=settings.model, model=model)
        ahead = bool(cascade.graph.start_of(name) or settings.model)
        checked = offline(recipe, job, ranks, dry_run=settings.dry_run, ahead=ahead)
        into.findings += [replace(f, check=f"{name}: {f.check}") for f in checked.findings]
        into.seconds += checked.seconds
