"""Finds public methods and properties of classes that no code names.

Names are compared, not types: an attribute `.name` anywhere, or a string "name" for a call on
another process, uses the methods of that name of all classes. A library may call the methods of a
class with a base from it, and of one that a decorator registers; these are skipped, and so are
pytest's hooks.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

STRUCTURAL = {"ABC", "Enum", "Exception", "Generic", "NamedTuple", "Protocol", "StrEnum"}
"""Bases from libraries that call no method of their own accord."""
PLAIN = {
    "abstractmethod", "cache", "cached_property", "classmethod", "contextmanager", "lru_cache",
    "no_grad", "override", "property", "setter", "staticmethod",
}  # fmt: skip
"""Decorators that register nothing."""

_Method = ast.FunctionDef | ast.AsyncFunctionDef


def unused_methods(folders: Sequence[Path], users: Iterable[Path] = ()) -> list[str]:
    """`Class.method` of each public method in `folders` that neither they nor `users` name."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in _files(folders)]
    others = [ast.parse(path.read_text(encoding="utf-8")) for path in _files(users)]
    used = {name for tree in (*trees, *others) for name in _names(tree)}
    classes = [n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    own = {found.name: found for found in classes}
    return sorted(
        f"{found.name}.{method.name}"
        for found in classes
        if not found.name.startswith("_") and not _has_library_base(found, own)
        for method in found.body
        if isinstance(method, _Method) and _is_checked(method) and method.name not in used
    )


def _files(folders: Iterable[Path]) -> Iterator[Path]:
    for folder in folders:
        yield from (p for p in sorted(folder.rglob("*.py")) if "__pycache__" not in p.parts)


def _names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.MatchClass):
            yield from node.kwd_attrs


def _is_checked(method: _Method) -> bool:
    is_private_or_hook = method.name.startswith(("_", "pytest_"))
    return not is_private_or_hook and all(_last(d) in PLAIN for d in method.decorator_list)


def _has_library_base(found: ast.ClassDef, own: dict[str, ast.ClassDef]) -> bool:
    bases = [_last(base) for base in found.bases]
    return any(
        _has_library_base(own[base], own) if base in own else base not in STRUCTURAL
        for base in bases
        if base != found.name
    )


def _last(node: ast.expr) -> str:
    """The last name of `a.b`, `a.b(...)` or `a.b[...]`."""
    while isinstance(node, ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
