"""Launches a recipe script: applies overrides, then runs the stage of the recipe's type."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nemocascade.recipe import GrpoRecipe, MopdRecipe, StageRecipe
from nemocascade.runtime.command_line import parse_settings
from nemocascade.runtime.errors import exit_cleanly
from nemocascade.runtime.hub_rows import with_hub_files
from nemocascade.runtime.logging import Console


def run_stage(recipe: StageRecipe, console: Console | None = None) -> Path:
    """Run the stage that matches the recipe's type; returns the artifact's folder. console: of the
    cascade."""
    # Imported here: a recipe script needs no torch until its command line is checked.
    if isinstance(recipe, GrpoRecipe):
        from nemocascade.stages.grpo import run_grpo

        return run_grpo(recipe, console)
    if isinstance(recipe, MopdRecipe):
        from nemocascade.stages.mopd import run_mopd

        return run_mopd(recipe, console)
    from nemocascade.stages.sft import run_sft

    return run_sft(recipe, console)


def parse[R: StageRecipe](recipe: R, arguments: list[str] | None = None) -> R:
    """Apply the command line's overrides. Unknown names exit with a hint."""
    return parse_settings(type(recipe), arguments, default=recipe)


def launch(recipe: StageRecipe, arguments: list[str] | None = None) -> Path:
    """Run the stage of `recipe` with the command line's overrides; returns the artifact's folder.

    Invalid settings or data end the program with exit code 2 and a message.
    """
    resolved = parse(recipe, arguments)
    if not Path(resolved.run_dir).is_absolute():
        resolved = replace(resolved, run_dir=str(Path.cwd() / resolved.run_dir))
    return exit_cleanly(lambda: run_stage(with_hub_files(resolved)))
