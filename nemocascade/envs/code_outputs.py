"""Comparison of a program's outputs with the expected ones."""

from __future__ import annotations

import math
import re
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

TOLERANCE = 1e-6
"""Relative and absolute tolerance where the expected number is a float."""

Decimals = Literal["exact", "tolerance"]

_INTEGER = re.compile(r"[+-]?\d+")


def same_output(expected: str, got: str, decimals: Decimals = "tolerance") -> bool:
    """Return True if two outputs have the same words in the same lines, numbers by value."""
    ours, theirs = expected.strip().splitlines(), got.strip().splitlines()
    return len(ours) == len(theirs) and all(
        _same_line(a, b, decimals) for a, b in zip(ours, theirs, strict=True)
    )


def same_value(expected: Any, got: Any, decimals: Decimals = "tolerance") -> bool:
    """Return True if two JSON values are equal, as Python compares them: 1, 1.0 and true are.

    decimals: "tolerance" compares with an expected float by `TOLERANCE`.
    """
    if isinstance(expected, list) and isinstance(got, list):
        return len(expected) == len(got) and all(
            same_value(a, b, decimals) for a, b in zip(expected, got, strict=True)
        )
    if isinstance(expected, dict) and isinstance(got, dict):
        return expected.keys() == got.keys() and all(
            same_value(value, got[key], decimals) for key, value in expected.items()
        )
    if decimals == "tolerance" and isinstance(expected, float) and isinstance(got, int | float):
        return _close(expected, got)
    return bool(expected == got)


def _same_line(expected: str, got: str, decimals: Decimals) -> bool:
    ours, theirs = expected.split(), got.split()
    return len(ours) == len(theirs) and all(
        _same_word(a, b, decimals) for a, b in zip(ours, theirs, strict=True)
    )


def _same_word(expected: str, got: str, decimals: Decimals) -> bool:
    if expected == got:
        return True
    try:
        if Decimal(expected) == Decimal(got):
            return True
        is_float = decimals == "tolerance" and not _INTEGER.fullmatch(expected)
        return is_float and _close(float(expected), float(got))
    except (InvalidOperation, ValueError):
        return False


def _close(a: float, b: float) -> bool:
    try:
        return math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    except OverflowError:  # an integer too large for a float
        return False
