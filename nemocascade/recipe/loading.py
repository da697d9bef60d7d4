"""Loads the recipe object of a recipe script."""

from __future__ import annotations

import runpy
from pathlib import Path

from nemocascade.recipe.cascade import CascadeRecipe
from nemocascade.recipe.errors import RecipeError
from nemocascade.recipe.mopd import MopdRecipe
from nemocascade.recipe.rl import GrpoRecipe
from nemocascade.recipe.sft import SftRecipe

Recipe = SftRecipe | GrpoRecipe | MopdRecipe | CascadeRecipe
"""What a recipe script may define."""


def load_recipe[R](script: Path, kind: type[R]) -> R:
    """The `RECIPE` of a recipe script. Raises RecipeError if it defines none of type `kind`."""
    return _checked(script, _recipe_of(script), kind)


def load_any_recipe(script: Path) -> Recipe:
    """The `RECIPE` of a stage's script or of a cascade's. Raises RecipeError for anything else."""
    return _checked(script, _recipe_of(script), SftRecipe, GrpoRecipe, MopdRecipe, CascadeRecipe)


def _recipe_of(script: Path) -> object:
    values = runpy.run_path(str(script), run_name="nemocascade_recipe")
    if "RECIPE" not in values:
        raise RecipeError([f"{script} defines no RECIPE: a recipe script ends in `launch(RECIPE)`"])
    return values["RECIPE"]


def _checked[R](script: Path, recipe: object, *kinds: type[R]) -> R:
    """The recipe, if it is one of these types. Raises RecipeError naming script and types."""
    if not isinstance(recipe, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise RecipeError(
            [
                f"{script}: RECIPE is of type {type(recipe).__name__}, where {wanted} is needed: "
                "name another script, or build that type"
            ]
        )
    return recipe
