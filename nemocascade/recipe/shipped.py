"""The recipe scripts that come with NemoCascade: listed, and copied to be changed."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

from nemocascade.recipe.errors import RecipeError


def recipes_folder() -> Path:
    """Folder of the scripts: in an installed package beside this file, otherwise the checkout's."""
    here = Path(__file__).resolve()
    installed = here.with_name("scripts")
    return installed if installed.is_dir() else here.parents[2] / "recipes"


def list_recipes() -> str:
    """A line for each script: its path below the folder, and what it trains."""
    folder = recipes_folder()
    scripts = sorted(folder.glob("*/*.py"))
    names = [script.relative_to(folder).as_posix() for script in scripts]
    width = max(map(len, names), default=0)
    lines = [
        f"  {name:{width}}  {_summary(script)}" for name, script in zip(names, scripts, strict=True)
    ]
    return "\n".join([f"{folder}:", *lines])


def copy_recipes(target: Path) -> str:
    """Copy all scripts to a new folder; returns a note. Raises RecipeError if it exists."""
    if target.exists():
        raise RecipeError([f"{target} exists: name a new folder, nothing is overwritten"])
    shutil.copytree(recipes_folder(), target, ignore=shutil.ignore_patterns("__pycache__"))
    return f"{target}: change a script and start it, such as nemocascade run {target}/tiny/sft.py"


def _summary(script: Path) -> str:
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())
