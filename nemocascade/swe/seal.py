"""Removes the expected values from tests, so that the code under test cannot know them.

`self.assertEqual(f(2), 4)` is rewritten to report the value of f(2); 4 stays outside of the
sandbox. A value that claims to be equal to everything, a replaced assertion or a forged report then
gain nothing: only the right value passes.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemocascade.swe.runner import VALUE, show

_EQUAL = ("assertEqual", "assertEquals", "assertListEqual", "assertDictEqual", "assertTupleEqual")
_TRUTH = {"assertTrue": True, "assertFalse": False}
_TRUTH_OPERANDS, _EQUAL_OPERANDS = 1, 2


@dataclass
class Sealed:
    """A test file without the literals that it compares with.

    source: text of the file that enters the sandbox.
    expected: the literal as text of `runner.show`, by number of the comparison.
    required: numbers of the comparisons that a test must reach, by `Class.method` or by
        function.
    """

    source: str
    expected: dict[int, str] = field(default_factory=dict)
    required: dict[str, tuple[int, ...]] = field(default_factory=dict)


def seal(source: str | bytes, *, first: int = 0) -> Sealed:
    """Seal equality comparisons with a literal, and truth assertions; others are unchanged.

    first: number of the file's first comparison. Raises SyntaxError or ValueError for a file that
    is not Python.
    """
    tree = ast.parse(source)
    sealer = _Sealer(first)
    tree = ast.fix_missing_locations(sealer.visit(tree))
    required = {}
    for name, function in _tests(tree):
        early = any(isinstance(node, ast.Return) for node in ast.walk(function))
        keys = [k for statement in function.body if (k := _key(statement)) is not None]
        required[name] = () if early else tuple(keys)
    return Sealed(ast.unparse(tree), sealer.expected, required)


def _tests(tree: ast.Module) -> list[tuple[str, ast.FunctionDef]]:
    found = [(node.name, node) for node in tree.body if isinstance(node, ast.FunctionDef)]
    for owner in tree.body:
        if isinstance(owner, ast.ClassDef):
            methods = (node for node in owner.body if isinstance(node, ast.FunctionDef))
            found += [(f"{owner.name}.{node.name}", node) for node in methods]
    return [(name, node) for name, node in found if node.name.startswith("test")]


def _key(statement: ast.stmt) -> int | None:
    """Return the number of a sealed comparison; None for other statements."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        call = statement.value
        if isinstance(call.func, ast.Name) and call.func.id == VALUE:
            return int(ast.literal_eval(call.args[0]))
    return None


class _Sealer(ast.NodeTransformer):
    def __init__(self, first: int) -> None:
        self._next = first
        self.expected: dict[int, str] = {}

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        found = self._assertion(node.value)
        return node if found is None else self._value(*found)

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        test = node.test
        if isinstance(test, ast.Compare) and [type(op) for op in test.ops] == [ast.Eq]:
            found = _against_literal([test.left, test.comparators[0]])
            if found is not None:
                return self._value(*found)
        return node

    def _assertion(self, call: ast.expr) -> tuple[ast.expr, Any] | None:
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            return None
        owner, name = call.func.value, call.func.attr
        if not isinstance(owner, ast.Name) or owner.id != "self":
            return None
        if name in _EQUAL and len(call.args) >= _EQUAL_OPERANDS:
            return _against_literal(call.args[:_EQUAL_OPERANDS])
        if name in _TRUTH and len(call.args) >= _TRUTH_OPERANDS:
            inverse = ast.UnaryOp(ast.Not(), call.args[0])
            return ast.UnaryOp(ast.Not(), inverse), _TRUTH[name]
        return None

    def _value(self, value: ast.expr, literal: Any) -> ast.stmt:
        key, self._next = self._next, self._next + 1
        self.expected[key] = show(literal)
        call = ast.Call(ast.Name(VALUE, ast.Load()), [ast.Constant(key), value], [])
        return ast.Expr(call)


def _against_literal(operands: list[ast.expr]) -> tuple[ast.expr, Any] | None:
    """Return the computed operand and the other's value; None if neither is a literal."""
    for literal, value in (operands[::-1], operands):
        try:
            return value, ast.literal_eval(literal)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
    return None


def broken(expected: Mapping[int, str], required: tuple[int, ...], values: list[Any]) -> str:
    """Return what is wrong with the values that a test reported; empty if nothing is."""
    seen = set()
    for key, text in values:
        if expected.get(key) != text:
            return f"comparison {key} is wrong"
        seen.add(key)
    missing = sorted(set(required) - seen)
    return f"comparisons {missing} were never made" if missing else ""
