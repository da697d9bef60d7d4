"""Comparison of the settings of two runs, recipes or artifacts: `nemocascade diff`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemocascade.megatron.checkpoint.folder import MANIFEST, read_manifest
from nemocascade.recipe import RecipeError, load_any_recipe
from nemocascade.recipe.changes import Change, as_json, changes_between
from nemocascade.recipe.commands import DiffSettings
from nemocascade.runtime.row_files import is_built

FACTS = ("stage", "step", "digest", "parent_digest", "precision", "data", "scores", "changes")
"""Entries of an artifact's manifest that are compared besides its recipe and its model."""


def compare(settings: DiffSettings) -> list[str]:
    """Readable differences, by name. Raises RecipeError if a path is none of those kinds, and
    CheckpointError for a damaged artifact."""
    found = changed_settings(Path(settings.first), Path(settings.second))
    return [change.text() for change in found]


def changed_settings(first: Path, second: Path) -> list[Change]:
    """The settings that differ. Errors as of `compare`."""
    return changes_between(*(_by_name(_described(path)) for path in (first, second)))


def _described(path: Path) -> Mapping[str, Any]:
    """The settings of a recipe, and the facts of an artifact, as JSON values."""
    if is_built(path):
        raise RecipeError(
            [
                f"{path} was written by `nemocascade data build` and holds no recipe: its settings "
                f"are the key in {path / MANIFEST}"
            ]
        )
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path, "artifact")
        facts = {name: manifest[name] for name in FACTS if name in manifest}
        return {**manifest["recipe"], "model": manifest["model"], "artifact": facts}
    for name in ("recipe.json", "cascade.json"):
        if (path / name).is_file():
            return _read(path / name, "settings" if name == "cascade.json" else "")
    if path.suffix == ".json" and path.is_file():
        return _read(path)
    if path.is_file():
        return as_json(load_any_recipe(path))
    raise RecipeError(
        [
            f"{path} is not a recipe, run folder or artifact: name a recipe script, or a folder "
            "with recipe.json, cascade.json or manifest.json"
        ]
    )


def _read(path: Path, entry: str = "") -> dict[str, Any]:
    """The settings in a JSON file, or in an entry of it."""
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
        return dict(found.get(entry, {})) if entry else found
    except (ValueError, TypeError, RecursionError) as error:
        raise RecipeError([f"{path} holds no settings: {error}"]) from error


def _by_name(value: Any) -> Any:
    """The value with each list of named settings, such as stages and domains, by their names."""
    if isinstance(value, Mapping):
        return {name: _by_name(inner) for name, inner in value.items() if name != "kind"}
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        names = [str(v.get("name") or v.get("domain") or i) for i, v in enumerate(value)]
        if len(set(names)) == len(names):
            return {name: _by_name(inner) for name, inner in zip(names, value, strict=True)}
    return value
