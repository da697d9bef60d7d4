"""Content key of a stage's inputs: the same key means the same artifact.

The key covers the recipe, the start artifact, the teachers, and the content of every file that the
recipe names. Excluded: settings that only change how the stage runs, such as folders, layout,
checkpoints and logs.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nemocascade.cascade.records import write_json
from nemocascade.data.built import built_digest
from nemocascade.megatron.artifact import read_artifact
from nemocascade.megatron.checkpoint.folder import digest_of, file_sha256, kind_of
from nemocascade.recipe import MopdRecipe, ScoreConfig, SftRecipe, StageRecipe
from nemocascade.recipe.changes import HOW, changes_between
from nemocascade.recipe.paths import named_paths
from nemocascade.runtime.row_files import is_built

VERSION = 1
Inputs = dict[str, Any]


def stage_inputs(
    recipe: StageRecipe, start: str, teachers: Mapping[str, str], files: FileHashes
) -> Inputs:
    """Everything that the artifact depends on, as JSON values.

    recipe: the resolved recipe. start: digest of the start artifact, or empty. teachers: digest by
    domain.
    """
    said = json.loads(json.dumps(asdict(recipe)))
    for name in HOW:
        _drop(said, name.split("."))
    if isinstance(recipe, MopdRecipe):
        said.pop("teachers")
    return {
        "version": VERSION,
        "kind": type(recipe).__name__,
        "recipe": said,
        "start": start,
        "teachers": dict(sorted(teachers.items())),
        "files": files.of(recipe_files(recipe)),
    }


def key_of(inputs: Inputs) -> str:
    """Content key of the inputs."""
    return digest_of(inputs)


def recipe_files(recipe: StageRecipe) -> list[str]:
    """Files and external artifacts that a stage reads, besides its start artifact and teachers."""
    found = {path for _, path in named_paths(recipe, "input")}
    settings = recipe.demonstrations if isinstance(recipe, SftRecipe) else recipe.envs
    found.update(map(_module_file, settings.modules))
    if isinstance(recipe, SftRecipe):
        # The digest of the start artifact already covers its tokenizer.
        if recipe.init_from:
            found.discard(recipe.tokenizer.path)
        # A built folder holds the rows, whose files may be gone.
        if any(map(is_built, recipe.data.path)):
            found.difference_update(set(recipe.data.non_thinking_path) - {*recipe.data.path})
    else:
        found.add(recipe.envs.judge.artifact)
    return sorted(found - {""})


def _module_file(name: str) -> str:
    """The file of a module of `envs.modules`; its name where it cannot be found."""
    if name.endswith(".py"):
        return name
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        found = None
    return name if found is None or found.origin is None else found.origin


def score_files(config: ScoreConfig) -> list[str]:
    """Files that scores depend on: held-out tasks, and what the verifiers read."""
    found = {path for _, path in named_paths(config, "input")}
    return sorted(found.union(map(_module_file, config.envs.modules)))


class FileHashes:
    """Content hashes of files and folders, cached by size and modification time.

    memory: file that keeps the cache between runs, for data sets that take hours to read.
    """

    def __init__(self, memory: Path) -> None:
        self.memory = memory
        try:
            known = json.loads(memory.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError, RecursionError):
            known = {}
        self._known: dict[str, Any] = known if isinstance(known, dict) else {}

    def of(self, paths: list[str]) -> dict[str, str]:
        """Hash by path: `missing` for a path that does not exist, the digest of its manifest for an
        artifact and for a folder of `nemocascade data build`."""
        return {path: self._of(Path(path)) for path in paths}

    def _of(self, path: Path) -> str:
        if path.is_dir():
            if is_built(path):
                return built_digest(path)
            if kind_of(path) == "artifact":
                return read_artifact(path).digest
            parts = {str(p.relative_to(path)): self._file(p) for p in _files(path)}
            return digest_of(parts)
        return self._file(path) if path.is_file() else "missing"

    def _file(self, path: Path) -> str:
        status = path.stat()
        state = [status.st_size, status.st_mtime_ns]
        name = str(path.absolute())
        match self._known.get(name):
            case [known, str(digest)] if known == state:
                return digest
        digest = file_sha256(path)
        self._known[name] = [state, digest]
        write_json(self.memory, self._known)
        return digest


def differences(old: Inputs, new: Inputs, unset: Collection[str] = ()) -> list[str]:
    """Readable changes between two sets of inputs, one a line.

    unset: settings at their defaults, see `changes_between`. Settings in `HOW`, which older
    versions may have recorded, are ignored.
    """
    how = tuple(f"recipe.{name}." for name in HOW)
    found = changes_between(old, new, {f"recipe.{name}" for name in unset})
    return sorted(
        replace(c, name=c.name.removeprefix("recipe.")).text()
        for c in found
        if not f"{c.name}.".startswith(how)
    )


def _drop(values: dict[str, Any], path: list[str]) -> None:
    for name in path[:-1]:
        values = values.get(name, {})
    values.pop(path[-1], None)


def _files(folder: Path) -> Iterator[Path]:
    return (p for p in sorted(folder.rglob("*")) if p.is_file())
