"""Loads the recipe object of a recipe script."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from nemocascade.recipe.errors import RecipeError


def load_recipe(script: Path) -> Any:
    """The `RECIPE` of a recipe script. Raises RecipeError if it defines none."""
    values = runpy.run_path(str(script), run_name="nemocascade_recipe")
    if "RECIPE" not in values:
        raise RecipeError([f"{script} defines no RECIPE: a recipe script ends in `launch(RECIPE)`"])
    return values["RECIPE"]
