"""Domains of users: classes marked with `environment`, from modules that the settings name.

Installed packages offer domains by entry points of the group `nemocascade.environments`: the name
is the domain's, the value is its class.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from nemocascade.envs.base import Domain, is_environment
from nemocascade.recipe import RecipeError

GROUP = "nemocascade.environments"
"""Group of entry points."""


def own_domains(modules: Sequence[str], shipped: Sequence[str]) -> dict[str, type[Domain]]:
    """Classes by the name of their domain, in the order of the modules, then of the entry points.

    modules: dotted names, or paths of `.py` files. shipped: names that are taken.

    Raises RecipeError naming every module that cannot be imported or holds no environment, and
    every class that cannot be made or whose name is taken.
    """
    found: dict[str, type[Domain]] = {}
    problems: list[str] = []
    for name in modules:
        said = f"envs.modules({name})"
        try:
            classes = _environments_of(_imported(name))
        except (Exception, SystemExit) as error:  # a user's module may raise anything
            problems.append(f"{said} cannot be imported: {type(error).__name__}: {error}")
            continue
        if not classes:
            problems.append(f"{said} holds no class marked with @environment: mark its domain")
        for kind in classes:
            problems += _added(found, kind, said, shipped)
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        said = f"entry point {point.name} = {point.value} of {GROUP}"
        try:
            kind = point.load()
        except (Exception, SystemExit) as error:
            problems.append(f"{said} cannot be loaded: {type(error).__name__}: {error}")
            continue
        problems += _added(found, kind, said, shipped)
    if problems:
        raise RecipeError(problems)
    return found


def _added(
    found: dict[str, type[Domain]], kind: Any, said: str, shipped: Sequence[str]
) -> list[str]:
    """Add a class to `found`; returns what forbids it."""
    if not (isinstance(kind, type) and issubclass(kind, Domain)):
        return [f"{said}: {kind!r} is not a subclass of nemocascade.envs.base.Domain"]
    if missing := sorted(kind.__abstractmethods__):
        return [f"{said}: {kind.__name__} has no {', '.join(missing)}"]
    name = getattr(kind, "domain", None)
    if not isinstance(name, str) or not name.isidentifier():
        return [f"{said}: {kind.__name__}.domain is {name!r}: give a name, such as 'my_domain'"]
    if name in shipped or found.get(name, kind) is not kind:
        return [f"{said}: the domain {name!r} exists already: give {kind.__name__} another name"]
    found[name] = kind
    return []


def _environments_of(module: ModuleType) -> list[type[Domain]]:
    """Marked classes that the module defines, in the order of their definition."""
    own = [k for k in vars(module).values() if isinstance(k, type) and is_environment(k)]
    return [k for k in own if k.__module__ == module.__name__]


def _imported(name: str) -> ModuleType:
    """Import a module. The folder of a file joins sys.path, also that of check processes."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    module = importlib.import_module(path.stem)
    if Path(inspect.getfile(module)).resolve() != path:
        raise ImportError(f"{module.__file__} has the same name: rename the file")
    return module
