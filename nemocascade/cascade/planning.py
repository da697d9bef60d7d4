"""Plan, preflight and Slurm jobs of a whole cascade, stage by stage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from nemocascade.cascade.graph import StageGraph
from nemocascade.plan.errors import PlanError
from nemocascade.plan.settings import PlanSettings
from nemocascade.plan.slurm import job_of_script
from nemocascade.plan.submission import SlurmJob
from nemocascade.plan.summary import report_of
from nemocascade.recipe import CascadeRecipe, PolicyRecipe


def plan_cascade(cascade: CascadeRecipe, settings: PlanSettings) -> str:
    """Plan report of each stage. Raises PlanError for an unknown accelerator or model."""
    graph = StageGraph(cascade)
    found = {}
    for name in graph.names:
        recipe, model = graph.resolved(name), graph.model_of(name)
        if not settings.simulate:
            prefix = f"stages.{name.replace('_', '-')}."
            found[name] = report_of(recipe, settings, model, prefix=prefix)
        elif isinstance(recipe, PolicyRecipe):
            from nemocascade.stages.simulation import simulated_report

            found[name] = simulated_report(recipe, settings, model)
    if settings.json:
        return json.dumps({"stages": {name: value for name, (_, value) in found.items()}}, indent=1)
    return "\n\n".join(f"== {name} ==\n{text}" for name, (text, _) in found.items())


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
