"""Loads the recipe object of a recipe script."""

from __future__ import annotations

import runpy
import traceback
from pathlib import Path

from nemocascade.recipe.cascade import CascadeRecipe
from nemocascade.recipe.errors import RecipeError, UserError
from nemocascade.recipe.mopd import MopdRecipe
from nemocascade.recipe.rl import GrpoRecipe
from nemocascade.recipe.sft import SftRecipe

Recipe = SftRecipe | GrpoRecipe | MopdRecipe | CascadeRecipe
"""Types of recipe that a script may define."""


def load_recipe[R](script: Path, kind: type[R]) -> R:
    """Load `RECIPE` from a script. Raises RecipeError if it is missing or not of type `kind`."""
    recipe = _recipe_of(script)
    if not isinstance(recipe, kind):
        raise _wrong_type(script, recipe, kind.__name__)
    return recipe


def load_any_recipe(script: Path) -> Recipe:
    """Load `RECIPE` of a stage or cascade script. Raises RecipeError if it defines none."""
    recipe = _recipe_of(script)
    if not isinstance(recipe, Recipe):
        raise _wrong_type(script, recipe, "the recipe of a stage or of a cascade")
    return recipe


def _recipe_of(script: Path) -> object:
    if not script.is_file():
        raise RecipeError([f"{script} is not a file: name a recipe script"])
    try:
        values = runpy.run_path(str(script), run_name="nemocascade_recipe")
    except UserError:
        raise
    except Exception as error:  # whatever the script raises is an error of the script
        own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(script)]
        line = error.lineno if isinstance(error, SyntaxError) else own[-1].lineno if own else None
        where = str(script) if line is None else f"{script}:{line}"
        raise RecipeError([f"{where}: {type(error).__name__}: {error}: fix the script"]) from error
    if "RECIPE" not in values:
        raise RecipeError([f"{script} defines no RECIPE: a recipe script ends in `launch(RECIPE)`"])
    return values["RECIPE"]


def _wrong_type(script: Path, recipe: object, wanted: str) -> RecipeError:
    return RecipeError(
        [f"{script}: RECIPE is of type {type(recipe).__name__}, not {wanted}: name another script"]
    )
