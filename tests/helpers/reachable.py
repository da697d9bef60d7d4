"""Finds public classes and functions of a package that no entry point uses.

Names are resolved statically. A function or class uses the names in its body, decorators, bases,
defaults and annotations. Code at module level counts once the module is imported, and methods
belong to their class. A module that is passed as a value uses all of its names. Strings that name a
function, as `package.module:name` or as an import, count too, because they start child processes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Node = tuple[str, str]
"""Module and name of a definition; an empty name stands for the module's own level."""

_IN_STRING = re.compile(r"([\w.]+):(\w+)|from ([\w.]+) import (\w+)")
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass
class _Module:
    name: str
    tree: ast.Module
    is_package: bool
    definitions: dict[str, ast.stmt] = field(default_factory=dict)
    imported: dict[str, str] = field(default_factory=dict)
    """Dotted name, of a module or of something in it, behind each name that imports bind."""

    def __post_init__(self) -> None:
        self.definitions = {n.name: n for n in self.tree.body if isinstance(n, _DEFINITIONS)}
        self.imported = dict(_bindings(self._level(), self.package))

    def _level(self) -> Iterator[ast.AST]:
        for statement in self.tree.body:
            if not isinstance(statement, _DEFINITIONS):
                yield from ast.walk(statement)

    @property
    def package(self) -> str:
        return self.name if self.is_package else self.name.rpartition(".")[0]

    @property
    def is_script(self) -> bool:
        """It has an `if __name__ == "__main__"`, so it can be started by itself."""
        tests = [ast.unparse(n.test) for n in self.tree.body if isinstance(n, ast.If)]
        return "__name__ == '__main__'" in tests


class Reachability:
    """The graph of who uses whom in a package, `python` files of `folder` and all below it."""

    def __init__(self, folder: Path, *, without: Sequence[Path] = ()) -> None:
        self.modules: dict[str, _Module] = {}
        for path in sorted(folder.rglob("*.py")):
            if any(path.is_relative_to(other) for other in without):
                continue
            parts = path.relative_to(folder.parent).with_suffix("").parts
            package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if package else parts)
            self.modules[name] = _Module(name, _parsed(path), package)

    def unreachable(self, scripts: Iterable[Path], entries: Iterable[str] = ()) -> list[str]:
        """`module:name` of each public class and function that is not reached.

        scripts: files outside of the package, all of whose code counts as used. entries: more
        starting points, `module:name`; modules that can be started by themselves always are.
        """
        roots = [(name, "") for name, module in self.modules.items() if module.is_script]
        for entry in entries:
            name, _, inner = entry.partition(":")
            roots.append((name, inner))
        for path in scripts:
            script = _Module(str(path), _parsed(path), is_package=False)
            roots += [node for node in self._used(script, script.tree) if node[0] in self.modules]
        seen: set[Node] = set()
        waiting = list(roots)
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                waiting += self._uses_of(node)
        return sorted(
            f"{module.name}:{name}"
            for module in self.modules.values()
            for name in module.definitions
            if not name.startswith("_") and (module.name, name) not in seen
        )

    def _uses_of(self, node: Node) -> Iterator[Node]:
        module = self.modules[node[0]]
        if node[1]:
            yield module.name, ""
            yield from self._used(module, module.definitions[node[1]])
            return
        yield from self._modules_of(module.name)
        for statement in module.tree.body:
            if not isinstance(statement, _DEFINITIONS):
                yield from self._used(module, statement)

    def _used(self, module: _Module, tree: ast.AST) -> Iterator[Node]:
        """Names that the code below `tree` names."""
        nodes = list(ast.walk(tree))
        local = dict(_bindings(nodes, module.package))
        bound = {**module.imported, **local}
        for target in local.values():
            yield from self._modules_of(target)
        inner = {id(n.value) for n in nodes if isinstance(n, ast.Attribute)}
        for node in nodes:
            if isinstance(node, ast.Name | ast.Attribute) and id(node) not in inner:
                first, *rest = _dotted(node).split(".")
                if first in bound:
                    yield from self._resolved(".".join([bound[first], *rest]))
                elif first in module.definitions:
                    yield module.name, first
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                for found in _IN_STRING.finditer(node.value):
                    yield from self._resolved(".".join(part for part in found.groups() if part))

    def _modules_of(self, dotted: str) -> Iterator[Node]:
        """The modules that an import of `dotted` runs."""
        parts = dotted.split(".")
        for end in range(1, len(parts) + 1):
            if (name := ".".join(parts[:end])) in self.modules:
                yield name, ""

    def _resolved(self, dotted: str) -> Iterator[Node]:
        """The definition behind a dotted name, through imports of imports."""
        parts = dotted.split(".")
        for end in range(len(parts), 0, -1):
            module = self.modules.get(".".join(parts[:end]))
            if module is None:
                continue
            rest = parts[end:]
            yield module.name, ""
            if not rest:
                yield from ((module.name, name) for name in module.definitions)
            elif rest[0] in module.definitions:
                yield module.name, rest[0]
            elif rest[0] in module.imported:
                yield from self._resolved(".".join([module.imported[rest[0]], *rest[1:]]))
            return


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _bindings(nodes: Iterable[ast.AST], package: str) -> Iterator[tuple[str, str]]:
    """Names that imports bind in a module of `package`, and the dotted name behind each."""
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname:
                    yield alias.asname, alias.name
                else:
                    first = alias.name.partition(".")[0]
                    yield first, first
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            start = [*(above if node.level else ()), *([node.module] if node.module else ())]
            for alias in node.names:
                yield alias.asname or alias.name, ".".join([*start, alias.name])


def _dotted(node: ast.expr) -> str:
    """`a.b.c` of a chain of attributes, as far as it is one."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed([*parts, node.id if isinstance(node, ast.Name) else ""]))
