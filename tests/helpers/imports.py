"""The import graph of the source files, from a static parse."""

from __future__ import annotations

import ast
import functools
from collections import deque
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "nemocascade"
KERNELS = ROOT / "kernels" / "nemocascade_kernels"

Graph = Mapping[str, set[str]]
"""The modules that each module imports, wherever in its file, by their absolute names."""


def sources(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.py") if "__pycache__" not in p.parts)


def module_name(path: Path) -> str:
    """`nemocascade.train.trainer` of that file; a package's `__init__.py` has the package's."""
    folder = KERNELS if path.is_relative_to(KERNELS) else PACKAGE
    parts = path.relative_to(folder.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imports_of(path: Path) -> set[tuple[str, str]]:
    """`(a, b)` of each `from a import b` and `(a, "")` of each `import a`, wherever in the file."""
    found = set()
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *filter(None, [node.module])])
            found |= {(name, alias.name) for alias in node.names}
    return found


@functools.cache
def import_graph() -> Graph:
    """Who imports whom among the files of both packages.

    `from a import b` counts as `a.b` where that is a module: `a/__init__.py` runs too, but nothing
    of it is used.
    """
    files = {module_name(path): path for path in sources(PACKAGE) + sources(KERNELS)}
    graph = {}
    for module, path in files.items():
        targets = {f"{a}.{b}" if f"{a}.{b}" in files else a for a, b in imports_of(path)}
        graph[module] = (targets & files.keys()) - {module}
    return graph


def loaded_with(start: str) -> dict[str, list[str]]:
    """The modules that importing `start` loads, libraries among them, each with a way from it.

    Imports at the top of files count, and the packages that a module is in.
    """
    files = {module_name(path): path for path in sources(PACKAGE) + sources(KERNELS)}
    found, waiting = {start: [start]}, deque([start])
    while waiting:
        module = waiting.popleft()
        names = {module.rpartition(".")[0]} - {""}
        if module in files:
            for node in ast.parse(files[module].read_text(encoding="utf-8")).body:
                if isinstance(node, ast.Import):
                    names |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    names |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
        for name in sorted(names - found.keys()):
            found[name] = [*found[module], name]
            waiting.append(name)
    return found


def shortest_circle(graph: Graph) -> list[str]:
    """The modules along a shortest circle, the first one again at its end; [] without a circle."""
    circles = [circle for module in sorted(graph) if (circle := _way_back(graph, module))]
    return min(circles, key=len, default=[])


def _way_back(graph: Graph, start: str) -> list[str]:
    """A shortest way from `start` to itself."""
    waiting = deque([[start]])
    seen: set[str] = set()
    while waiting:
        way = waiting.popleft()
        for module in sorted(graph.get(way[-1], ())):
            if module == start:
                return [*way, start]
            if module not in seen:
                seen.add(module)
                waiting.append([*way, module])
    return []
