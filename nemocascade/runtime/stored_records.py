"""Records stored as JSON, read back as dataclasses: the type of every field is checked."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def record_of[T](kind: type[T], value: object) -> T:
    """Return a JSON value as the dataclass `kind`, with the dataclasses inside of it.

    Raises ValueError that names the first field which is missing, unknown or of another type.
    """
    made: T = _value(kind, value, kind.__name__)
    return made


def _value(hint: Any, value: object, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        (inner,) = (a for a in arguments if a is not NoneType)
        return _value(inner, value, where)
    if origin is Literal:
        if value in arguments:
            return value
    elif is_dataclass(hint):
        if isinstance(value, dict):
            return _record(hint, value, where)
    elif origin in (dict, Mapping):
        if isinstance(value, dict):
            return {k: _value(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    elif origin is tuple and arguments[1:] == (...,):
        if isinstance(value, list):
            return tuple(_value(arguments[0], v, f"{where}.{i}") for i, v in enumerate(value))
    elif origin is list:
        if isinstance(value, list):
            return [_value(arguments[0], v, f"{where}.{i}") for i, v in enumerate(value)]
    elif hint is float and isinstance(value, int) and abs(value) > sys.float_info.max:
        pass  # arithmetic would fail
    elif isinstance(value, bool) == (hint is bool) and isinstance(
        value, int | float if hint is float else hint
    ):
        return value
    raise ValueError(f"{where} cannot be {str(value)[:80]!r}")


def _record(kind: Any, value: dict[str, Any], where: str) -> Any:
    hints, known = get_type_hints(kind), {f.name: f for f in fields(kind)}
    needed = {
        f.name for f in known.values() if f.default is MISSING and f.default_factory is MISSING
    }
    if missing := sorted(needed - value.keys()):
        raise ValueError(f"{where} has no field {missing[0][:80]!r}")
    if unknown := sorted(value.keys() - known.keys()):
        raise ValueError(f"{where} has an unknown field {unknown[0][:80]!r}")
    return kind(**{k: _value(hints[k], v, f"{where}.{k}") for k, v in value.items()})
