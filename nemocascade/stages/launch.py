"""From a recipe script to a running stage: overrides, errors, exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import tyro

from nemocascade.data.errors import DataError
from nemocascade.megatron.accelerators import AcceleratorError
from nemocascade.megatron.checkpoint import CheckpointError
from nemocascade.megatron.convert import ConversionError
from nemocascade.megatron.world import RecipeError
from nemocascade.plan.errors import PlanError
from nemocascade.recipe import SftRecipe
from nemocascade.recipe.mopd import MopdRecipe
from nemocascade.recipe.rl import GrpoRecipe
from nemocascade.stages.grpo import run_grpo
from nemocascade.stages.mopd import run_mopd
from nemocascade.stages.setup import MainRankError
from nemocascade.stages.sft import run_sft
from nemocascade.train.dump import NonFiniteError

# What a user can mend: each says what is wrong and what to do.
ERRORS = (
    RecipeError,
    DataError,
    CheckpointError,
    ConversionError,
    AcceleratorError,
    NonFiniteError,
    PlanError,
)


StageRecipe = SftRecipe | GrpoRecipe | MopdRecipe


def run_stage(recipe: StageRecipe) -> Path:
    """Run the stage that a recipe is of; returns the artifact's folder."""
    if isinstance(recipe, GrpoRecipe):
        return run_grpo(recipe)
    if isinstance(recipe, MopdRecipe):
        return run_mopd(recipe)
    return run_sft(recipe)


def parse[R: StageRecipe](recipe: R, arguments: list[str] | None = None) -> R:
    """`recipe` with the command line's overrides. Unknown names end the program with a hint."""
    return tyro.cli(
        type(recipe),
        default=recipe,
        args=arguments,
        description=type(recipe).__doc__,
        config=(tyro.conf.FlagConversionOff,),
    )


def launch(recipe: StageRecipe, arguments: list[str] | None = None) -> Path:
    """Run the stage of `recipe` with the command line's overrides; returns the artifact's folder.

    Settings and data that cannot run end the program with exit code 2 and a message.
    """
    resolved = parse(recipe, arguments)
    if not Path(resolved.run_dir).is_absolute():
        resolved = replace(resolved, run_dir=str(Path.cwd() / resolved.run_dir))
    return exit_cleanly(lambda: run_stage(resolved))


def exit_cleanly(work: Callable[[], Path]) -> Path:
    """Turn the errors a user can mend into a message, once, and exit code 2 (3 for NaN)."""
    try:
        return work()
    except MainRankError:
        # The main rank says why.
        raise SystemExit(2) from None
    except ERRORS as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(3 if isinstance(error, NonFiniteError) else 2) from None
