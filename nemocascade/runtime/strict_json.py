"""Strict JSON of data rows: values that every later step can render, hash and write again.

Rows come from downloads. Rejected are values beyond RFC 8259 (NaN, Infinity), duplicate keys,
numbers beyond float64, half a surrogate pair, and nesting that would exhaust a recursive reader.
The same rules hold for JSON inside of text fields, such as a tool call's arguments.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NoReturn

from nemocascade.runtime.row_errors import RowError

MAX_DEPTH = 128
"""Deepest nesting of lists and objects, as in serde_json."""
_SHOWN = 80


def parse_json(text: str | bytes) -> Any:
    """Parse one JSON value. Raises RowError with the reason."""
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise RowError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    try:
        value = _DECODER.decode(text)
    except RowError:
        raise
    except ValueError as error:
        raise RowError(f"not JSON ({error})") from None
    except RecursionError:
        raise _too_deep() from None
    check_json(value)
    return value


def parse_field(text: str, what: str) -> Any:
    """Parse the JSON text of a field. Raises RowError that begins with `what`."""
    try:
        return parse_json(text)
    except RowError as error:
        raise RowError(f"{what}: {error}") from None


def check_json(value: Any) -> None:
    """Raise RowError unless a value of Python could have come from `parse_json`."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, str):
                _check_text(item)
            elif isinstance(item, dict):
                for key in item:
                    _check_text(key)
                inner += item.values()
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, float) and not math.isfinite(item):
                _reject(str(item))
            elif not isinstance(item, int | float | None):
                raise RowError(f"a value of type {type(item).__name__}, which JSON does not have")
        if not inner:
            return
        level = inner
    raise _too_deep()


def _too_deep() -> RowError:
    return RowError(f"JSON nested deeper than {MAX_DEPTH} levels")


def _check_text(text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = text[error.start]
            raise RowError(
                f"half a surrogate pair in a text ({half!r} is not a character)"
            ) from None


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RowError(f"the key {twice[:_SHOWN]!r} occurs twice in one object")
    return found


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise RowError(f"the number {text[:_SHOWN]} is beyond float64")
    return value


def _reject(name: str) -> NoReturn:
    raise RowError(f"the value {name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_number, parse_constant=_reject)
