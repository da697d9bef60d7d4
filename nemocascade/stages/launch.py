"""Launches a recipe script: applies overrides, then runs the stage of the recipe's type."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import tyro

from nemocascade.recipe import GrpoRecipe, MopdRecipe, StageRecipe
from nemocascade.runtime.errors import exit_cleanly
from nemocascade.stages.grpo import run_grpo
from nemocascade.stages.mopd import run_mopd
from nemocascade.stages.sft import run_sft


def run_stage(recipe: StageRecipe) -> Path:
    """Run the stage that matches the recipe's type; returns the artifact's folder."""
    if isinstance(recipe, GrpoRecipe):
        return run_grpo(recipe)
    if isinstance(recipe, MopdRecipe):
        return run_mopd(recipe)
    return run_sft(recipe)


def parse[R: StageRecipe](recipe: R, arguments: list[str] | None = None) -> R:
    """Apply the command line's overrides. Unknown names exit with a hint."""
    return tyro.cli(
        type(recipe),
        default=recipe,
        args=arguments,
        description=type(recipe).__doc__,
        config=(tyro.conf.FlagConversionOff,),
    )


def launch(recipe: StageRecipe, arguments: list[str] | None = None) -> Path:
    """Run the stage of `recipe` with the command line's overrides; returns the artifact's folder.

    Invalid settings or data end the program with exit code 2 and a message.
    """
    resolved = parse(recipe, arguments)
    if not Path(resolved.run_dir).is_absolute():
        resolved = replace(resolved, run_dir=str(Path.cwd() / resolved.run_dir))
    return exit_cleanly(lambda: run_stage(resolved))
