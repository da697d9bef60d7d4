"""Detects that code under test has replaced a test, or a part of the framework that runs it.

The runner's text includes this file's, so only the standard library is used.
"""

from __future__ import annotations

import ast
import inspect
import sys
import types
import unittest
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

Codes = Mapping[str, list[types.CodeType]]
"""Code objects by the qualified name of their function."""
_WATCHED_PYTEST = {
    *("assertion", "fixtures", "main", "nodes", "outcomes", "python", "python_api", "raises"),
    *("reports", "runner", "skipping", "unittest"),
}
_ASSERTIONS = {
    name for name, value in vars(unittest.TestCase).items() if isinstance(value, types.FunctionType)
}
"""Methods of test cases: assertions, and those that run a test."""
_Definition = ast.FunctionDef | ast.AsyncFunctionDef


def framework_parts() -> list[types.ModuleType]:
    """Return the loaded framework modules that determine a test's outcome.

    Not all modules: libraries patch `unittest.mock`, and pytest its own configuration.
    """
    return [
        module
        for name, module in sys.modules.items()
        if name.partition(".")[0] in ("unittest", "pytest", "pluggy", "_pytest")
        and name != "unittest.mock"
        and (not name.startswith("_pytest.") or name.split(".")[1] in _WATCHED_PYTEST)
    ]


def watch(modules: Iterable[types.ModuleType]) -> Callable[[], bool]:
    """Return a function that detects if a module, or a function or class in one, was replaced."""
    modules = {module.__name__: module for module in modules}.values()
    kept: list[tuple[dict[str, Any], str, Any, Any, Any]] = []
    for module in modules:
        classes = (v for v in vars(module).values() if isinstance(v, type))
        mine = (v for v in classes if v.__module__ == module.__name__)
        for owner in (module, *mine):
            for name, value in vars(owner).items():
                plain = getattr(value, "__func__", value)
                if isinstance(plain, types.FunctionType):
                    kept.append((vars(owner), name, value, plain, plain.__code__))
                elif isinstance(value, (type, property)):
                    kept.append((vars(owner), name, value, None, None))
    case, names = vars(unittest.TestCase), set(vars(unittest.TestCase))

    def tampered() -> bool:
        if any(name.startswith("__") for name in case.keys() - names):
            return True
        if any(sys.modules.get(module.__name__) is not module for module in modules):
            return True
        for owner, name, value, plain, code in kept:
            if owner.get(name) is not value or (plain and plain.__code__ is not code):
                return True
        return False

    return tampered


class TestCode:
    """The code of test files, compiled before any code of the repository runs.

    paths: the test files. with_pytest: pytest is loaded, and may have rewritten assertions.
    """

    __test__ = False  # keeps pytest from collecting the class

    def __init__(self, paths: Iterable[str], *, with_pytest: bool) -> None:
        self._helpers: dict[str, list[tuple[str, list[types.CodeType]]]] = {}
        self._tests: dict[tuple[str, str], list[tuple[str, list[types.CodeType]]]] = {}
        for path in paths:
            self._helpers[path] = []
            for name, codes in _codes(path, with_pytest).items():
                last = name.rpartition(".")[2]
                if last.startswith("test"):
                    self._tests.setdefault((path, last), []).append((name, codes))
                else:
                    self._helpers[path].append((name, codes))
        self._overrides: dict[type, set[str]] = {}
        self._kept: dict[str, tuple[Any, types.CodeType | None]] = {}

    def keep(self, test: str, function: Any, owner: type | None) -> None:
        """Remember the function of a test, and its class, before the first test runs."""
        plain = getattr(function, "__func__", function)
        self._kept[test] = (plain, getattr(plain, "__code__", None))
        for kind in owner.__mro__ if owner else ():
            self._overrides.setdefault(kind, vars(kind).keys() & _ASSERTIONS)

    def overrides(self, owner: type) -> bool:
        """Return True if a class has new methods in place of those of `unittest.TestCase`."""
        known = self._overrides
        return any(
            kind in known and vars(kind).keys() & _ASSERTIONS != known[kind]
            for kind in owner.__mro__
        )

    def is_replaced(self, test: str, function: Any) -> bool:
        """Return True if the function of a test is not the one that was remembered."""
        plain = getattr(function, "__func__", function)
        kept = self._kept.get(test)
        return kept is not None and (
            plain is not kept[0] or getattr(plain, "__code__", None) is not kept[1]
        )

    def differs(self, path: str, module: Any, owner: type | None, test: str) -> bool:
        """Return True if functions of a loaded test module are not those of its file.

        owner: the class whose test runs, which need not be the module's attribute. test: name of
        the test's function. Other tests are checked when they run.
        """
        for name, codes in self._used(path, test):
            *classes, last = name.split(".")
            holder = owner if owner and classes == owner.__qualname__.split(".") else module
            for part in classes if holder is module else ():
                holder = vars(holder).get(part) if holder is not None else None
            found = vars(holder).get(last) if holder is not None else None
            if not isinstance(found, types.FunctionType) or found.__code__ not in codes:
                return True
        return False

    def _used(self, path: str, test: str) -> Iterator[tuple[str, list[types.CodeType]]]:
        yield from self._helpers.get(path, ())
        yield from self._tests.get((path, test), ())

    def module_path(self, name: str) -> str:
        """Return the test file of a module's name, or of a dotted name inside it; else empty."""
        for path in self._helpers:
            module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            for known in (module, module.removeprefix("src.")):
                if name == known or name.startswith(f"{known}."):
                    return path
        return ""


def case_is_tampered(test: unittest.TestCase, codes: TestCode) -> bool:
    """Return True if a test case does not run what its file says."""
    kind, name = type(test), test._testMethodName
    # An attribute of the instance would be called instead of the method.
    shadows = vars(test).keys() & {name, *_ASSERTIONS}
    path = codes.module_path(test.id())
    return (
        bool(shadows)
        or codes.overrides(kind)
        or codes.is_replaced(test.id(), inspect.getattr_static(kind, name, None))
        or codes.differs(path, sys.modules.get(kind.__module__), kind, name)
    )


def _codes(path: str, with_pytest: bool) -> Codes:
    """Return the possible code of each function that has no decorator and one definition."""
    with open(path, "rb") as file:
        source = file.read()
    found: dict[str, list[types.CodeType]] = {}
    try:
        plain = set(_plain_functions(ast.parse(source)))
        for tree in _trees(source, path, with_pytest):
            for code in _nested(compile(tree, path, "exec", dont_inherit=True)):
                if code.co_qualname in plain:
                    found.setdefault(code.co_qualname, []).append(code)
    except (SyntaxError, ValueError, RecursionError):
        return {}  # the test itself fails
    return found


def _trees(source: bytes, path: str, with_pytest: bool) -> Iterator[ast.Module]:
    yield ast.parse(source)
    if not with_pytest:
        return
    from _pytest.assertion.rewrite import rewrite_asserts

    for hook in (False, True):
        tree = ast.parse(source)
        config: Any = types.SimpleNamespace(getini=lambda name, hook=hook: hook)
        rewrite_asserts(tree, source, path, config)
        yield tree


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _nested(constant)


def _plain_functions(scope: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[str]:
    """Yield the qualified names of functions that nothing else in their scope can replace."""
    stored = Counter(
        node.id
        for statement in scope.body
        if not isinstance(statement, (_Definition, ast.ClassDef))
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)
    )
    defined = [s for s in scope.body if isinstance(s, (_Definition, ast.ClassDef))]
    bound = stored + Counter(s.name for s in defined)
    for statement in defined:
        if statement.decorator_list or bound[statement.name] > 1:
            continue
        name = prefix + statement.name
        if isinstance(statement, _Definition):
            yield name
        elif not statement.keywords:
            yield from _plain_functions(statement, f"{name}.")
