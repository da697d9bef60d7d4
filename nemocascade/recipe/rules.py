"""Rules of numeric settings: each is in its field's annotation, and one walk checks all."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, get_args, get_type_hints


@dataclass(frozen=True)
class Range:
    """Legal values of a numeric field, from `low` to `high`. open_low, open_high: without them."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def problem(self, value: float) -> str:
        """The rule that the value breaks; empty if it breaks none."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        if above and below:
            return ""
        if self.high == math.inf:
            return f"must be {'above' if self.open_low else 'at least'} {self.low:g}"
        if not (self.open_low or self.open_high):
            return f"must be in {_plain(self.low)}..{_plain(self.high)}"
        left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"must be in {left}{_plain(self.low)}, {_plain(self.high)}{right}"


LARGEST = 2**63 - 1
"""Largest whole number of a setting."""
Natural = Annotated[int, Range(0)]
Count = Annotated[int, Range(1)]
Tokens = Annotated[int, Range(1, 2**31 - 1)]
"""A number of tokens in one sequence: positions are stored as int32."""
Seed = Annotated[int, Range(0, 2**32 - 1)]
Port = Annotated[int, Range(0, 2**16 - 1)]
Positive = Annotated[float, Range(0, open_low=True)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
Probability = Annotated[float, Range(0, 1, open_low=True)]
Decay = Annotated[float, Range(0, 1, open_high=True)]
LearningRate = Annotated[float, Range(0, 100)]
Seconds = Annotated[float, Range(0, 30 * 86_400, open_low=True)]
"""A timeout: at most 30 days, which every clock and socket can count."""


def number_problems(settings: Any, name: str = "") -> list[str]:
    """Every number in a tree of settings that is not finite or breaks its field's rule.

    name: prefix of the settings, such as `engine`.
    """
    return [f"{path}({value}) {problem}" for path, value, problem in _broken(settings, name)]


def numeric_fields(kind: type) -> dict[str, Range | None]:
    """Rule of every numeric field of a settings class; None for a field without one."""
    return _numeric_fields(kind)


@functools.cache
def _numeric_fields(kind: type) -> dict[str, Range | None]:
    found: dict[str, Range | None] = {}
    for name, hint in hints_of(kind).items():
        rules = [rule for rule in getattr(hint, "__metadata__", ()) if isinstance(rule, Range)]
        if rules or hint in (int, float, float | None, int | None):
            found[name] = rules[0] if rules else None
    return found


@functools.cache
def hints_of(kind: type) -> dict[str, Any]:
    """Type of every field of a settings class, with its annotations."""
    parameters = {p.__name__: p for p in getattr(kind, "__type_params__", ())}
    return get_type_hints(kind, localns=parameters, include_extras=True)


def _broken(value: Any, path: str) -> Iterator[tuple[str, Any, str]]:
    """Path, value and broken rule of every number in a value, at any depth."""
    if is_dataclass(value) and not isinstance(value, type):
        for name, rule, kind in _ruled_fields(type(value)):
            inner = getattr(value, name)
            # Most numbers of a search over layouts: nothing inside of them is checked.
            is_plain = type(inner) is int and kind is int and abs(inner) <= LARGEST
            if is_plain and rule is not None and not rule.problem(inner):
                continue
            here = f"{path}.{name}" if path else name
            found = list(_broken(inner, here))
            if not found and rule is not None:
                problem = _problem(rule, kind, inner)
                found = [(here, inner, problem)] if problem else []
            yield from found
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _broken(inner, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _broken(inner, f"{path}.{number}")
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, value, "must be a finite number"
    elif isinstance(value, int) and abs(value) > LARGEST:
        yield path, value, "must fit in 64 bits"


@functools.cache
def _ruled_fields(kind: type) -> list[tuple[str, Range | None, Any]]:
    """Name, rule and number type of every field of a settings class."""
    rules, hints = numeric_fields(kind), hints_of(kind)
    return [
        (f.name, rule, get_args(hints[f.name])[0] if rule else None)
        for f in fields(kind)
        for rule in [rules.get(f.name)]
    ]


def _problem(rule: Range, kind: Any, value: Any) -> str:
    if kind is int and (isinstance(value, bool) or not isinstance(value, int)):
        return "must be a whole number"
    if not isinstance(value, kind | int):
        return "must be a number"
    return "" if value is None else rule.problem(value)


def _plain(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)
